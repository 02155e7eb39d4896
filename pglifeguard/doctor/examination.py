"""Asking one database: one connection, one question after the other, each with a bound.

A question that the server or the role has no answer for is skipped. A server that stops answering is not asked on, so
that it costs one bound and hides nothing about the others.
"""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import asyncpg

from pglifeguard.connector import Connector, KeptAliveConnection
from pglifeguard.doctor import questions
from pglifeguard.doctor.facts import WRITING, Facts, Target
from pglifeguard.driver_failures import DRIVER_FAILURES
from pglifeguard.errors import DatabaseUnavailable
from pglifeguard.pooler import startup_parameters
from pglifeguard.pooler_look import PoolerLook
from pglifeguard.server_position import UNKNOWN, Position, PositionQuery

T = TypeVar("T")
# An active transaction is long after five minutes; one that idles for one minute was forgotten.
LONG_SECONDS = 300.0
FORGOTTEN_SECONDS = 60.0
PREPARED_SECONDS = 600.0
TIMEOUTS = (
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "transaction_timeout",
)


class Interview:
    """Asks questions on an open connection, each for `seconds` at most."""

    def __init__(self, connection: KeptAliveConnection, seconds: float, unseen: list[str]) -> None:
        self.connection = connection
        self._seconds = seconds
        self._unseen = unseen

    async def ask(self, sql: str, *arguments: Any) -> Sequence[asyncpg.Record]:
        """Ask; raises what the driver raises, and TimeoutError when there was no answer in time."""
        return await self._in_time(self._fetch(sql, *arguments))

    async def command(self, command: str) -> None:
        """Have a console do something, by the simple protocol; raises as `ask`."""
        await self._in_time(self.connection.execute(command))

    async def rows(self, name: str, sql: str, *arguments: Any) -> list[dict[str, Any]] | None:
        """Return the rows of an answer; None for a question that the server or the role has no answer for.

        Raises: one of DRIVER_FAILURES when the connection is lost.
        """
        try:
            return [dict(row.items()) for row in await self.ask(sql, *arguments)]
        except asyncpg.PostgresError:
            # Any refusal: a missing view, column or right, and the role's own statement_timeout too.
            if self.connection.is_closed():
                raise
            self._unseen.append(name)
            return None

    async def row(self, name: str, sql: str, *arguments: Any) -> dict[str, Any]:
        """Return the first row of an answer, empty without one."""
        rows = await self.rows(name, sql, *arguments)
        return rows[0] if rows else {}

    async def position(self) -> Position:
        """Return the server's position, as far as it tells it; raises as `rows`."""
        try:
            return await PositionQuery().ask(self.ask)
        except asyncpg.PostgresError:
            if self.connection.is_closed():
                raise
            self._unseen.append("position")
            return UNKNOWN

    async def _in_time(self, answer: Awaitable[T]) -> T:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._seconds
        # At the deadline the socket is cut: asyncpg would send a cancel request to a server that hangs.
        timer = loop.call_at(deadline, self.connection.cut)
        try:
            return await answer
        except DRIVER_FAILURES as error:
            if loop.time() >= deadline:
                raise TimeoutError(f"no answer within {self._seconds:g} s") from error
            raise
        finally:
            timer.cancel()

    async def _fetch(self, sql: str, *arguments: Any) -> Sequence[asyncpg.Record]:
        if not self.connection.pooled:
            return await self.connection.fetch(sql, *arguments)
        # A transaction stays on one server connection, and a statement without a name is nobody else's.
        async with self.connection.transaction():
            prepared = await self.connection.prepare(sql, name="")
            return await prepared.fetch(*arguments)


async def examine(target: Target, *, seconds: float, turn: asyncio.Lock) -> Facts:
    """Log in to a database and ask it everything; never raises for a database that fails.

    The login has `seconds`, or DATABASE_WAKE_SECONDS where the database sleeps, and each question has `seconds`.
    """
    facts = Facts(target)
    # As the service does: of several hosts the primary is the one that takes writes.
    console = target.purpose == "console"
    look = None if console else _look(target)
    connector = Connector(target.settings, writable=target.purpose in WRITING, console=console, look=look)
    try:
        # Several looks at one pooler in step may each be given a server connection of their own, as in session mode.
        async with turn:
            started = time.perf_counter()
            deadline = asyncio.get_running_loop().time() + target.settings.seconds_of_a_job(seconds)
            connection = await connector.open(deadline, waking=target.settings.sleeps)
            facts.login_ms = (time.perf_counter() - started) * 1000
        try:
            facts.encryption, facts.pooled = connection.encryption, connection.pooled
            if look is not None and facts.pooled:
                facts.pooler = look.found
            interview = Interview(connection, seconds, facts.unseen)
            if console:
                await _ask_console(interview)
            else:
                await _ask_server(interview, facts)
        finally:
            connection.terminate()
    except DatabaseUnavailable as error:
        facts.failure = str(error)
        facts.refusal = None if look is None else look.refusal
    except DRIVER_FAILURES as error:
        facts.failure = f"It let the service in and stopped answering: {error or type(error).__name__}."
    finally:
        await connector.close()
    return facts


def _look(target: Target) -> PoolerLook | None:
    """Look at what stands in front as the service does; None where POOLER_CHECK is off."""
    settings = target.settings
    if not settings.pooler_check:
        return None
    return PoolerLook(
        target.variable,
        writable=target.purpose == "primary",
        parameters=startup_parameters(settings.parameters.server_settings),
        keeps_statements=settings.statement_cache_size > 0,
    )


async def _ask_console(interview: Interview) -> None:
    # PgBouncer takes no prepared statements on its console, so the answer cannot be read; it is one all the same.
    await interview.command("SHOW VERSION")


async def _ask_server(interview: Interview, facts: Facts) -> None:
    before = time.time()
    started = time.perf_counter()
    clock = await interview.row("clock", questions.ROUND_TRIP)
    facts.round_trip_ms = (time.perf_counter() - started) * 1000
    facts.clock_difference_seconds = _difference(clock.get("at"), before, time.time())
    facts.identity = await interview.row("identity", questions.IDENTITY)
    facts.position = await interview.position()
    await _ask_settings(interview, facts)
    facts.activity = await interview.row("activity", questions.ACTIVITY, LONG_SECONDS, FORGOTTEN_SECONDS)
    facts.collation_actual = (await interview.row("collation", questions.COLLATION)).get("actual")
    facts.slots = await interview.rows("slots", questions.SLOTS) or []
    if facts.role == "primary":
        facts.standbys = await interview.rows("standbys", questions.STANDBYS)
    facts.prepared = await interview.row("prepared_transactions", questions.PREPARED, PREPARED_SECONDS)
    facts.oldest = await interview.row("wraparound", questions.WRAPAROUND)
    facts.invalid_indexes = (await interview.row("indexes", questions.INVALID_INDEXES)).get("names") or []
    facts.unarchived = (await interview.row("archiver", questions.ARCHIVER)).get("failed")
    facts.may_create = (await interview.row("rights", questions.MAY_CREATE)).get("may_create")


async def _ask_settings(interview: Interview, facts: Facts) -> None:
    rows = await interview.rows("settings", questions.SETTINGS, list(questions.SETTING_NAMES)) or []
    facts.settings = {row["name"]: row["setting"] for row in rows}
    milliseconds = {name: facts.integer(name) for name in TIMEOUTS}
    facts.timeouts = {name: None if value is None else value / 1000 for name, value in milliseconds.items()}
    facts.pending_restart = (await interview.row("pending_restart", questions.PENDING)).get("names") or []


def _difference(there: datetime | None, before: float, after: float) -> float | None:
    """Return how far a clock is ahead of ours; 0.0 where the round trip alone explains it."""
    if there is None:
        return None
    at = there.astimezone(UTC).timestamp()
    return at - before if at < before else max(0.0, at - after)
