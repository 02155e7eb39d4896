"""Many instances behind the balancer and a pooler: what they cost, and all of them replaced under load."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import asyncpg
import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.
import psycopg
import pytest
from psycopg.rows import dict_row

from bench.served import cpu_seconds
from pglifeguard.embedded.postgres import HOST, free_port
from pglifeguard.embedded.waiting import eventually
from tests.app.test_cli import MODULE, Process, served
from tests.balancer import Balancer, balanced, needs_haproxy
from tests.chaos import FULL, pooler
from tests.chaos.load import offer, quantile, tell
from tests.chaos.test_balancer import Ledger
from tests.conftest import Database
from tests.poolers.programs import Running, Shape, running

pytestmark = [
    needs_haproxy,
    pytest.mark.skipif(pooler.program() is None, reason="PgBouncer is not installed: apt-get install pgbouncer"),
]

INSTANCES, SURGE = (20, 4) if FULL else (2, 2)
PER_SECOND = 100 if FULL else 50
IDLE_SECONDS = 20.0 if FULL else 0.5
SAMPLE_SECONDS = 0.2
END_SECONDS = 60
# What PgBouncer may open on each server: all that a server sees of these instances.
SERVER_CONNECTIONS = 8
SETTINGS = {
    "ENVIRONMENT": "test",
    "LOG_LEVEL": "ERROR",
    "INSTANCES": str(INSTANCES),
    "SURGE_INSTANCES": str(SURGE),
    "MIGRATION_CONNECTIONS": "0",
    "DATABASE_POOL_SIZE": "2",
    "DATABASE_MAX_OVERFLOW": "0",
    "DATABASE_ANALYTICS_POOL_SIZE": "1",
    # Two cores serve all of this and start the new instances meanwhile. Whoever waits for a processor is not refused.
    "DATABASE_POOL_TIMEOUT": "10",
    "DATABASE_CONNECT_TIMEOUT_SECONDS": "5",
    # Of compose: by then the balancer has left an instance that ends.
    "DRAIN_DELAY_SECONDS": "4",
}
SESSIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND datname = current_database() AND usename IN ('app_rw', 'app_ro')
"""


class Watch:
    """Connections beside the load, to both servers and to the pooler's console, and what was counted there."""

    def __init__(self, servers: list[Any], console: Any) -> None:
        self._servers = servers
        self._console = console
        # The connections that each server has, as it says itself and as the pooler says; the pooler's clients.
        self.sessions: list[int] = []
        self.opened: list[int] = []
        self.clients: list[int] = []

    @classmethod
    @asynccontextmanager
    async def of(cls, database: Database, pgbouncer: Running) -> AsyncIterator[Self]:
        """Connect, and disconnect in the end."""
        async with AsyncExitStack() as stack:
            servers = []
            for url in (database.url("postgres"), database.replica_url("postgres")):
                servers.append(await asyncpg.connect(url))
                stack.push_async_callback(servers[-1].close)
            # The console takes the simple protocol alone, and no BEGIN.
            console = await psycopg.AsyncConnection.connect(
                pgbouncer.url(database.cluster.url("app_owner", database="pgbouncer")), autocommit=True
            )
            stack.push_async_callback(console.close)
            yield cls(servers, psycopg.AsyncClientCursor(console, row_factory=dict_row))

    async def show(self, what: str) -> list[dict[str, Any]]:
        """Ask the pooler, and leave out what it says of its console."""
        await self._console.execute(f"SHOW {what}")
        return [row for row in await self._console.fetchall() if row["database"] != "pgbouncer"]

    async def transactions(self) -> int:
        """Count what the pooler has passed on so far."""
        return sum(int(row["total_xact_count"]) for row in await self.show("STATS"))

    async def sample(self) -> None:
        """Count once."""
        self.sessions += [await server.fetchval(SESSIONS) for server in self._servers]
        aliases = [row["database"] for row in await self.show("SERVERS")]
        self.opened += [aliases.count(alias) for alias in set(aliases)]
        self.clients.append(len(await self.show("CLIENTS")))

    @asynccontextmanager
    async def sampling(self) -> AsyncIterator[None]:
        """Count several times a second until the block ends."""
        done = asyncio.Event()

        async def sample() -> None:
            while not done.is_set():
                await self.sample()
                await asyncio.sleep(SAMPLE_SECONDS)

        task = asyncio.create_task(sample())
        try:
            yield
        finally:
            done.set()
            await task


class Fleet:
    """Instances behind the balancer, which knows a port for each, and `SURGE` more for those that replace them."""

    def __init__(self, environment: dict[str, str], directory: Path, stack: AsyncExitStack) -> None:
        self.ports = [free_port() for _ in range(INSTANCES + SURGE)]
        self.running: dict[int, Process] = {}
        self.most = 0
        self._environment = environment
        self._directory = directory
        self._stack = stack
        self._started = 0

    async def start(self) -> Balancer:
        """Start the instances and the balancer; return that when it sends requests to each of them."""
        await asyncio.gather(*(self._start(port) for port in self.ports[:INSTANCES]))
        urls = (f"http://{HOST}:{port}" for port in self.ports)
        balancer = await self._stack.enter_async_context(balanced(self._directory, *urls))
        for port in self.running:
            await self._found(balancer, port)
        return balancer

    async def replace_all(self, balancer: Balancer) -> None:
        """Replace every instance, `SURGE` at a time: a new one first, then the old one is told to end."""
        leaving = list(self.running)

        async def replace(free: int) -> None:
            while leaving:
                port = leaving.pop()
                await self._start(free)
                await self._found(balancer, free)
                old = self.running[port].process
                old.send_signal(signal.SIGTERM)
                await asyncio.wait_for(old.wait(), END_SECONDS)
                del self.running[port]
                free = port

        await asyncio.gather(*(replace(port) for port in self.ports[INSTANCES:]))

    async def _start(self, port: int) -> None:
        self._started += 1
        directory = self._directory / f"instance-{self._started}"
        directory.mkdir()
        instance = served(directory, self._environment, *MODULE, port=port)
        self.running[port] = await self._stack.enter_async_context(instance)
        self.most = max(self.most, len(self.running))

    async def _found(self, balancer: Balancer, port: int) -> None:
        name = f"app{self.ports.index(port) + 1}"
        line = rf'^haproxy_server_status\{{proxy="instances",server="{name}",state="UP"\}} 1'

        async def sends_requests() -> bool:
            return re.search(line, await balancer.figures(), re.MULTILINE) is not None

        assert await eventually(sends_requests, END_SECONDS), name


async def published(instance: Process, metric: str) -> float:
    """Return a figure of an instance's own /metrics that has one series."""
    text = (await instance.client.get("/metrics")).text
    (value,) = re.findall(rf"^{metric}\{{.*\}} (\S+)$", text, re.MULTILINE)
    return float(value)


def spent(pids: Iterable[int]) -> float:
    """Return the CPU seconds that these processes took so far, with those that they have started."""
    return sum(cpu_seconds(pid) for pid in pids)


async def test_replacing_every_instance_fails_nothing(
    database: Database, tmp_path: Path, open_directory: Path, measured: Callable[..., None]
) -> None:
    """Behind the balancer and PgBouncer each instance is replaced under load: no request fails, and at every sample the
    servers have the connections that the pooler may open, and the pooler the clients that the service's budget counts.
    """
    found = pooler.program()
    assert found is not None
    shape = Shape(size=SERVER_CONNECTIONS, on_replica=database.name, settings={"max_client_conn": 500})
    cluster = database.cluster
    async with AsyncExitStack() as stack:
        pgbouncer = await stack.enter_async_context(running(found, shape, cluster, open_directory))
        replica = pgbouncer.replica_url(database.replica_url())
        environment = SETTINGS | {
            "DATABASE_URL": pgbouncer.url(database.url()),
            "DATABASE_REPLICA_URL": replica,
            "DATABASE_ANALYTICS_URL": replica,
            "DATABASE_STATEMENT_CACHE_SIZE": str(pooler.statement_cache_size()),
            "CONNECTION_LIMIT": "500",
        }
        fleet = Fleet(environment, tmp_path, stack)
        balancer = await fleet.start()
        watch = await stack.enter_async_context(Watch.of(database, pgbouncer))
        instances = {port: instance.process.pid for port, instance in fleet.running.items()}
        budget = await published(fleet.running[fleet.ports[0]], "db_connection_budget_wanted")

        (pooler_pid,) = (p.pid for p in psutil.Process().children() if p.name() == "pgbouncer")
        groups = (instances.values(), [pooler_pid], [cluster.primary.pid, cluster.replica.pid], [balancer.pid])
        before, transactions = [spent(pids) for pids in groups], await watch.transactions()
        await asyncio.sleep(IDLE_SECONDS)
        idle = [(spent(pids) - first) / IDLE_SECONDS for pids, first in zip(groups, before, strict=True)]
        probes = (await watch.transactions() - transactions) / IDLE_SECONDS
        memory = sum(psutil.Process(pid).memory_full_info().pss for pid in instances.values()) / len(instances)

        ledger = Ledger(balancer)
        await ledger.begin()
        over = asyncio.Event()
        load = asyncio.create_task(offer(ledger.send, per_second=PER_SECOND, until=over.is_set, first=1))
        async with watch.sampling():
            await fleet.replace_all(balancer)
            over.set()
            await load
        ledger.client.close()

    outcomes = ledger.outcomes()
    each, pgbouncers, servers, balancers = (1000 * seconds for seconds in idle)
    p99 = quantile([answer.seconds for _, answer in ledger.answers], 0.99)
    measured(
        f"{INSTANCES} instances, {fleet.most} at most: {tell(outcomes)}, p99 {1000 * p99:.0f} ms; {len(watch.clients)} "
        f"samples: at most {max(watch.sessions)} connections of {SERVER_CONNECTIONS} on a server, {max(watch.clients)} "
        f"clients of {budget:.0f} at the pooler. Idle: an instance {each / INSTANCES:.0f} ms of CPU a second and "
        f"{memory / 1e6:.0f} MB, {probes:.0f} probes/s, which cost PgBouncer {pgbouncers:.0f} ms, both servers "
        f"{servers:.0f} ms, the balancer {balancers:.0f} ms a second"
    )
    assert not set(instances.values()) & {instance.process.pid for instance in fleet.running.values()}
    assert INSTANCES < fleet.most <= INSTANCES + SURGE
    assert set(outcomes) == {"GET 200", "POST 201"}, outcomes
    assert max(watch.sessions) <= SERVER_CONNECTIONS
    assert max(watch.opened) <= SERVER_CONNECTIONS
    assert max(watch.clients) <= budget
