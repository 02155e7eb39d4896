"""Finding the host that lets the service in: one search for all callers, with few and paced logins.

While a host is known to be good, all callers connect to it. When it fails, the first caller that notices starts a
search, and the others wait for its result, each until its own deadline. A search tries the hosts in the URL's order,
the last good one first. It does not wait for a silent host: it tries the next one beside it. The first login that
succeeds ends the search for all. When no host lets the service in, the callers get the reasons, and the next round
begins after a pause. So an outage costs a handful of logins a second, however many requests ask for a connection.

A login is not bound to the request that asked for it. It goes on when the request has ended, and serves the next one:
on a server that takes two seconds to log in, a deadline of half a second would never get a connection.

A caller may say that the database is asleep. A refusal is then no answer: the caller waits for further rounds, until
its deadline. And a login gets more time before its host counts as silent, so that one login wakes the database.
"""

import asyncio
import logging
import random
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, cast

from pglifeguard.database_url import Host
from pglifeguard.errors import DatabaseUnreachable, sqlstate
from pglifeguard.pooler import PoolerRefused

logger = logging.getLogger(__name__)

# A login may take this many times the seconds after which its host counts as silent.
LATE_FACTOR = 8
# The patience with an only host doubles at each silence, up to these seconds. A server that hundreds of instances find
# again at one moment is silent because of their logins. Tried anew each half second, all of these were given up and
# begun again, without an end. Of several hosts another one may be promoted, so they are asked as often as before.
LONGEST_PATIENCE_SECONDS = 2.0
# The next host is tried beside a silent one after STAGGER_SHARE of its patience, and after STAGGER_SECONDS at most.
STAGGER_SECONDS = 0.25
STAGGER_SHARE = 0.2
# Pauses between two rounds in which no host let us in, in seconds for each host: they double from the first to the
# last, and half of each is left to chance. At most twenty logins a second, and ten once an outage lasts.
FIRST_PAUSE_SECONDS = 0.05
LAST_PAUSE_SECONDS = 0.2
# Seconds for which a connection is kept when no caller waits for it any more.
SPARE_SECONDS = 2.0
# SQLSTATE classes of refusals by a server that is awake: the user, the database or a parameter is wrong.
FINAL = ("22", "28", "3D", "42", "0A")


class Connection(Protocol):
    """A connection, as far as the search needs to know it."""

    def terminate(self) -> None:
        """Close it without waiting for an answer."""

    def is_closed(self) -> bool:
        """Say whether it is closed."""


C = TypeVar("C", bound=Connection)


@dataclass(slots=True, eq=False)
class _Attempt:
    """One login; `late` when its host counts as silent and the search no longer waits for it.

    `patience` is the seconds after which it does. With `waking` it may have to wake the host.
    """

    host: int
    patience: float
    started_at: float
    waking: bool
    late: bool = False
    task: asyncio.Task[None] = field(init=False)
    timer: asyncio.TimerHandle = field(init=False)


class HostSearch(Generic[C]):
    """Connects to the host that works; see above. All of it runs on one event loop."""

    def __init__(
        self,
        hosts: Sequence[Host],
        log_in: Callable[[Host, float], Awaitable[C]],
        *,
        expected: tuple[type[Exception], ...],
        patience_seconds: float,
        waits_for: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Search `hosts` by `log_in(host, seconds)`; `expected` are its failures that another host may not have.

        A host that has not answered after `patience_seconds` counts as silent; its login goes on for a while. An only
        host gets more at each silence, up to LONGEST_PATIENCE_SECONDS.
        `waits_for` says what else than the host a login waits for.
        """
        self.hosts = hosts
        self.login_seconds = patience_seconds * LATE_FACTOR
        self._log_in = log_in
        self._expected = expected
        self._patience = self._usual_patience = patience_seconds
        self._waits_for = waits_for
        # The host that let the service in, None during a search.
        self._good: int | None = None
        self._last_good = 0
        self._succeeded_at = float("-inf")
        # The callers, with the patience of a login for those that wake the database; None for the others.
        self._callers: OrderedDict[asyncio.Future[C], float | None] = OrderedDict()
        self._attempts: set[_Attempt] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._spares: dict[C, asyncio.TimerHandle] = {}
        # The round of a search: the hosts that are still to be tried, and the failures of the others.
        self._untried: list[int] | None = None
        self._failures: dict[int, Exception] = {}
        self._pause = 0.0
        self._next_round_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def connect(self, deadline: float, *, waking_seconds: float | None = None) -> C:
        """Return a connection to the good host by `deadline` (the event loop's time).

        With `waking_seconds` the database may be asleep: a host counts as silent after as many seconds, and a host that
        refuses is tried again until the deadline.

        Raises: DatabaseUnreachable, caused by what the hosts said; whatever else `log_in` raises, as it is.
        """
        loop = asyncio.get_running_loop()
        if deadline <= loop.time():
            raise DatabaseUnreachable("The database cannot be reached: no time was left.")
        while self._spares:
            spare, timer = self._spares.popitem()
            timer.cancel()
            if not spare.is_closed():
                return spare
        if self._failures and not self._attempts and self._next_round_at >= deadline:
            raise self._unreachable()
        caller: asyncio.Future[C] = loop.create_future()
        self._callers[caller] = waking_seconds
        ending = loop.call_at(deadline, self._expire, caller)
        self._advance()
        try:
            return await caller
        except asyncio.CancelledError:
            if caller.done() and not caller.cancelled() and caller.exception() is None:
                self._deliver(caller.result())
            raise
        finally:
            ending.cancel()
            self._callers.pop(caller, None)

    async def close(self) -> None:
        """Give up the logins that have not ended, and the connections that no caller took."""
        for caller in self._waiting():
            caller.set_exception(DatabaseUnreachable("The database cannot be reached: the service is shutting down."))
        self._end_round()
        for spare, timer in self._spares.items():
            timer.cancel()
            spare.terminate()
        self._spares.clear()
        for attempt in list(self._attempts):
            self._cancel(attempt)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # The search. `_advance` is called after each event, and starts the logins that are due.

    def _advance(self) -> None:
        waiting = len(self._waiting())
        pending = [attempt for attempt in self._attempts if not attempt.late]
        if self._good is None and self._untried is not None and not pending:
            # The hosts that were tried have failed, or were silent for too long.
            if self._untried and waiting:
                self._try_next()
            else:
                self._finish_round()
        elif not waiting:
            return
        elif self._good is not None:
            for _ in range(waiting - len(pending)):
                self._start(self._good)
        elif self._untried is None:
            self._begin_round(pending)
        elif self._untried and self._timer is None:
            self._try_next()

    def _begin_round(self, pending: list[_Attempt]) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < self._next_round_at:
            if self._timer is None:
                self._timer = loop.call_at(self._next_round_at, self._tick)
            return
        count = len(self.hosts)
        order = [(self._last_good + offset) % count for offset in range(count)]
        # Several callers connect to the good host at once: a login that goes on there may still succeed.
        self._untried = [host for host in order if all(attempt.host != host for attempt in pending)]
        self._failures.clear()
        if self._untried:
            self._try_next()

    def _try_next(self) -> None:
        untried = cast("list[int]", self._untried)
        self._start(untried.pop(0))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if untried:
            self._timer = asyncio.get_running_loop().call_later(
                min(STAGGER_SECONDS, self._patience * STAGGER_SHARE), self._tick
            )

    def _tick(self) -> None:
        """Go on after a pause, or beside a host that is silent."""
        self._timer = None
        if self._untried and self._waiting():
            self._try_next()
        else:
            self._advance()

    def _finish_round(self) -> None:
        """Tell the callers the reasons, unless a late login may still serve them; pause before the next round."""
        loop, count = asyncio.get_running_loop(), len(self.hosts)
        self._end_round()
        self._pause = min(max(2 * self._pause, FIRST_PAUSE_SECONDS * count), LAST_PAUSE_SECONDS * count)
        self._next_round_at = loop.time() + self._pause * random.uniform(0.5, 1.0)  # noqa: S311  # Not a secret.
        if not self._attempts:
            awake = any(_is_final(error) for error in self._failures.values())
            for caller in self._waiting():
                if awake or self._callers[caller] is None:
                    del self._callers[caller]
                    caller.set_exception(self._unreachable())
        self._advance()

    def _end_round(self) -> None:
        self._untried = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # One login.

    def _start(self, host: int) -> None:
        loop = asyncio.get_running_loop()
        # The most patient caller decides: a second login beside the first would not wake the database sooner.
        patience = max(self._patience, *(seconds or 0.0 for seconds in self._callers.values()))
        waking = any(seconds is not None for seconds in self._callers.values())
        attempt = _Attempt(host, patience, loop.time(), waking)
        self._attempts.add(attempt)
        attempt.timer = loop.call_later(patience, self._mark_silent, attempt)
        # A context of its own: in that of a request, the log lines of the login would carry the request's id.
        attempt.task = loop.create_task(self._try_host(attempt), context=Context())
        self._tasks.add(attempt.task)
        attempt.task.add_done_callback(self._tasks.discard)

    def _cancel(self, attempt: _Attempt) -> None:
        self._end(attempt)
        attempt.task.cancel()

    def _end(self, attempt: _Attempt) -> None:
        self._attempts.discard(attempt)
        attempt.timer.cancel()

    async def _try_host(self, attempt: _Attempt) -> None:
        try:
            connection = await self._log_in(self.hosts[attempt.host], attempt.patience * LATE_FACTOR)
        except Exception as error:  # noqa: BLE001  # The edge of a task; the callers are told.
            self._end(attempt)
            self._failed(attempt, error)
        else:
            self._end(attempt)
            self._succeeded(attempt, connection)

    def _succeeded(self, attempt: _Attempt, connection: C) -> None:
        if attempt.host != self._last_good:
            logger.warning("database host changed", extra={"host": str(self.hosts[attempt.host])})
        self._good = self._last_good = attempt.host
        self._succeeded_at = asyncio.get_running_loop().time()
        self._failures.clear()
        self._pause = self._next_round_at = 0.0
        self._patience = self._usual_patience
        self._end_round()
        # A login to another host that ends later must not move all callers away from the host that was found. One that
        # the sleeping host has left alone may end when nobody asks any more, and would keep the host awake.
        for other in list(self._attempts):
            if other.host != attempt.host or (other.late and other.waking):
                self._cancel(other)
        self._deliver(connection)
        self._advance()

    def _failed(self, attempt: _Attempt, error: Exception) -> None:
        self._failures[attempt.host] = error
        if not isinstance(error, self._expected):
            for caller in self._waiting():
                del self._callers[caller]
                caller.set_exception(error)
        if attempt.host == self._good and not attempt.late:
            self._good = None
        self._advance()

    def _mark_silent(self, attempt: _Attempt) -> None:
        """Mark a host as silent when no login succeeded there since this one began; else give it more time."""
        loop = asyncio.get_running_loop()
        if self._good == attempt.host and self._succeeded_at > attempt.started_at:
            # The host is slow, and more logins would make it slower.
            attempt.started_at = loop.time()
            attempt.timer = loop.call_later(attempt.patience, self._mark_silent, attempt)
            return
        attempt.late = True
        if len(self.hosts) == 1:
            self._patience = max(self._patience, min(2 * self._patience, LONGEST_PATIENCE_SECONDS))
        silence = f"{self.hosts[attempt.host]} has not let the service in within {attempt.patience:g} s"
        if (reason := self._waits_for()) is not None:
            silence = f"{silence}: {reason}"
        self._failures[attempt.host] = TimeoutError(silence)
        if self._good == attempt.host:
            self._good = None
        self._advance()

    # The callers.

    def _waiting(self) -> list[asyncio.Future[C]]:
        return [caller for caller in self._callers if not caller.done()]

    def _deliver(self, connection: C) -> None:
        """Give a connection to the caller that has waited longest; without one, keep it for SPARE_SECONDS."""
        for caller in self._waiting():
            del self._callers[caller]
            caller.set_result(connection)
            return
        loop = asyncio.get_running_loop()
        self._spares[connection] = loop.call_later(SPARE_SECONDS, self._drop, connection)

    def _drop(self, spare: C) -> None:
        del self._spares[spare]
        spare.terminate()

    def _expire(self, caller: asyncio.Future[C]) -> None:
        if not caller.done():
            del self._callers[caller]
            caller.set_exception(self._unreachable())

    def _unreachable(self) -> DatabaseUnreachable:
        said = list(self._failures.values())
        if not said:
            reason = self._waits_for()
            said = [TimeoutError(f"no host has let the service in in time{f': {reason}' if reason else ''}")]
        message = "; ".join(dict.fromkeys(str(error) or type(error).__name__ for error in said))
        failure = DatabaseUnreachable(f"The database cannot be reached: {message}.")
        failure.__cause__ = said[-1]
        return failure


def _is_final(error: Exception) -> bool:
    """Whether somebody who is awake has refused the login, or has another certificate than it should have."""
    if isinstance(error, PoolerRefused) or isinstance(error.__cause__, ssl.SSLCertVerificationError):
        return True
    return (sqlstate(error) or "").startswith(FINAL)
