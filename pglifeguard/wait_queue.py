"""The requests that wait for a connection of a pool: who is next, and who is told at once not to wait.

A queue that keeps emptying is served first come, first served: a burst is served whole, as long as its last request
gets its turn within its patience. A queue that grows is another matter. Whoever is served from it has waited for nearly
the whole patience, however long that is. So there are three states:

- calm: first come, first served;
- growing, when in the last interval many more requests came than were served, or more than were served while the queue
  was long already: the newest is served first, so that those who are served have not waited for long, and the others
  wait for the end of the burst, as many of them as could be served after it;
- standing, when it has grown for several intervals: it keeps as many requests as can be served within the target, and
  refuses all others at once. It ends when the queue is empty, and is remembered for a moment.

Where clients are told apart (`client_key`), each has a line of its own and they take turns, so one with many requests
in flight does not keep the others waiting; in a full queue it makes room for them. While the queue stands a client may
wait in its own line, which is served newest first.

The idea is that of controlled delay (Nichols and Jacobson, "Controlling Queue Delay", ACM Queue 2012) and of adaptive
LIFO (Maurer, "Fail at Scale", ACM Queue 2015). Decision 0031 says what was measured. Times are seconds of the pool's
clock.
"""

import asyncio
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Generic, TypeVar

from pglifeguard.database_settings import DatabaseSettings

# An interval has at least this many seconds, and as many as it takes to serve so many requests, by each connection one.
# With twice as long ones, those who came in the first tenth of a second of an overload waited for that long.
INTERVAL_SECONDS = 0.05
INTERVAL_SERVED = 8
# A server that serves nobody for this long stands still.
STILL_SECONDS = 0.1
# A queue grows when this many times as many requests came in an interval as were served. Requests that come at random,
# at nine tenths of the capacity, do so in few intervals, and hardly ever in several in a row.
GROWTH = 1.5
# A queue whose last request will wait for this part of its patience grows also when hardly more come than are served.
LONG = 0.7
# A queue that grows holds this many times as many requests as can be served within their patience: a few of them tell
# the rate.
HELD = 1.25
# Requests that are refused when a connection is granted. Hundreds at once held the event loop for a fifth of a second.
REFUSED_AT_ONCE = 6
# Intervals of growth after which the queue stands; one without growth takes one off. A burst that can be served in time
# is over by then: three times the capacity may come for 0.2 s, and takes a busy event loop longer to notice.
STANDING_AFTER = 7
# A queue that stands is empty after the target without a request, and requests pause for longer than that. Those that
# come so soon after it stood find it one interval of growth away from that, not a whole burst.
REMEMBERED_SECONDS = 0.3

# On whose behalf a connection is acquired in this context: a token's subject, a tenant; None tells nobody apart.
client_key: ContextVar[str | None] = ContextVar("client_key", default=None)
# How a request of this context begins to watch its client. It returns a future that is done once the client has left,
# or None when the request is to be served all the same.
watch_client: ContextVar[Callable[[], asyncio.Future[None] | None] | None] = ContextVar("watch_client", default=None)
S = TypeVar("S")


class WaitQueue(Generic[S]):
    """The waiting requests, oldest first: `waiters` maps their futures to the time and the client of each.

    Set `idle` when a connection is free and nobody waits for it: this ends every state. Until `calm_until` it is not
    judged: the pool renews its connections, and requests wait for logins. `settings` may be replaced by another size.
    """

    def __init__(self, settings: DatabaseSettings) -> None:
        self.settings = settings
        self.waiters: OrderedDict[asyncio.Future[S], tuple[float, str | None]] = OrderedDict()
        # The requests of each client that has some, oldest first; the client whose turn it is comes first.
        self._lines: OrderedDict[str | None, OrderedDict[asyncio.Future[S], None]] = OrderedDict()
        self.idle = True
        self.calm_until = float("-inf")
        # The current interval: its start, and the requests that came and that were served in it.
        self._began = self._served_at = 0.0
        self._came = self._served = 0
        # The interval before: its start, and the requests that were served in it.
        self._before = (0.0, 0)
        # Intervals of growth, those without it taken off.
        self._grown = 0
        # Requests that a standing queue keeps; None while it does not stand.
        self._limit: int | None = None
        # Requests that were removed because they would be served too late, and are not told yet.
        self.overdue: deque[asyncio.Future[S]] = deque()

    @property
    def stands(self) -> bool:
        """Whether the queue has to be kept short."""
        return self._limit is not None and not self.idle

    def has_room(self, free: int) -> bool:
        """Whether a request of this context's client may wait; `free` others wait for a login only."""
        waiting, client = len(self.waiters), client_key.get()
        if waiting >= free + self.settings.pool_max_waiting:
            return False
        if self._limit is None or self.idle:
            return True
        if client is None:
            return waiting < free + self._limit
        # One more in a client's own line keeps nobody else waiting. Refused at once, it would come back at once.
        return client in self._lines or len(self._lines) < free + self._limit

    def patience(self, seconds: float) -> float:
        """Return for how many of these seconds a request of this context's client may wait.

        A client with more requests in the queue than can be served at once gets a random part for each further one.
        When 200 requests that had come at once were refused at once, their client sent them again at once, and twice a
        second all others waited for a tenth of a second.
        """
        client = client_key.get()
        if client is None or len(self._lines.get(client, ())) < self.settings.capacity:
            return seconds
        return random.uniform(seconds / 2, seconds)  # noqa: S311  # No secret.

    def count_arrival(self, now: float) -> None:
        """Count a request that found no connection, whether it then joins or is refused."""
        if self.idle:
            stood = self._limit is not None and now - self._served_at <= REMEMBERED_SECONDS
            self._grown = STANDING_AFTER - 1 if stood else 0
            self.idle, self._limit, self._served_at = False, None, now
            self._begin(now)
            self._before = (now, 0)
        self._came += 1

    def join(self, waiter: asyncio.Future[S], now: float) -> None:
        """Append a request of this context's client."""
        client = client_key.get()
        self.waiters[waiter] = (now, client)
        self._lines.setdefault(client, OrderedDict())[waiter] = None
        if self._grown and self._limit is None and self._holds_too_many(now):
            self._push_out()

    def leave(self, waiter: asyncio.Future[S]) -> None:
        """Remove a request; nothing happens when it is not there."""
        _, client = self.waiters.pop(waiter, (0.0, None))
        line = self._lines.get(client, OrderedDict())
        line.pop(waiter, None)
        if not line:
            self._lines.pop(client, None)

    def make_room(self) -> asyncio.Future[S] | None:
        """Remove and return the newest request of the longest line, if that is longer than that of this client."""
        if not self._lines:
            return None
        longest = max(self._lines.values(), key=len)
        if len(longest) <= len(self._lines.get(client_key.get(), ())) + 1:
            return None
        newest = next(reversed(longest))
        self.leave(newest)
        return newest

    def pop_oldest(self) -> asyncio.Future[S]:
        """Remove and return the request that has waited longest."""
        oldest = next(iter(self.waiters))
        self.leave(oldest)
        return oldest

    def next(self, now: float) -> asyncio.Future[S] | None:
        """Remove and return the request that gets the connection that is free now; None when nobody waits."""
        while self._lines:
            client, line = next(iter(self._lines.items()))
            # A standing queue lets a client wait in its own line, which may be long.
            newest_first = self._grown > 0 if self._limit is None else client is not None
            waiter = next(reversed(line)) if newest_first else next(iter(line))
            self.leave(waiter)
            if client in self._lines:
                self._lines.move_to_end(client)
            if not waiter.done():
                if now - self._served_at > STILL_SECONDS:
                    # The server stood still, and those who came meanwhile are no overload. Nor does the time of its
                    # standstill tell how fast it serves.
                    self._begin(now)
                    self._before = (now, 0)
                self._served, self._served_at = self._served + 1, now
                self._judge(now)
                return waiter
        return None

    def drain_seconds(self, now: float) -> float:
        """Estimate how long those who wait take to be served, at the rate of late; 0 when none has been served yet."""
        began, served = self._before
        served += self._served
        return len(self.waiters) * (now - began) / served if served else 0.0

    def take_overdue(self, *, everyone: bool = False) -> list[asyncio.Future[S]]:
        """Return requests that the queue has removed, to be told so: a few of them, but all once nobody waits."""
        overdue = len(self.overdue)
        number = overdue if everyone or not self.waiters else min(overdue, REFUSED_AT_ONCE)
        return [self.overdue.popleft() for _ in range(number)]

    def _judge(self, now: float) -> None:
        """At the end of an interval, find out whether the queue has grown in it, and what it may hold."""
        if now < self.calm_until:
            self._grown, self._limit = 0, None
            self._begin(now)
            return
        seconds = now - self._began
        if seconds < INTERVAL_SECONDS or self._served < max(INTERVAL_SERVED, self.settings.capacity):
            return
        target, rate = self.settings.pool_queue_target_seconds, self._served / seconds
        late = bool(self.waiters) and now - self._oldest > target > 0
        long = len(self.waiters) >= rate * self.settings.pool_timeout * LONG
        grows = late and self._came >= self._served * (1.0 if long else GROWTH)
        self._grown = self._grown + 1 if grows else max(0, self._grown - 1)
        if self._limit is None and self._grown >= STANDING_AFTER:
            self._keep_newest(self._most(rate), joined_since=now - target)
        if self._limit is not None or self._grown >= STANDING_AFTER:
            self._limit = self._most(rate)
        self._begin(now)

    def _holds_too_many(self, now: float) -> bool:
        """Say whether not all who wait can be served in their patience, unless the server stands still or is new."""
        judged = now - self._served_at <= STILL_SECONDS and now >= self.calm_until
        return judged and self.drain_seconds(now) > self.settings.pool_timeout * HELD

    def _push_out(self) -> None:
        """Remove the request that would be served last: the oldest of the longest line."""
        # Of lines that are equally long, the one whose turn comes last.
        longest = max(reversed(self._lines.values()), key=len)
        last = next(iter(longest))
        self.leave(last)
        self.overdue.append(last)

    def _most(self, rate: float) -> int:
        """Count the requests that are served within the target; all connections are kept at work in any case."""
        return max(self.settings.capacity, math.ceil(rate * self.settings.pool_queue_target_seconds))

    def _keep_newest(self, number: int, *, joined_since: float) -> None:
        """Remove other requests without a client: who would be served next has waited for too long already."""
        line = list(self._lines.get(None, ()))
        for place, waiter in enumerate(line):
            if len(line) - place > number or self.waiters[waiter][0] < joined_since:
                self.leave(waiter)
                self.overdue.append(waiter)

    @property
    def _oldest(self) -> float:
        """When the request that waits longest has joined."""
        return next(iter(self.waiters.values()))[0]

    def _begin(self, now: float) -> None:
        self._before = (self._began, self._served)
        self._began, self._came, self._served = now, 0, 0
