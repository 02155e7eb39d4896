"""The records of a pool: a connection and its checkouts, the figures of one instant, the open checkouts, the counters.

Times are in seconds. Nothing here waits or decides: `pool` fills the records in, metrics and operators read them.
`PoolWatch` counts what a pool does, under the names of `metrics.py`, and writes the pool's log lines.
"""

import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

from prometheus_client import Counter, Histogram

from pglifeguard.connector import KeptAliveConnection
from pglifeguard.metrics import Metrics
from pglifeguard.sampling import Sampler
from pglifeguard.telemetry import PoolTelemetry

logger = logging.getLogger(__name__)

# A statement is cut to this length in the log: enough to find it, too little to flood.
STATEMENT_CHARACTERS = 200

# How the wait for a connection ended; the metric's label.
WaitOutcome = Literal["granted", "refused", "cancelled"]

# The holder of connections that are acquired in this context: the route template of a request, or the name of a task.
holder: ContextVar[str] = ContextVar("holder", default="background")


@dataclass(slots=True, eq=False)
class Checkout:
    """The life of one open connection; times are of the pool's clock, in seconds.

    `queried` and `asked_at` are of `time.perf_counter`, by which statements are timed. `asked_at` is when the current
    statement was sent, None between two statements. A connection that waits for the database is not idle.
    """

    connection: KeptAliveConnection
    opened_at: float
    expires_at: float
    generation: int
    idle_since: float
    uses: int = 0
    holder: str = ""
    taken_at: float = 0.0
    queried: float = 0.0
    asked_at: float | None = None
    taken_in: str | None = None
    reported: bool = False
    # Whether it leads to a standby that had not replayed far enough for its holder. The pool hands it out last.
    behind: bool = False
    # When its login began.
    login_began_at: float = 0.0

    def begin_query(self) -> None:
        """Note that the connection waits for the server from now on."""
        self.asked_at = time.perf_counter()

    def end_query(self) -> float:
        """Count the time since `begin_query` as time at work, and return its seconds.

        Call it in a `finally`: `cut_unanswered` cuts a connection that seems to wait for ever.
        """
        if self.asked_at is None:
            # Two tasks used one session at the same time, and the one that asyncpg refused has ended first.
            return 0.0
        seconds = time.perf_counter() - self.asked_at
        self.queried += seconds
        self.asked_at = None
        return seconds

    def queried_seconds(self) -> float:
        """Seconds that this checkout spent on statements, the current one included."""
        return self.queried if self.asked_at is None else self.queried + time.perf_counter() - self.asked_at


class PoolFigures(NamedTuple):
    """One instant of a pool. `checked_out + connecting + available == total`, always.

    Only in a pool that was made smaller the sum is more, until what is beyond its size is released.

    `connecting` counts the requests within `total` whose connection was just granted, or is being probed or opened, and
    the logins that no request waits for any more. `waiting` counts the requests beyond `total`.
    """

    pool_size: int
    max_overflow: int
    total: int
    checked_out: int
    checked_in: int
    connecting: int
    overflow: int
    available: int
    waiting: int


class Holding(NamedTuple):
    """An open checkout: its holder, its duration, and how much of that was without a query.

    `pid` is the server's process that serves it; None when it is closed, and behind a pooler, where each transaction
    may have another one.
    """

    holder: str
    held_seconds: float
    idle_seconds: float
    taken_in: str | None = None
    pid: int | None = None


def holding_of(checkout: Checkout, now: float) -> Holding:
    """Describe an open checkout."""
    held = now - checkout.taken_at
    idle = max(0.0, held - checkout.queried_seconds())
    connection = checkout.connection
    pid = None if connection.pooled or connection.is_closed() else connection.get_server_pid()
    return Holding(checkout.holder, held, idle, checkout.taken_in, pid)


class PoolWatch:
    """Counts what one pool does. Looking a metric's labels up costs more than counting, so each is looked up once.

    `telemetry` is None where nothing is traced, and nothing is called for it then.
    """

    def __init__(  # noqa: PLR0913  # What it counts for, what it counts with, and from when it tells.
        self,
        metrics: Metrics,
        pool: str,
        sampler: Sampler,
        *,
        slow_query_seconds: float,
        idle_hold_seconds: float,
        telemetry: PoolTelemetry | None = None,
    ) -> None:
        self.pool = pool
        self.telemetry = telemetry
        # Holders that have kept a connection for too long: the line that takes their next ones is remembered. For all
        # holders that is too dear, and the first sight of such a holder is seldom its last.
        self.traced: set[str] = set()
        self._sampler = sampler
        self._slow_query_seconds = slow_query_seconds
        self._idle_hold_seconds = idle_hold_seconds
        self._acquire = metrics.acquire_seconds.labels(pool)
        self._wait = metrics.wait.labels(pool)
        self._metrics = metrics
        self._connect = metrics.connect_seconds.labels(pool)
        self._connect_failures = metrics.connect_failures.labels(pool)
        self._query = metrics.query_seconds.labels(pool)
        self._slow = metrics.slow_queries.labels(pool)
        # Routes are templates and a handful: the caches stay small.
        self._hold: Callable[[str], Histogram] = lru_cache(lambda route: metrics.hold_seconds.labels(pool, route))
        self._idle: Callable[[str], Histogram] = lru_cache(lambda route: metrics.idle_hold_seconds.labels(pool, route))
        self._waited: Callable[[str], Histogram] = lru_cache(lambda how: metrics.wait_seconds.labels(pool, how))
        self._cancelled: Callable[[str], Counter] = lru_cache(lambda why: metrics.cancelled.labels(pool, why))
        self._rejected: Callable[[str], Counter] = lru_cache(lambda why: metrics.rejected.labels(pool, why))
        self._replaced: Callable[[str], Counter] = lru_cache(lambda why: metrics.invalidations.labels(pool, why))
        for reason in ("queue_full", "overload", "timeout", "closing"):
            # A rate needs a zero to start from: without it the first refusal would not show.
            self._rejected(reason)
        for reason in ("client_left", "cancelled"):
            self._cancelled(reason)
        for outcome in get_args(WaitOutcome):
            self._waited(outcome)

    def acquired(self, seconds: float, holder: str) -> None:
        """Count a checkout and the seconds that it took."""
        self._acquire.observe(seconds, None if self.telemetry is None else self.telemetry.acquired(seconds))
        # The first hold of a route is an increase too, when it ends: its series begin at 0 now.
        self._hold(holder)
        self._idle(holder)

    def queued(self) -> None:
        """Count an acquisition that has to queue; `waited` follows."""
        self._wait.inc()

    def waited(self, seconds: float, outcome: WaitOutcome) -> None:
        """Count the seconds in the queue of an acquisition that `queued` has counted, and how its wait ended."""
        self._waited(outcome).observe(seconds)

    def cancelled(self, reason: str) -> None:
        """Count an acquisition that was given up while it waited."""
        self._cancelled(reason).inc()

    def woke(self, seconds: float) -> None:
        """Count an acquisition that waited for a sleeping database, and the seconds that it waited."""
        self._metrics.wake_seconds.labels(self.pool).observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count a refusal. Many come at once, so the log has them at DEBUG only."""
        self._rejected(reason).inc()
        if self.telemetry is not None and reason == "timeout":
            self.telemetry.timed_out()
        logger.debug("connection refused", extra={"pool": self.pool, "reason": reason})

    def connected(self, seconds: float) -> None:
        """Count and log a connection that was opened."""
        self._connect.observe(seconds)
        if self.telemetry is not None:
            self.telemetry.connected(seconds)
        logger.debug("connection opened", extra={"pool": self.pool, "seconds": round(seconds, 4)})

    def connect_failed(self) -> None:
        """Count a connection that could not be opened."""
        self._connect_failures.inc()

    def replaced(self, reason: str) -> None:
        """Count and log a connection that was given up."""
        self._replaced(reason).inc()
        logger.debug("connection closed", extra={"pool": self.pool, "reason": reason})

    def returned(self, checkout: Checkout, held: float) -> None:
        """Count a checkin: seconds held, and of these the ones without a query; log it when those were many."""
        holder = checkout.holder
        idle = max(0.0, held - checkout.queried_seconds())
        self._hold(holder).observe(held)
        if self.telemetry is not None:
            self.telemetry.returned(held)
        self._idle(holder).observe(idle)
        if idle >= self._idle_hold_seconds:
            self.log_kept("connection held idle", checkout, held_seconds=round(held, 3), idle_seconds=round(idle, 3))

    def log_kept(self, message: str, checkout: Checkout, *, level: int = logging.WARNING, **details: Any) -> None:
        """Write a line about a connection that its holder kept for too long; the second one says where it was taken."""
        self.traced.add(checkout.holder)
        by = {"pool": self.pool, "route": checkout.holder, "taken_in": checkout.taken_in}
        self._sampler.log(logger, level, message, by=by, **details)

    def answered(self, checkout: Checkout, statement: str, seconds: float, failure: str | None = None) -> None:
        """Count a statement, answered or failed, and the seconds that it took; log it when it was slow."""
        telemetry = self.telemetry
        self._query.observe(
            seconds,
            None if telemetry is None else telemetry.asked(checkout.connection, statement, seconds, failure),
        )
        if seconds >= self._slow_query_seconds:
            self._slow.inc()
            # Never the parameters: they are health data.
            text = " ".join(statement.split())[:STATEMENT_CHARACTERS]
            by = {"pool": self.pool, "route": checkout.holder, "statement": text}
            self._sampler.log(logger, logging.WARNING, "slow query", by=by, seconds=round(seconds, 3))

    def log(
        self, message: str, *arguments: object, level: int = logging.WARNING, route: str | None = None, **details: Any
    ) -> None:
        """Write a line about this pool that many requests may cause at once: the first of a burst, then the count."""
        self._sampler.log(logger, level, message, *arguments, by={"pool": self.pool, "route": route}, **details)
