"""Finding out at the first login what stands in front of a server: a pooler, in which mode, and what it loses.

The look asks a few questions on two connections, once, before a connection is used for anything else. A server that
answers itself is known by the login alone, which costs nothing. Nothing is left behind in a session of the pooler's.

A pooler shows itself by the process number: it gives its client one of its own, and each answer has the server's.
pgpool-II may give the server's; there the client's port, as the server sees it, is not the one of our socket.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, cast
from uuid import uuid4

import asyncpg

from pglifeguard.driver_failures import DRIVER_FAILURES
from pglifeguard.pooler import FORGETS, LOST, NONE, UNTOLD, Mode, Pooler, PoolerRefused
from pglifeguard.server_position import is_missing_feature
from pglifeguard.tracked_connection import TrackedConnection

logger = logging.getLogger(__name__)

# A look asks about thirty short questions, and of a pooler in session mode a dozen more; where each takes 50 ms, they
# take one second and a half.
LOOK_SECONDS = 3.0
# Looks that fail before the service goes on without a finding.
ATTEMPTS = 3
# Seconds after which a pooler that was refused is looked at again: it may have been set right.
AGAIN_SECONDS = 5.0
# Turns of two clients that are asked for their servers, one after the other and at the same time. In transaction mode
# one server connection then serves both, or one client two of them: the client that comes first takes the connection
# that was given back last. Asked one after the other only, two clients kept to two connections beside other looks.
TURNS = 8
# Seconds before two clients that shared no server connection take turns once more.
SECOND_LOOK_SECONDS = 0.05
# Read/write splitters send a query with a volatile function to the primary, and one without perhaps to a replica.
SERVED = "SELECT pg_backend_pid() AS process, extract(epoch FROM pg_postmaster_start_time())::float8 AS server"
SERVED_WRITABLE = f"{SERVED}, clock_timestamp() AS now"
# PgBouncer's words when it closes a connection that has begun a transaction in statement mode.
STATEMENTS_ONLY = "statement pooling"
STATEMENTS = "SELECT ARRAY(SELECT name FROM pg_prepared_statements)"
# A pooler that passes a start-up parameter on has the server take it from its client, or sets it in the session.
NOT_IN_FORCE = """
SELECT asked FROM unnest($1::text[]) AS asked LEFT JOIN pg_settings ON lower(name) = lower(asked)
WHERE CASE WHEN name IS NULL THEN current_setting(asked, true) IS NULL ELSE source NOT IN ('client', 'session') END
"""
LogIn = Callable[[], Awaitable[Any]]


class PoolerLook:
    """The look at what one URL leads to, and its finding. Keep one for each pool: all its logins pass `admit`."""

    def __init__(self, database: str, *, writable: bool, parameters: list[str], keeps_statements: bool) -> None:
        """Look for a database; `parameters` are those of its start-up, `keeps_statements` whether the service does.

        With `writable`, all its statements have to reach one server. Reads may go to one replica after the other.
        """
        self.database = database
        self.found = Pooler()
        # Why connections are refused, as the end of a sentence about the URL.
        self.refusal: str | None = None
        self._writable = writable
        self._parameters = parameters
        self._wanted = keeps_statements
        self._done = False
        self._failures = 0
        self._look_again_at = float("inf")
        # One looks, and the others wait for the finding.
        self._turn = asyncio.Lock()

    @property
    def keeps_statements(self) -> bool:
        """Whether connections may keep prepared statements."""
        return self._wanted and self.found.keeps_statements is not False

    async def wait(self) -> None:
        """Wait for a look that is under way, for LOOK_SECONDS at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS), self._turn:
                pass

    def refuse(self, refusal: str | None) -> None:
        """Refuse connections, for a reason that is the end of a sentence about the URL; None lets them pass."""
        if refusal is not None and refusal != self.refusal:
            logger.error("pooler refused", extra={"database": self.database, "reason": refusal})
        self.refusal = refusal
        self._look_again_at = asyncio.get_running_loop().time() + AGAIN_SECONDS

    async def admit(self, connection: TrackedConnection, log_in: LogIn, *, direct: bool, server: float | None) -> None:
        """Let a new connection pass when what it leads to is known, and may be used.

        `direct` says that the server itself answered, and `server` which one did. `log_in` opens another connection.

        Raises: PoolerRefused; and one of DRIVER_FAILURES when the connection is lost.
        """
        if self.refusal is not None and asyncio.get_running_loop().time() >= self._look_again_at:
            self._done = False
        if not self._done and direct:
            self._conclude(NONE)
        async with self._turn:
            if not self._done:
                await self._look(connection, log_in)
        if self.refusal is None and not direct and server is not None and self.found.mode == "session":
            # pgpool-II chooses a replica for each session, so one look may meet none. And it does not show itself where
            # it gives a client an old connection to the server.
            await self._check_session(connection, server)
        if self.refusal is not None:
            raise PoolerRefused(self.refusal)
        connection.pooled = connection.pooled or self.found.present is True

    async def _look(self, connection: TrackedConnection, log_in: LogIn) -> None:
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                found = await self._examine(connection, log_in)
        except DRIVER_FAILURES as error:
            self._failures += 1
            lacks = is_missing_feature(error)
            if lacks or self._failures == ATTEMPTS:
                logger.warning(UNTOLD, extra={"database": self.database, "reason": str(error) or type(error).__name__})
                self._conclude(Pooler(present=True if connection.pooled else None))
            if not lacks:
                # This login has lost its connection; the next one looks again.
                raise
        else:
            self._conclude(found)

    async def _examine(self, connection: TrackedConnection, log_in: LogIn) -> Pooler:
        if (await _ask(connection, SERVED_WRITABLE))[
            "process"
        ] == connection.get_server_pid() and not connection.pooled:
            return NONE  # What stands in between rewrites addresses, as a balancer does.
        other = cast("TrackedConnection", await log_in())
        try:
            return await self._compare(connection, other)
        finally:
            other.terminate()

    async def _compare(self, *clients: TrackedConnection) -> Pooler:
        """Ask two clients of a pooler by turns, outside of a transaction and in one."""
        seen: list[set[tuple[float, int]]] = [set(), set()]
        await _take_turns(clients, seen)
        if not _is_shared(seen):
            # While another pool looks at the same moment, the two may keep to one server connection each.
            await asyncio.sleep(SECOND_LOOK_SECONDS)
            await _take_turns(clients, seen)
        shared = _is_shared(seen)
        splits = self._writable and any(len({server for server, _ in servers}) > 1 for servers in seen)
        lost = await _lost(clients[0], self._parameters)
        mode: Mode = "transaction" if shared else "session"
        for client in clients:
            try:
                await client.control("BEGIN READ ONLY;")
                inside = {_served(await _ask(client, query)) for query in (SERVED, SERVED_WRITABLE)}
            except asyncpg.PostgresError as error:
                return _only_statements(error)
            spread = len(inside) > len({server for server, _ in inside})
            mode = "statement" if spread or not client.is_in_transaction() else mode
            splits = splits or len(inside) > 1
            await client.control("ROLLBACK;")
        # On the second client, which is closed afterwards: Amazon's proxy pins a client that sends DEALLOCATE.
        handed_on = await _hands_on(clients[-1])
        keeps = None if handed_on is None else not handed_on or not shared
        return Pooler(True, mode, keeps, splits, tuple(lost))

    async def _check_session(self, connection: TrackedConnection, server: float) -> None:
        async with asyncio.timeout(LOOK_SECONDS):
            writing = await _ask(connection, SERVED_WRITABLE)
        if writing["server"] != server:
            self._conclude(Pooler(present=True, mode="session", splits=True))

    def _conclude(self, found: Pooler) -> None:
        self._done, self.found = True, found
        if found.present:
            logger.info("pooler found", extra={"database": self.database, "pooler": str(found)})
        if found.lost:
            logger.warning(LOST, extra={"database": self.database, "parameters": ", ".join(found.lost)})
        if self._wanted and found.keeps_statements is False:
            logger.warning(FORGETS, extra={"database": self.database})
        self.refuse(found.refusal)


async def _take_turns(clients: Sequence[TrackedConnection], seen: Sequence[set[tuple[float, int]]]) -> None:
    """Ask the clients for their servers, one after the other and at the same time; add them to what was `seen`."""
    for turn in range(TURNS):
        query = SERVED_WRITABLE if turn // 2 % 2 else SERVED
        if turn % 2:
            answers = list(await asyncio.gather(*(_ask(client, query) for client in clients)))
        else:
            answers = [await _ask(client, query) for client in clients]
        for servers, answer in zip(seen, answers, strict=True):
            servers.add(_served(answer))


def _is_shared(seen: Sequence[set[tuple[float, int]]]) -> bool:
    """Whether one server connection served both clients, or one client was served by two."""
    return bool(seen[0] & seen[1]) or any(len(servers) > 1 for servers in seen)


async def _ask(connection: TrackedConnection, sql: str) -> asyncpg.Record:
    """Ask by a statement without a name, which no pooler can mistake for another client's."""
    prepared = await connection.prepare(sql, name="")
    return cast("asyncpg.Record", await prepared.fetchrow())


def _served(answer: asyncpg.Record) -> tuple[float, int]:
    """Return which server, and which process of it, has answered."""
    return answer["server"], answer["process"]


def _only_statements(error: asyncpg.PostgresError) -> Pooler:
    """Return what a pooler is that refuses BEGIN in these words. Raises: any other error as it is."""
    if STATEMENTS_ONLY in str(error):
        return Pooler(present=True, mode="statement")
    raise error


async def _lost(connection: TrackedConnection, parameters: list[str]) -> list[str]:
    if not parameters:
        return []
    prepared = await connection.prepare(NOT_IN_FORCE, name="")
    return [row["asked"] for row in await prepared.fetch(parameters)]


async def _hands_on(connection: TrackedConnection) -> bool | None:
    """Say whether the server knows a statement by the name that its client gave it; None when it lists none.

    A pooler that keeps the statements of its clients gives them names of its own. Asked in a transaction, so that the
    statement can be removed from the session that it was made in.
    """
    name = f"lifeguard_{uuid4().hex}"
    await connection.control("BEGIN READ ONLY;")
    prepared = await connection.prepare(STATEMENTS, name=name)
    names: list[str] = await prepared.fetchval()
    if name in names:
        await connection.control(f"DEALLOCATE {name};")
    await connection.control("ROLLBACK;")
    return name in names if names else None
