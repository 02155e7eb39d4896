"""Reads go to a replica that is near enough and works, else to the primary, and it is said why."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pglifeguard.databases import Databases
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import ReplicaUnavailable
from pglifeguard.metrics import Metrics
from pglifeguard.monitor import Probe
from pglifeguard.replica import BREAK_SECONDS, Replica, State
from pglifeguard.server_position import UNKNOWN, Position, Token
from pglifeguard.testing.faults import exhausted
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database, Execute
from tests.service import Service, quiet

ADA = {"mrn": "A-1", "full_name": "Ada Lovelace", "birth_date": "1915-12-10"}
# So near that only a replica with nothing left to replay is near enough; a page's head of slack.
STRICT: dict[str, Any] = {"replica_max_lag_bytes": 64, "replica_max_lag_seconds": 1e-6}


async def look(service: Service) -> Replica:
    """Look at primary and replica now, and return what became of the replica."""
    await service.databases.primary.monitor.probe()
    await service.databases.replicas[0].monitor.probe()
    return service.databases.router.replicas[0]


async def becomes(service: Service, state: State) -> bool:
    """Look until the replica is in this state."""

    async def is_it() -> bool:
        return (await look(service)).state == state

    return await eventually(is_it, 5)


@asynccontextmanager
async def without_wal_receiver(database: Database) -> AsyncIterator[None]:
    """Take the replica's connection to its primary away."""
    replica = await database.cluster.replica.connect()

    async def receives() -> bool:
        return bool(await replica.fetchval("SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'"))

    async def receives_not() -> bool:
        return not await receives()

    try:
        await replica.execute("ALTER SYSTEM SET primary_conninfo = ''")
        await replica.execute("SELECT pg_reload_conf()")
        assert await eventually(receives_not, 10)
        yield
    finally:
        await replica.execute("ALTER SYSTEM RESET primary_conninfo")
        await replica.execute("SELECT pg_reload_conf()")
        assert await eventually(receives, 10)
        await replica.close()


# Lag.


async def test_replica_that_was_looked_at_first_does_not_wait(database: Database) -> None:
    """The lag is known as soon as both were looked at, in whatever order; the next look may be an hour away."""
    databases = Databases(database.settings(), Metrics())
    replica = databases.router.replicas[0]

    await replica.database.monitor.probe()
    alone = replica.state
    await databases.primary.monitor.probe()

    assert (alone, replica.state) == ("unknown", "usable")
    await databases.close()


async def test_idle_primary_is_no_lag(database: Database) -> None:
    """The age of the last transaction grows while nothing is written, and the replica is near all the same."""
    async with quiet(database.settings(**STRICT)) as service:
        replica = service.databases.router.replicas[0]

        async def level() -> bool:
            return (await look(service)).state == "usable" and replica.lag_bytes == 0

        assert await eventually(level, 5)
        age = replica.position.replay_age

        assert age is not None
        assert age > STRICT["replica_max_lag_seconds"]
        assert replica.lag_seconds == 0.0


@pytest.mark.usefixtures("breakable_cluster")
async def test_lag_is_no_longer_than_the_replica_has_not_been_level(database: Database, execute: Execute) -> None:
    """After an idle time the first log that is not replayed yet is new, however old the last transaction is."""
    idle = 2.0
    async with quiet(database.settings()) as service:
        replica = service.databases.router.replicas[0]

        async def level_and_idle() -> bool:
            await look(service)
            return replica.lag_bytes == 0 and (replica.position.replay_age or 0.0) > idle

        assert await eventually(level_and_idle, 20)
        await database.cluster.pause_replay()
        try:
            await execute("CREATE TABLE news ()")
            await look(service)
            age, behind, seconds = replica.position.replay_age, replica.lag_bytes, replica.lag_seconds
            told = service.sample("db_replica_lag_seconds", pool="replica")
            # What a server had before it was started again tells nothing of what it has now.
            assert replica._level is not None
            at, _, written = replica._level
            replica._level = at, UNKNOWN, written
            restarted = replica.lag_seconds
        finally:
            await database.cluster.resume_replay()

        assert behind
        assert age is not None
        assert seconds is not None
        assert 0 < seconds < age - idle / 2
        assert (told, restarted) == (seconds, age)


@pytest.mark.usefixtures("breakable_cluster")
async def test_dead_wal_receiver_is_lag(database: Database, execute: Execute) -> None:
    """A replica that receives nothing has replayed all it received, and is behind: the primary's position tells."""
    async with quiet(database.settings(**STRICT)) as service, without_wal_receiver(database):
        await execute("CREATE TABLE news AS SELECT * FROM generate_series(1, 1000)")
        replica = await database.cluster.replica.connect()
        own_view = "SELECT pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn()"
        seems_level = await replica.fetchval(own_view)
        await replica.close()

        assert seems_level is True
        assert await becomes(service, "lagging")
        assert service.sample("db_replica_lag_bytes", pool="replica") > 1000


@pytest.mark.usefixtures("breakable_cluster")
async def test_lagging_replica_serves_no_reads(
    database: Database, execute: Execute, caplog: pytest.LogCaptureFixture
) -> None:
    """While replay is paused reads go to the primary, counted and said once; afterwards they go back."""
    caplog.set_level(logging.INFO, "pglifeguard.replica")
    async with quiet(database.settings(**STRICT)) as service:
        assert await becomes(service, "usable")
        await database.cluster.pause_replay()
        try:
            await execute("CREATE TABLE news AS SELECT * FROM generate_series(1, 1000)")
            assert await becomes(service, "lagging")
            for _ in range(3):
                assert (await service.client.get("/patients")).status_code == 200
        finally:
            await database.cluster.resume_replay()
        assert await becomes(service, "usable")
        await service.client.get("/patients")

        assert service.sample("db_reads_routed_total", target="primary", reason="lagging") == 3
        assert service.sample("db_reads_routed_total", target="replica", reason="replica") == 1
        assert service.sample("db_replica_usable", pool="replica") == 1
    states = [record.message for record in caplog.records if record.name == "pglifeguard.replica"]
    assert states[-2:] == ["replica is lagging: it is further behind than the settings allow", "replica is usable"]


@pytest.mark.parametrize(
    ("written", "replayed", "age", "state"),
    [
        (None, 100, 1.0, "unknown"),
        (100, None, 1.0, "unmeasured"),
        (100, 100, 3600.0, "usable"),
        (100, 101, 3600.0, "usable"),
        (1100, 100, 3600.0, "usable"),
        (1101, 100, 3600.0, "lagging"),
        (1101, 100, 10.0, "usable"),
        (1101, 100, 10.1, "lagging"),
        (1101, 100, None, "lagging"),
    ],
)
async def test_near_is_few_bytes_or_few_seconds(
    database: Database, written: int | None, replayed: int | None, age: float | None, state: State
) -> None:
    """Either measure is enough; what is not known is not near."""
    async with quiet(database.settings(replica_max_lag_bytes=1000, replica_max_lag_seconds=10)) as service:
        replica = service.databases.router.replicas[0]
        monitor = replica.database.monitor
        primary = service.databases.primary.monitor
        primary.position = UNKNOWN if written is None else Position(in_recovery=False, lsn=written)
        monitor.position = Position(in_recovery=True, lsn=replayed, replay_age=age)
        monitor.last = Probe(at=monitor.last.at, status="healthy", position=monitor.position)

        for listener in monitor.listeners:
            listener(monitor.last)

        assert replica.state == state


# The breaker.


async def test_broken_replica_comes_back_after_a_pause(database: Database, replica_proxy: Proxy) -> None:
    """A look that fails breaks it; a good one lets it in again, but not in the second after."""
    settings = database.settings(replicas=({"url": replica_proxy.url(database.replica_url())},))
    async with quiet(settings) as service:
        replica_proxy.refuse()
        replica_proxy.cut()
        assert await becomes(service, "broken")
        await replica_proxy.accept()
        replica, monitor = await look(service), service.databases.replicas[0].monitor
        assert (monitor.last.status, replica.state) == ("healthy", "broken")

        broken_at = replica._broken_at
        for seconds, state in ((BREAK_SECONDS * 0.99, "broken"), (BREAK_SECONDS, "usable")):
            replica._judge(Probe(at=broken_at + seconds, status="healthy"))
            assert replica.state == state


async def test_request_that_is_not_let_in_breaks_the_replica(database: Database, replica_proxy: Proxy) -> None:
    """The request is answered by the primary, and the next one does not try the replica."""
    settings = database.settings(replicas=({"url": replica_proxy.url(database.replica_url()), "pool_min_size": 0},))
    async with quiet(settings) as service:
        replica_proxy.refuse()

        answers = [await service.client.get("/patients") for _ in range(2)]

        assert [answer.status_code for answer in answers] == [200, 200]
        assert service.databases.router.replicas[0].state == "broken"
        assert service.sample("db_reads_retried_total", reason="database_unreachable") == 1
        assert service.sample("db_reads_routed_total", target="primary", reason="broken") == 1


async def test_read_in_flight_is_cut_when_the_replica_breaks(database: Database, replica_proxy: Proxy) -> None:
    """A read on a replica that went silent is served by the primary once a second look is late; one is forgiven."""
    settings = database.settings(
        replicas=({"url": replica_proxy.url(database.replica_url())},), health_timeout_seconds=0.1
    )
    async with quiet(settings) as service:
        await service.client.get("/patients")
        replica_proxy.hang()
        read = asyncio.create_task(service.client.get("/patients"))

        async def at_work() -> bool:
            return service.databases.replicas[0].pool.figures().checked_out == 1

        assert await eventually(at_work, 5)
        await look(service)
        waits = not read.done()
        state = service.databases.router.replicas[0].state
        await look(service)

        assert (waits, state) == (True, "broken")
        assert (await read).status_code == 200
        assert service.sample("db_reads_retried_total", reason="connection_lost") == 1


async def test_unknown_name_breaks_nothing(database: Database) -> None:
    """A database that is no replica cannot be broken."""
    async with quiet(database.settings()) as service:
        assert await becomes(service, "usable")

        service.databases.router.trip(service.databases.primary)

        assert service.databases.router.replicas[0].state == "usable"


# Choosing.


async def test_replica_with_the_fewest_requests_is_chosen(database: Database) -> None:
    """Of two replicas that both do, the one with less to do serves."""
    replica = {"url": database.replica_url(), "pool_size": 1, "max_overflow": 0}
    async with quiet(database.settings(replicas=(replica, replica))) as service:
        databases = service.databases
        await databases.primary.monitor.probe()
        for one in databases.replicas:
            await one.monitor.probe()
        assert [one.name for one in databases.replicas] == ["replica-1", "replica-2"]

        free, _ = databases.router.route()
        async with exhausted(databases.replicas[0]):
            first_busy, _ = databases.router.route()
        async with exhausted(databases.replicas[1]):
            second_busy, _ = databases.router.route()
            ahead = Token(int(databases.replicas[0].monitor.position.lsn or 0) + 1, 1)
            asked, _ = databases.router.route(at_least=ahead)

        chosen = [one.name for one in (free, first_busy, second_busy, asked)]
        assert chosen == ["replica-1", "replica-2", "replica-1", "replica-1"]


async def test_token_that_cannot_be_compared_leads_to_the_primary(database: Database) -> None:
    """A replica is asked for what it may replay soon, and not for what it cannot prove."""
    async with quiet(database.settings()) as service:
        assert await becomes(service, "usable")
        router, position = service.databases.router, service.databases.router.replicas[0].position
        replayed, primary = int(position.lsn or 0), (service.databases.primary, "behind_token")

        assert router.route(at_least=Token(replayed, 1))[1] == "replica"
        assert router.route(at_least=Token(replayed + 1, 1))[1] == "replica"
        assert router.route(at_least=Token(replayed)) == primary
        assert router.route(at_least=Token(replayed, 1, (position.system or 0) + 1 & 0xFFFF_FFFF)) == primary


async def test_primary_is_had_for_the_asking(database: Database) -> None:
    """A read that must see everything is not the replica's."""
    async with quiet(database.settings()) as service:
        assert await becomes(service, "usable")

        assert service.databases.router.route(primary=True) == (service.databases.primary, "primary_only")


async def test_absent_replica_is_the_primarys_work(database: Database) -> None:
    """One database alone serves everything, fallback or not."""
    async with quiet(database.settings(replica=False, replica_fallback=False)) as service:
        assert service.databases.router.route() == (service.databases.primary, "absent")


@pytest.mark.parametrize("state", ["unknown", "lagging", "broken", "promoted", "foreign", "diverged", "unmeasured"])
async def test_falling_back_can_be_switched_off(database: Database, state: State) -> None:
    """Who must not load the primary reads 503 replica_unavailable instead; a token still leads to it."""
    async with quiet(database.settings(replica_fallback=False)) as service:
        assert await becomes(service, "usable")
        router = service.databases.router
        assert router.route(at_least=Token(1))[1] == "behind_token"
        router.replicas[0].state = state

        with pytest.raises(ReplicaUnavailable, match=f"The replica is {state}"):
            service.databases.reading()
        answer = await service.client.get("/patients")

        assert (answer.status_code, answer.json()["code"]) == (503, "replica_unavailable")
        assert answer.headers["Retry-After"] == "1"


@pytest.mark.parametrize("broken", [0, 1])
async def test_order_of_replicas_decides_nothing(database: Database, broken: int) -> None:
    """One is behind the token, the other is broken: falling back is no fallback of the first, so it is not refused."""
    url = database.replica_url()
    async with quiet(database.settings(replicas=({"url": url}, {"url": url}), replica_fallback=False)) as service:
        for each in service.databases.all():
            await each.monitor.probe()
        router = service.databases.router
        router.replicas[broken].trip()

        assert router.route(at_least=Token(1)) == (service.databases.primary, "behind_token")


def test_positions_are_compared_where_both_are_known() -> None:
    """By timeline first, then by LSN; what one of them does not tell proves nothing."""
    known = Position(in_recovery=True, timeline=2, lsn=10)

    assert known.is_further(Position(in_recovery=True, timeline=1, lsn=20))
    assert known.is_further(Position(in_recovery=True, timeline=2, lsn=9))
    assert not known.is_further(known)
    for unknown in (UNKNOWN, Position(in_recovery=True, timeline=2), Position(in_recovery=True, lsn=1)):
        assert not known.is_further(unknown)
        assert not unknown.is_further(known)
