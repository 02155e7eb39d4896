"""The queue in front of a pool, with a clock of its own: bursts are served whole, and overload keeps nobody waiting."""

import asyncio
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.wait_queue import WaitQueue, client_key

CONNECTIONS = 4
SERVICE_SECONDS = 0.02
PER_SECOND = CONNECTIONS / SERVICE_SECONDS
PATIENCE_SECONDS = 0.5


def settings(**changed: float) -> DatabaseSettings:
    """Return the settings of a pool of four."""
    sizes = {"pool_size": CONNECTIONS, "max_overflow": 0, "pool_timeout": PATIENCE_SECONDS}
    return DatabaseSettings.model_validate({"url": "postgresql://u:p@h/d"} | sizes | changed)


@dataclass
class Outcome:
    """What became of the requests of one run: seconds until the answer, by how it ended."""

    served: list[float] = field(default_factory=list)
    served_at: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    order: list[int] = field(default_factory=list)
    most_waiting: int = 0

    def p99(self) -> float:
        """Return the 99th percentile of those that were served."""
        return sorted(self.served)[int(0.99 * len(self.served))]


class Simulation:
    """Four connections that take 20 ms for each request, and the queue in front of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, seconds: float = SERVICE_SECONDS, **changed: float) -> None:
        self._loop = loop
        self.settings = settings(**changed)
        self.queue: WaitQueue[int] = WaitQueue(self.settings)
        self._seconds = seconds
        self._free = CONNECTIONS
        self._events: list[tuple[float, int, str, int]] = []
        self._numbers = itertools.count()
        self._came: dict[int, float] = {}
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self.outcome = Outcome()

    def run(self, arrivals: Iterator[float]) -> Outcome:
        """Let requests arrive at these times, and go on until the last one has ended."""
        for at in arrivals:
            self._plan(at, "arrival", next(self._numbers))
        while self._events:
            now, _, event, request = heapq.heappop(self._events)
            getattr(self, f"_{event}")(now, request)
        return self.outcome

    def _plan(self, at: float, event: str, request: int) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), event, request))

    def _arrival(self, now: float, request: int) -> None:
        self._came[request] = now
        if self._free:
            self._free -= 1
            self._serve(now, request)
            return
        self.queue.count_arrival(now)
        if not self.queue.has_room(0):
            self.outcome.refused["overload" if self.queue.stands else "full"] += 1
            return
        waiter: asyncio.Future[int] = self._loop.create_future()
        self.queue.join(waiter, now)
        self._waiting[request] = waiter
        self.outcome.most_waiting = max(self.outcome.most_waiting, len(self.queue.waiters))
        self._plan(now + self.settings.pool_timeout, "deadline", request)

    def _deadline(self, _now: float, request: int) -> None:
        waiter = self._waiting.pop(request, None)
        if waiter is not None and waiter in self.queue.waiters:
            self.queue.leave(waiter)
            waiter.cancel()
            self.outcome.refused["timeout"] += 1

    def _release(self, now: float, request: int) -> None:
        self.outcome.served.append(now - self._came[request])
        self.outcome.served_at.append(now)
        chosen = self.queue.next(now)
        for late in self.queue.take_overdue():
            late.cancel()
            self.outcome.refused["late"] += 1
        if chosen is None:
            self.queue.idle = True
            self._free += 1
            return
        chosen.cancel()
        self._serve(now, next(number for number, waiter in self._waiting.items() if waiter is chosen))

    def _serve(self, now: float, request: int) -> None:
        self._waiting.pop(request, None)
        self.outcome.order.append(request)
        self._plan(now + self._seconds, "release", request)


def evenly(rate: float, seconds: float, *, begin: float = 0.0) -> Iterator[float]:
    """Let requests come at a fixed rate."""
    return (begin + number / rate for number in range(round(rate * seconds)))


def at_random(rate: float, seconds: float) -> Iterator[float]:
    """Let requests come as those of independent clients do."""
    chance, now = random.Random(7), 0.0  # noqa: S311  # A load, not a secret.
    while (now := now + chance.expovariate(rate)) < seconds:
        yield now


@pytest.fixture
async def loop() -> asyncio.AbstractEventLoop:
    """Give the loop that the futures belong to."""
    return asyncio.get_running_loop()


@pytest.mark.parametrize("come", [evenly, at_random])
@pytest.mark.parametrize("load", [2, 3, 5])
async def test_overload_keeps_nobody_waiting(loop: asyncio.AbstractEventLoop, load: int, come: type) -> None:
    """At two to five times the capacity all of it is used, and who is served is served in four times what it takes."""
    seconds = 10

    outcome = Simulation(loop).run(come(load * PER_SECOND, seconds))

    assert len(outcome.served) >= 0.95 * PER_SECOND * seconds
    assert outcome.p99() <= 0.08
    # Most others are told at once: those who came before it was known to be an overload are told after a wait.
    assert outcome.refused["overload"] >= 0.8 * outcome.refused.total()


async def test_overload_is_not_over_by_a_pause(loop: asyncio.AbstractEventLoop) -> None:
    """When nothing comes for a moment the short queue is empty; those who come then are not held for another burst."""
    rate = 2 * PER_SECOND

    whole = Simulation(loop).run(evenly(rate, 4))
    paused = Simulation(loop).run(itertools.chain(evenly(rate, 2), evenly(rate, 2, begin=2.1)))

    held = [outcome.refused.total() - outcome.refused["overload"] for outcome in (whole, paused)]
    assert held[1] <= held[0] + 0.1 * PER_SECOND


async def test_overload_is_forgotten(loop: asyncio.AbstractEventLoop) -> None:
    """Half a second after it, a burst that can be served in time is served whole again."""
    overload = list(evenly(3 * PER_SECOND, 2))
    burst = list(evenly(3 * PER_SECOND, 0.2, begin=2.5))

    alone = Simulation(loop).run(iter(overload))
    both = Simulation(loop).run(itertools.chain(overload, burst))

    assert len(both.served) == len(alone.served) + len(burst)


@pytest.mark.parametrize("client", [None, "gateway"])
async def test_growing_queue_holds_as_many_as_can_be_served(
    loop: asyncio.AbstractEventLoop, client: str | None
) -> None:
    """Before it is known to be an overload those who are too many are told one by one, and not hundreds at a time."""
    client_key.set(client)

    outcome = Simulation(loop).run(evenly(5 * PER_SECOND, 0.4))

    assert outcome.most_waiting <= 1.5 * PER_SECOND * PATIENCE_SECONDS
    assert outcome.refused["late"] >= 100


async def test_last_one_that_would_be_served_is_pushed_out(loop: asyncio.AbstractEventLoop) -> None:
    """The oldest of the longest line; where all lines are equally long, the one that has come."""
    queue: WaitQueue[int] = WaitQueue(settings())
    queue.count_arrival(0.0)
    waiters = [loop.create_future() for _ in range(6)]
    for waiter, client in zip(waiters, ["one", "other", "one", "other", "one", "new"], strict=True):
        client_key.set(client)
        queue.join(waiter, 0.0)

    for _ in range(4):
        queue._push_out()

    assert queue.take_overdue() == [waiters[0], waiters[1], waiters[2], waiters[5]]


async def test_few_are_refused_at_a_time(loop: asyncio.AbstractEventLoop) -> None:
    """Each costs the event loop an answer, and those who are served wait meanwhile. Once nobody waits, all are told."""
    queue: WaitQueue[int] = WaitQueue(settings())
    waiters = [loop.create_future() for _ in range(21)]
    for waiter in waiters:
        queue.join(waiter, 0.0)
    for _ in range(20):
        queue._push_out()

    few, others = queue.take_overdue(), queue.take_overdue()
    queue.leave(waiters[20])

    assert few + others == waiters[:12]
    assert queue.take_overdue() == waiters[12:20]


@pytest.mark.parametrize("load", [2, 3, 5])
async def test_overload_by_one_client_keeps_its_answers_fast(loop: asyncio.AbstractEventLoop, load: int) -> None:
    """All requests may have one token, a gateway's: they may wait in line, and who is served has not waited for long.

    When the overload ends, those who still wait are served.
    """
    client_key.set("gateway")
    seconds = 10

    outcome = Simulation(loop).run(at_random(load * PER_SECOND, seconds))

    waits = [waited for waited, at in zip(outcome.served, outcome.served_at, strict=True) if at <= seconds]
    assert len(waits) >= 0.95 * PER_SECOND * seconds
    assert sorted(waits)[int(0.99 * len(waits))] <= 0.1
    assert max(outcome.served_at) <= seconds + PATIENCE_SECONDS + SERVICE_SECONDS


async def test_plain_queue_lets_everybody_wait(loop: asyncio.AbstractEventLoop) -> None:
    """With a target of 0 the queue is first come, first served, whatever comes: all wait for their whole patience."""
    outcome = Simulation(loop, pool_queue_target_seconds=0).run(evenly(3 * PER_SECOND, 5))

    assert outcome.p99() >= PATIENCE_SECONDS
    assert outcome.refused.keys() == {"full", "timeout"}
    assert outcome.order == sorted(outcome.order)


@pytest.mark.parametrize("come", [evenly, at_random])
async def test_nothing_is_shed_at_nine_tenths(loop: asyncio.AbstractEventLoop, come: type) -> None:
    """A queue that keeps emptying is served whole, and in the order of arrival unless it grows for a moment."""
    outcome = Simulation(loop).run(come(0.9 * PER_SECOND, 60))

    in_order = sum(one < other for one, other in itertools.pairwise(outcome.order))
    assert outcome.refused.total() == 0
    assert in_order >= 0.95 * len(outcome.order)


async def test_burst_is_served_whole(loop: asyncio.AbstractEventLoop) -> None:
    """Three times the capacity for 0.2 s is cleared within the patience, so nobody is refused."""
    outcome = Simulation(loop).run(evenly(3 * PER_SECOND, 0.2))

    assert outcome.refused.total() == 0
    assert max(outcome.served) <= PATIENCE_SECONDS + SERVICE_SECONDS


async def test_normal_returns_when_the_overload_ends(loop: asyncio.AbstractEventLoop) -> None:
    """From half a second after the overload on, half a load waits for nothing."""
    simulation = Simulation(loop)
    later = itertools.chain(evenly(3 * PER_SECOND, 3), evenly(PER_SECOND / 2, 2, begin=3.5))

    outcome = simulation.run(later)

    assert outcome.served[-round(PER_SECOND) :] == pytest.approx([SERVICE_SECONDS] * round(PER_SECOND))
    assert not simulation.queue.stands


async def test_slow_work_keeps_all_connections_busy(loop: asyncio.AbstractEventLoop) -> None:
    """Where a request takes longer than the target, as many may wait as there are connections."""
    outcome = Simulation(loop, seconds=0.2).run(evenly(3 * CONNECTIONS / 0.2, 20))

    assert len(outcome.served) >= 0.95 * 20 * CONNECTIONS / 0.2


async def test_server_that_stands_still_is_no_overload(loop: asyncio.AbstractEventLoop) -> None:
    """Those who came while no connection came back are served in their order, and wait with their whole patience."""
    queue = Simulation(loop).queue
    waiters = [loop.create_future() for _ in range(80)]
    for number, waiter in enumerate(waiters):
        queue.count_arrival(number * 0.005)
        queue.join(waiter, number * 0.005)

    served = [queue.next(0.4 + number * 0.005) for number in range(80)]

    assert served == waiters
    assert queue.take_overdue() == []


async def test_standstill_of_a_growing_queue_is_no_slowness(loop: asyncio.AbstractEventLoop) -> None:
    """Its time tells nothing about how fast the server serves: who can be served in time afterwards is kept."""
    queue = Simulation(loop).queue
    for number in range(90):
        now = number / (3 * PER_SECOND)
        queue.count_arrival(now)
        queue.join(loop.create_future(), now)
        if number % 3 == 0:
            queue.next(now)
    assert queue._grown

    for number in range(20):
        now = 0.45 + number / PER_SECOND
        queue.next(now)
        queue.count_arrival(now)
        queue.join(loop.create_future(), now)

    assert len(queue.waiters) == 60
    assert queue.take_overdue() == []


async def test_renewal_of_the_connections_is_no_overload(loop: asyncio.AbstractEventLoop) -> None:
    """While requests wait for logins nobody is told that the queue is kept short; afterwards it is, when it grows."""
    simulation = Simulation(loop)
    simulation.queue.calm_until = 2.0

    outcome = simulation.run(evenly(3 * PER_SECOND, 2.0))

    assert not outcome.refused.keys() & {"overload", "late"}
    assert simulation.run(evenly(3 * PER_SECOND, 5, begin=3)).refused["overload"]


async def test_request_that_has_ended_gets_no_turn(loop: asyncio.AbstractEventLoop) -> None:
    """A waiter whose client has left is passed over; without any other the connection stays free."""
    queue = Simulation(loop).queue
    gone = loop.create_future()
    gone.cancel()
    queue.count_arrival(0.0)
    queue.join(gone, 0.0)

    assert queue.next(0.1) is None
    assert not queue.waiters


async def test_one_client_keeps_no_other_waiting(loop: asyncio.AbstractEventLoop) -> None:
    """Clients take turns, whoever has how many requests in the queue; those of one client keep their order."""
    queue: WaitQueue[int] = WaitQueue(settings())
    greedy, polite = [loop.create_future() for _ in range(50)], [loop.create_future() for _ in range(2)]
    joined = dict.fromkeys(greedy, "greedy") | {polite[0]: "one", polite[1]: "other"}
    for waiter, client in joined.items():
        client_key.set(client)
        queue.count_arrival(0.0)
        queue.join(waiter, 0.0)

    turns = [queue.next(0.01) for _ in range(5)]

    assert turns == [greedy[0], polite[0], polite[1], greedy[1], greedy[2]]


async def test_full_queue_has_room_for_who_has_less_in_it(loop: asyncio.AbstractEventLoop) -> None:
    """The newest of the longest line leaves; among equals the one that comes is refused."""
    queue: WaitQueue[int] = WaitQueue(settings())
    client_key.set("greedy")
    greedy = [loop.create_future() for _ in range(3)]
    for waiter in greedy:
        queue.join(waiter, 0.0)
    same = queue.make_room()
    client_key.set("polite")

    removed = queue.make_room()
    queue.join(loop.create_future(), 0.0)

    assert same is None
    assert removed is greedy[-1]
    assert queue.make_room() is None
    assert len(queue.waiters) == 3


async def test_client_may_wait_in_its_own_line_while_the_queue_stands(loop: asyncio.AbstractEventLoop) -> None:
    """It delays nobody else there; a queue that stands limits the clients that wait, and requests without one."""
    queue: WaitQueue[int] = WaitQueue(settings())
    queue.count_arrival(0.0)
    queue._limit = 2
    room = []
    for client in ("greedy", "greedy", "greedy", "one", "other", None):
        client_key.set(client)
        room.append(queue.has_room(0))
        if room[-1]:
            queue.join(loop.create_future(), 0.0)

    assert room == [True, True, True, True, False, False]


async def test_requests_of_one_client_give_up_one_after_another(loop: asyncio.AbstractEventLoop) -> None:
    """Told all at once, they would come again all at once. Who has few in the queue has its whole patience."""
    queue: WaitQueue[int] = WaitQueue(settings())
    client_key.set("greedy")
    patience = []
    for _ in range(settings().capacity + 100):
        patience.append(queue.patience(0.5))
        queue.join(loop.create_future(), 0.0)
    client_key.set("polite")
    polite = queue.patience(0.5)
    client_key.set(None)

    few, many = patience[: settings().capacity], patience[settings().capacity :]
    assert {*few, polite, queue.patience(0.5)} == {0.5}
    assert 0.25 <= min(many) < 0.3
    assert 0.45 < max(many) <= 0.5


async def test_time_until_it_is_empty_is_told_by_the_rate_of_late() -> None:
    """Nobody knows before the first was served; then the longer nothing is served, the longer it is thought to take."""
    queue: WaitQueue[int] = WaitQueue(settings())
    loop = asyncio.get_running_loop()
    for _ in range(30):
        queue.count_arrival(0.0)
        queue.join(loop.create_future(), 0.0)
    unknown = queue.drain_seconds(1.0)

    for number in range(1, 11):
        queue.next(number * SERVICE_SECONDS)

    # Ten in 0.2 s, and twenty are left; after 2 s without any they were ten in 2.2 s.
    assert unknown == 0.0
    assert queue.drain_seconds(0.2) == pytest.approx(0.4)
    assert queue.drain_seconds(2.2) == pytest.approx(4.4)

    queue.next(11 * SERVICE_SECONDS)
    queue.idle = True
    queue.count_arrival(100.0)
    assert queue.drain_seconds(101.0) == 0.0
