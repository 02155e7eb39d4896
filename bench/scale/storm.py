"""Every instance has lost its connections, and the server that they find again lets in so many a second: simulated.

Real are the parts that decide when a login is made: the connector with its search of the hosts, its pauses and their
jitter, and the pool. Their event loop has a clock that jumps. Simulated are the server, the requests, and the monitor
and the upkeep of `Databases`, which are a loop each.

The server gives each login the same share of its processors, as a kernel does with so many processes. So a hundred
logins at once take a hundred times as long as one, and all of them end at the end. A login that was given up costs as
much as any other: the server notices too late.
"""

import asyncio
import heapq
import random
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from types import FrameType
from typing import Any, cast

from bench.scale.limits import Figures
from pglifeguard.checkout import PoolWatch
from pglifeguard.connector import Connector, KeptAliveConnection
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.database_url import Host
from pglifeguard.databases import UPKEEP_SECONDS
from pglifeguard.errors import DatabaseUnavailable, DatabaseUnreachable, PoolExhausted
from pglifeguard.metrics import Metrics
from pglifeguard.monitor import PROBE_SECONDS
from pglifeguard.pool import ConnectionPool
from pglifeguard.sampling import Sampler

# The outage begins then: the instances have started, each at a moment of its own.
SETTLED_SECONDS = 5.0
SEED = 12


@dataclass(frozen=True)
class Situation:
    """How many instances lose their connections, for how long, and what they find then.

    With two `hosts` in the URL the first has died. The second is a standby, which lets everybody in and takes no writes
    until it is promoted. One host is an address that leads nowhere meanwhile. With `silent` the host that died answers
    nothing; else it refuses at once.
    """

    instances: int
    hosts: int = 1
    silent: bool = False
    figures: Figures = field(default_factory=Figures)
    cores: int = 2
    away_seconds: float = 5.0
    requests_per_second: float = 5.0
    watched_seconds: float = 60.0

    @property
    def needed(self) -> int:
        """The logins that make all pools whole, and give each monitor its connection."""
        return self.instances * (int(self.figures.pool_size) + 1)


@dataclass
class Story:
    """What happened; times are seconds from the moment in which the server takes writes again."""

    logins: list[float] = field(default_factory=list)
    # Logins that were given up before the server had finished them.
    wasted: int = 0
    # When each instance had its first connection, and when all that it keeps.
    first: dict[int, float] = field(default_factory=dict)
    whole: dict[int, float] = field(default_factory=dict)
    refused: list[float] = field(default_factory=list)

    @property
    def before(self) -> list[float]:
        """The logins that were begun while nothing took writes."""
        return [at for at in self.logins if at < 0]


class Processors:
    """The processors of a server, shared equally by all logins that are under way."""

    def __init__(self, cores: int, login_seconds: float) -> None:
        self._cores = cores
        self._login_seconds = login_seconds
        self._loop = asyncio.get_running_loop()
        # The seconds of a processor that a login has had which has been there from the start.
        self._served = 0.0
        self._at = self._loop.time()
        self._numbers = count()
        self._working: list[tuple[float, int, asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def work(self) -> None:
        """Wait for as long as a login takes beside the others."""
        self._go_on()
        done: asyncio.Future[None] = self._loop.create_future()
        heapq.heappush(self._working, (self._served + self._login_seconds, next(self._numbers), done))
        self._wait()
        await done

    def _go_on(self) -> None:
        now = self._loop.time()
        self._served += (now - self._at) * self._share()
        self._at = now

    def _share(self) -> float:
        return min(1.0, self._cores / len(self._working)) if self._working else 0.0

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._working:
            seconds = (self._working[0][0] - self._served) / self._share()
            self._timer = self._loop.call_later(max(0.0, seconds), self._end)

    def _end(self) -> None:
        self._go_on()
        # What is left of the first one is a rounding error.
        self._served = max(self._served, self._working[0][0])
        while self._working and self._working[0][0] <= self._served:
            done = heapq.heappop(self._working)[2]
            if not done.done():
                done.set_result(None)
        self._wait()


class Connection:
    """A connection as the pool and the search know one."""

    pooled = False
    server = 1.0

    def __init__(self) -> None:
        self.closed = False

    def is_closed(self) -> bool:
        """Whether it is closed."""
        return self.closed

    def terminate(self) -> None:
        """Close it."""
        self.closed = True

    cut = terminate

    def settle(self) -> None:
        """Say that it may go back into the pool."""


class World:
    """The servers, and what is told of all logins."""

    def __init__(self, situation: Situation) -> None:
        self.situation = situation
        self.story = Story()
        self.all_whole = asyncio.Event()
        self.back_at = SETTLED_SECONDS + situation.away_seconds
        self._loop = asyncio.get_running_loop()
        seconds = situation.cores / situation.figures.logins
        self._processors = Processors(situation.cores, seconds)

    @property
    def now(self) -> float:
        """Seconds from the moment in which the server takes writes again; negative before it."""
        return self._loop.time() - self.back_at

    @property
    def away(self) -> bool:
        """Whether nothing takes writes."""
        return -self.situation.away_seconds <= self.now < 0

    async def log_in(self, host: Host) -> Connection:
        """Let somebody in, as the host of this name would."""
        if self._loop.time() < SETTLED_SECONDS:
            return Connection()
        standby = host.port > 1
        if not standby and (self.situation.hosts > 1 or self.away):
            if self.situation.silent:
                await asyncio.Event().wait()
            raise ConnectionRefusedError("nobody listens")
        self.story.logins.append(self.now)
        try:
            await self._processors.work()
        except asyncio.CancelledError:
            self.story.wasted += 1
            raise
        if self.away:
            raise ConnectionRefusedError("it takes no writes")
        return Connection()


class SimulatedConnector(Connector):
    """The connector, whose logins are the world's; everything that decides about them is its own."""

    def __init__(self, settings: DatabaseSettings, world: World) -> None:
        super().__init__(settings, writable=True)
        self._world = world

    async def _open_host(self, host: Host, seconds: float) -> KeptAliveConnection:
        async with asyncio.timeout(seconds):
            return cast("KeptAliveConnection", await self._world.log_in(host))


class Slot:
    """A place in the pool."""

    def __init__(self, connection: KeptAliveConnection) -> None:
        self.info: dict[str, Any] = {}
        self.dbapi_connection: object | None = connection

    def invalidate(self) -> None:
        """Give the connection up."""
        self.dbapi_connection = None


class Opener:
    """Opens connections for a pool."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self.login_seconds = connector.login_seconds

    async def open_slot(self, deadline: float, *, waking: bool = False) -> tuple[Slot, KeptAliveConnection]:
        """Open one by the deadline."""
        connection = await self._connector.open(deadline, waking=waking)
        return Slot(connection), connection

    def waits_for(self) -> str | None:
        """Say that logins wait for the server only."""
        return self._connector.waits_for()

    def frame(self) -> FrameType:
        """Nobody asks who took a connection."""
        raise NotImplementedError


class Instance:
    """One process of the service: the pool of its primary, and the tasks around it."""

    def __init__(self, number: int, world: World, watch: PoolWatch, settings: DatabaseSettings) -> None:
        self.number = number
        self.world = world
        self.connector = SimulatedConnector(settings, world)
        loop = asyncio.get_running_loop()
        self.pool: ConnectionPool[Slot] = ConnectionPool(settings, watch, Opener(self.connector), loop.time)
        self.monitored: Connection | None = None

    async def run(self) -> None:
        """Start at a moment of its own, and work until cancelled."""
        await asyncio.sleep(random.uniform(0, 1))  # noqa: S311  # Not a secret.
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._monitor())
            tasks.create_task(self._upkeep())
            tasks.create_task(self._ask())

    def lose(self) -> None:
        """Lose every connection, as when the server behind them ends."""
        self.pool.abandon()
        if self.monitored is not None:
            self.monitored.terminate()

    async def _monitor(self) -> None:
        """Probe at each interval; without a connection log in, for as long as a probe may take."""
        loop = asyncio.get_running_loop()
        while True:
            if self.monitored is None or self.monitored.closed:
                try:
                    self.monitored = cast("Connection", await self.connector.open(loop.time() + PROBE_SECONDS))
                except DatabaseUnreachable:
                    self.monitored = None
            self._note()
            await asyncio.sleep(self.world.situation.figures.monitor_interval)

    async def _upkeep(self) -> None:
        """Keep the pool warm while the database is known to answer."""
        while True:
            await asyncio.sleep(UPKEEP_SECONDS)
            self.pool.tend()
            if self.monitored is not None and not self.monitored.closed:
                try:
                    await self.pool.warm_up()
                except DatabaseUnavailable:
                    continue
                self._note()

    async def _ask(self) -> None:
        rate = self.world.situation.requests_per_second
        async with asyncio.TaskGroup() as requests:
            while True:
                await asyncio.sleep(random.expovariate(rate))
                requests.create_task(self._request())

    async def _request(self) -> None:
        try:
            slot = await self.pool.acquire()
        except (DatabaseUnavailable, PoolExhausted):
            self.world.story.refused.append(self.world.now)
            return
        self._note()
        await asyncio.sleep(self.world.situation.figures.hold)
        self.pool.release(slot)

    def _note(self) -> None:
        """Note the first connection of after the outage, and that all are there."""
        story, now = self.world.story, self.world.now
        if now < 0:
            return
        figures = self.pool.figures()
        opened = figures.checked_in + figures.checked_out
        if opened:
            story.first.setdefault(self.number, now)
        monitored = self.monitored is not None and not self.monitored.closed
        if monitored and opened >= self.pool.settings.warm_size:
            story.whole.setdefault(self.number, now)
            if len(story.whole) == self.world.situation.instances:
                self.world.all_whole.set()


async def play(situation: Situation) -> Story:
    """Play an outage of every connection, and the seconds after it until all instances are whole."""
    random.seed(SEED)
    figures = situation.figures
    world = World(situation)
    hosts = "&".join(f"host=server{number}.example:{number}" for number in range(1, situation.hosts + 1))
    settings = DatabaseSettings.model_validate(
        {
            "url": f"postgresql://app_rw:secret@/lifeguard?{hosts}",
            "pool_size": int(figures.pool_size),
            "max_overflow": 0,
            "pool_timeout": figures.pool_timeout,
            "connect_timeout_seconds": figures.connect_timeout,
        }
    )
    sampler = Sampler()
    watch = PoolWatch(Metrics(), "primary", sampler, slow_query_seconds=1, idle_hold_seconds=60)
    instances = [Instance(number, world, watch, settings) for number in range(situation.instances)]
    running = [asyncio.create_task(instance.run()) for instance in instances]
    await asyncio.sleep(SETTLED_SECONDS)
    for instance in instances:
        instance.lose()
    with suppress(TimeoutError):
        async with asyncio.timeout(situation.away_seconds + situation.watched_seconds):
            await world.all_whole.wait()
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for instance in instances:
        await instance.connector.close()
    return world.story
