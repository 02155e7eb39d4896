"""Tokens ahead of all that the primary has written: forged ones, and those from before a failover or a restore.

No replica ever reaches such a token, so its reads would be the primary's for as long as the client sends it. Each write
of another instance is ahead too, until the next probe of the primary. So the primary is asked, on the connection of its
monitor, and one question answers for all tokens that came before it. A token that is still ahead then is not believed.

While such tokens come, a read with a token that is ahead waits for that question before it takes a connection. A flood
of them then costs the primary a question every `ROUND_SECONDS`, and no read.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from pglifeguard.monitor import PROBE_SECONDS, Monitor, Probe
from pglifeguard.server_position import Token

# Seconds between two questions to the primary: short for the reads that wait for one, and little work for the primary.
ROUND_SECONDS = 0.05
# Seconds after the last token that was not believed, for which reads with a token that is ahead wait for a question.
ALERT_SECONDS = 1.0
TOKENS_KEPT = 1000


class ForgedTokens:
    """Tells which tokens the primary cannot have given."""

    def __init__(self, primary: Monitor, count: Callable[[], None]) -> None:
        self._primary = primary
        self._count = count
        # Tokens that the primary has not written: a client sends the same one again and again.
        self._refused: OrderedDict[Token, None] = OrderedDict()
        self._suspects: set[Token] = set()
        self._found_at = float("-inf")
        self._asked_at = float("-inf")
        # The question that the next tokens wait for, and all that are not answered yet.
        self._next: asyncio.Task[Probe] | None = None
        self._rounds: set[asyncio.Task[Probe]] = set()
        self._closed = False

    def is_ahead(self, token: Token) -> bool:
        """Whether a token is ahead of all that the primary is known to have written."""
        return token.is_ahead_of(self._primary.position)

    def believed(self, token: Token) -> Token | None:
        """Return a token, or None for one that was found to be ahead of all that the primary has written."""
        if token in self._refused and self.is_ahead(token):
            self._count()
            return None
        return token

    @property
    def alert(self) -> bool:
        """Whether such tokens came lately, so that one that is ahead is asked about before its read goes anywhere."""
        return time.monotonic() - self._found_at < ALERT_SECONDS

    def suspect(self, token: Token) -> None:
        """Ask the primary about a token that is ahead; nobody waits for that."""
        if not self._closed and self.is_ahead(token):
            self._ask(token)

    async def confirms(self, token: Token) -> bool:
        """Ask the primary about a token that is ahead; return whether it is believed.

        It is believed where the primary does not answer.
        """
        if self._closed:
            return True
        # The shield keeps the question for the other reads that wait for it when this one is cancelled.
        probe = await asyncio.shield(self._ask(token))
        if probe.status != "healthy" or not self.is_ahead(token):
            return True
        self._count()
        return False

    async def close(self) -> None:
        """Ask no more; returns when the last question is answered."""
        self._closed = True
        await asyncio.gather(*self._rounds)

    def _ask(self, token: Token) -> "asyncio.Task[Probe]":
        if len(self._suspects) < TOKENS_KEPT:
            self._suspects.add(token)
        if self._next is None:
            self._next = asyncio.create_task(self._round())
            self._rounds.add(self._next)
            self._next.add_done_callback(self._rounds.discard)
        return self._next

    async def _round(self) -> Probe:
        await asyncio.sleep(max(0.0, self._asked_at + ROUND_SECONDS - time.monotonic()))
        # Tokens that come from now on wait for the next round: the primary may have written them after its answer.
        self._next, suspects, self._suspects = None, self._suspects, set()
        self._asked_at = begun = time.monotonic()
        probe = await self._primary.probe(timeout_seconds=PROBE_SECONDS)
        if probe.status == "healthy" and probe.at - (probe.latency_seconds or 0.0) < begun:
            # That one had begun before.
            probe = await self._primary.probe(timeout_seconds=PROBE_SECONDS)
        if probe.status == "healthy":
            for token in filter(self.is_ahead, suspects):
                self._refused[token] = None
                self._found_at = probe.at
            while len(self._refused) > TOKENS_KEPT:
                self._refused.popitem(last=False)
        return probe
