"""What network, replication and load do to a request, produced for real, and what the client is told.

The failures that a server reports by itself are in `test_errors.py`.
"""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Integer, Text, literal_column, select, text

from local.cluster import Cluster
from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi.sessions import AnalyticsDB, ReadDB, WriteDB
from pglifeguard.query import Query
from pglifeguard.testing.faults import exhausted
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database, Execute
from tests.servers import setting
from tests.service import Service, quiet, serving
from tests.stopwatch import Stopwatch

COUNT = Query(
    select(literal_column("count(*)", Integer), literal_column("pg_sleep(0.5)::text", Text)).select_from(
        text("patients")
    )
)
ADD = """
INSERT INTO patients (mrn, full_name, birth_date)
SELECT n::text, 'Ada', '1915-12-10' FROM generate_series(1, 50) AS n
"""


@pytest.fixture
async def impatient_replica(breakable_cluster: Cluster) -> AsyncIterator[None]:
    """Let replay wait for no query, as when a replica has been behind for long."""
    async with setting(breakable_cluster.replica, "max_standby_streaming_delay", "0"):
        yield


async def clean_up_rows(execute: Execute) -> None:
    """Take the rows away that a snapshot on the replica may still look at."""
    await execute("DELETE FROM patients")
    await execute("VACUUM (FREEZE) patients")


def lost(answer_code: str) -> tuple[int, str, str]:
    """Return what a failure that a retry may mend looks like."""
    return 503, answer_code, "1"


@pytest.mark.usefixtures("impatient_replica")
async def test_hot_standby_conflict_is_never_an_error(database: Database, service: Service, execute: Execute) -> None:
    """A read on the replica that stood in the way of replay is run once more on the primary."""
    await execute(ADD)
    await database.cluster.wait_replayed()

    @service.app.get("/direct")
    async def direct(session: ReadDB) -> int:
        return int((await session.rows(COUNT))[0][0])

    @service.app.get("/through")
    async def through(session: ReadDB) -> int:
        return int((await session.execute(COUNT.statement)).one()[0])

    pool = service.databases.replicas[0].pool
    reads = [asyncio.create_task(service.client.get(path)) for path in ("/direct", "/through")]

    async def at_work() -> bool:
        return pool.figures().checked_out == len(reads)

    assert await eventually(at_work, 5)
    await clean_up_rows(execute)
    answers = await asyncio.gather(*reads)

    assert [(answer.status_code, answer.json()) for answer in answers] == [(200, 0), (200, 0)]
    assert service.sample("db_reads_retried_total", reason="serialization_failure") == 2


@pytest.mark.usefixtures("impatient_replica")
async def test_hot_standby_conflict_of_an_idle_report(database: Database, service: Service, execute: Execute) -> None:
    """A report that was cut between two statements is told to come again, and the next one is served."""
    await execute(ADD)
    await database.cluster.wait_replayed()
    wreck = [True]

    @service.app.get("/report")
    async def report(session: AnalyticsDB) -> int:
        first = (await session.execute(text("SELECT count(*) FROM patients"))).scalar_one()
        if wreck:
            wreck.clear()
            await clean_up_rows(execute)
            await database.cluster.wait_replayed()
        return int(first + (await session.execute(text("SELECT count(*) FROM patients"))).scalar_one())

    cut, served = [await service.client.get("/report") for _ in range(2)]

    assert (cut.status_code, cut.headers["Retry-After"]) == (503, "1")
    assert cut.json()["code"] in {"serialization_failure", "connection_lost"}
    assert (served.status_code, served.json()) == (200, 0)


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_connection_lost_in_a_write(database: Database, proxy: Proxy, fault: str) -> None:
    """Whether the peer says goodbye or not: 503 connection_lost, nothing stored, and the next request is served."""
    primary = {"url": proxy.url(database.url())}
    async with quiet(database.settings(replica=False, primary=primary)) as service:

        @service.app.post("/slow")
        async def slow(session: WriteDB) -> None:
            await session.execute(text(ADD))
            await session.execute(text("SELECT pg_sleep(60)"))

        asked = asyncio.create_task(service.client.post("/slow"))

        async def asleep() -> bool:
            return any("pg_sleep(60)" in statement for statement in proxy.statements)

        assert await eventually(asleep, 5)
        getattr(proxy, fault)()
        answer = await asked

        assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == lost("connection_lost")
        assert (await service.client.get("/patients")).json() == []
        assert service.sample("db_connection_invalidations_total", pool="primary", reason="error") == 1


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_connection_lost_in_a_read_on_the_replica(database: Database, replica_proxy: Proxy, fault: str) -> None:
    """The client notices nothing: the primary answers."""
    replica = {"url": replica_proxy.url(database.replica_url())}
    async with quiet(database.settings(replicas=(replica,))) as service:
        await service.client.get("/patients")
        replica_proxy.freeze()
        asked = asyncio.create_task(service.client.get("/patients"))

        async def at_work() -> bool:
            return service.databases.replicas[0].pool.figures().checked_out == 1

        assert await eventually(at_work, 5)
        getattr(replica_proxy, fault)()

        assert (await asked).status_code == 200
        assert service.sample("db_reads_retried_total", reason="connection_lost") == 1


async def test_wait_for_a_connection_that_is_over(database: Database, stopwatch: Stopwatch) -> None:
    """Who waited in vain is told so at the deadline; who finds the queue full, at once."""
    settings = database.settings(replica=False, pool_size=1, max_overflow=0, pool_timeout=0.2, pool_max_waiting=1)
    async with serving(settings) as service, exhausted(service.databases.primary):
        started, asked_at = stopwatch.seconds, time.perf_counter()
        first = asyncio.create_task(service.client.get("/patients"))

        async def queued() -> bool:
            return service.databases.primary.pool.figures().waiting == 1

        assert await eventually(queued, 5)
        crowded = await service.client.get("/patients")
        assert stopwatch.seconds - started < 0.2
        waited = await first
        assert stopwatch.seconds - started < 0.6
        assert time.perf_counter() - asked_at >= 0.2

    for answer in (crowded, waited):
        assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == lost("pool_exhausted")
    assert "No connection became free within 0.2 s." in waited.json()["detail"]


async def test_database_that_drops_everybody_is_found_again(database: Database, proxy: Proxy) -> None:
    """Refused while it is away, served when it is back, with no restart and no stale connection in between."""
    primary = {"url": proxy.url(database.url())}
    async with quiet(database.settings(replica=False, primary=primary)) as service:
        assert (await service.client.get("/patients")).status_code == 200
        proxy.refuse()
        proxy.reset()

        async def refused() -> bool:
            answer = await service.client.get("/patients")
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            return bool(answer.json()["code"] == "database_unreachable")

        assert await eventually(refused, 5)
        await proxy.accept()

        assert (await service.client.get("/patients")).status_code == 200
