"""The databases open and close together, whatever state they are in, and are looked after in between."""

import asyncio
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import asyncpg
import pytest
from sqlalchemy import Integer, Text, bindparam, literal_column, select, text
from sqlalchemy.exc import DBAPIError

from local.cluster import Cluster
from pglifeguard import databases as engines
from pglifeguard import lease
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import CommandTimeout, ConnectionLost, PoolExhausted, classify
from pglifeguard.lease import fetch_once
from pglifeguard.query import Query
from pglifeguard.testing.faults import exhausted
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database, Execute
from tests.pglifeguard.conftest import pooled, sessions_end
from tests.service import quiet, serving
from tests.stopwatch import Stopwatch

SLEEP = Query(select(literal_column("pg_sleep(60)::text", Text)))
ASLEEP = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid()"


# Starting.


@pytest.mark.parametrize("fault", ["refuse", "hang"])
async def test_service_starts_without_its_databases_and_is_ready_when_they_are(
    database: Database, proxy: Proxy, stopwatch: Stopwatch, fault: str
) -> None:
    """Live at once, 503 with Retry-After meanwhile, ready within 2 seconds of the return."""
    getattr(proxy, fault)()
    url = proxy.url(database.url())
    settings = database.settings(replica=False, primary={"url": url}, analytics={"url": url}).model_copy(
        update={"monitor_interval_seconds": 0.5}
    )
    started = stopwatch.seconds
    async with serving(settings, settled=False) as service:
        assert stopwatch.seconds - started < 2
        assert (await service.client.get("/health/live")).status_code == 200
        for path in ("/health/ready", "/patients"):
            answer = await service.client.get(path)
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")

        await proxy.accept()
        proxy.resume()
        back = stopwatch.seconds

        async def ready() -> bool:
            return (await service.client.get("/health/ready")).status_code == 200

        assert await eventually(ready, 20)
        assert stopwatch.seconds - back < 2
        assert (await service.client.get("/patients")).status_code == 200


async def test_messages_alone_say_which_database_is_away_and_why(
    database: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """A log without a format of its own shows no fields; the password is in none."""
    proxy.refuse()
    here, there = proxy.url(database.url()), database.replica_url()
    primary = {"url": here.replace("@", ":hunter2@")}
    settings = database.settings(primary=primary, replicas=({"url": there},), analytics={"url": there})
    async with serving(settings, settled=False) as service:

        async def found() -> bool:
            return service.databases.router.replicas[0].state == "alone" and "is error" in caplog.text

        assert await eventually(found, 10)

    where, reason = f"primary at 127.0.0.1:{proxy.port}", "The database cannot be reached: "
    for beginning in (f"pool {where} not warmed: {reason}", f"database {where} is error: {reason}"):
        assert any(message.startswith(beginning) for message in caplog.messages), caplog.messages
    assert "replica is alone: its primary is away, so it serves reads without being compared" in caplog.messages
    assert "hunter2" not in caplog.text


async def test_pools_are_warm_when_the_service_opens(database: Database) -> None:
    """The first requests find open connections, as many as are to be kept."""
    async with serving(database.settings(pool_size=4, pool_min_size=3)) as service:
        checked_in = {one.name: one.pool.figures().checked_in for one in service.databases.all()}

    assert checked_in == {"primary": 3, "replica": 3, "analytics": 3}


async def test_caches_can_be_switched_off(database: Database, replica_proxy: Proxy) -> None:
    """For a pooler without prepared statements nothing is kept prepared: a read is two round trips."""
    replica = {"url": replica_proxy.url(database.replica_url()), "statement_cache_size": 0}
    async with quiet(database.settings(replicas=(replica,))) as service:
        await service.client.get("/patients")
        replica_proxy.round_trips = 0

        assert (await service.client.get("/patients")).status_code == 200
        assert replica_proxy.round_trips == 2


async def test_two_services_in_a_process_know_nothing_of_each_other(database: Database) -> None:
    """Each has its own pools and figures."""
    async with serving(database.settings()) as one, serving(database.settings()) as other:
        async with exhausted(one.databases.primary):
            assert other.databases.primary.pool.figures().checked_out == 0
        await one.client.get("/patients")

        assert one.sample("http_requests_total", method="GET", route="/patients", status="200") == 1
        assert other.sample("http_requests_total", method="GET", route="/patients", status="200") == 0


# Upkeep.


async def test_gauges_are_what_the_pools_are(database: Database) -> None:
    """Each scrape publishes the figures of its moment."""
    async with quiet(database.settings(pool_size=2, max_overflow=1, pool_min_size=2)) as service:
        async with service.databases.writing() as session:
            await session.execute(text("SELECT 1"))
            service.databases.publish()

        figures = {
            name: service.sample(f"db_pool_connections_{name}", pool="primary")
            for name in ("total", "available", "checked_out", "connecting", "waiting")
        }
        assert figures == {"total": 3, "available": 2, "checked_out": 1, "connecting": 0, "waiting": 0}
        assert service.sample("db_pool_connections_open", pool="primary") == 2
        assert service.sample("db_up", pool="primary") == 1


async def test_pools_are_tended(database: Database, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that were cut are replaced before a request needs them."""
    monkeypatch.setattr(engines, "UPKEEP_SECONDS", 0.01)
    primary = {"url": proxy.url(database.url()), "pool_size": 2, "pool_min_size": 2}
    async with serving(database.settings(replica=False, primary=primary)) as service:
        pool = service.databases.primary.pool
        proxy.cut()

        async def renewed() -> bool:
            closed = service.sample("db_connection_invalidations_total", pool="primary", reason="closed")
            return closed == 2 and pool.figures().checked_in == 2

        assert await eventually(renewed, 5)


async def test_figures_are_logged(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Every so often each pool's figures are a line of the log."""
    caplog.set_level(logging.INFO, "pglifeguard.databases")
    async with serving(database.settings(pool_log_interval_seconds=0.01)):

        async def logged() -> bool:
            lines = [vars(record) for record in caplog.records if record.message == "pool figures"]
            return {line["pool"] for line in lines} == {"primary", "replica", "analytics"}

        assert await eventually(logged, 5)
    line = next(vars(record) for record in caplog.records if record.message == "pool figures")
    assert (line["total"], line["waiting"], line["available"]) == (15, 0, 15)


async def test_long_held_connection_is_counted_and_named(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each such checkout is in the log once, and in a metric; from the second one on with the line that took it."""
    monkeypatch.setattr(engines, "UPKEEP_SECONDS", 0.01)
    held: list[Any] = []
    async with serving(database.settings(leak_after_seconds=0.05)) as service:

        async def reported() -> bool:
            labels = {"pool": "primary", "route": "forgetful"}
            return service.sample("db_connection_long_held_total", **labels) == len(held) + 1

        for _ in range(2):
            async with service.databases.writing(label="forgetful") as session:
                await session.execute(text("SELECT 1"))
                assert await eventually(reported, 5)
                held += (await service.client.get("/debug/connections")).json()["primary"]["held"]
        async with service.databases.writing(label="another") as session:
            await session.execute(text("SELECT 1"))
            (other,) = service.databases.primary.pool.holdings()

    first, second = (vars(record) for record in caplog.records if record.message == "connection held for long")
    assert (first["pool"], first["route"], first["taken_in"]) == ("primary", "forgetful", None)
    assert first["held_seconds"] + 0.05 >= 0.05
    assert re.fullmatch(r"tests\.pglifeguard\.test_databases:\d+ in test_long_held_\w+", second["taken_in"])
    assert [holding["taken_in"] for holding in held] == [None, second["taken_in"]]
    assert other.taken_in is None


# Another server.


async def test_server_that_took_over_is_noticed(
    breakable_cluster: Cluster, database: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits for a server that vanished is freed when another one answers at its address."""
    primary = {"url": proxy.url(database.url())}
    async with quiet(database.settings(replica=False, primary=primary, health_timeout_seconds=0.3)) as service:
        await service.client.get("/patients")
        proxy.freeze()
        waiting = asyncio.create_task(service.client.get("/patients"))
        await breakable_cluster.primary.restart()

        async def looked() -> bool:
            return (await service.databases.primary.monitor.probe()).status == "healthy"

        assert await eventually(looked, 10)
        answer = await waiting

        assert (answer.status_code, answer.json()["code"]) == (503, "connection_lost")
        assert "database is another server" in caplog.text
        assert (await service.client.get("/patients")).status_code == 200


# Reads past SQLAlchemy.


async def test_lost_connection_of_a_direct_read(database: Database, proxy: Proxy) -> None:
    """A read whose connection is reset says so, and its connection is not used again."""
    async with pooled(proxy.url(database.url()), role="replica") as p:
        await p.backend()
        read = asyncio.create_task(fetch_once(p.database, SLEEP, {}))

        async def asked() -> bool:
            return any("pg_sleep(60)" in statement for statement in proxy.statements)

        assert await eventually(asked, 5)
        proxy.reset()

        with pytest.raises(asyncpg.PostgresConnectionError) as lost:
            await read
        failure = classify(lost.value)
        assert failure is not None
        assert failure.code == "connection_lost"
        assert p.pool.figures().checked_in == 0


async def test_direct_read_on_a_connection_that_was_just_lost(database: Database) -> None:
    """A connection may be lost between being given out and being used."""

    class Losing(Mapping[str, int]):
        """Parameters that lose the connection while they are read, as the event loop tells asyncpg of a loss."""

        def __getitem__(self, name: str) -> int:
            (entry,) = p.pool._out
            cast("Any", entry.driver_connection)._protocol.connection_lost(None)
            return 1

        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Iterator[str]:
            return iter(["number"])

    async with pooled(database.url(), role="replica") as p:
        with pytest.raises(ConnectionLost):
            await fetch_once(p.database, Query(select(bindparam("number", type_=Integer))), Losing())

        assert p.pool.figures().checked_in == 0


async def test_direct_read_is_bounded(database: Database, proxy: Proxy) -> None:
    """A server that falls silent is given up after command_timeout_seconds."""
    async with pooled(
        proxy.url(database.url()), role="replica", command_timeout_seconds=0.1, service={"statement_timeout_seconds": 5}
    ) as p:
        proxy.fates["pg_sleep(60)"] = "hang"

        with pytest.raises(CommandTimeout):
            await fetch_once(p.database, SLEEP, {})

        assert p.pool.figures().checked_in == 0


async def test_cancelled_direct_read_stops_on_the_server(database: Database, execute: Execute) -> None:
    """A read that is given up is given up at the server too, before its permit serves the next one."""
    async with pooled(database.url(), role="replica") as p:
        read = asyncio.create_task(fetch_once(p.database, SLEEP, {}))

        async def asleep() -> bool:
            return bool(await execute(ASLEEP))

        assert await eventually(asleep, 5)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read

        assert await execute(ASLEEP) == 0
    assert p.pool.figures().available == p.pool.figures().total


async def test_cancelled_direct_read_on_a_silent_server_ends(
    database: Database, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, stopwatch: Stopwatch
) -> None:
    """Telling a server to stop takes so long and no longer."""
    monkeypatch.setattr(lease, "CLOSE_SECONDS", 0.05)
    async with pooled(proxy.url(database.url()), role="replica") as p:
        await p.backend()
        proxy.hang()
        read = asyncio.create_task(fetch_once(p.database, SLEEP, {}))

        async def at_work() -> bool:
            return p.pool.figures().checked_out == 1

        assert await eventually(at_work, 5)
        await asyncio.sleep(0)
        read.cancel()
        started = stopwatch.seconds
        with pytest.raises(asyncio.CancelledError):
            await read

        assert stopwatch.seconds - started < 1
        assert p.pool.figures().checked_in == 0


async def test_mistake_of_the_client_library_is_no_loss(database: Database) -> None:
    """What asyncpg refuses to send is a bug of ours, and leaves the connection as it was."""
    wrong = Query(select(literal_column("$1::int", Integer)))
    async with pooled(database.url(), role="replica") as p:
        with pytest.raises(Exception, match="the server expects 1 argument"):
            await fetch_once(p.database, wrong, {})

        assert p.pool.figures().checked_in == 1


# Closing.


async def test_closed_service_leaves_no_session(database: Database) -> None:
    """Pools and monitors alike are gone from the server."""
    async with serving(database.settings(pool_size=5, pool_min_size=5)) as service:
        await asyncio.gather(*(service.client.get("/patients") for _ in range(20)))

    assert await sessions_end(database)


async def test_close_waits_for_what_is_at_work_and_refuses_the_rest(database: Database) -> None:
    """A request in flight is finished; one that waits, and one that comes, is told that the service ends."""
    async with serving(database.settings(pool_size=1, max_overflow=0, pool_timeout=10)) as service:
        databases, pool = service.databases, service.databases.primary.pool
        async with databases.writing() as session:
            await session.execute(text("SELECT 1"))
            waiting = asyncio.create_task(_write(databases))

            async def queued() -> bool:
                return pool.figures().waiting == 1

            assert await eventually(queued, 5)
            closing = asyncio.create_task(databases.close())
            for refused in (waiting, asyncio.create_task(_write(databases))):
                with pytest.raises(PoolExhausted, match="shutting down"):
                    await refused
            assert not closing.done()
            await session.execute(text("SELECT 1"))
        await closing

    assert await sessions_end(database)


async def test_close_cuts_what_does_not_end(
    database: Database, execute: Execute, caplog: pytest.LogCaptureFixture
) -> None:
    """Past its grace a request is cut, which is said, and its session on the server is closed."""
    async with serving(database.settings()) as service:
        stuck = asyncio.create_task(_sleep(service.databases))

        async def asleep() -> bool:
            return bool(await execute(ASLEEP))

        assert await eventually(asleep, 5)
        await service.databases.close(grace_seconds=0.05)

        # Long before its statement_timeout.
        with pytest.raises(DBAPIError):
            await asyncio.wait_for(stuck, 5)
    (line,) = (vars(record) for record in caplog.records if record.message == "connections cut at shutdown")
    assert (line["pool"], line["count"]) == ("primary", 1)


async def _write(databases: engines.Databases) -> None:
    async with databases.writing() as session:
        await session.execute(text("SELECT 1"))


async def _sleep(databases: engines.Databases) -> None:
    async with databases.writing() as session:
        await session.execute(text("SELECT pg_sleep(60)"))


async def test_read_outside_a_request_when_everything_is_closed(database: Database) -> None:
    """Who comes after the end is refused and not answered by a new connection."""
    async with serving(database.settings()) as service:
        pass

    with pytest.raises(PoolExhausted, match="shutting down"):
        async with service.databases.reading() as session:
            await session.execute(text("SELECT 1"))
    assert await sessions_end(database)
