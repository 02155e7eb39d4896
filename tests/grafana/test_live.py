"""Each query of the dashboards about the service, on a real Prometheus that scrapes it while things go wrong.

Those about PostgreSQL and PgBouncer have their exporters in tests/compose; here Prometheus only parses them.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from app.main import create_app
from app.settings import Settings
from pglifeguard.databases import Databases
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import DatabaseUnreachable
from pglifeguard.serving.protocol import LimitedProtocol
from pglifeguard.sessions import WriteSession
from pglifeguard.testing.faults import exhausted
from pglifeguard.testing.proxy import Proxy
from pglifeguard.testing.serving import listening
from tests.conftest import Database
from tests.grafana.reading import Panel, is_served, panels, values, wrong
from tests.names import Names, answering
from tests.pglifeguard.test_members import finding
from tests.pglifeguard.test_sleeping import sleeping
from tests.service import ADA
from tests.watching import needs_prometheus, running_prometheus

SCRAPE_SECONDS = 0.5
# Grafana makes it of four scrape intervals.
INTERVAL = "2s"
COLLIDE = text("DO $$ BEGIN RAISE EXCEPTION 'collided' USING ERRCODE = '40001'; END $$")


@dataclass(frozen=True)
class Instance:
    """A running instance of the service, on a socket."""

    url: str
    databases: Databases
    client: httpx.AsyncClient

    def count(self, name: str, **labels: str) -> float:
        """Return a figure, 0.0 when there is no such series yet."""
        return self.databases.metrics.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def instance(settings: Settings) -> AsyncIterator[Instance]:
    """Serve as production does, limits of connections included."""
    app = create_app(settings)
    async with (
        listening(app, http=LimitedProtocol) as url,
        httpx.AsyncClient(base_url=url, trust_env=False) as client,
    ):
        yield Instance(url, app.state.databases, client)


async def use(served: Instance) -> None:
    """Write, read what was written, look for what is nowhere, ask for a report, and for another host."""
    patient = (await served.client.post("/patients", json=ADA | {"mrn": str(time.monotonic_ns())})).json()
    for path in (f"/patients/{patient['id']}", "/patients", "/patients/999999", "/reports/summary"):
        await served.client.get(path)
    await served.client.get("/patients", headers={"Host": "elsewhere.example"})


async def overload(served: Instance) -> None:
    """Ask for more than the pool has: some are refused in time, and one leaves before."""
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(exhausted(served.databases.primary))
        except DatabaseUnreachable:
            # On a busy machine a login may take longer than this pool waits. The next round asks again.
            return
        asked = [served.client.post("/patients", json=ADA | {"mrn": f"refused-{n}"}) for n in range(3)]
        with suppress(httpx.ReadTimeout):
            await served.client.post("/patients", json=ADA | {"mrn": "left"}, timeout=0.05)
        assert 503 in {answer.status_code for answer in await asyncio.gather(*asked)}


async def hold(served: Instance) -> None:
    """Hold a connection until that counts as too long."""
    counter = {"name": "db_connection_long_held_total", "pool": "primary", "route": "background"}
    before = served.count(**counter)

    async def noticed() -> bool:
        return served.count(**counter) > before

    async with served.databases.writing() as session:
        await session.execute(text("SELECT 1"))
        assert await eventually(noticed, 10)


async def collide(served: Instance) -> None:
    """Run a transaction that collides once."""
    collides = iter((True, False))

    async def work(session: WriteSession) -> None:
        if next(collides):
            await session.execute(COLLIDE)

    await served.databases.run_transaction(work)


async def lose_the_primary(served: Instance, network: Proxy) -> None:
    """Take the primary away until a login has failed, and give it back."""
    counter = {"name": "db_connection_connect_failures_total", "pool": "primary"}
    before = served.count(**counter)
    network.refuse()
    network.cut()

    async def failed() -> bool:
        await served.client.post("/patients", json=ADA)
        return served.count(**counter) > before

    async def back() -> bool:
        return served.databases.primary.monitor.healthy

    assert await eventually(failed, 10)
    await network.accept()
    assert await eventually(back, 10)


async def lose_the_replica(served: Instance, network: Proxy) -> None:
    """Take the replica away until reads have fallen back to the primary, and give it back."""
    network.refuse()
    network.cut()

    async def unusable() -> bool:
        return served.databases.router.replicas[0].state != "usable"

    async def usable() -> bool:
        return not await unusable()

    assert await eventually(unusable, 10)
    assert (await served.client.get("/patients")).status_code == 200
    await network.accept()
    assert await eventually(usable, 10)


async def speak_nonsense(served: Instance) -> None:
    """Send what is no request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rpartition(":")[2]))
    writer.write(b"nonsense\r\n\r\n")
    await reader.read()
    writer.close()


async def wake(served: Instance) -> None:
    """Let the databases fall asleep, and ask for something."""

    async def asleep() -> bool:
        return served.databases.primary.monitor.asleep

    assert await eventually(asleep, 10)
    assert (await served.client.get("/users")).status_code == 200


async def change_replicas(served: Instance, names: Names) -> None:
    """Let DNS name another replica, which is not there, until the one that was is drained; then that one again."""
    before = served.count("db_replica_changes_total", change="left")
    usual, names.addresses = names.addresses, ["127.0.0.9"]

    async def left() -> bool:
        return served.count("db_replica_changes_total", change="left") > before

    assert await eventually(left, 10)
    names.addresses = usual


async def lacking(prometheus: httpx.AsyncClient, asked: Iterable[Panel], started: float) -> list[tuple[Panel, str]]:
    """List the queries that have no value yet, or of something that is counted none but 0."""
    found = []
    for panel in asked:
        for query in filter(is_served, panel.queries):
            drawn = await values(prometheus, query, INTERVAL, started, SCRAPE_SECONDS)
            if not drawn or (re.search(r"\b(rate|increase)\(", query) and not any(drawn)):
                found.append((panel, query))
    return found


@needs_prometheus
@pytest.mark.slow
async def test_every_panel_has_data(
    database: Database, proxy: Proxy, replica_proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load with errors, refusals, retries, losses and sleep, each query has values, as its unit allows."""
    small = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 0.2, "pool_min_size": 1}
    settings = database.settings(
        primary={"url": proxy.url(database.url()), **small},
        replicas=({"url": replica_proxy.url(database.replica_url()), **small},),
        slow_query_seconds=0.0001,
        leak_after_seconds=0.1,
        allowed_hosts="127.0.0.1",
    )
    started = time.time()
    with answering(monkeypatch, "127.0.0.1") as names:
        async with (
            instance(settings) as served,
            instance(sleeping(database)) as dozing,
            instance(finding(database)) as changing,
            running_prometheus(
                served.url, tmp_path, interval_seconds=SCRAPE_SECONDS, others=[dozing.url, changing.url]
            ) as prometheus,
        ):
            left: list[tuple[Panel, str]] = []

            async def scraped() -> bool:
                return len(await values(prometheus, "up == 1", INTERVAL, started, SCRAPE_SECONDS)) > 1

            async def all_have_data() -> bool:
                await use(served)
                await overload(served)
                await hold(served)
                await collide(served)
                await lose_the_primary(served, proxy)
                await lose_the_replica(served, replica_proxy)
                await speak_nonsense(served)
                await wake(dozing)
                await change_replicas(changing, names)
                left[:] = await lacking(prometheus, panels(), started)
                return not left

            assert await eventually(scraped, 30)
            assert await eventually(all_have_data, 60), [f"{panel}: {query}" for panel, query in left]

            for panel in panels():
                for query in panel.queries:
                    drawn = await values(prometheus, query, INTERVAL, started, SCRAPE_SECONDS)
                    assert wrong(panel, drawn) == [], (panel, query)
