"""Replicas that DNS finds join when they are warm, are drained when they go, and never take more than their places."""

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text

from app.settings import Settings
from local.cluster import Cluster
from pglifeguard import members
from pglifeguard.connector import KeptAliveConnection
from pglifeguard.database import Database as Pool
from pglifeguard.databases import Databases
from pglifeguard.doctor import diagnose
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import BudgetExceeded
from pglifeguard.fastapi.sessions import ReadDB
from pglifeguard.members import RAMP_SECONDS, UNFIT_SECONDS, Members
from tests.conftest import Database
from tests.names import NAME, Names, answering, name_server
from tests.service import Service, serving, write
from tests.standbys import balancing, second_standby

FIRST, SECOND, THIRD = "127.0.0.1", "127.0.0.2", "127.0.0.3"


def _is_own(address: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


pytestmark = pytest.mark.skipif(
    not _is_own(SECOND), reason="127.0.0.2 is no address here: ifconfig lo0 alias 127.0.0.2, and so to 127.0.0.4"
)


def finding(database: Database, *, pool_timeout: float = 0.5, **changes: Any) -> Settings:
    """Return settings by which DNS finds the replicas, often."""
    url = database.replica_url().replace("127.0.0.1", NAME)
    replica: dict[str, Any] = {
        "url": url,
        "pool_min_size": 1,
        "pool_size": 2,
        "max_overflow": 0,
        "pool_timeout": pool_timeout,
    }
    fields: dict[str, Any] = {
        "replicas": (replica,),
        "pool_timeout": pool_timeout,
        "database_replica_discovery": "dns",
        "database_replica_discovery_seconds": 0.05,
    }
    return database.settings(**(fields | changes))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give what DNS answers: the cluster's replica at first."""
    with answering(monkeypatch, FIRST) as answers:
        yield answers


@asynccontextmanager
async def addresses(database: Database, *hosts: str) -> AsyncIterator[None]:
    """Make the cluster's replica answer at these addresses too."""
    port = database.cluster.replica.port
    async with AsyncExitStack() as stack:
        for host in hosts:
            await stack.enter_async_context(balancing(port, host=host, port=port))
        yield


def stages(databases: Databases) -> dict[str, str | None]:
    """Return what each replica does, by its address without the port."""
    return {str(one.found and one.found.host.address): one.stage for one in databases.replicas}


async def become(service: Service, **wanted: str) -> None:
    """Return when the replicas do this, and there are no others; `first` is the one at 127.0.0.1."""
    named = {"first": FIRST, "second": SECOND, "third": THIRD}
    expected = {named[name]: stage for name, stage in wanted.items()}

    async def there() -> bool:
        return stages(service.databases) == expected

    assert await eventually(there, 10), stages(service.databases)


def members_of(service: Service) -> Members:
    """Return what follows DNS."""
    found = service.databases._members
    assert found is not None
    return found


def pool_at(service: Service, host: str) -> Pool:
    """Return the pool to the replica at an address."""
    return next(one for one in service.databases.replicas if one.found and one.found.host.address == host)


async def test_reads_go_on_while_replicas_come_and_go(database: Database, cluster: Cluster, names: Names) -> None:
    """One replica joins under load and another one is removed: no read fails, and both serve in their time."""
    async with (
        second_standby(cluster, host=SECOND, port=cluster.replica.port),
        # A busy machine opens a connection in more than the half second that a request usually waits.
        serving(finding(database, pool_timeout=5)) as service,
    ):
        await write(service)
        await cluster.wait_replayed()
        answers: Counter[int] = Counter()
        ended = asyncio.Event()

        async def read() -> None:
            while not ended.is_set():
                answers[(await service.client.get("/patients/1")).status_code] += 1

        readers = [asyncio.create_task(read()) for _ in range(8)]
        names.addresses = [FIRST, SECOND]
        await become(service, first="serving", second="serving")
        first, second = pool_at(service, FIRST), pool_at(service, SECOND)
        routed = {"target": second.name, "reason": "replica"}

        async def serves() -> bool:
            return service.sample("db_reads_routed_total", **routed) > 20

        assert await eventually(serves, 10)
        names.addresses = [SECOND]
        await become(service, second="serving")
        before = service.sample("db_reads_routed_total", **routed)

        async def goes_on() -> bool:
            return service.sample("db_reads_routed_total", **routed) > before + 100

        assert await eventually(goes_on, 10)
        ended.set()
        await asyncio.gather(*readers)

        assert set(answers) == {200}
        assert first.pool.figures().checked_in + first.pool.figures().checked_out == 0
        # What came and went has left no series that says that it is there.
        assert service.sample("db_pool_connections_total", pool=first.name) == 0
        assert service.databases.metrics.registry.get_sample_value("db_replica_usable", {"pool": first.name}) is None
        assert service.sample("db_replica_changes_total", change="joined") == 2
        assert service.sample("db_replica_changes_total", change="left") == 1


async def test_list_stays_where_dns_gives_no_answer(
    database: Database, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    """Lookups that fail drop no replica; they are counted, and logged once until one succeeds."""
    caplog.set_level("INFO", "pglifeguard.members")
    async with serving(finding(database)) as service:
        names.addresses = []

        async def failed() -> bool:
            return service.sample("db_replica_lookups_total", outcome="failed") > 4

        assert await eventually(failed, 10)
        assert stages(service.databases) == {FIRST: "serving"}
        names.addresses = [FIRST]
        found = service.sample("db_replica_lookups_total", outcome="found")

        async def again() -> bool:
            return service.sample("db_replica_lookups_total", outcome="found") > found

        assert await eventually(again, 10)

    said = [each.message for each in caplog.records if each.name == "pglifeguard.members" and "look" in each.message]
    assert said == ["replicas cannot be looked up", "replicas are looked up again"]


async def test_service_starts_without_an_answer(database: Database, names: Names) -> None:
    """Reads go to the primary, loudly, until DNS answers."""
    names.addresses = []
    async with serving(finding(database)) as service:
        # A replica that joins later may be asked for what is written now.
        assert "x-consistency-token" in (await write(service)).headers
        status = (await service.client.get("/patients/1")).status_code
        fell_back = service.sample("db_reads_routed_total", target="primary", reason="unknown")
        names.addresses = [FIRST]
        await become(service, first="serving")

    assert (status, fell_back) == (200, 1)


async def test_answer_that_lacks_a_replica_once_changes_nothing(database: Database, names: Names) -> None:
    """One incomplete answer is no departure, two in a row are."""
    async with addresses(database, SECOND):
        names.addresses = [FIRST, SECOND]
        slow = finding(database, database_replica_discovery_seconds=3600)
        async with serving(slow) as service:
            found = members_of(service)
            seen = []
            for answer in ([FIRST], [FIRST, SECOND], [FIRST], [FIRST]):
                names.addresses = answer
                await found.look()
                seen.append(stages(service.databases)[SECOND])
            await become(service, first="serving")

    assert seen == ["serving", "serving", "serving", "draining"]


async def test_new_replica_waits_for_the_place_of_the_one_that_goes(database: Database, names: Names) -> None:
    """With one place there is never a second pool: what is drained holds it until its last statement has ended."""
    slow = finding(database, database_replica_max_pools=1, database_replica_discovery_seconds=3600)
    async with addresses(database, SECOND), serving(slow) as service:
        found = members_of(service)
        (before,) = service.databases.replicas
        async with service.databases.reading() as session:
            connection = await session.connection()
            names.addresses = [SECOND]
            await found.look()
            await found.look()
            await found.look()
            during = stages(service.databases)
            running = (await connection.exec_driver_sql("SELECT 1")).scalar()
        await become(service, second="serving")
        (after,) = service.databases.replicas

        assert (during, running) == ({FIRST: "draining"}, 1)
        assert (before.name, after.name) == ("replica", "replica")
        assert before.pool.figures().checked_in == 0
        assert service.sample("db_replicas", stage="serving") == 1


async def test_replica_that_comes_back_waits_for_its_own_end(database: Database, names: Names) -> None:
    """One that is drained and named again gets a new pool when the old one is closed."""
    async with serving(finding(database, database_replica_discovery_seconds=3600)) as service:
        found = members_of(service)
        (before,) = service.databases.replicas
        members_now = found._members
        async with service.databases.reading() as session:
            await session.connection()
            for answer in ([THIRD], [THIRD], [FIRST]):
                names.addresses = answer
                await found.look()
            assert members_now[f"{FIRST}:{database.cluster.replica.port}"].database is before

        async def anew() -> bool:
            return any(one.stage == "serving" and one is not before for one in service.databases.replicas)

        assert await eventually(anew, 10)


async def test_session_of_a_replica_that_is_gone_reads_on_the_primary(database: Database, names: Names) -> None:
    """A session that was opened before the replica went, and asks after it, is served all the same."""
    async with serving(finding(database, database_replica_discovery_seconds=3600)) as service:
        found = members_of(service)
        names.addresses = [SECOND]
        async with service.databases.reading() as session:
            await found.look()
            await found.look()

            async def gone() -> bool:
                return FIRST not in stages(service.databases)

            assert await eventually(gone, 10)
            value = (await (await session.connection()).exec_driver_sql("SELECT pg_is_in_recovery()")).scalar()

        assert value is False
        assert service.sample("db_reads_routed_total", target="primary", reason="drained") == 1


async def test_replica_that_leaves_during_a_question_about_a_token_is_left(database: Database, names: Names) -> None:
    """A read that asks the primary about its token, while its replica is drained, goes to the primary."""
    async with serving(finding(database, database_replica_discovery_seconds=3600)) as service:
        found, primary, forgeries = (
            members_of(service),
            service.databases.primary.monitor,
            service.databases.router.forged,
        )
        path, token = (answer := await write(service)).headers["location"], answer.headers["x-consistency-token"]
        forged = [{"x-consistency-token": f"{token.rpartition('/')[0]}/FFFFFF{number:02X}"} for number in (1, 2)]
        await service.client.get(path, headers=forged[0])

        async def alert() -> bool:
            return forgeries.alert and not forgeries._rounds

        assert await eventually(alert, 10)
        async with primary._turn:
            reading = asyncio.create_task(service.client.get(path, headers=forged[1]))

            async def asks() -> bool:
                return bool(forgeries._rounds)

            assert await eventually(asks, 10)
            names.addresses = [SECOND]
            await found.look()
            await found.look()
        answer = await reading

        assert answer.status_code == 200
        assert service.sample("db_reads_routed_total", target="primary", reason="drained") == 1


async def test_session_that_goes_on_after_its_replica_is_run_again(database: Database, names: Names) -> None:
    """A request that had released its connection, and is refused by the closed pool, is served by the primary."""
    async with serving(finding(database, database_replica_discovery_seconds=3600)) as service:
        found, runs = members_of(service), []

        @service.app.get("/twice")
        async def twice(db: ReadDB) -> bool:
            runs.append(await db.scalar(text("SELECT pg_is_in_recovery()")))
            await db.close()
            names.addresses = [SECOND]
            await found.look()
            await found.look()

            async def gone() -> bool:
                return FIRST not in stages(service.databases)

            await eventually(gone, 10)
            return bool(await db.scalar(text("SELECT pg_is_in_recovery()")))

        answer = await service.client.get("/twice")

        assert (answer.status_code, answer.json(), runs) == (200, False, [True, False])
        assert service.sample("db_reads_retried_total", reason="pool_exhausted") == 1


async def test_statement_that_does_not_end_is_cut(
    database: Database, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    """A drained pool waits as long as a shutdown does, then its place is given away."""
    slow = finding(
        database,
        database_replica_max_pools=1,
        database_replica_discovery_seconds=3600,
        graceful_timeout_seconds=1,
        statement_timeout_seconds=0.1,
    )
    async with addresses(database, SECOND), serving(slow) as service:
        found, pool = members_of(service), service.databases.replicas[0].pool
        held = await pool.acquire()
        names.addresses = [SECOND]
        await found.look()
        await found.look()
        await become(service, second="serving")
        pool.release(held)

    assert "connections cut of a drained replica" in caplog.messages


async def test_replica_that_serves_nothing_gives_its_place_away(
    database: Database, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that DNS still names and that does not answer is replaced by another one, and may be chosen again later."""
    now = 0.0
    names.addresses = [SECOND]
    one = finding(database, database_replica_max_pools=1, database_replica_discovery_seconds=3600)
    async with serving(one, settled=False) as service:
        found = members_of(service)
        monkeypatch.setattr(found, "_clock", lambda: now)
        found._members[f"{SECOND}:{database.cluster.replica.port}"].fit_at = now
        monkeypatch.setattr(members, "chosen", _in_order_of_addresses(SECOND, FIRST))
        names.addresses = [FIRST, SECOND]
        await found.look()
        now = UNFIT_SECONDS - 1
        found.tick()
        assert stages(service.databases) == {SECOND: "warming"}
        now = UNFIT_SECONDS
        found.tick()
        await become(service, first="serving")
        now += 299
        await found.look()
        assert stages(service.databases) == {FIRST: "serving"}
        now += 2
        await found.look()
        assert stages(service.databases) == {FIRST: "draining"}
        await become(service, second="warming")


async def test_replica_that_serves_again_is_fit(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was broken for long, and had no other to give its place to, is not exchanged once it has recovered."""
    now = 0.0
    with answering(monkeypatch, FIRST):
        async with serving(finding(database, database_replica_discovery_seconds=3600)) as service:
            found, (replica,) = members_of(service), service.databases.router.replicas
            monkeypatch.setattr(found, "_clock", lambda: now)
            found.tick()
            replica.trip()
            now = UNFIT_SECONDS
            found.tick()
            unfit = set(found._unfit)

            async def usable() -> bool:
                return replica.state == "usable"

            assert await eventually(usable, 10)
            found.tick()

    assert unfit == {f"{FIRST}:{database.cluster.replica.port}"}
    assert not found._unfit


def _in_order_of_addresses(*hosts: str) -> Any:
    def choose(listed: Any, most: int, _lot: str, _ranks: Any, unfit: Any) -> list[str]:
        ordered = sorted(listed, key=lambda each: (each.key in unfit, hosts.index(each.host.address)))
        return [each.key for each in ordered[:most]]

    return choose


async def test_replica_takes_no_reads_before_its_pool_is_warm(database: Database, names: Names) -> None:
    """One whose monitor has found it near enough waits for its connections, and for ever behind a refused pooler."""
    held, opened = asyncio.Event(), asyncio.Event()

    async def on_connect(connection: KeptAliveConnection) -> None:
        if connection.transport.get_extra_info("peername")[0] == SECOND:
            held.set()
            await opened.wait()

    url = database.replica_url().replace("127.0.0.1", NAME)
    patient = ({"url": url, "pool_min_size": 1, "connect_timeout_seconds": 30},)
    settings = finding(database, replicas=patient)
    async with addresses(database, SECOND), Databases(settings, on_connect=on_connect) as databases:
        names.addresses = [FIRST, SECOND]
        await held.wait()
        (new,) = [one for one in databases.replicas if one.found and one.found.host.address == SECOND]
        for _ in range(3):
            await new.monitor.probe()
        judge = databases.router.judge_of(new)
        before = (judge and judge.state, new.stage, len(databases.router.replicas))
        assert new.connector.look is not None
        new.connector.look.refuse("leads to something else")
        opened.set()

        async def warm() -> bool:
            return new.pool.figures().checked_in == 1

        assert await eventually(warm, 10)
        for _ in range(3):
            await new.monitor.probe()

        assert before == ("usable", "warming", 1)
        assert new.stage == "warming"


async def test_what_dns_still_names_is_exchanged_one_at_a_time(
    database: Database, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where other replicas come first now, one pool is given up for one of them, and then the next."""
    fourth = "127.0.0.4"
    names.addresses = [FIRST, SECOND, THIRD, fourth]
    two = finding(database, database_replica_max_pools=2, database_replica_discovery_seconds=3600)
    monkeypatch.setattr(members, "chosen", _in_order_of_addresses(FIRST, SECOND, THIRD, fourth))
    async with addresses(database, SECOND, THIRD, fourth), serving(two) as service:
        await become(service, first="serving", second="serving")
        monkeypatch.setattr(members, "chosen", _in_order_of_addresses(THIRD, fourth, FIRST, SECOND))
        await members_of(service).look()
        at_once = Counter(stages(service.databases).values())

        async def exchanged() -> bool:
            await members_of(service).look()
            return stages(service.databases) == {THIRD: "serving", fourth: "serving"}

        assert await eventually(exchanged, 10)

    assert at_once == {"draining": 1, "serving": 1}


async def test_share_of_a_new_replica_grows(database: Database, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new replica has a tenth of its share at first and all of it after RAMP_SECONDS, also where nobody is busy."""
    now = 0.0
    async with addresses(database, SECOND), serving(finding(database)) as service:
        found, router = members_of(service), service.databases.router
        monkeypatch.setattr(found, "_clock", lambda: now)
        found._opened_at = -RAMP_SECONDS
        names.addresses = [FIRST, SECOND]
        await become(service, first="serving", second="serving")
        new = pool_at(service, SECOND)

        def share() -> float:
            found.tick()
            return Counter(router.route()[0].name for _ in range(1100))[new.name] / 1100

        shares = []
        for seconds in (0.0, RAMP_SECONDS / 2, RAMP_SECONDS):
            now = seconds
            shares.append(share())
        told = (await service.client.get("/health/db")).json()["databases"][new.name]

    assert shares == [
        pytest.approx(1 / 11, abs=0.01),
        pytest.approx(1 / 3, abs=0.01),
        pytest.approx(0.5, abs=0.01),
    ]
    assert told["share"] == 1.0


async def test_reads_stay_in_the_zone_while_it_serves(database: Database, names: Names) -> None:
    """A replica of another zone has a pool, and gets reads when none of the own zone serves."""
    names.addresses = [FIRST, SECOND]
    zones: dict[str, Any] = {"database_zone": "b", "database_replica_zones": f"{FIRST}/32=a,{SECOND}/32=b"}
    async with addresses(database, SECOND), serving(finding(database, **zones)) as service:
        await become(service, first="serving", second="serving")
        router, near, far = service.databases.router, pool_at(service, SECOND), pool_at(service, FIRST)
        usual = {router.route()[0].name for _ in range(20)}
        router.trip(near)
        without = router.route()[0].name

    assert (usual, without) == ({near.name}, far.name)


async def test_weights_of_records_are_shares(database: Database, names: Names) -> None:
    """Where nobody is busy, a replica of three times the weight gets three times the reads."""
    names.addresses = [FIRST, SECOND]
    async with addresses(database, SECOND), serving(finding(database)) as service:
        await become(service, first="serving", second="serving")
        router = service.databases.router
        router.judges[0].weight, router.judges[1].weight = 3, 1
        counts = Counter(router.route()[0].name for _ in range(400))

    assert counts[router.judges[0].database.name] == pytest.approx(300, abs=2)


# What operators see and do.


@pytest.mark.usefixtures("names")
async def test_operators_see_which_replica_is_which(database: Database) -> None:
    """Health and figures say the address and what the replica does; the places bound the names."""
    async with serving(finding(database)) as service:
        health = (await service.client.get("/health/db")).json()["databases"]
        stats = (await service.client.get("/debug/pool-stats")).json()

    address = f"{FIRST}:{database.cluster.replica.port}"
    replica = health["replica-1"]
    assert (replica["state"], replica["address"], replica["stage"], replica["rank"]) == (
        "usable",
        address,
        "serving",
        0,
    )
    assert replica["share"] == 1.0  # It is as new as all others here.
    assert (stats["replica-1"]["address"], stats["replica-1"]["stage"]) == (address, "serving")
    assert set(stats) == {"primary", "replica-1", "analytics"}


async def test_doctor_examines_each_replica_that_dns_names(database: Database, names: Names) -> None:
    """Each address is a database of the report; the budget counts what leads to one server; no answer is an error."""
    names.addresses = [FIRST, SECOND]
    settings = finding(database)
    async with addresses(database, SECOND):
        found = await diagnose(settings)
    names.addresses = []
    without = await diagnose(settings)

    port = database.cluster.replica.port
    wanted = [f"DATABASE_REPLICA_URL ({host}:{port})" for host in (FIRST, SECOND)]
    assert [facts.variable for facts in found.databases if facts.target.purpose == "replica"] == wanted
    (line,) = [line for line in found.budget if line.server == f"{NAME}:{port}"]
    assert (line.wanted, line.arithmetic) == (6, "1 workers x 1 instances x 2 pools x (2 + 0 + 1)")
    assert not {finding.code for finding in found.findings} & {"over_max_connections", "replicas_not_found"}
    (missing,) = [finding for finding in without.findings if finding.code == "replicas_not_found"]
    assert "Name or service not known" in missing.text


async def test_size_belongs_to_the_place(database: Database, names: Names) -> None:
    """A size holds for the replica that takes the place later, and an empty place may be given one."""
    async with serving(finding(database, database_replica_discovery_seconds=3600)) as service:
        databases, found = service.databases, members_of(service)
        databases.resize("replica-1", pool_size=1)
        databases.resize("replica-2", pool_size=3)
        await databases.renew_connections("replica-2")
        sizes = [databases.replicas[0].pool.settings.pool_size]
        async with addresses(database, SECOND):
            names.addresses = [FIRST, SECOND]
            await found.look()
            await become(service, first="serving", second="serving")
            sizes.append(pool_at(service, SECOND).pool.settings.pool_size)
        back = databases.resize("replica-1")

    assert (sizes, back.pool_size) == ([1, 3], 2)


async def test_sizes_are_held_to_what_one_server_and_the_limit_grant(database: Database, names: Names) -> None:
    """A server has the pool of one place, CONNECTION_LIMIT those of all; addresses of one server share its grant."""
    names.addresses = [FIRST, SECOND]
    limited = finding(database, connection_limit=40, connection_reserve=0, database_replica_discovery_seconds=3600)
    async with addresses(database, SECOND), serving(limited) as service:
        await become(service, first="serving", second="serving")
        databases = service.databases
        server = databases.replicas[0].settings.server

        async def two_pools() -> bool:
            databases.publish()
            return service.sample("db_connection_budget_wanted", server=server) == 2 * (2 + 0 + 1)

        # The second address leads to the same server.
        assert await eventually(two_pools, 5)
        databases.resize("replica-1", pool_size=14)
        databases.resize("replica-2", pool_size=14)
        # The server would get 15 + 15, and the name 15 more.
        with pytest.raises(BudgetExceeded, match=r"3 pools x \(14 \+ 0 \+ 1\) = 45 connections"):
            databases.resize("replica-3", pool_size=14)
        databases.resize("replica-1")
        databases.resize("replica-2")
        names.addresses = [FIRST]
        for _ in range(2):
            await members_of(service).look()
        await become(service, first="serving")
        databases.publish()

        assert service.sample("db_connection_budget_wanted", server=server) == 2 + 0 + 1


async def test_replica_that_joins_in_a_pause_waits_too(database: Database, names: Names) -> None:
    """Its pool hands nothing out before the pause ends."""
    async with addresses(database, SECOND), serving(finding(database)) as service:
        service.databases.pause(seconds=30)
        names.addresses = [FIRST, SECOND]
        await become(service, first="serving", second="serving")

        assert pool_at(service, SECOND).pool.take_warm() is None
        service.databases.resume()
        held = await pool_at(service, SECOND).pool.acquire()
        pool_at(service, SECOND).pool.release(held)


async def test_closing_leaves_no_replica_behind(database: Database, names: Names) -> None:
    """Databases that are closed while a replica is drained, and another one warms, have no connection and no task."""
    names.addresses = [FIRST, SECOND]
    async with addresses(database, SECOND):
        databases = Databases(finding(database, database_replica_discovery_seconds=3600))
        async with databases:
            found = databases._members
            assert found is not None
            session = databases.reading()
            await session.connection()
            names.addresses = [THIRD]
            await found.look()
            await found.look()
            await session.close()
            every = list(databases.replicas)

        assert all(one.pool.figures().checked_in == 0 for one in every)
        async with databases:
            assert databases._members is not found


async def test_records_of_a_service_lead_to_replicas(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SRV records each replica has a port of its own, and the lower priority serves first."""
    port = database.cluster.replica.port
    service_name = "_postgresql._tcp.orders.example"
    url = database.replica_url().replace(f"127.0.0.1:{port}", service_name)
    settings = finding(
        database,
        replicas=({"url": url, "pool_min_size": 1},),
        database_replica_discovery="srv",
    )
    async with name_server(monkeypatch) as server, balancing(port) as other:
        server.records[service_name] = [f"10 5 {port} localhost.", f"20 0 {other.port} localhost."]
        async with serving(settings) as service:

            async def both() -> bool:
                return [one.stage for one in service.databases.replicas] == ["serving", "serving"]

            assert await eventually(both, 10)
            router = service.databases.router
            first, second = sorted(router.replicas, key=lambda replica: replica.rank)
            usual = {router.route()[0].name for _ in range(10)}
            router.trip(first.database)
            without = router.route()[0].name
            server.records[service_name] = [f"10 7 {port} localhost.", f"20 0 {other.port} localhost."]

            async def heavier() -> bool:
                return first.weight == 7

            assert await eventually(heavier, 10)

    assert [first.database.found and first.database.found.key] == [f"localhost:{port}"]
    assert (usual, without) == ({first.database.name}, second.database.name)


async def test_address_of_the_primary_serves_reads_as_it_does(database: Database, names: Names) -> None:
    """A name that leads to the primary too, as a service of all servers does, gives it a pool as a replica has one."""
    names.addresses = [FIRST, SECOND]
    primary, port = database.cluster.primary.port, database.cluster.replica.port
    async with balancing(primary, host=SECOND, port=port), serving(finding(database)) as service:
        await become(service, first="serving", second="serving")
        path = (await write(service)).headers["location"]
        states = {replica.state for replica in service.databases.router.replicas}
        answers = {(await service.client.get(path)).status_code for _ in range(6)}

    assert (states, answers) == ({"usable"}, {200})
