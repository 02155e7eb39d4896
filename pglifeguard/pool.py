"""The bounded pool: it acquires, releases, checks and closes the connections of one database.

`acquire` and `release` come first and tell how the pool works. At most `capacity` connections are checked out. A
request gets an idle connection at once, or it waits in a queue of bounded length (`wait_queue.py`), or it is refused.
A waiting request gets the next connection, whether another request releases it or the pool has just opened it.

The pool opens connections in the background, few at a time, as many as the queue needs. No request opens one itself.
So a login goes on when the deadline of a request passes, and serves the next request; and a hundred requests that find
the pool empty do not make a hundred logins that slow each other down. When a login fails, the pool tells the waiting
requests at once, with the cause.

The checks at a checkout cost no round trip: the event loop has seen the socket close, the connection is too old, or it
was used too often. Only a connection that was idle for long is probed by SELECT 1, under the same deadline. `tend()`
closes old, idle and surplus connections in the background.

Everything here runs on one event loop, without threads: between two awaits the figures agree with each other. An
`Opener` opens the connections; that of the service, in `sqlalchemy.py`, makes each of them known to SQLAlchemy.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from pglifeguard.checkout import Checkout, Holding, PoolFigures, PoolWatch, WaitOutcome, holder, holding_of
from pglifeguard.connector import KeptAliveConnection, password_is_late
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.driver_failures import DRIVER_FAILURES
from pglifeguard.errors import ClientLeft, DatabaseUnreachable, PoolExhausted, sqlstate
from pglifeguard.telemetry import PoolTelemetry
from pglifeguard.wait_queue import WaitQueue, watch_client

# Connections that one pool opens at the same time. Each login costs the server a process and both sides a millisecond
# of hashing. When every waiting request logged in for itself, on a machine with two processors, each login took longer
# than the request's deadline, was thrown away and began again (decision 0015).
OPENED_AT_ONCE = 3
# The least time between two disposals because of a demoted server. Without it each write that met the demoted server
# disposed of all connections, and so cost a login.
RENEW_SECONDS = 0.2
# A request that waits for a sleeping database gives up this much later than the login, which can say why.
TELL_SECONDS = 0.1
# SQLSTATE class of a server that has no room for another connection. The open connections go on working.
SERVER_FULL = "53"
# Awaited with each new connection, before a request gets it; see `Lifeguard`.
OnConnect: TypeAlias = Callable[[KeptAliveConnection], Awaitable[None]]
# Requests that may wait while the pool is paused; no settings ask for more than a few hundred otherwise.
PAUSED_WAITING = 10_000
# Seconds after a pause or a renewal in which those who have waited get their turn. All connections are opened anew
# then, so whoever comes in these seconds may wait as long: with `pool_timeout`, 43 requests were refused after a
# planned switchover.
RESUMED_SECONDS = 5.0
# Opening a connection raises one of these when the database is away; anything else is a bug of the service.
FAILURES = (DatabaseUnreachable, *DRIVER_FAILURES)
OVERLOAD = "More requests come than the connections can serve, so the queue is kept short."


class Slot(Protocol):
    """What the pool lends: one connection, with the record of its checkouts in `info["checkout"]`."""

    @property
    def info(self) -> Any:
        """A mapping that lives as long as the connection."""

    @property
    def dbapi_connection(self) -> object | None:
        """The connection; None after its holder found it lost."""

    def invalidate(self) -> None:
        """Give the connection up; it is closed already."""


@dataclass(slots=True, eq=False)
class _Opening:
    """A connection that is being opened.

    `generation` is the pool's at the start of the login. `keep` is the server that it must lead to, None for any.
    With `waking` it may have to wake the database.
    """

    started_at: float
    generation: int
    waking: bool = False
    keep: float | None = None


S = TypeVar("S", bound=Slot)
S_co = TypeVar("S_co", bound=Slot, covariant=True)


class Opener(Protocol[S_co]):
    """How connections are opened for a pool, and made into slots."""

    @property
    def login_seconds(self) -> float:
        """Seconds after which a login is given up, also when a request still waits for it."""

    async def open_slot(self, deadline: float, *, waking: bool = False) -> tuple[S_co, KeptAliveConnection]:
        """Open a connection by `deadline` (the event loop's time); with `waking` the database may be asleep.

        Raises: DatabaseUnreachable, or one of DRIVER_FAILURES.
        """

    def waits_for(self) -> str | None:
        """Say what logins wait for beside the server; None when they wait for nothing else."""

    def frame(self) -> FrameType:
        """Return a frame that leads to the code that asked for a connection."""


class ConnectionPool(Generic[S]):
    """A pool of at most `pool_size + max_overflow` connections behind a bounded, fair and timed queue."""

    def __init__(
        self,
        settings: DatabaseSettings,
        watch: PoolWatch,
        opener: Opener[S],
        clock: Callable[[], float] = time.monotonic,
        *,
        trace: bool = False,
    ) -> None:
        self.settings = settings
        self._opener = opener
        self._watch = watch
        self._clock = clock
        self._trace = trace
        # Each connection is in one of these: idle, checked out, or in hand, which means granted or being probed.
        # Without the third, a connection between its grant and the wake-up of its request was in none of the figures.
        self._idle: list[S] = []
        self._out: dict[S, Checkout] = {}
        self._in_hand: set[S] = set()
        self._openings: set[_Opening] = set()
        self._login_tasks: set[asyncio.Task[None]] = set()
        self._queue: WaitQueue[S] = WaitQueue(settings)
        # The error of the last login; None when the last login succeeded.
        self._failure: Exception | None = None
        self._returned_at = self._renewed_at = self._failed_at = self._connected_at = float("-inf")
        self._generation = 0
        self._closed = False
        # Ends a pause; None while connections are handed out.
        self._pause: asyncio.TimerHandle | None = None
        # Nobody is refused for having waited before this time of the event loop: some seconds after the last renewal.
        self._patient_until = float("-inf")
        self._drained: asyncio.Event | None = None
        # Whether more connections may be open than a smaller size allows.
        self._shrinking = False

    async def acquire(self) -> S:
        """Take a connection; the caller must `release` it whatever happens.

        One deadline, `pool_timeout` seconds from now, covers waiting, connecting and probing.

        Raises: PoolExhausted when all are checked out, DatabaseUnreachable when none could be opened; ClientLeft when
        the client of the request left meanwhile (see `watch_client`).
        """
        # Most of the time an idle connection needs no probe, and this request waits for nothing.
        if (slot := self.take_warm()) is not None:
            return slot
        if self._watch.telemetry is None:
            return await self._acquire()
        with self._watch.telemetry.acquiring():
            return await self._acquire()

    async def _acquire(self) -> S:
        if self._closed:
            raise self._refusal("closing", "The service is shutting down.")
        started = self._clock()
        loop = asyncio.get_running_loop()
        deadline = max(loop.time() + self._queue.patience(self.settings.pool_timeout), self._patient_until)
        while self._idle and self._pause is None:
            # The most recently used connection comes first. It is the likeliest to live, and the others stay idle, so
            # that `tend` can close them. Handed out in turn, all of them stay in use, however few the requests are.
            slot = self._idle.pop()
            if await self._is_usable(slot, deadline):
                return self._hand_out(slot, _checkout(slot), started)
        # The queue is bounded: a request that waits behind many others is late even when it is served, and its client
        # has gone by then. Those that the pool has room for do not count, they wait for a login only.
        free = self._free
        self._queue.count_arrival(self._clock())
        patient = loop.time() < self._patient_until
        if len(self._queue.waiters) >= free + PAUSED_WAITING if patient else not self._queue.has_room(free):
            refusal, other = self._full(free), self._queue.make_room()
            if other is None:
                raise refusal
            _refuse(other, refusal)
        if queued := len(self._queue.waiters) >= free:
            self._watch.queued()
        if not self.asleep:
            slot = await self._wait_in_queue(deadline, queued=queued)
            return self._hand_out(slot, _checkout(slot), started)
        waking_until = max(loop.time() + self._waking_seconds, self._patient_until)
        slot = await self._wait_in_queue(waking_until, queued=queued)
        # The time of a wake-up is counted by itself: else each morning would be an alert of slow acquisitions.
        self._watch.woke(self._clock() - started)
        return self._hand_out(slot, _checkout(slot), self._clock())

    def release(self, slot: S) -> None:
        """Take back a connection that `acquire` gave; a closed or old one is replaced."""
        # There is no await in here. The garbage collector calls this too, for a session that was dropped without being
        # closed, and a cancelled request could not finish an await.
        checkout = self._out.pop(slot)
        now = self._clock()
        kept = False
        try:
            self._watch.returned(checkout, now - checkout.taken_at)
            if slot.dbapi_connection is None:
                # SQLAlchemy invalidated it, and has closed it already.
                self._watch.replaced("error")
            elif reason := self._expired(checkout, now) or checkout.connection.settle():
                self._discard(slot, reason)
            else:
                checkout.idle_since = self._returned_at = now
                kept = True
        finally:
            # Also when counting or closing failed above: a place that is not handed on is lost until the next restart,
            # and the requests in the queue would wait until their deadline.
            if kept:
                self._grant(slot)
            else:
                self._open_more()
            if self._drained is not None:
                self._note_drained()

    def take_warm(self) -> S | None:
        """Take the most recently used idle connection, or None when it needs a probe or is not usable."""
        if not self._idle or self._closed or self._pause is not None:
            return None
        now, slot = self._clock(), self._idle[-1]
        checkout: Checkout = slot.info["checkout"]
        if (
            now - checkout.idle_since >= self.settings.pool_check_after_seconds
            or self._expired(checkout, now) is not None
        ):
            return None
        if self._watch.telemetry is not None:
            self._watch.telemetry.took_idle()
        return self._hand_out(self._idle.pop(), checkout, now)

    async def _wait_in_queue(self, deadline: float, *, queued: bool) -> S:
        """Wait for a connection; `queued` says that others wait for a release too, and not for a login only."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[S] = loop.create_future()
        joined = self._clock()
        outcome: WaitOutcome = "refused"
        self._queue.join(waiter, joined)
        if self._queue.overdue:
            self._refuse_overdue()
        # A timer ends the wait, and not asyncio.timeout, which would cancel the task: a cancel in the same turn of the
        # event loop as a grant is how connections get lost (SQLAlchemy 2.0.43 and 2.1.1 lose slots in this way).
        self._open_more()
        # Read after the logins of this request have begun: one that still goes on then is what it waited for.
        timer = loop.call_at(deadline, self._expire, waiter, loop.time())
        watch = watch_client.get()
        left = None if watch is None else watch()
        give_up = partial(self._give_up, waiter)
        if left is not None:
            left.add_done_callback(give_up)
        try:
            slot = await waiter
            outcome = "granted"
        except ClientLeft:
            outcome = "cancelled"
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            if waiter.cancelled():
                self._watch.cancelled("cancelled")
            # The answer came in the same turn as the cancel. A granted connection goes to the next request. A refusal
            # granted nothing: when it was handed back all the same, the pool opened more than its capacity.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._watch.cancelled("cancelled")
                self._in_hand.discard(waiter.result())
                self._grant(waiter.result())
                self._note_drained()
            raise
        finally:
            timer.cancel()
            if left is not None:
                left.remove_done_callback(give_up)
            self._queue.leave(waiter)
            if queued:
                self._watch.waited(self._clock() - joined, outcome)
            if self._watch.telemetry is not None:
                granted = _checkout(waiter.result()) if outcome == "granted" else None
                self._tell_phases(self._watch.telemetry, joined, granted, queued=queued)
        self._in_hand.discard(slot)
        return slot

    def _tell_phases(self, telemetry: PoolTelemetry, joined: float, granted: Checkout | None, *, queued: bool) -> None:
        """Tell the time in the queue from that of the login whose connection the request was granted."""
        now = self._clock()
        if granted is None:
            telemetry.phase("wait" if queued else "connect", began=now - joined)
            return
        is_new = granted.uses == 0 and granted.opened_at >= joined
        began = now
        if is_new:
            # Behind others it waits for its turn; then, or else from the start, for a login.
            began = max(joined, granted.login_began_at) if queued else joined
        if began > joined:
            telemetry.phase("wait", began=now - joined, ended=now - began)
        if is_new:
            telemetry.phase("connect", began=now - began)

    def _grant(self, slot: S) -> None:
        """Hand a connection to the request that is next in the queue; without one, keep it idle."""
        if self._shrinking and self._is_surplus():
            self._discard(slot, "surplus")
            return
        waiter = self._queue.next(self._clock()) if self._queue.waiters and self._pause is None else None
        if self._queue.overdue:
            self._refuse_overdue()
        if waiter is not None:
            # The request wakes up in a later turn of the event loop; until then the connection counts as in hand.
            self._in_hand.add(slot)
            waiter.set_result(slot)
            return
        self._queue.idle = True
        checkout = _checkout(slot)
        # A connection to a standby that had not replayed far enough goes to the other end, where it is used last.
        self._idle.insert(0 if checkout.behind else len(self._idle), slot)
        checkout.behind = False

    def _hand_out(self, slot: S, checkout: Checkout, started: float) -> S:
        now = self._clock()
        checkout.uses += 1
        checkout.holder = holder.get()
        checkout.taken_at = now
        checkout.queried, checkout.asked_at = 0.0, None
        checkout.taken_in = self._caller() if self._trace or checkout.holder in self._watch.traced else None
        checkout.reported = False
        self._out[slot] = checkout
        self._watch.acquired(now - started, checkout.holder)
        return slot

    # Refusals.

    def _expire(self, waiter: asyncio.Future[S], queued_at: float) -> None:
        """Refuse a request at its deadline, and say what it waited for: a release, or a login."""
        if waiter.done() or self._pause is not None:
            return  # `resume` sets another deadline for those who have waited.
        loop = asyncio.get_running_loop()
        if (left := self._patient_until - loop.time()) > 0:
            loop.call_later(left, self._expire, waiter, queued_at)
            return
        self._queue.leave(waiter)
        seconds = self.settings.pool_timeout
        # A login that has gone on for as long as this request waited says that the database is away, and not that the
        # pool is small.
        connecting_hangs = any(opening.started_at <= queued_at for opening in self._openings)
        if self._failure is not None or connecting_hangs or not (self._out or self._in_hand):
            waiter.set_exception(self._unreachable())
        else:
            waiter.set_exception(self._refusal("timeout", f"No connection became free within {seconds:g} s."))

    def _refuse_overdue(self, *, everyone: bool = False) -> None:
        """Refuse the requests that the queue has removed: some at a time, unless nobody waits any more."""
        for late in self._queue.take_overdue(everyone=everyone):
            # Its patience may be over, or its client may have left.
            if not late.done():
                late.set_exception(self._refusal("overload", OVERLOAD))

    def _give_up(self, waiter: asyncio.Future[S], _left: asyncio.Future[None]) -> None:
        """Let a request go whose client has left; its place in the queue is free at once."""
        if not waiter.done():
            self._queue.leave(waiter)
            self._watch.cancelled("client_left")
            waiter.set_exception(ClientLeft("The client left while its request waited for a connection."))

    def _full(self, free: int) -> Exception:
        if free and self._failure is not None:
            return self._unreachable()
        if self._queue.stands:
            return self._refusal("overload", OVERLOAD)
        return self._refusal(
            "queue_full",
            f"All {self.settings.capacity} connections are at work and {len(self._queue.waiters)} requests wait "
            "already.",
        )

    def _refusal(self, reason: str, sentence: str) -> PoolExhausted:
        self._watch.rejected(reason)
        if self._pause is None:
            seconds = self._queue.drain_seconds(self._clock())
        else:
            seconds = self._pause.when() - asyncio.get_running_loop().time()
        return PoolExhausted(sentence, retry_after_seconds=seconds, database=self._watch.pool, reason=reason)

    def _unreachable(self) -> Exception:
        """Return the reason why no connection could be opened, as a new exception for each request.

        One exception for all of them would collect the tracebacks of all. A bug is returned as it is.
        """
        known = self._failure
        if known is None:
            reason = self._opener.waits_for()
            known = TimeoutError(
                f"no connection was opened within {self.settings.pool_timeout:g} s{f': {reason}' if reason else ''}"
            )
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
        """Check an idle connection, probe it when it was idle for long, and discard it when it fails."""
        now, checkout = self._clock(), _checkout(slot)
        reason = self._expired(checkout, now)
        if reason is None and now - checkout.idle_since >= self.settings.pool_check_after_seconds:
            # A firewall that forgot an idle connection sends neither FIN nor RST, so its socket looks open.
            # SQLAlchemy's pool_pre_ping would find that too, for three round trips at each checkout (2.1).
            self._in_hand.add(slot)
            try:
                reason = None if await _answers(checkout.connection, deadline) else "unresponsive"
            except BaseException:
                # After a cancel asyncpg asks the server to stop SELECT 1, and is busy until the server has done that.
                self._discard(slot, "unresponsive")
                raise
            finally:
                self._in_hand.discard(slot)
                self._open_more()
                self._note_drained()
                if self._watch.telemetry is not None:
                    self._watch.telemetry.phase("check", began=self._clock() - now)
        if reason is None:
            return True
        self._discard(slot, reason)
        return False

    def _expired(self, checkout: Checkout, now: float) -> str | None:
        # The event loop sees a FIN or RST in the background, so this costs no round trip.
        if checkout.connection.is_closed():
            return "closed"
        if checkout.generation != self._generation:
            return "disposed"
        worn = checkout.uses >= self.settings.pool_max_uses
        if worn:
            checkout.expires_at = min(checkout.expires_at, now)
        if now < checkout.expires_at or self._outlives(checkout):
            return None
        if worn:
            return "uses"
        return "age"

    def _outlives(self, checkout: Checkout) -> bool:
        """Say whether an old connection goes on: while no login succeeds it is better than none.

        A rotated password may reach the server minutes before it reaches this process. Closed for its age before
        anybody had tried to log in, the only connection of a quiet pool was lost, and each request was refused until
        the password came. So a login has to succeed first, once the connection has come of age. `warm_up` begins it. It
        needs a place: a pool that is full gives up one connection for it. The one that is judged is not counted.
        """
        if self._failure is not None:
            return True
        return self._connected_at < checkout.expires_at and self._opened + 1 < self.settings.capacity

    def _discard(self, slot: S, reason: str) -> None:
        self._watch.replaced(reason)
        # asyncpg says goodbye and closes without waiting for an answer, which a dead peer would never give.
        _checkout(slot).connection.terminate()
        slot.invalidate()

    # Opening.

    @property
    def _free(self) -> int:
        """Connections that may still be taken, idle or not open yet."""
        # After the pool was made smaller, more of them may be at work than it has now.
        return max(0, self.settings.capacity - len(self._out) - len(self._in_hand))

    def _open_more(self) -> None:
        """Open what the queue needs: few at a time, and never more than the pool may hold."""
        if not self._queue.waiters or self._closed or self._pause is not None:
            return
        opening = len(self._openings)
        room = self._free - len(self._idle)
        loop = next(iter(self._queue.waiters)).get_loop()
        # One login wakes a sleeping database; the others begin when it has succeeded.
        at_once = 1 if self.asleep else OPENED_AT_ONCE
        for _ in range(min(len(self._queue.waiters), room, at_once) - opening):
            self._start_login(loop)

    def _start_login(self, loop: asyncio.AbstractEventLoop) -> None:
        opening = self._begin_opening(loop)
        seconds = self.settings.wake_seconds if opening.waking else self._opener.login_seconds
        # A context of its own: in that of a request, the log lines of the login would carry the request's id.
        task = loop.create_task(self._open_one(opening, seconds), context=Context())
        self._login_tasks.add(task)
        task.add_done_callback(self._login_tasks.discard)

    def _begin_opening(self, loop: asyncio.AbstractEventLoop) -> _Opening:
        opening = _Opening(loop.time(), self._generation, waking=self.asleep)
        self._openings.add(opening)
        return opening

    async def _open_one(self, opening: _Opening, seconds: float) -> None:
        """Open a connection within `seconds`, and give it to the request that is then first in the queue."""
        started = self._clock()
        try:
            deadline = asyncio.get_running_loop().time() + seconds
            slot, connection = await self._opener.open_slot(deadline, waking=opening.waking)
        except Exception as error:  # noqa: BLE001  # The edge of a task; the waiting requests are refused.
            self._openings.discard(opening)
            self._refuse_waiting(error, opening)
        else:
            self._openings.discard(opening)
            now = self._clock()
            # A tenth of the lifetime is left to chance. Without it the connections that were opened together end
            # together, and the requests that meet them all wait for logins.
            lifetime = self.settings.pool_recycle * random.uniform(0.9, 1.0)  # noqa: S311  # Not a secret.
            slot.info["checkout"] = Checkout(
                connection, now, now + lifetime, opening.generation, idle_since=now, login_began_at=started
            )
            self._failure, self._connected_at = None, now
            self._watch.connected(now - started)
            self._arrive(slot, opening)
        finally:
            self._openings.discard(opening)
            self._open_more()
            self._note_drained()

    def _arrive(self, slot: S, opening: _Opening) -> None:
        checkout = _checkout(slot)
        # A login that was under way during a failover may lead to the old primary.
        if opening.keep is not None and checkout.connection.server != opening.keep:
            self._discard(slot, "superseded")
        elif self._queue.waiters:
            # When `dispose` was called during the login, it holds for this connection too: it serves the request that
            # waits now and is closed at its release. Pooled, it led later requests to the server that was left.
            self._grant(slot)
        elif checkout.generation != self._generation:
            self._discard(slot, "disposed")
        elif self._shrinking and self._is_surplus():
            self._discard(slot, "surplus")
        else:
            self._idle.insert(0, slot)

    def _refuse_waiting(self, error: Exception, opening: _Opening) -> None:
        """Tell the requests that waited for this login; those that a release may still serve wait on.

        SQLAlchemy's QueuePool (2.1) wakes none of them, so after an outage they wait until their timeout.
        """
        known, self._failure = self._failure, error
        self._failed_at = self._clock()
        # Several logins end with one cause when they waited for one search of the hosts: one failure, counted once.
        known_already = known is not None and known.__cause__ is not None and known.__cause__ is error.__cause__
        if not known_already:
            self._watch.connect_failed()
        refused = len(self._queue.waiters)
        if self._pause is not None or password_is_late(error, self.settings):
            # The requests wait until their own deadlines: the next login asks for the password again.
            refused = 0
        elif self.asleep and not opening.waking:
            # The database went to sleep during this login. The next login has the time to wake it.
            refused = 0
        elif self._out or self._in_hand:
            # The checked out connections will be released, and serve the queue. So nobody is refused when the server is
            # only full, and otherwise only as many requests as the pool had room for: they waited for this login.
            full = (sqlstate(error) or "").startswith(SERVER_FULL)
            refused = 0 if full or known_already else min(refused, self._free)
        for _ in range(refused):
            waiter = self._queue.pop_oldest()
            if not waiter.done():
                waiter.set_exception(self._unreachable())

    # Figures for operators.

    def figures(self) -> PoolFigures:
        """Count, without waiting for anything."""
        settings, free, waiting = self.settings, self._free, len(self._queue.waiters)
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
        """Requests that hold a connection or wait for one."""
        return len(self._out) + len(self._in_hand) + len(self._queue.waiters)

    @property
    def leaving(self) -> int:
        """Connections at work that are closed at their release, since the pool was renewed or made smaller."""
        outdated = sum(checkout.generation != self._generation for checkout in self._out.values())
        return max(outdated, len(self._out) + len(self._in_hand) - self.settings.capacity)

    def holdings(self) -> list[Holding]:
        """List the checkouts that are open, longest first."""
        now = self._clock()
        checkouts = sorted(self._out.values(), key=lambda t: t.taken_at)
        return [holding_of(t, now) for t in checkouts]

    def newly_long_held(self, seconds: float) -> list[Holding]:
        """List the checkouts that have been held for longer than `seconds`, each of them once."""
        now, found = self._clock(), []
        for checkout in self._out.values():
            if now - checkout.taken_at >= seconds and not checkout.reported:
                checkout.reported = True
                self._watch.traced.add(checkout.holder)
                found.append(holding_of(checkout, now))
        return found

    # A database that sleeps.

    @property
    def asleep(self) -> bool:
        """Whether the database sleeps when nobody asks it, and this pool has no connection to it."""
        if not self.settings.sleeps or self._out or self._in_hand:
            return False
        # A server that goes to sleep closes them; to ask it then would wake it up again.
        return all(_checkout(slot).connection.is_closed() for slot in self._idle)

    @property
    def asked(self) -> bool:
        """Whether requests use the database, did within `pool_idle_seconds`, or failed to reach it within them."""
        return not self.asleep or self._failed_lately

    def wake(self) -> None:
        """Begin to open a connection, unless one is open or being opened."""
        if not self._opened and not self._closed:
            self._start_login(asyncio.get_running_loop())

    def let_sleep(self) -> bool:
        """Close the idle connections, unless requests use the database or failed to; return whether nobody does."""
        if self.load or self._failed_lately:
            return False
        self.dispose()
        return True

    @property
    def _failed_lately(self) -> bool:
        return self._clock() - self._failed_at < self.settings.pool_idle_seconds

    # Upkeep, which `Databases` calls.

    async def warm_up(self) -> None:
        """Open connections until `warm_size` are open, and one in the place of those that have come of age.

        Without it the first requests after a start, or after many minutes, wait for logins.

        Raises: DatabaseUnreachable when one cannot be opened within `connect_timeout_seconds`; the others stay open.
        """
        while self._lacks_connections and not self._closed:
            opening = self._begin_opening(asyncio.get_running_loop())
            await self._open_one(opening, self.settings.connect_timeout_seconds)
            if self._failure is not None:
                raise self._unreachable()

    @property
    def _lacks_connections(self) -> bool:
        if self._opened < self.settings.warm_size:
            return True
        if self._opened >= self.settings.capacity:
            return False
        now, failed = self._clock(), self._failure is not None
        # An old connection beyond `warm_size` that nobody has used since ends for idling; a database that sleeps is not
        # woken for it.
        all_needed = failed or self._opened <= self.settings.warm_size
        idle = [each for each in map(_checkout, self._idle) if all_needed or each.idle_since >= each.expires_at]
        old = [each for each in (*idle, *self._out.values()) if now >= each.expires_at]
        # The login that succeeds lets `tend` close those that are old.
        return any(failed or self._connected_at < each.expires_at for each in old)

    @property
    def _opened(self) -> int:
        """Connections that are open or being opened."""
        return len(self._idle) + len(self._out) + len(self._in_hand) + len(self._openings)

    def tend(self) -> None:
        """Close connections that are too old, idle for too long, or idle beyond the pool's size.

        It runs in the background. SQLAlchemy's pool_recycle acts at a checkout only (2.1), so after a quiet night each
        request would wait for a login. SQLAlchemy closes overflow connections at their release, so a load just above
        the pool's size would log in all the time.
        """
        now, settings = self._clock(), self.settings
        spare = self._opened - settings.warm_size
        surplus = self._opened - settings.pool_size
        for slot in tuple(self._idle):  # The one idle for longest comes first.
            self._idle.remove(slot)
            checkout = _checkout(slot)
            idle = now - checkout.idle_since
            reason = self._expired(checkout, now)
            if reason is None and surplus > 0 and idle >= settings.pool_overflow_idle_seconds:
                reason = "surplus"
            if reason is None and spare > 0 and idle >= settings.pool_idle_seconds:
                reason = "idle"
            if reason is None:
                self._idle.append(slot)
                continue
            spare, surplus = spare - 1, surplus - 1
            self._discard(slot, reason)

    # The end, of the connections or of the pool.

    def abandon(self, *, keep: float | None = None) -> None:
        """Drop every connection, checked out or not: the server behind them is gone or is the wrong one.

        Connections to the server `keep` stay. Without this the writes that waited for a primary which had been replaced
        held their connections until command_timeout, and nearly all others were refused as pool_exhausted meanwhile.
        """
        for slot in (*self._idle, *self._in_hand, *self._out):
            connection = _checkout(slot).connection
            if keep is None or connection.server != keep:
                # A holder is in the middle of a statement, so its socket is cut: asyncpg's terminate() takes the
                # protocol away from under the statement, and its AttributeError was a 500 (see
                # `KeptAliveConnection.cut`).
                connection.cut() if slot in self._out or slot in self._in_hand else connection.terminate()
        for opening in self._openings:
            opening.keep = keep
        self.tend()

    def dispose(self) -> None:
        """Close the idle connections; the others are closed at their release."""
        self._generation += 1
        idle, self._idle = self._idle, []
        for slot in idle:
            self._discard(slot, "disposed")

    def pause(self, seconds: float) -> None:
        """Hand out no connection until `resume`, or for `seconds`: requests wait, checkouts go on until their end."""
        if self._pause is not None:
            self._pause.cancel()
        # During a pause nobody's patience ends, and nothing is granted.
        self._refuse_overdue(everyone=True)
        self._pause = asyncio.get_running_loop().call_later(seconds, self.resume)
        self._patient_until = self._pause.when() + self._resumed_seconds
        # A queue that grew before holds all who come now.
        self._queue.calm_until = self._clock() + seconds + self._resumed_seconds

    def resume(self) -> None:
        """End a pause: all connections are replaced, and for RESUMED_SECONDS nobody is refused for having waited.

        A database that sleeps gets the time to wake up.
        """
        if self._pause is None:
            return
        self._pause.cancel()
        self._pause = None
        self._failure = None
        self.renew()
        loop = asyncio.get_running_loop()
        for waiter in self._queue.waiters:
            loop.call_at(self._patient_until, self._expire, waiter, loop.time())

    def renew(self) -> None:
        """Replace all connections as `dispose` does, and refuse nobody for having waited in the RESUMED_SECONDS after.

        Requests wait for logins meanwhile. With `pool_timeout`, and in a queue that has to be kept short, some were
        refused for that.
        """
        self.dispose()
        seconds = self._resumed_seconds
        self._patient_until = max(self._patient_until, asyncio.get_running_loop().time() + seconds)
        self._queue.calm_until = self._clock() + seconds
        self._open_more()

    def resize(self, settings: DatabaseSettings) -> None:
        """Take the size of these settings. Of too many connections those at work are closed at their release."""
        self.settings = self._queue.settings = settings
        self._shrinking = True
        surplus = max(0, len(self._idle) - self._free)
        # The connection that has been idle for longest comes first.
        closing, self._idle = self._idle[:surplus], self._idle[surplus:]
        for slot in closing:
            self._discard(slot, "surplus")
        self._open_more()

    def _is_surplus(self) -> bool:
        """Whether a connection that is in none of the figures now is one more than the pool may hold."""
        if len(self._idle) + len(self._out) + len(self._in_hand) >= self.settings.capacity:
            return True
        # A login that began in the larger pool may still add one.
        self._shrinking = bool(self._openings)
        return False

    @property
    def patience_seconds(self) -> float:
        """The seconds for which a request that comes now may wait; in a pause and soon after it they are more."""
        return max(self.settings.pool_timeout, self._patient_until - asyncio.get_running_loop().time())

    @property
    def _resumed_seconds(self) -> float:
        return self._waking_seconds if self.asleep else RESUMED_SECONDS

    @property
    def _waking_seconds(self) -> float:
        return self.settings.wake_seconds + TELL_SECONDS

    def leave_demoted(self) -> bool:
        """Dispose of the connections to a server that takes no writes; return whether that was done.

        It is done once in RENEW_SECONDS: as long as the address leads to that server, new connections are no better.
        Without it, behind a fixed address, pooled connections to a demoted primary failed with 25006 for ever.
        """
        now = self._clock()
        if now - self._renewed_at < RENEW_SECONDS:
            return False
        self._renewed_at = now
        self.dispose()
        return True

    def cut_unanswered(self, seconds: float) -> int:
        """Cut the connections whose statement got no answer for `seconds`; return how many these were.

        Nothing is cut when another connection was released in good order meanwhile: the server answers, and the
        statement is slow. Nothing is cut behind a pooler either: there the monitor's probe waited in the pooler's queue
        while all server connections waited for one lock, and writers on a healthy server were cut.
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
        """Refuse all requests from now on, the waiting ones too. Checked out connections stay with their holders."""
        self._closed = True
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self._refuse_overdue(everyone=True)
        for waiter in list(self._queue.waiters):
            self._queue.leave(waiter)
            if not waiter.done():
                waiter.set_exception(self._refusal("closing", "The service is shutting down."))
        for task in self._login_tasks:
            task.cancel()

    async def drained(self, timeout_seconds: float) -> bool:
        """Wait until no connection is checked out, for `timeout_seconds` at most; return whether that happened."""
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
        """Return the line that asked for a connection: the first outside this library and SQLAlchemy."""
        frame = self._opener.frame()
        while _module(frame).startswith(("pglifeguard.", "sqlalchemy.")) and frame.f_back is not None:
            frame = frame.f_back
        return f"{_module(frame)}:{frame.f_lineno} in {frame.f_code.co_name}"


async def _answers(connection: KeptAliveConnection, deadline: float) -> bool:
    # A timer cuts the socket, which ends the wait; a cancel would depend on the server, which may be mute. Half of the
    # time that is left is kept for another connection.
    loop = asyncio.get_running_loop()
    timer = loop.call_at((loop.time() + deadline) / 2, connection.cut)
    try:
        # execute("") would be the shortest probe, but asyncpg 0.32 crashes on it.
        await connection.execute("SELECT 1")
    except DRIVER_FAILURES:
        return False
    finally:
        timer.cancel()
    return True


def _refuse(waiter: "asyncio.Future[Any]", error: Exception) -> None:
    # Its client may have left in this turn of the event loop.
    if not waiter.done():
        waiter.set_exception(error)


def _checkout(slot: Slot) -> Checkout:
    checkout: Checkout = slot.info["checkout"]
    return checkout


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
