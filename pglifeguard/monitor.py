"""One connection beside each pool that probes the database: is it up, how fast, how far has it written or replayed.

Health, readiness, lag and the queries of operators use it. So none of them waits behind requests, and a full pool is
not mistaken for a dead database. The monitor probes every `monitor_interval_seconds`, and at once when it is asked to.

A database that sleeps when nobody asks is watched only while requests use it: see `let_sleep`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol

import asyncpg

from pglifeguard.connector import Connector, KeptAliveConnection
from pglifeguard.driver_failures import DRIVER_FAILURES
from pglifeguard.errors import DatabaseUnavailable, DatabaseUnreachable
from pglifeguard.fence import Fence
from pglifeguard.metrics import Metrics
from pglifeguard.server_position import UNKNOWN, Position, PositionQuery, is_missing_feature
from pglifeguard.settings import DatabasesSettings

logger = logging.getLogger(__name__)

PROBE_SECONDS = 0.5
# A commit that waits for longer than this is a stall; a slow network or disk takes less.
STALLED_SECONDS = 1.0


class Probe(NamedTuple):
    """The result of one probe. `at` is of time.monotonic(); `position` is what the server said of itself.

    "asleep" is no answer: nobody uses the database, so that it may sleep, and it was not asked. `server` is the one
    that the monitor's connection was opened to: see `KeptAliveConnection`.
    """

    at: float
    status: Literal["healthy", "timeout", "error", "unknown", "asleep"]
    latency_seconds: float | None = None
    error: str | None = None
    position: Position = UNKNOWN
    server: float | None = None


class SleepingPool(Protocol):
    """The pool of a database that sleeps, as far as the monitor needs to know it."""

    @property
    def asked(self) -> bool:
        """Whether requests use the database, did lately, or failed to reach it lately."""

    def let_sleep(self) -> bool:
        """Close the idle connections, unless requests use the database or failed to; return whether nobody does."""


class Monitor:
    """Probes one database through a connection of its own."""

    def __init__(
        self,
        name: str,
        connector: Connector,
        settings: DatabasesSettings,
        metrics: Metrics,
        fence: Fence | None = None,
    ) -> None:
        self.name = name
        self.last = Probe(at=time.monotonic(), status="unknown")
        # The position of the last probe that was answered; it is kept when the database goes away.
        self.position = UNKNOWN
        self.listeners: list[Callable[[Probe], None]] = []
        # Whether it has been healthy since the start of the process.
        self.was_healthy = False
        self._misses = 0
        self._connector = connector
        self._settings = settings
        self._metrics = metrics
        self._connection: KeptAliveConnection | None = None
        self._position_query = PositionQuery()
        self._missing: frozenset[str] = frozenset()
        self._probe: asyncio.Task[Probe] | None = None
        self._turn = asyncio.Lock()
        self._pool: SleepingPool | None = None
        self._fence = fence

    @property
    def healthy(self) -> bool:
        """Whether the database answers. One late answer does not count: this process may have been the late one."""
        return self.last.status == "healthy" or (self.last.status == "timeout" and self._misses == 1)

    @property
    def misses(self) -> int:
        """How many of the last probes in a row were no good. After each of them the next one connects anew."""
        return self._misses

    @property
    def granted(self) -> int | None:
        """Connections that the server has for ordinary roles; None when unknown, and behind a pooler."""
        direct = self._connection is not None and not self._connection.pooled
        return self.position.granted if direct else None

    @property
    def address(self) -> object:
        """This end of its connection, None where there is none: who counts round trips leaves them out by it."""
        return None if self._connection is None else self._connection.transport.get_extra_info("sockname")

    @property
    def asleep(self) -> bool:
        """Whether nothing is asked, because nobody uses the database: it may sleep, and may be down."""
        return self.last.status == "asleep"

    @property
    def lacks_lsn(self) -> bool:
        """Whether the server was asked for its LSN and has no such function, or refuses it to this role."""
        return "lsn" in self._position_query.missing

    @property
    def position_sql(self) -> str:
        """The SQL of a probe, for other connections to the same server: see `read_position`."""
        return self._position_query.sql

    @property
    def waiting_sql(self) -> str:
        """The same, answered once the server has replayed an LSN: see `PositionQuery.waiting_sql`."""
        return self._position_query.waiting_sql

    @property
    def stalled(self) -> bool:
        """Whether commits have been waiting for longer than STALLED_SECONDS while the database answers."""
        return self.healthy and (self.position.stalled or 0.0) >= STALLED_SECONDS

    def let_sleep(self, pool: SleepingPool) -> None:
        """Ask nothing, and keep no connection, while nobody uses the database: a probe would keep it awake."""
        self._pool = pool
        self.last = self.last._replace(status="asleep")

    async def probe_forever(self) -> None:
        """Probe every `monitor_interval_seconds`, until the task is cancelled."""
        begun = time.monotonic()
        while True:
            # A short timeout, so that a database that hangs is found within a second.
            await self.probe(timeout_seconds=min(PROBE_SECONDS, self._settings.health_timeout_seconds))
            await asyncio.sleep(seconds_to_beat(time.monotonic() - begun, self._settings.monitor_interval_seconds))

    async def probe(self, *, timeout_seconds: float | None = None) -> Probe:
        """Probe now. Callers at the same time share one probe. Never raises: the result says what was wrong.

        A database that may sleep is not asked; the result is "asleep".
        """
        if self._pool is not None and not self._pool.asked and not self._turn.locked():
            self._fall_asleep()
            return self.last
        if self._probe is None or self._probe.done():
            seconds = self._settings.health_timeout_seconds if timeout_seconds is None else timeout_seconds
            self._probe = asyncio.create_task(self._probe_once(seconds))
        # The shield keeps the probe for the other callers when this one is cancelled.
        return await asyncio.shield(self._probe)

    async def _probe_once(self, seconds: float) -> Probe:
        started, stalled = time.monotonic(), self.stalled
        try:
            position = await self._position_query.ask(lambda sql: self.ask(sql, timeout_seconds=seconds))
        except DatabaseUnavailable as error:
            late = time.monotonic() - started >= seconds or isinstance(error.__cause__, TimeoutError)
            found = Probe(time.monotonic(), "timeout" if late else "error", error=str(error))
        else:
            self._log_missing()
            found = self._judge(position, started)
        if found.status != "healthy" and self._pool is not None and self._pool.let_sleep():
            # Nobody asks, and the server has ended the connections: it went to sleep by itself. Whether it is down, the
            # next request will tell.
            self._fall_asleep()
            return self.last
        self._tell(found, was_stalled=stalled)
        return found

    def _fall_asleep(self) -> None:
        self._disconnect()
        if not self.asleep:
            self._tell(Probe(time.monotonic(), "asleep"), was_stalled=False)

    def _tell(self, found: Probe, *, was_stalled: bool) -> None:
        """Log a change, keep what was found, and tell the listeners."""
        if found.status != self.last.status:
            level = logging.INFO if found.status in {"healthy", "asleep"} else logging.WARNING
            # A log without a format of its own shows the message alone.
            reason = "" if found.error is None else f": {found.error}"
            extra = {"database": self.name, "reason": found.error}
            said = (self.name, self._connector.where, found.status, reason)
            logger.log(level, "database %s at %s is %s%s", *said, extra=extra)
        self._misses = 0 if found.status == "healthy" else self._misses + 1
        self.last = found
        self.was_healthy = self.was_healthy or found.status == "healthy"
        if self._connector.writable:
            self._report_stall(before=was_stalled)
        for listener in self.listeners:
            listener(found)

    def _judge(self, position: Position, started: float) -> Probe:
        now = time.monotonic()
        if position.read_only and self._connector.writable:
            # The server was demoted, or is not promoted yet. The address may lead to another server by now, so the next
            # probe connects anew.
            self._disconnect()
            return Probe(now, "error", now - started, "The server takes no writes.", position)
        if self._fence is not None:
            if refusal := self._fence.refusal(position.system, position.timeline):
                self._disconnect()
                return Probe(now, "error", now - started, f"The server {refusal}.", position)
            self._fence.see(position.system, position.timeline, position.started)
        if position.is_same_server(self.position) and position.in_recovery and position.timeline is not None:
            # The WAL receiver may have reported a later timeline than the control file does, and have ended since.
            position = replace(position, timeline=max(position.timeline, self.position.timeline or 0))
        self.position = position
        server = None if self._connection is None else self._connection.server
        return Probe(now, "healthy", now - started, None, position, server)

    def _log_missing(self) -> None:
        """Log once which parts of its position the server does not report: some features are off without them."""
        missing, self._missing = self._missing, self._position_query.missing
        if self._missing - missing:
            logger.warning(
                "database does not tell all of its position",
                extra={"database": self.name, "missing": ", ".join(sorted(self._missing))},
            )

    def _report_stall(self, *, before: bool) -> None:
        """Report writes that hang: the database answers, so nothing else shows it."""
        if self.asleep:
            self._metrics.forget(self._metrics.write_stall_seconds, self.name)
            return
        seconds = self.position.stalled or 0.0
        self._metrics.write_stall_seconds.labels(self.name).set(seconds if self.stalled else 0.0)
        if self.stalled and not before:
            logger.warning("writes are stalled", extra={"database": self.name, "seconds": round(seconds, 1)})
        elif before and not self.stalled:
            logger.info("writes are stalled no more", extra={"database": self.name})

    async def ask(self, sql: str, *arguments: Any, timeout_seconds: float) -> Sequence[asyncpg.Record]:
        """Run one query on the connection beside the pool.

        Raises: DatabaseUnavailable when there is no answer within `timeout_seconds`; the connection is then replaced.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        async with self._turn:
            try:
                if self._connection is None or self._connection.is_closed():
                    # An operator's commands have no pool, and may wake the database.
                    waking = self._pool is None and self._connector.settings.sleeps
                    self._connection = await self._connector.open(deadline, waking=waking)
                    # It may lead to another server, and the role may have been granted rights meanwhile.
                    self._position_query.missing = frozenset()
                # At the deadline the socket is cut: asyncpg would send a cancel request to a server that hangs.
                timer = loop.call_at(deadline, self._connection.cut)
                try:
                    return await self._connection.fetch(sql, *arguments)
                finally:
                    timer.cancel()
            except DRIVER_FAILURES as error:
                if not is_missing_feature(error):
                    self._disconnect()
                message = "no answer in time" if loop.time() >= deadline else str(error) or type(error).__name__
                raise DatabaseUnreachable(f"The database cannot be reached: {message}.") from error

    async def renew(self, *, timeout_seconds: float) -> None:
        """Open a new connection and close the old one; do nothing while nobody uses a database that sleeps.

        Raises: DatabaseUnreachable when none can be opened; the old one is kept then.
        """
        if self._pool is not None and not self._pool.asked:
            return
        async with self._turn:
            connection = await self._connector.open_patiently(asyncio.get_running_loop().time() + timeout_seconds)
            self._disconnect()
            self._connection = connection

    async def close(self) -> None:
        """Stop probing, and close the connection."""
        if self._probe is not None:
            # The probe may be connecting right now, and would leave a session behind.
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        self._disconnect()
        await self._connector.close()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()


def seconds_to_beat(passed: float, interval: float) -> float:
    """Return the seconds until the next multiple of an interval, when so many have passed.

    Monitors that count so from one moment stay in step, whatever their servers take for an answer. Together they wake a
    process that sleeps once, which takes more CPU than a probe.
    """
    left = interval - passed % interval
    # An event loop counts milliseconds, and may wake it one too early.
    return left if left > interval / 10 else left + interval
