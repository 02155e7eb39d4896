"""A primary that another server has replaced takes no write any more, though it runs, answers and takes writes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from local.cluster import Cluster
from pglifeguard.embedded.postgres import HOST, Server
from pglifeguard.embedded.waiting import eventually
from pglifeguard.fence import Fence
from pglifeguard.testing.proxy import Proxy
from tests.chaos.pooler import program, statement_cache_size
from tests.conftest import Database
from tests.names import answering
from tests.pglifeguard.test_members import finding
from tests.poolers.programs import Shape, running
from tests.service import ADA, Service, serving
from tests.standbys import cascading_standby

SYSTEM, OTHER = 7_000_000_000_000_000_001, 7_000_000_000_000_000_002


def patient(number: int) -> dict[str, str]:
    """Make a patient of that number."""
    return ADA | {"mrn": f"F-{number}"}


async def test_older_timeline_of_a_cluster_is_refused() -> None:
    """Each cluster has its own; what a server does not report is not judged; a rise is told with the new server."""
    fence, left = Fence(), list[float | None]()
    fence.leave = left.append
    fence.see(None, 9, 0.5)
    fence.see(SYSTEM, None, 0.5)
    fence.see(SYSTEM, 2, 1.0)
    fence.see(OTHER, 1, 2.0)
    assert left == []

    fence.see(SYSTEM, 3, 3.0)
    fence.see(SYSTEM, 2, 1.0)

    assert left == [3.0]
    assert fence.refusal(SYSTEM, 2) == "is on timeline 2, and was replaced by a primary on timeline 3"
    for known in ((SYSTEM, 3), (SYSTEM, 4), (SYSTEM, None), (OTHER, 1), (None, 1)):
        assert fence.refusal(*known) is None


@asynccontextmanager
async def behind_an_address(database: Database, proxy: Proxy) -> AsyncIterator[Service]:
    """Give a service that reaches its primary by an address which may lead to another server later."""
    primary = {"url": proxy.url(database.url()), "pool_min_size": 2}
    async with serving(database.settings(primary=primary, replicas=())) as service:
        assert (await service.client.post("/patients", json=patient(1))).status_code == 201
        yield service


async def stored(server: Server, database: Database) -> int:
    """Count the patients on a server."""
    connection = await server.connect(database.name)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM patients"))
    finally:
        await connection.close()


async def promote(cluster: Cluster) -> None:
    """Promote the replica with all that is committed; the primary goes on."""
    await cluster.wait_replayed()
    await cluster.replica.promote()


async def shows_promoted(service: Service) -> bool:
    """Whether the service knows that its replica is none any more."""
    return service.databases.router.replicas[0].position.in_recovery is False


async def answers(service: Service, status: int, *, number: int) -> bool:
    """Wait until a write is answered so."""

    async def answered() -> bool:
        return (await service.client.post("/patients", json=patient(number))).status_code == status

    return await eventually(answered, 20)


async def test_former_primary_behind_the_address_takes_no_write(
    database: Database, breakable_cluster: Cluster, proxy: Proxy
) -> None:
    """The address leads to the promoted standby, and back to the server of before, which takes writes as ever."""
    async with behind_an_address(database, proxy) as service:
        await promote(breakable_cluster)
        proxy.upstream = breakable_cluster.replica.port
        proxy.cut()
        assert await answers(service, 201, number=2)

        proxy.upstream = breakable_cluster.primary.port
        proxy.cut()
        refused = [await service.client.post("/patients", json=patient(number)) for number in range(3, 10)]
        await service.databases.primary.monitor.probe()
        health = (await service.client.get("/health/db")).json()["databases"]["primary"]

        proxy.upstream = breakable_cluster.replica.port
        assert await answers(service, 201, number=10)
    assert {answer.status_code for answer in refused} == {503}
    assert {answer.json()["code"] for answer in refused} <= {"database_unreachable", "connection_lost"}
    assert health["status"] == "error"
    assert "timeline 1, and was replaced by a primary on timeline 2" in health["error"]
    assert await stored(breakable_cluster.primary, database) == 1


async def test_connections_to_a_replaced_primary_are_left(
    database: Database, breakable_cluster: Cluster, proxy: Proxy
) -> None:
    """They are open, answer and take writes; one login that meets the new primary ends them."""
    async with behind_an_address(database, proxy) as service:
        await promote(breakable_cluster)
        proxy.upstream = breakable_cluster.replica.port

        connector, loop = service.databases.primary.connector, asyncio.get_running_loop()
        (await connector.open(loop.time() + 10)).terminate()

        created = await service.client.post("/patients", json=patient(2))
    assert created.status_code in {201, 503}
    assert await stored(breakable_cluster.primary, database) == 1


async def test_replica_that_follows_a_newer_primary_tells(
    database: Database, breakable_cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """The service's own address still leads to the former primary, which takes no write any more; reads go on."""
    async with cascading_standby(breakable_cluster) as second:
        replica = {"url": make_url(database.replica_url()).set(port=second.port).render_as_string(hide_password=False)}
        async with serving(database.settings(replicas=(replica,))) as service:
            assert (await service.client.post("/patients", json=patient(1))).status_code == 201

            await breakable_cluster.replica.promote()

            async def reads_on() -> bool:
                return service.databases.router.replicas[0].state == "alone"

            assert await answers(service, 503, number=2)
            assert await eventually(reads_on, 10)
            # Nobody can tell whether the successor has what a token stands for.
            service.client.cookies.clear()
            assert (await service.client.get("/patients")).status_code == 200
    assert "primary was replaced" in caplog.text


async def test_reads_go_on_where_the_replica_took_over(database: Database, breakable_cluster: Cluster) -> None:
    """The primary's address leads to nobody yet. When the former primary answers there, it serves the reads again."""
    primary, replica = breakable_cluster.primary, breakable_cluster.replica
    async with serving(database.settings()) as service:

        async def is_read(state: str) -> bool:
            service.client.cookies.clear()
            assert (await service.client.get("/patients")).status_code == 200
            return service.databases.router.replicas[0].state == state

        assert await is_read("usable")
        await primary.stop()
        await replica.promote()

        assert await eventually(lambda: is_read("alone"), 10)
        assert await answers(service, 503, number=1)
        await primary.start()
        assert await eventually(lambda: is_read("promoted"), 10)


@pytest.mark.parametrize(("named", "found"), [(True, False), (False, False), (True, True)])
async def test_promoted_replica_tells_where_it_is_the_successor(
    database: Database, breakable_cluster: Cluster, monkeypatch: pytest.MonkeyPatch, *, named: bool, found: bool
) -> None:
    """Named among the primary's hosts, also by the address at which DNS has found it, it takes the writes over.

    Any other promoted replica changes nothing.
    """
    primary, standby = breakable_cluster.primary.port, breakable_cluster.replica.port
    url = database.url()
    url = url.replace(f":{primary}/", f":{primary},{HOST}:{standby}/") if named else url
    with answering(monkeypatch, HOST):
        settings = finding(database, primary={"url": url}) if found else database.settings(primary={"url": url})
        async with serving(settings) as service:
            await promote(breakable_cluster)
            assert await eventually(lambda: shows_promoted(service), 10)
            assert await answers(service, 201, number=1)

            assert await stored(breakable_cluster.replica if named else breakable_cluster.primary, database) == 1


@pytest.mark.skipif(program() is None, reason="PgBouncer is not installed: apt-get install pgbouncer")
@pytest.mark.parametrize("hosts", [1, 2])
async def test_name_of_a_pooler_is_nobodys(
    database: Database, breakable_cluster: Cluster, open_directory: Path, *, hosts: int
) -> None:
    """Behind one pooler primary and replica have one address: a replica that is promoted there succeeds nobody."""
    pgbouncer = program()
    assert pgbouncer is not None
    shape = Shape(size=10, on_replica=database.name)
    async with running(pgbouncer, shape, breakable_cluster, open_directory) as pooler:
        one = f"{HOST}:{pooler.port}"
        url = pooler.url(database.url()).replace(one, ",".join([one] * hosts))
        replica_url = pooler.replica_url(database.replica_url())
        cache = {"statement_cache_size": statement_cache_size()}
        settings = database.settings(primary={"url": url, **cache}, replicas=({"url": replica_url, **cache},))
        async with serving(settings) as service:
            await promote(breakable_cluster)
            assert await eventually(lambda: shows_promoted(service), 10)
            await service.databases.primary.monitor.probe()

            assert (await service.client.post("/patients", json=patient(1))).status_code == 201
