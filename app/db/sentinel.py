"""One connection beside each pool that looks at the database: is it up, how fast, how far has it written or replayed.

Health, readiness, lag and the operators' questions use it, so that none of them ever waits behind requests, and a full
pool does not look like a dead database. It looks every `monitor_interval_seconds`, and at once when asked.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import asyncpg

from app.db.connector import DRIVER_FAILURES, Connector, KeptAliveConnection
from app.db.pooler import STATEMENTS, WARNING, forgets_statements
from app.errors import DatabaseUnavailable, DatabaseUnreachable
from app.metrics import Metrics
from app.settings import Settings

logger = logging.getLogger(__name__)

# One round trip. The LSNs are bytes from the start of the WAL. A primary says how far it has written; a standby how
# far it has replayed, and the age in seconds of the last transaction that it replayed.
LOOK = """
SELECT in_recovery,
       CASE WHEN in_recovery THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END - '0/0'::pg_lsn AS lsn,
       CASE WHEN in_recovery
            THEN extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8 END AS replay_age,
       current_setting('transaction_read_only')::boolean AS read_only
FROM pg_is_in_recovery() AS in_recovery
"""


LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Look:
    """What one look saw. `at` is of time.monotonic(); `lsn` is in bytes; None where the database did not say."""

    at: float
    status: Literal["healthy", "timeout", "error", "unknown"]
    latency_seconds: float | None = None
    error: str | None = None
    in_recovery: bool | None = None
    lsn: int | None = None
    replay_age_seconds: float | None = None
    server: float | None = None


class Sentinel:
    """Looks at one database through a connection of its own."""

    def __init__(self, name: str, connector: Connector, settings: Settings, metrics: Metrics) -> None:
        self.name = name
        self.last = Look(at=time.monotonic(), status="unknown")
        # Bytes written or replayed at the last look that was answered: kept when the database goes away.
        self.lsn: int | None = None
        self.listeners: list[Callable[[Look], None]] = []
        self._misses = 0
        self._pooler_examined = False
        self._connector = connector
        self._settings = settings
        self._metrics = metrics
        self._connection: KeptAliveConnection | None = None
        self._look: asyncio.Task[Look] | None = None
        self._turn = asyncio.Lock()

    @property
    def healthy(self) -> bool:
        """Whether the database answers. One late answer is forgiven: this process may be the one that was late."""
        return self.last.status == "healthy" or (self.last.status == "timeout" and self._misses == 1)

    async def watch(self) -> None:
        """Look for ever, every `monitor_interval_seconds`."""
        while True:
            # Short, so that a database that hangs is found within a second.
            await self.look(timeout_seconds=min(LOOK_SECONDS, self._settings.health_timeout_seconds))
            await asyncio.sleep(self._settings.monitor_interval_seconds)

    async def look(self, *, timeout_seconds: float | None = None) -> Look:
        """Look now. Those who ask at the same time share one look. Never raises: the answer says what was wrong."""
        if self._look is None or self._look.done():
            seconds = self._settings.health_timeout_seconds if timeout_seconds is None else timeout_seconds
            self._look = asyncio.create_task(self._look_once(seconds))
        # Shielded: one who goes away does not take the look from the others.
        return await asyncio.shield(self._look)

    async def _look_once(self, seconds: float) -> Look:
        started = time.monotonic()
        try:
            rows = await self.ask(LOOK, timeout_seconds=seconds)
        except DatabaseUnavailable as error:
            late = time.monotonic() - started >= seconds or isinstance(error.__cause__, TimeoutError)
            found = Look(time.monotonic(), "timeout" if late else "error", error=str(error))
        else:
            found = self._seen(rows[0], started)
        if found.status != self.last.status:
            level = logging.INFO if found.status == "healthy" else logging.WARNING
            logger.log(level, "database is %s", found.status, extra={"database": self.name, "reason": found.error})
        self._misses = 0 if found.status == "healthy" else self._misses + 1
        self.last = found
        for listener in self.listeners:
            listener(found)
        if found.status == "healthy" and not self._pooler_examined:
            await self._examine_pooler(seconds)
        return found

    async def _examine_pooler(self, seconds: float) -> None:
        """Say once, at the start, that a pooler will break prepared statements; the answers say it too."""
        # Once only, whatever comes of it: a server that has no such view is no less healthy.
        self._pooler_examined = True
        with suppress(DatabaseUnavailable):
            (statements,) = await self.ask(STATEMENTS, timeout_seconds=seconds)
            if self._connection is not None and forgets_statements(self._connection, statements):
                logger.warning(WARNING, extra={"database": self.name})

    def _seen(self, row: asyncpg.Record, started: float) -> Look:
        now = time.monotonic()
        if row["read_only"] and self._connector.writable:
            # Demoted, or not promoted yet. The address may lead to another server by now: look there next time.
            self._hang_up()
            return Look(now, "error", now - started, "The server takes no writes.", row["in_recovery"])
        self.lsn = lsn = None if row["lsn"] is None else int(row["lsn"])
        server = None if self._connection is None else self._connection.server
        return Look(now, "healthy", now - started, None, row["in_recovery"], lsn, row["replay_age"], server)

    async def ask(self, sql: str, *arguments: Any, timeout_seconds: float) -> Sequence[asyncpg.Record]:
        """Ask one question on the connection beside the pool.

        Raises: DatabaseUnavailable when there is no answer within `timeout_seconds`; the connection is then replaced.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        async with self._turn:
            try:
                if self._connection is None or self._connection.is_closed():
                    self._connection = await self._connector.open(deadline)
                # At the deadline the socket is torn down: no cancel request goes to a server that hangs.
                timer = loop.call_at(deadline, self._connection.cut)
                try:
                    return await self._connection.fetch(sql, *arguments)
                finally:
                    timer.cancel()
            except DRIVER_FAILURES as error:
                self._hang_up()
                message = "no answer in time" if loop.time() >= deadline else str(error) or type(error).__name__
                raise DatabaseUnreachable(f"The database cannot be reached: {message}.") from error

    async def close(self) -> None:
        """Look no more, and give the connection up."""
        if self._look is not None:
            # It may be connecting right now, and would leave a session behind.
            self._look.cancel()
            await asyncio.gather(self._look, return_exceptions=True)
        self._hang_up()
        await self._connector.close()

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()
