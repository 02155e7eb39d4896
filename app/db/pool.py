"""The bounded pool: admission, checkout, checkin and upkeep of one engine's connections.

SQLAlchemy's QueuePool waits on a queue of connections; this pool grants *permits*. At most `capacity` permits are
out; a request takes one at once, or stands in a first-come-first-served queue of at most `max_waiting`, or is
refused. With a permit it takes the most recently used idle connection that passes the checks, or opens one. One
deadline covers all of it. Because a permit is handed over by whoever returns one, also by a connect that failed,
nobody waits for a wake-up that was lost.

Checks on checkout cost no round trip: a socket that the event loop saw closing, an age, a number of uses. Only a
connection that idled for long proves itself by SELECT 1, under the same deadline. What is old, idle for too long or
beyond the pool's size is closed by `tend()`, in the background, unless a request meets it first.

Everything here runs on one event loop, without threads: between two awaits the figures agree with each other.
"""

import asyncio
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Self, TypeVar, cast

from greenlet import getcurrent
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection
from sqlalchemy.util.concurrency import await_, greenlet_spawn

from app.db.connector import DRIVER_FAILURES, KeptAliveConnection, Opening, opening
from app.db.observe import PoolWatch
from app.errors import DatabaseUnreachable, PoolExhausted
from app.settings import DatabaseSettings

# Who takes a connection in this context: the route template of a request, or the name of a task.
holder: ContextVar[str] = ContextVar("holder", default="background")
# What SQLAlchemy connects to in this context in place of a connection of its own.
_adopted: ContextVar[ConnectionPoolEntry | None] = ContextVar("adopted", default=None)
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Tenure:
    """The life of one open connection; times are of the pool's clock, in seconds.

    `queried` and `asked_at` are of `time.perf_counter`, by which statements are timed. `asked_at` is when the statement
    under way was sent, None between two statements: what waits for the database is not idle.
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

    def queried_seconds(self) -> float:
        """Seconds that this checkout spent on statements, the one under way included."""
        return self.queried if self.asked_at is None else self.queried + time.perf_counter() - self.asked_at


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """One instant of a pool. `checked_out + connecting + available == total`, always.

    Connecting are the permits that have no connection yet: just granted, or it is being checked or opened.
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


@dataclass(frozen=True, slots=True)
class Holding:
    """A checkout that is going on: who holds it, for how long, and how much of that without a query."""

    holder: str
    held_seconds: float
    idle_seconds: float
    taken_in: str | None = None


@dataclass(slots=True)
class _Counts:
    at_work: int = 0
    generation: int = 0
    closed: bool = False
    out: dict[ConnectionPoolEntry, Tenure] = field(default_factory=dict)


class BoundedPool(Pool):
    """A pool of at most `pool_size + max_overflow` connections with a bounded, fair and timed queue in front."""

    def __init__(
        self,
        creator: Callable[..., Any],
        settings: DatabaseSettings,
        watch: PoolWatch,
        clock: Callable[[], float] = time.monotonic,
        trace: bool = False,  # noqa: FBT001, FBT002  # See below.
        **for_pool: Any,
    ) -> None:
        # create_async_engine hands on what it finds in this signature, and overlooks what is keyword-only.
        super().__init__(creator, **for_pool)
        self.settings = settings
        self._watch = watch
        self._clock = clock
        self._trace = trace
        self._idle: list[ConnectionPoolEntry] = []
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._counts = _Counts()
        self._drained: asyncio.Event | None = None

    # What operators read.

    def figures(self) -> PoolFigures:
        """Count, without waiting for anything."""
        settings, counts = self.settings, self._counts
        opened = len(self._idle) + len(counts.out)
        return PoolFigures(
            pool_size=settings.pool_size,
            max_overflow=settings.max_overflow,
            total=settings.capacity,
            checked_out=len(counts.out),
            checked_in=len(self._idle),
            connecting=counts.at_work - len(counts.out),
            overflow=max(0, opened - settings.pool_size),
            available=settings.capacity - counts.at_work,
            waiting=len(self._waiters),
        )

    @property
    def load(self) -> int:
        """Requests at work or waiting."""
        return self._counts.at_work + len(self._waiters)

    def holdings(self) -> list[Holding]:
        """List the checkouts going on, longest first."""
        now = self._clock()
        tenures = sorted(self._counts.out.values(), key=lambda t: t.taken_at)
        return [_holding(t, now) for t in tenures]

    def status(self) -> str:
        """Describe the pool in one line, as SQLAlchemy's own pools do."""
        return str(self.figures())

    # Checkout and checkin, called by SQLAlchemy inside its greenlet.

    def _do_get(self) -> ConnectionPoolEntry:
        if (adopted := _adopted.get()) is not None:
            return adopted
        started = self._clock()
        deadline = asyncio.get_running_loop().time() + self.settings.pool_timeout
        self._admit(deadline)
        try:
            entry = self._take_idle(deadline) or self._open(deadline)
        except BaseException:
            self._release()
            raise
        return self._hand_out(entry, _tenure(entry), started)

    async def lease(self) -> ConnectionPoolEntry:
        """Take a connection past SQLAlchemy; `give_back` it whatever happens.

        Raises: PoolExhausted, DatabaseUnreachable.
        """
        # Most of the time a connection is there to be taken, and nothing has to be waited for.
        if self._idle and self._counts.at_work < self.settings.capacity and not self._counts.closed:
            started, entry = self._clock(), self._idle[-1]
            tenure = _tenure(entry)
            idle = started - tenure.idle_since
            if idle < self.settings.pool_check_after_seconds and self._expired(tenure, started) is None:
                self._counts.at_work += 1
                return self._hand_out(self._idle.pop(), tenure, started)
        return cast("ConnectionPoolEntry", await greenlet_spawn(self._do_get))

    def adopt(self, entry: ConnectionPoolEntry, connect: Callable[[], T]) -> T:
        """Let SQLAlchemy `connect` to what `lease` gave; it is SQLAlchemy that gives it back then."""
        adopting = _adopted.set(entry)
        try:
            return connect()
        finally:
            _adopted.reset(adopting)

    def give_back(self, entry: ConnectionPoolEntry) -> None:
        """Return what `lease` gave; a connection that is closed meanwhile is replaced."""
        self._do_return_conn(entry)

    def _hand_out(self, entry: ConnectionPoolEntry, tenure: Tenure, started: float) -> ConnectionPoolEntry:
        now = self._clock()
        tenure.uses += 1
        tenure.holder = holder.get()
        tenure.taken_at = now
        tenure.queried, tenure.asked_at = 0.0, None
        tenure.taken_in = _caller() if self._trace else None
        tenure.reported = False
        self._counts.out[entry] = tenure
        self._watch.acquired(now - started, tenure.holder)
        return entry

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        # No await in here: the garbage collector calls it too, for a connection that somebody dropped.
        tenure = self._counts.out.pop(record)
        now = self._clock()
        try:
            self._watch.returned(tenure.holder, now - tenure.taken_at, tenure.queried_seconds())
            if record.dbapi_connection is None:
                self._watch.replaced("error")
            elif reason := self._expired(tenure, now) or tenure.connection.settle():
                self._discard(record, reason)
            else:
                tenure.idle_since = now
                self._idle.append(record)
        finally:
            self._release()

    def _invalidate(
        self,
        connection: PoolProxiedConnection,
        exception: BaseException | None = None,
        _checkin: bool = True,  # noqa: FBT001, FBT002  # SQLAlchemy's signature.
    ) -> None:
        # SQLAlchemy would replace every connection of the pool when one is lost. Each of ours is looked at when
        # it is taken; whoever knows that all are lost says so by `abandon` or `dispose`.
        if _checkin and connection.is_valid:
            connection.invalidate(exception)

    def _admit(self, deadline: float) -> None:
        if self._counts.closed:
            raise self._refusal("closing", "The service is shutting down.")
        if self._counts.at_work < self.settings.capacity:
            self._counts.at_work += 1
        elif len(self._waiters) >= self.settings.pool_max_waiting:
            raise self._refusal(
                "queue_full",
                f"All {self.settings.capacity} connections are at work and {len(self._waiters)} requests wait already.",
            )
        else:
            self._watch.waited()
            await_(self._queue(deadline))

    async def _queue(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiters[waiter] = None
        # A timer of its own, and no asyncio.timeout: that would cancel the task, and a cancel that crosses with
        # a permit just granted is how permits get lost.
        timer = loop.call_at(deadline, self._expire, waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            # Cancelled in the very moment of an answer: a permit goes to the next one; a refusal was none.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._release()
            raise
        finally:
            timer.cancel()
            self._waiters.pop(waiter, None)

    def _expire(self, waiter: asyncio.Future[None]) -> None:
        if not waiter.done():
            del self._waiters[waiter]
            seconds = self.settings.pool_timeout
            waiter.set_exception(self._refusal("timeout", f"No connection became free within {seconds:g} s."))

    def _refusal(self, reason: str, sentence: str) -> PoolExhausted:
        self._watch.rejected(reason)
        return PoolExhausted(sentence, database=self._watch.pool, reason=reason)

    def _release(self) -> None:
        """Hand the permit to the one who has waited longest, or take it back."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(None)
                return
        self._counts.at_work -= 1
        if self._counts.at_work == 0 and self._drained is not None:
            self._drained.set()

    def _take_idle(self, deadline: float) -> ConnectionPoolEntry | None:
        while self._idle:
            # The most recently used one: it is the likeliest to live, and the others can grow old and be closed.
            entry = self._idle.pop()
            now = self._clock()
            tenure = _tenure(entry)
            reason = self._expired(tenure, now)
            if reason is None and now - tenure.idle_since >= self.settings.pool_check_after_seconds:
                reason = None if self._answers(entry, deadline) else "unresponsive"
            if reason is None:
                return entry
            self._discard(entry, reason)
        return None

    def _expired(self, tenure: Tenure, now: float) -> str | None:
        if tenure.connection.is_closed():
            return "closed"
        if tenure.generation != self._counts.generation:
            return "disposed"
        if now >= tenure.expires_at:
            return "age"
        if tenure.uses >= self.settings.pool_max_uses:
            return "uses"
        return None

    def _answers(self, entry: ConnectionPoolEntry, deadline: float) -> bool:
        connection = _tenure(entry).connection
        # At the deadline the socket is torn down, which ends the wait; cancelling would leave it to the server.
        # Half of what is left is kept for opening another one.
        loop = asyncio.get_running_loop()
        timer = loop.call_at((loop.time() + deadline) / 2, connection.cut)
        try:
            await_(connection.execute("SELECT 1"))
        except DRIVER_FAILURES:
            return False
        except BaseException:
            self._discard(entry, "unresponsive")
            raise
        finally:
            timer.cancel()
        return True

    def _open(self, deadline: float) -> ConnectionPoolEntry:
        # What `dispose` was called for while this one was being opened holds for it too.
        started, generation = self._clock(), self._counts.generation
        opening.set(attempt := Opening(deadline))
        try:
            entry = self._create_connection()
        except DRIVER_FAILURES as error:
            self._watch.connect_failed()
            raise DatabaseUnreachable("The database cannot be reached.", database=self._watch.pool) from error
        except DatabaseUnreachable as error:
            self._watch.connect_failed()
            error.database = self._watch.pool
            raise
        finally:
            attempt.done()
        now = self._clock()
        # A tenth of the lifetime is left to chance, so that connections opened together do not end together.
        lifetime = self.settings.pool_recycle * random.uniform(0.9, 1.0)  # noqa: S311  # Not a secret.
        connection = cast("KeptAliveConnection", entry.driver_connection)
        entry.info["tenure"] = Tenure(connection, now, now + lifetime, generation, idle_since=now)
        self._watch.connected(now - started)
        return entry

    def _discard(self, entry: ConnectionPoolEntry, reason: str) -> None:
        self._watch.replaced(reason)
        # Says goodbye and closes without waiting for an answer, which a dead peer would never give.
        _tenure(entry).connection.terminate()
        entry.invalidate()

    # Upkeep, called by the owner of the engine.

    async def warm_up(self) -> None:
        """Open connections until `warm_size` are open.

        Raises: DatabaseUnavailable when one cannot be opened; those that were stay.
        """
        while len(self._idle) + self._counts.at_work < self.settings.warm_size and not self._counts.closed:
            await greenlet_spawn(self._add_idle)

    def _add_idle(self) -> None:
        self._counts.at_work += 1
        try:
            loop = asyncio.get_running_loop()
            self._idle.insert(0, self._open(loop.time() + self.settings.connect_timeout_seconds))
        finally:
            self._release()

    def tend(self) -> None:
        """Close what is too old, idle for too long, or idle beyond the pool's size."""
        now, settings, kept = self._clock(), self.settings, []
        spare = len(self._idle) + self._counts.at_work - settings.warm_size
        surplus = len(self._idle) + self._counts.at_work - settings.pool_size
        for entry in self._idle:  # The one idle for longest comes first.
            tenure = _tenure(entry)
            idle = now - tenure.idle_since
            reason = self._expired(tenure, now)
            if reason is None and surplus > 0 and idle >= settings.pool_overflow_idle_seconds:
                reason = "surplus"
            if reason is None and spare > 0 and idle >= settings.pool_idle_seconds:
                reason = "idle"
            if reason is None:
                kept.append(entry)
                continue
            spare, surplus = spare - 1, surplus - 1
            self._discard(entry, reason)
        self._idle = kept

    def newly_long_held(self, seconds: float) -> list[Holding]:
        """List the checkouts that have been held for longer than `seconds`, each of them once."""
        now, found = self._clock(), []
        for tenure in self._counts.out.values():
            if now - tenure.taken_at >= seconds and not tenure.reported:
                tenure.reported = True
                found.append(_holding(tenure, now))
        return found

    async def drained(self, timeout_seconds: float) -> bool:
        """Wait until nothing is at work, for `timeout_seconds` at most, and say whether that came about."""
        if self._counts.at_work == 0:
            return True
        self._drained = asyncio.Event()
        try:
            await asyncio.wait_for(self._drained.wait(), max(0.0, timeout_seconds))
        except TimeoutError:
            return False
        return True

    def abandon(self, *, keep: float | None = None) -> None:
        """Drop every connection, those at work too: the server behind them is gone or is the wrong one.

        Those that lead to the server `keep` stay.
        """
        for entry in (*self._idle, *self._counts.out):
            connection = _tenure(entry).connection
            if keep is None or connection.server != keep:
                # Whoever takes it or brings it back finds it closed.
                connection.cut() if entry in self._counts.out else connection.terminate()
        self.tend()

    def close(self) -> None:
        """Admit nobody any more; who waits is refused now. The connections at work stay with their holders."""
        self._counts.closed = True
        for waiter in list(self._waiters):
            del self._waiters[waiter]
            if not waiter.done():
                waiter.set_exception(self._refusal("closing", "The service is shutting down."))

    def dispose(self) -> None:
        """Close the idle connections; those at work are closed when they come back."""
        self._counts.generation += 1
        idle, self._idle = self._idle, []
        for entry in idle:
            self._discard(entry, "disposed")

    def recreate(self) -> Self:
        """Return this pool: after `dispose` it goes on, and its figures stay right for what is still out."""
        return self


def _tenure(entry: ConnectionPoolEntry) -> Tenure:
    tenure: Tenure = entry.info["tenure"]
    return tenure


def _holding(tenure: Tenure, now: float) -> Holding:
    held = now - tenure.taken_at
    return Holding(tenure.holder, held, max(0.0, held - tenure.queried_seconds()), tenure.taken_in)


def _caller() -> str:
    """Name the line of the service that asked for a connection: outside `app.db`, above SQLAlchemy's greenlet."""
    parent = getcurrent().parent
    frame = cast("FrameType", sys._getframe() if parent is None else parent.gr_frame)  # noqa: SLF001  # As documented.
    while _module(frame).startswith(("app.db.", "sqlalchemy.")) and frame.f_back is not None:
        frame = frame.f_back
    return f"{_module(frame)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
