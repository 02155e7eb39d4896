"""The bounded pool: admission, checkout, checkin and upkeep of one database's connections.

`acquire` and `release` come first, and tell how it works. At most `capacity` connections are at work; a request takes
an idle one at once, or stands in a first-come-first-served line of bounded length, or is refused. Who stands in line
gets whatever comes first: a connection that somebody returns, or one that was newly opened.

Connections are opened in the background, few at a time, as many as the line needs. No request opens one by itself: a
request whose deadline passes leaves behind a login that serves the next one, and a hundred requests that find the pool
empty do not make a hundred logins, each of which makes all of them late. When a login fails, those who wait for it are
told at once, with its cause.

Checks on checkout cost no round trip: a socket that the event loop saw closing, an age, a number of uses. Only a
connection that idled for long proves itself by SELECT 1, under the same deadline. What is old, idle for too long or
beyond the pool's size is closed by `tend()`, in the background, unless a request meets it first.

Everything here runs on one event loop, without threads: between two awaits the figures agree with each other. How a
connection is opened and kept is its subclass's business: SQLAlchemy's, in `sqlalchemy_pool`.
"""

import asyncio
import random
import sys
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from pglifeguard.checkout import Checkout, Holding, PoolFigures, holder, holding_of
from pglifeguard.connector import KeptAliveConnection
from pglifeguard.driver_failures import DRIVER_FAILURES
from pglifeguard.errors import DatabaseUnreachable, PoolExhausted, sqlstate
from pglifeguard.observe import PoolWatch
from pglifeguard.settings import DatabaseSettings

# Connections that one pool opens at the same time. Each costs the server a process and both sides a millisecond of
# hashing; more at once made all of them late on a machine that is short of processors (decision 0015).
OPENED_AT_ONCE = 3
# Between two times that connections to a demoted server are given up, each of which costs as many logins.
RENEW_SECONDS = 0.2
# What the server answers when it has no room for another connection: those that are open go on working.
SERVER_FULL = "53"
# Awaited with each new connection, before anybody has it.
OnConnect: TypeAlias = Callable[[KeptAliveConnection], Awaitable[None]]
# What opening a connection raises when nothing is wrong with the service itself.
FAILURES = (DatabaseUnreachable, *DRIVER_FAILURES)


class Slot(Protocol):
    """What the pool lends: the place of one connection, with the life of that connection in `info["checkout"]`."""

    @property
    def info(self) -> Any:
        """A mapping that lives as long as the connection."""

    @property
    def dbapi_connection(self) -> object | None:
        """The connection, None when its holder found it lost."""

    def invalidate(self) -> None:
        """Give the connection up; it is closed already."""


@dataclass(slots=True, eq=False)
class _Opening:
    """A connection that is being opened: `generation` is the pool's when that began, `keep` the server it must be."""

    started_at: float
    generation: int
    keep: float | None = None


S = TypeVar("S", bound=Slot)


class ConnectionPool(ABC, Generic[S]):
    """A pool of at most `pool_size + max_overflow` connections with a bounded, fair and timed line in front."""

    def __init__(
        self, settings: DatabaseSettings, watch: PoolWatch, clock: Callable[[], float], *, trace: bool
    ) -> None:
        self.settings = settings
        self._watch = watch
        self._clock = clock
        self._trace = trace
        # A connection is idle, out with a holder, or in hand: granted or being checked. Nobody waits while one idles.
        self._idle: list[S] = []
        self._out: dict[S, Checkout] = {}
        self._in_hand: set[S] = set()
        self._openings: set[_Opening] = set()
        self._openers: set[asyncio.Task[None]] = set()
        self._waiters: OrderedDict[asyncio.Future[S], None] = OrderedDict()
        # Why the last connect failed; None since one succeeded.
        self._failure: Exception | None = None
        self._returned_at = self._renewed_at = float("-inf")
        self._generation = 0
        self._closed = False
        self._drained: asyncio.Event | None = None

    async def acquire(self) -> S:
        """Take a connection; `release` it whatever happens.

        One deadline, `pool_timeout` seconds from now, covers waiting, connecting and checking.

        Raises: PoolExhausted when all are at work, DatabaseUnreachable when none could be opened.
        """
        # Most of the time a connection is there to be taken, and nothing has to be waited for.
        if (slot := self._take_warm()) is not None:
            return slot
        if self._closed:
            raise self._refusal("closing", "The service is shutting down.")
        started = self._clock()
        deadline = asyncio.get_running_loop().time() + self.settings.pool_timeout
        while self._idle:
            # The most recently used one: it is the likeliest to live, and the others can grow old and be closed.
            slot = self._idle.pop()
            if await self._is_usable(slot, deadline):
                return self._hand_out(slot, _checkout(slot), started)
        free = self._free
        if len(self._waiters) >= free + self.settings.pool_max_waiting:
            raise self._full(free)
        if len(self._waiters) >= free:
            self._watch.waited()
        slot = await self._stand_in_line(deadline)
        return self._hand_out(slot, _checkout(slot), started)

    def release(self, slot: S) -> None:
        """Return what `acquire` gave; one that is closed or too old is replaced."""
        # No await in here: the garbage collector calls it too, for a connection that somebody dropped.
        checkout = self._out.pop(slot)
        now = self._clock()
        kept = False
        try:
            self._watch.returned(checkout.holder, now - checkout.taken_at, checkout.queried_seconds())
            if slot.dbapi_connection is None:
                self._watch.replaced("error")
            elif reason := self._expired(checkout, now) or checkout.connection.settle():
                self._discard(slot, reason)
            else:
                checkout.idle_since = self._returned_at = now
                kept = True
        finally:
            if kept:
                self._grant(slot)
            else:
                self._open_more()
            if self._drained is not None:
                self._note_drained()

    def _take_warm(self) -> S | None:
        """Take the most recently used idle connection if it needs no check that takes time."""
        if not self._idle or self._closed:
            return None
        now, slot = self._clock(), self._idle[-1]
        checkout: Checkout = slot.info["checkout"]
        if (
            now - checkout.idle_since >= self.settings.pool_check_after_seconds
            or self._expired(checkout, now) is not None
        ):
            return None
        return self._hand_out(self._idle.pop(), checkout, now)

    async def _stand_in_line(self, deadline: float) -> S:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[S] = loop.create_future()
        self._waiters[waiter] = None
        # A timer of its own, and no asyncio.timeout: that would cancel the task, and a cancel that crosses with
        # a connection just granted is how connections get lost.
        timer = loop.call_at(deadline, self._expire, waiter)
        self._open_more()
        try:
            slot = await waiter
        except asyncio.CancelledError:
            # Cancelled in the very moment of an answer: a connection goes to the next one; a refusal was none.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._in_hand.discard(waiter.result())
                self._grant(waiter.result())
                self._note_drained()
            raise
        finally:
            timer.cancel()
            self._waiters.pop(waiter, None)
        self._in_hand.discard(slot)
        return slot

    def _grant(self, slot: S) -> None:
        """Hand a connection to the one who has waited longest, else keep it."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                self._in_hand.add(slot)
                waiter.set_result(slot)
                return
        checkout = _checkout(slot)
        self._idle.insert(0 if checkout.behind else len(self._idle), slot)
        checkout.behind = False

    def _hand_out(self, slot: S, checkout: Checkout, started: float) -> S:
        now = self._clock()
        checkout.uses += 1
        checkout.holder = holder.get()
        checkout.taken_at = now
        checkout.queried, checkout.asked_at = 0.0, None
        checkout.taken_in = self._caller() if self._trace else None
        checkout.reported = False
        self._out[slot] = checkout
        self._watch.acquired(now - started, checkout.holder)
        return slot

    # Refusals.

    def _expire(self, waiter: asyncio.Future[S]) -> None:
        """Refuse who has waited until the deadline, and say what for: a returned connection, or one being opened."""
        if waiter.done():
            return
        del self._waiters[waiter]
        seconds = self.settings.pool_timeout
        began = asyncio.get_running_loop().time() - seconds
        connecting_hangs = any(opening.started_at <= began for opening in self._openings)
        if self._failure is not None or connecting_hangs or not (self._out or self._in_hand):
            waiter.set_exception(self._unreachable())
        else:
            waiter.set_exception(self._refusal("timeout", f"No connection became free within {seconds:g} s."))

    def _full(self, free: int) -> Exception:
        if free and self._failure is not None:
            return self._unreachable()
        return self._refusal(
            "queue_full",
            f"All {self.settings.capacity} connections are at work and {len(self._waiters)} requests wait already.",
        )

    def _refusal(self, reason: str, sentence: str) -> PoolExhausted:
        self._watch.rejected(reason)
        return PoolExhausted(sentence, database=self._watch.pool, reason=reason)

    def _unreachable(self) -> Exception:
        """Name why the last connect failed, or that none has ended, anew for each who is told; a bug as it is."""
        known = self._failure
        if known is None:
            known = TimeoutError(f"no connection was opened within {self.settings.pool_timeout:g} s")
        if not isinstance(known, FAILURES):
            return known
        sentence = f"The database cannot be reached: {known or type(known).__name__}."
        cause: BaseException | None = known
        if isinstance(known, DatabaseUnreachable):
            sentence, cause = str(known), known.__cause__
        failure = DatabaseUnreachable(sentence, database=self._watch.pool)
        failure.__cause__ = cause
        return failure

    # Checks.

    async def _is_usable(self, slot: S, deadline: float) -> bool:
        """Check an idle connection, and discard it when it fails."""
        now, checkout = self._clock(), _checkout(slot)
        reason = self._expired(checkout, now)
        if reason is None and now - checkout.idle_since >= self.settings.pool_check_after_seconds:
            self._in_hand.add(slot)
            try:
                reason = None if await _answers(checkout.connection, deadline) else "unresponsive"
            except BaseException:
                self._discard(slot, "unresponsive")
                raise
            finally:
                self._in_hand.discard(slot)
                self._open_more()
                self._note_drained()
        if reason is None:
            return True
        self._discard(slot, reason)
        return False

    def _expired(self, checkout: Checkout, now: float) -> str | None:
        if checkout.connection.is_closed():
            return "closed"
        if checkout.generation != self._generation:
            return "disposed"
        if now >= checkout.expires_at:
            return "age"
        if checkout.uses >= self.settings.pool_max_uses:
            return "uses"
        return None

    def _discard(self, slot: S, reason: str) -> None:
        self._watch.replaced(reason)
        # Says goodbye and closes without waiting for an answer, which a dead peer would never give.
        _checkout(slot).connection.terminate()
        slot.invalidate()

    # Opening.

    @abstractmethod
    async def connect_slot(self, deadline: float) -> tuple[S, KeptAliveConnection]:
        """Open a connection by `deadline` (the event loop's time).

        Raises: DatabaseUnreachable, or one of DRIVER_FAILURES.
        """

    @property
    @abstractmethod
    def login_seconds(self) -> float:
        """Seconds after which a login is given up, whoever still waits for it."""

    @property
    def _free(self) -> int:
        """Connections that may still be taken, idle or not open yet."""
        return self.settings.capacity - len(self._out) - len(self._in_hand)

    def _open_more(self) -> None:
        """Open what those in line need: few at a time, and never more than the pool may hold."""
        if not self._waiters or self._closed:
            return
        opening = len(self._openings)
        room = self._free - len(self._idle)
        loop = next(iter(self._waiters)).get_loop()
        for _ in range(min(len(self._waiters), room, OPENED_AT_ONCE) - opening):
            # In a context of its own: it belongs to no request.
            task = loop.create_task(self._open_one(self._begin_opening(loop), self.login_seconds), context=Context())
            self._openers.add(task)
            task.add_done_callback(self._openers.discard)

    def _begin_opening(self, loop: asyncio.AbstractEventLoop) -> _Opening:
        opening = _Opening(loop.time(), self._generation)
        self._openings.add(opening)
        return opening

    async def _open_one(self, opening: _Opening, seconds: float) -> None:
        """Open a connection within `seconds` for whoever waits when it is there."""
        started = self._clock()
        try:
            slot, connection = await self.connect_slot(asyncio.get_running_loop().time() + seconds)
        except Exception as error:  # noqa: BLE001  # The edge of a task: whoever waits is told.
            self._openings.discard(opening)
            self._tell_failure(error)
        else:
            self._openings.discard(opening)
            now = self._clock()
            # A tenth of the lifetime is left to chance, so that connections opened together do not end together.
            lifetime = self.settings.pool_recycle * random.uniform(0.9, 1.0)  # noqa: S311  # Not a secret.
            slot.info["checkout"] = Checkout(connection, now, now + lifetime, opening.generation, idle_since=now)
            self._failure = None
            self._watch.connected(now - started)
            self._arrive(slot, opening)
        finally:
            self._openings.discard(opening)
            self._open_more()
            self._note_drained()

    def _arrive(self, slot: S, opening: _Opening) -> None:
        checkout = _checkout(slot)
        if opening.keep is not None and checkout.connection.server != opening.keep:
            self._discard(slot, "superseded")
        elif self._waiters:
            # What `dispose` was called for meanwhile holds for it too: it serves who waits now, and nobody later.
            self._grant(slot)
        elif checkout.generation != self._generation:
            self._discard(slot, "disposed")
        else:
            self._idle.insert(0, slot)

    def _tell_failure(self, error: Exception) -> None:
        """Tell those who waited for this connect; who may still get a returned connection waits on."""
        known, self._failure = self._failure, error
        # Several connects end together when they waited for one login.
        known_already = known is not None and known.__cause__ is not None and known.__cause__ is error.__cause__
        if not known_already:
            self._watch.connect_failed()
        told = len(self._waiters)
        if self._out or self._in_hand:
            full = (sqlstate(error) or "").startswith(SERVER_FULL)
            told = 0 if full or known_already else min(told, self._free)
        for _ in range(told):
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_exception(self._unreachable())

    # What operators read.

    def figures(self) -> PoolFigures:
        """Count, without waiting for anything."""
        settings, free, waiting = self.settings, self._free, len(self._waiters)
        opened = len(self._idle) + len(self._out)
        coming = min(free, max(waiting, len(self._openings)))
        return PoolFigures(
            pool_size=settings.pool_size,
            max_overflow=settings.max_overflow,
            total=settings.capacity,
            checked_out=len(self._out),
            checked_in=len(self._idle),
            connecting=len(self._in_hand) + coming,
            overflow=max(0, opened - settings.pool_size),
            available=free - coming,
            waiting=max(0, waiting - free),
        )

    @property
    def load(self) -> int:
        """Requests at work or waiting."""
        return len(self._out) + len(self._in_hand) + len(self._waiters)

    def holdings(self) -> list[Holding]:
        """List the checkouts going on, longest first."""
        now = self._clock()
        checkouts = sorted(self._out.values(), key=lambda t: t.taken_at)
        return [holding_of(t, now) for t in checkouts]

    def newly_long_held(self, seconds: float) -> list[Holding]:
        """List the checkouts that have been held for longer than `seconds`, each of them once."""
        now, found = self._clock(), []
        for checkout in self._out.values():
            if now - checkout.taken_at >= seconds and not checkout.reported:
                checkout.reported = True
                found.append(holding_of(checkout, now))
        return found

    # Upkeep, called by the owner.

    async def warm_up(self) -> None:
        """Open connections until `warm_size` are open.

        Raises: DatabaseUnreachable when one cannot be opened within `connect_timeout_seconds`; those that were stay.
        """
        while self._opened < self.settings.warm_size and not self._closed:
            opening = self._begin_opening(asyncio.get_running_loop())
            await self._open_one(opening, self.settings.connect_timeout_seconds)
            if self._failure is not None:
                raise self._unreachable()

    @property
    def _opened(self) -> int:
        """Connections that are open, or being opened."""
        return len(self._idle) + len(self._out) + len(self._in_hand) + len(self._openings)

    def tend(self) -> None:
        """Close what is too old, idle for too long, or idle beyond the pool's size."""
        now, settings, kept = self._clock(), self.settings, []
        spare = self._opened - settings.warm_size
        surplus = self._opened - settings.pool_size
        for slot in self._idle:  # The one idle for longest comes first.
            checkout = _checkout(slot)
            idle = now - checkout.idle_since
            reason = self._expired(checkout, now)
            if reason is None and surplus > 0 and idle >= settings.pool_overflow_idle_seconds:
                reason = "surplus"
            if reason is None and spare > 0 and idle >= settings.pool_idle_seconds:
                reason = "idle"
            if reason is None:
                kept.append(slot)
                continue
            spare, surplus = spare - 1, surplus - 1
            self._discard(slot, reason)
        self._idle = kept

    # The end, of the connections or of the pool.

    def abandon(self, *, keep: float | None = None) -> None:
        """Drop every connection, those at work too: the server behind them is gone or is the wrong one.

        Those that lead to the server `keep` stay, and of those being opened only they will.
        """
        for slot in (*self._idle, *self._in_hand, *self._out):
            connection = _checkout(slot).connection
            if keep is None or connection.server != keep:
                # Whoever takes it or brings it back finds it closed.
                connection.cut() if slot in self._out or slot in self._in_hand else connection.terminate()
        for opening in self._openings:
            opening.keep = keep
        self.tend()

    def dispose(self) -> None:
        """Close the idle connections; those at work are closed when they come back."""
        self._generation += 1
        idle, self._idle = self._idle, []
        for slot in idle:
            self._discard(slot, "disposed")

    def leave_demoted(self) -> bool:
        """Dispose of connections to a server that takes no writes; say whether that was done.

        Once in a while only: as long as the address leads there, each new connection would be no better.
        """
        now = self._clock()
        if now - self._renewed_at < RENEW_SECONDS:
            return False
        self._renewed_at = now
        self.dispose()
        return True

    def cut_unanswered(self, seconds: float) -> int:
        """Close the connections whose statement got no answer for `seconds`, and say how many these were.

        Nothing is closed when another connection came back in good order meanwhile: the server answers, and what takes
        long there is its business. Nor is anything behind a pooler: there whoever looks may have waited in its queue,
        behind statements that wait for a lock, and the server is well.
        """
        if self._clock() - self._returned_at < seconds:
            return 0
        now = time.perf_counter()
        direct = [t for t in self._out.values() if not t.connection.pooled]
        waiting = [t for t in direct if t.asked_at is not None and now - t.asked_at >= seconds]
        for checkout in waiting:
            checkout.connection.cut()
        return len(waiting)

    def close(self) -> None:
        """Admit nobody any more; who waits is refused now. The connections at work stay with their holders."""
        self._closed = True
        for waiter in list(self._waiters):
            del self._waiters[waiter]
            if not waiter.done():
                waiter.set_exception(self._refusal("closing", "The service is shutting down."))
        for opener in self._openers:
            opener.cancel()

    async def drained(self, timeout_seconds: float) -> bool:
        """Wait until nothing is at work, for `timeout_seconds` at most, and say whether that came about."""
        self._drained = asyncio.Event()
        self._note_drained()
        try:
            await asyncio.wait_for(self._drained.wait(), max(0.0, timeout_seconds))
        except TimeoutError:
            return False
        return True

    def _note_drained(self) -> None:
        if self._drained is not None and not (self._out or self._in_hand or self._openings):
            self._drained.set()

    # Where a connection was taken.

    def _caller(self) -> str:
        """Name the line that asked for a connection: the first outside this library and SQLAlchemy."""
        frame = self.frame()
        while _module(frame).startswith(("pglifeguard.", "sqlalchemy.")) and frame.f_back is not None:
            frame = frame.f_back
        return f"{_module(frame)}:{frame.f_lineno} in {frame.f_code.co_name}"

    def frame(self) -> FrameType:
        """Return a frame that leads to the one who asked."""
        return sys._getframe()  # noqa: SLF001  # As documented.


async def _answers(connection: KeptAliveConnection, deadline: float) -> bool:
    # At the deadline the socket is torn down, which ends the wait; cancelling would leave it to the server.
    # Half of what is left is kept for opening another one.
    loop = asyncio.get_running_loop()
    timer = loop.call_at((loop.time() + deadline) / 2, connection.cut)
    try:
        await connection.execute("SELECT 1")
    except DRIVER_FAILURES:
        return False
    finally:
        timer.cancel()
    return True


def _checkout(slot: Slot) -> Checkout:
    checkout: Checkout = slot.info["checkout"]
    return checkout


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
