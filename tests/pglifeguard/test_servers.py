"""Which server answers is known: promoted, of another cluster, or late behind a balancer, it serves no wrong read.

The servers are real; what a server cannot be made to lack, a function of the same name before it lacks.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal

import asyncpg
import pytest
from sqlalchemy import select

from app.patients.models import Patient
from local.cluster import Cluster
from pglifeguard import forged_tokens
from pglifeguard import replica as replica_module
from pglifeguard.consistency import Consistency
from pglifeguard.embedded.postgres import Server, free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import ConnectionLost
from pglifeguard.lease import Lease
from pglifeguard.monitor import Monitor
from pglifeguard.replica import State
from pglifeguard.server_position import UNKNOWN, Position, Token
from pglifeguard.testing.faults import exhausted
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database, Execute
from tests.service import ADA, Service, quiet, serving, write
from tests.standbys import balancing, second_standby

# Before pg_catalog in a role's search path, a function of the same name is found first.
SHADOW = """
CREATE SCHEMA shadow;
GRANT USAGE ON SCHEMA shadow TO PUBLIC;
CREATE FUNCTION shadow.{name} RETURNS {returns} LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'Function {name} is not supported' USING ERRCODE = '{state}'; END $$;
ALTER DATABASE "{database}" SET search_path = shadow, pg_catalog, public;
"""


def state(service: Service) -> State:
    """Return the state of the only replica."""
    return service.databases.router.replicas[0].state


async def becomes(service: Service, wanted: State) -> bool:
    """Tell whether the replica gets into this state."""

    async def is_it() -> bool:
        return state(service) == wanted

    return await eventually(is_it, 10)


async def health(service: Service, name: str) -> Any:
    """Return what /health/db says of one database."""
    return (await service.client.get("/health/db")).json()["databases"][name]


# A server that is no replica.


async def test_promoted_replica_serves_no_read(database: Database, breakable_cluster: Cluster) -> None:
    """Its own log soon runs ahead of every token, and it is healthy: the primary serves, and health says why."""
    async with serving(database.settings()) as service:
        path = (await write(service)).headers["location"]
        await breakable_cluster.replica.promote()
        assert await becomes(service, "promoted")
        changed = await service.client.patch(path, json={"full_name": "Changed"})
        apart = await breakable_cluster.replica.connect(database.name)
        await apart.execute("CREATE TABLE own AS SELECT g FROM generate_series(1, 20000) AS g")
        await apart.close()
        await service.databases.replicas[0].monitor.probe()

        with_token = await service.client.get(path)
        service.client.cookies.clear()
        without = await service.client.get(path)

        assert changed.status_code == 200
        assert [answer.json()["full_name"] for answer in (with_token, without)] == ["Changed", "Changed"]
        assert service.sample("db_replica_usable", pool="replica") == 0
        assert service.sample("db_reads_routed_total", target="primary", reason="promoted") >= 1
        assert (await health(service, "replica"))["state"] == "promoted"


async def test_primary_may_be_its_own_replica(database: Database) -> None:
    """The same server is no stranger to itself: a service with one server under both names reads there."""
    settings = database.settings(replicas=({"url": database.url()},))
    async with serving(settings) as service:
        path = (await service.client.post("/patients", json=ADA)).headers["location"]
        before = service.sample("db_reads_routed_total", target="replica", reason="replica")

        async def served() -> bool:
            answer = await service.client.get(path)
            assert answer.json()["full_name"] == ADA["full_name"]
            return service.sample("db_reads_routed_total", target="replica", reason="replica") > before

        assert state(service) == "usable"
        assert await eventually(served, 5)


PRIMARY = Position(in_recovery=False, system=1, started=1.0, timeline=2, lsn=100, stalled=0.0)
STANDBY = Position(in_recovery=True, system=1, started=2.0, timeline=2, lsn=100, replay_age=0.0)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (STANDBY, "usable"),
        (PRIMARY, "usable"),
        (replace(STANDBY, in_recovery=False), "promoted"),
        (replace(PRIMARY, started=None), "promoted"),
        (replace(STANDBY, system=2), "foreign"),
        (replace(PRIMARY, system=2), "foreign"),
        (replace(STANDBY, timeline=1), "diverged"),
        (replace(STANDBY, timeline=3), "diverged"),
        (replace(STANDBY, timeline=None), "usable"),
        (replace(STANDBY, lsn=None), "unmeasured"),
    ],
)
async def test_server_is_judged_by_what_it_says(database: Database, said: Position, wanted: State) -> None:
    """Promoted, of another cluster, on another timeline or without a position, it serves no reads."""
    async with quiet(database.settings()) as service:
        monitor, replica = service.databases.primary.monitor, service.databases.router.replicas[0]
        monitor.position = PRIMARY
        replica.state_of(said)
        monitor.last = monitor.last._replace(at=time.monotonic())

        assert replica.state_of(said) == wanted


@pytest.mark.parametrize("status", ["error", "healthy"])
@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (replace(STANDBY, timeline=3), "alone"),
        (replace(STANDBY, timeline=3, in_recovery=False), "alone"),
        (replace(STANDBY, in_recovery=False), "promoted"),
        (replace(STANDBY, timeline=3, system=2), "foreign"),
        (replace(STANDBY, timeline=1), "diverged"),
        (STANDBY, "usable"),
    ],
)
async def test_successor_and_its_standbys_serve_while_the_primary_is_away(
    database: Database, said: Position, wanted: State, status: Literal["error", "healthy"]
) -> None:
    """A pooler may find the new primary a second later than the replica's address does, and no newer answer can be had.

    What the primary answered before that says nothing.
    """
    async with quiet(database.settings()) as service:
        monitor, replica = service.databases.primary.monitor, service.databases.router.replicas[0]
        monitor.position, monitor.last = PRIMARY, monitor.last._replace(status=status)
        states = [replica.state_of(said)]
        if status == "error":
            monitor.last = monitor.last._replace(at=time.monotonic())
            states.append(replica.state_of(said))

        assert set(states) == {wanted}


@pytest.mark.parametrize(
    ("token", "at", "covered"),
    [
        (Token(100, 2, 1), STANDBY, True),
        (Token(101, 2, 1), STANDBY, False),
        (Token(100, 3, 1), STANDBY, False),
        (Token(100), STANDBY, False),
        (Token(100, 2, 7), STANDBY, False),
        (Token(100, 2), STANDBY, True),
        # Of an older timeline: whoever has replayed what the primary had when it was seen on its own, has all of it.
        (Token(10**9, 1, 1), STANDBY, True),
        (Token(1, 1, 1), replace(STANDBY, lsn=99), False),
        (Token(1, 1, 1), replace(STANDBY, timeline=3), False),
        (Token(100, 2, 1), replace(STANDBY, timeline=None), False),
        (Token(100, 2, 1), replace(STANDBY, lsn=None), False),
    ],
)
async def test_token_means_something_on_its_timeline(
    database: Database, token: Token, at: Position, *, covered: bool
) -> None:
    """LSNs are compared on one timeline of one cluster only."""
    async with quiet(database.settings()) as service:
        replica = service.databases.router.replicas[0]
        replica._floors[2] = 100

        assert replica.covers(token, at) is covered


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (b"1-1-0/5", b"1-1-0/6"),
        (b"1-1-0/5", b"1-2-0/1"),
        (b"1-1-0/5", b"0/1"),
        (b"1-1-0/5", b"2-1-0/1"),
    ],
)
def test_of_two_tokens_the_one_that_asks_for_more_counts(older: bytes, newer: bytes) -> None:
    """A later timeline, or further on the same; one that cannot be compared leads to the primary."""
    first, second = Token.parse(older), Token.parse(newer)
    assert first is not None
    assert second is not None

    assert second.is_newer(None)
    assert second.is_newer(first)
    assert Token.parse(b"1-0/5") is None


async def test_token_of_a_timeline_before_the_failover_is_served_by_a_replica(
    database: Database, breakable_cluster: Cluster
) -> None:
    """After a failover a client's old token leads to a replica of the new primary, and to no other server."""
    async with second_standby(breakable_cluster) as other:
        async with serving(database.settings()) as before:
            token = (await write(before)).headers["x-consistency-token"]
        await _replayed(breakable_cluster, other)
        await breakable_cluster.primary.stop()
        await other.promote()
        replica = breakable_cluster.replica
        await _follow(replica, other)
        url = _at(database.url(), other.port)
        async with serving(database.settings(primary={"url": url})) as service:

            async def served() -> bool:
                read = await service.client.get("/patients", headers={"X-Consistency-Token": token})
                assert [one["mrn"] for one in read.json()] == [ADA["mrn"]]
                return service.sample("db_reads_routed_total", target="replica", reason="replica") > 0

            assert service.databases.primary.monitor.position.timeline == 2
            assert await eventually(served, 10)


async def test_replica_behind_a_failover_serves_no_read(database: Database, breakable_cluster: Cluster) -> None:
    """A standby that goes on following the old primary has nothing of what the new one writes."""
    async with second_standby(breakable_cluster) as other:
        await _replayed(breakable_cluster, other)
        await other.promote()
        settings = database.settings(primary={"url": _at(database.url(), other.port)})
        async with serving(settings, settled=False) as service:
            assert await becomes(service, "diverged")
            path = (await service.client.post("/patients", json=ADA)).headers["location"]

            assert (await service.client.get(path)).status_code == 200
            assert (await health(service, "replica"))["lag_bytes"] is None


# Several servers behind one address.


@asynccontextmanager
async def balanced(database: Database, cluster: Cluster, **changes: Any) -> AsyncIterator[tuple[Service, Server]]:
    """Give a service that reads from two standbys by turns, and the one of them that its monitor does not look at."""
    async with second_standby(cluster) as other:
        await _replayed(cluster, other)
        async with balancing(cluster.replica.port, other.port) as balancer:
            replica = {"url": balancer.url(database.replica_url()), "pool_min_size": 4}
            async with quiet(database.settings(replicas=(replica,), **changes)) as service:
                looked_at = await _started(cluster.replica) == service.databases.replicas[0].monitor.position.started
                yield service, other if looked_at else cluster.replica


async def test_token_is_honoured_by_the_server_that_answers(database: Database, breakable_cluster: Cluster) -> None:
    """One of two standbys replays nothing: no read with a token is stale, by `rows` or by SQLAlchemy."""
    async with balanced(database, breakable_cluster) as (service, paused):
        databases, monitor = service.databases, service.databases.replicas[0].monitor
        path = (await write(service)).headers["location"]
        number = int(path.rpartition("/")[2])
        await _pause(paused)
        for turn in range(40):
            name = f"Name {turn}"
            changed = await service.client.patch(path, json={"full_name": name})
            token = changed.headers["x-consistency-token"]
            service.client.cookies.clear()
            wanted = Token.parse(token.encode())
            assert wanted is not None

            async def replayed(wanted: Token = wanted) -> bool:
                await monitor.probe()
                return databases.router.replicas[0].covers(wanted)

            assert await eventually(replayed, 10)
            reads = [service.client.get(path, headers={"X-Consistency-Token": token}) for _ in range(4)]
            for answer in await asyncio.gather(*reads):
                assert answer.json()["full_name"] == name
            async with databases.reading(Consistency(wanted)) as session:
                found = await session.scalar(select(Patient.full_name).where(Patient.id == number))
                assert found == name

        # The paused one was met, and left.
        assert service.sample("db_reads_routed_total", target="primary", reason="behind_token") > 0


async def test_behind_a_pooler_a_token_is_asked_for_in_the_transaction(database: Database) -> None:
    """There the next statement may reach another server, unless it is part of the same transaction."""
    async with quiet(database.settings()) as service:
        path, token = (answer := await write(service)).headers["location"], answer.headers["x-consistency-token"]
        replica = service.databases.router.replicas[0]
        wanted = Token.parse(token.encode())
        assert wanted is not None

        async def replayed() -> bool:
            await replica.database.monitor.probe()
            return replica.covers(wanted)

        assert await eventually(replayed, 10)
        for entry in replica.database.pool._idle:
            entry.info["checkout"].connection.pooled = True
        before = service.sample("db_reads_routed_total", target="primary", reason="behind_token")
        async with service.databases.reading(Consistency(wanted)) as session:
            found = await session.scalar(select(Patient.full_name))
        read = await service.client.get(path, headers={"X-Consistency-Token": token})

        assert (found, read.json()["full_name"]) == (ADA["full_name"], ADA["full_name"])
        assert service.sample("db_reads_routed_total", target="primary", reason="behind_token") == before


async def test_late_server_behind_a_balancer_serves_no_read(
    database: Database, breakable_cluster: Cluster, execute: Execute
) -> None:
    """Each server is judged by its own lag: what the monitor sees of one says nothing about the other."""
    strict = {"replica_max_lag_bytes": 64, "replica_max_lag_seconds": 1e-6, "monitor_interval_seconds": 1e-9}
    async with balanced(database, breakable_cluster, **strict) as (service, paused):
        # Every read asks anew, and no monitor looks meanwhile.
        databases = service.databases
        databases.router.replicas[0]._settings = databases.settings.model_copy(
            update={"monitor_interval_seconds": 1e-9}
        )
        await _pause(paused)
        path = (await write(service)).headers["location"]
        await execute("CREATE TABLE news AS SELECT * FROM generate_series(1, 1000)")

        async def level() -> bool:
            await databases.primary.monitor.probe()
            await databases.replicas[0].monitor.probe()
            return state(service) == "usable"

        assert await eventually(level, 10)
        for _ in range(10):
            answers = await asyncio.gather(*(service.client.get(path) for _ in range(4)))
            assert {answer.status_code for answer in answers} == {200}
        described = await health(service, "replica")

        assert service.sample("db_reads_retried_total", reason="not_found") == 0
        assert service.sample("db_reads_routed_total", target="primary", reason="lagging") > 0
        assert [one["state"] for one in described["other_servers"]] == ["lagging"]


# Without a primary.


@pytest.mark.parametrize("ready", [True, False])
async def test_instance_that_starts_without_a_primary_serves_reads(database: Database, *, ready: bool) -> None:
    """A healthy standby serves what has no token; writes are 503, and readiness says what the operator wants of it."""
    nobody = f"postgresql://a@127.0.0.1:{free_port()}/x"
    settings = database.settings(primary={"url": nobody}, ready_without_primary=ready)
    async with serving(settings, settled=False) as service:
        assert await becomes(service, "alone")
        reads = [await service.client.get("/patients") for _ in range(20)]
        token = {"X-Consistency-Token": "0/1"}
        wanting = await service.client.get("/patients", headers=token)
        stored = await service.client.post("/patients", json=ADA)
        probe = await service.client.get("/health/ready")
        described = await health(service, "replica")

    assert {read.status_code for read in reads} == {200}
    assert (wanting.status_code, stored.status_code) == (503, 503)
    assert probe.status_code == (200 if ready else 503)
    assert (described["state"], described["judged_by"], described["lag_bytes"]) == ("alone", "own", None)


# Missing features.


@pytest.mark.parametrize(
    ("name", "returns"),
    [
        ("pg_is_in_recovery()", "boolean"),
        ("pg_last_xact_replay_timestamp()", "timestamptz"),
        ("pg_walfile_name(pg_lsn)", "text"),
    ],
)
@pytest.mark.parametrize("sqlstate", ["0A000", "42883"])
async def test_one_missing_feature_is_no_outage(database: Database, name: str, returns: str, sqlstate: str) -> None:
    """What a server cannot tell, or not to this role, is unknown: ready, healthy, and no write costs a connection."""
    owner = await database.cluster.primary.connect(database.name)
    await owner.execute(SHADOW.format(name=name, returns=returns, state=sqlstate, database=database.name))
    await owner.close()
    await database.cluster.wait_replayed()
    async with serving(database.settings(), settled=False) as service:

        async def ready() -> bool:
            return (await service.client.get("/health/ready")).is_success

        assert await eventually(ready, 10)
        answers = []
        for number in range(5):
            answers.append(await service.client.post("/patients", json=ADA | {"mrn": f"M-{number}"}))
            answers.append(await service.client.get(answers[-1].headers["location"]))
        body = (await service.client.get("/health/db")).json()

        assert [answer.status_code for answer in answers] == [201, 200] * 5
        assert body["status"] == "healthy"
        assert body["databases"]["primary"]["status"] == "healthy"
        assert service.sample("db_connection_invalidations_total", pool="primary", reason="closed") == 0


async def test_right_that_is_taken_away_is_no_outage(database: Database, execute: Execute) -> None:
    """A role that may not call the functions of the log is answered and answers; given back, they are used again."""
    await execute("REVOKE EXECUTE ON FUNCTION pg_current_wal_insert_lsn() FROM PUBLIC")
    async with serving(database.settings(replica=False)) as service:
        answer = await service.client.post("/patients", json=ADA)

        assert answer.status_code == 201
        assert (await service.client.get("/health/ready")).status_code == 200
        assert service.databases.primary.monitor.lacks_lsn


# Servers.


def _at(url: str, port: int) -> str:
    """Return where the database of `url` is on another server."""
    head, _, path = url.rpartition("/")
    return f"{head.rpartition(':')[0]}:{port}/{path}"


async def _started(server: Server) -> float:
    return float(await _ask(server, "SELECT extract(epoch FROM pg_postmaster_start_time())::float8"))


async def _pause(server: Server) -> None:
    await _ask(server, "SELECT pg_wal_replay_pause()")

    async def paused() -> bool:
        return bool(await _ask(server, "SELECT pg_get_wal_replay_pause_state() = 'paused'"))

    assert await eventually(paused, 10)


async def _replayed(cluster: Cluster, server: Server) -> None:
    """Wait until a standby shows what the primary has committed."""
    target = await _ask(cluster.primary, "SELECT pg_current_wal_flush_lsn()::text")

    async def level() -> bool:
        return bool(await _ask(server, "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", target))

    assert await eventually(level, 10)


async def _follow(standby: Server, primary: Server) -> None:
    """Let a standby follow another primary; returns when it has its timeline."""
    old = standby.settings["primary_conninfo"]
    settings = standby.settings
    settings["primary_conninfo"] = " ".join(
        f"port={primary.port}" if word.startswith("port=") else word for word in old.split()
    )
    slot = settings.pop("primary_slot_name")
    try:
        await standby.restart()

        async def followed() -> bool:
            return bool(await _ask(standby, "SELECT received_tli = 2 FROM pg_stat_wal_receiver"))

        assert await eventually(followed, 20)
        # Its control file knows at the next restart point, which a role without pg_read_all_stats waits for.
        await _ask(primary, "CHECKPOINT")
        await _ask(standby, "CHECKPOINT")
    finally:
        settings["primary_slot_name"], settings["primary_conninfo"] = slot, old


async def _ask(server: Server, statement: str, *arguments: Any) -> Any:
    connection: asyncpg.Connection[asyncpg.Record] = await server.connect()
    try:
        return await connection.fetchval(statement, *arguments)
    finally:
        await connection.close()


async def test_server_that_lacks_what_it_is_asked_is_unknown(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that cannot answer is told apart from a question that is wrong."""
    async with serving(database.settings()) as service:
        (replica,) = service.databases.router.replicas
        answers: list[Any] = []
        for question in ("SELECT no_such_function()", "SELECT 1 / 0"):
            monkeypatch.setattr(Monitor, "position_sql", question)
            lease = Lease(replica.database, await replica.database.pool.acquire(), readonly=True)
            try:
                answers.append((await replica._ask(lease, None))[0])
            except asyncpg.PostgresError as error:
                answers.append(error)
            finally:
                lease.give_back()

        assert answers[0] == UNKNOWN
        assert isinstance(answers[1], asyncpg.DivisionByZeroError)
        assert replica._state_by_lag(UNKNOWN) == "unmeasured"


async def test_what_is_kept_of_others_is_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers and tokens that were met are forgotten for newer ones: whoever sends them fills no memory."""
    monkeypatch.setattr(replica_module, "SERVERS_KEPT", 2)
    monkeypatch.setattr(forged_tokens, "TOKENS_KEPT", 2)
    async with quiet(database.settings()) as service:
        router = service.databases.router
        (replica,) = router.replicas
        for number in range(5):
            replica._keep(float(number), UNKNOWN)
            assert not await router.forged.confirms(Token(2**62 + number, 1))
        await asyncio.gather(*(router.forged.confirms(Token(2**61 + number, 1)) for number in range(5)))

        assert list(replica.other_servers) == [3.0, 4.0]
        assert len(router.forged._refused) == 2


class FailingCheck:
    """Fails when it is asked whether a connection may serve, as a server does that goes away meanwhile."""

    async def redirect(self, _lease: Lease) -> None:
        """Fail."""
        raise ConnectionLost("Gone.")

    async def leave_early(self) -> None:
        """Let the connection decide."""


async def test_failure_of_the_question_gives_the_connection_back(database: Database) -> None:
    """A read whose server cannot be asked fails, and holds nothing."""
    failing: Any = FailingCheck()
    async with serving(database.settings()) as service:
        async with service.databases.reading() as session:
            session._server_check = failing
            with pytest.raises(ConnectionLost, match="Gone"):
                await session.execute(select(Patient.id))

        for each in service.databases.all():
            assert each.pool.figures().checked_out == 0


async def test_one_of_several_servers_breaks_nothing(database: Database, replica_proxy: Proxy) -> None:
    """A probe that one of them leaves without an answer, or a request's login, says nothing of the others.

    Three probes in a row do, and the first good one mends it.
    """
    settings = database.settings(replicas=({"url": replica_proxy.url(database.replica_url())},))
    async with quiet(settings) as service:
        (replica,) = service.databases.router.replicas
        replica.database.connector.several = True
        replica.trip()
        states = [replica.state]
        replica_proxy.refuse()
        replica_proxy.cut()
        for _ in range(3):
            await replica.database.monitor.probe()
            states.append(replica.state)
        await replica_proxy.accept()
        await replica.database.monitor.probe()
        states.append(replica.state)

    assert states == ["usable", "usable", "usable", "broken", "usable"]


async def test_read_returns_to_several_servers_where_the_primary_is_busy(database: Database) -> None:
    """A failed read goes to the primary, unless that has no connection to spare; another server may answer then."""
    async with quiet(database.settings()) as service:
        router, replica = service.databases.router, service.databases.replicas[0]
        spare = router.has_other_than(replica)
        async with exhausted(service.databases.primary):
            alone = router.has_other_than(replica)
            replica.connector.several = True
            several = router.has_other_than(replica)
        target, _ = router.route(avoided=replica)
        replica.connector.several = False
        other, _ = router.route(avoided=replica)

    assert (spare, alone, several) == (False, False, True)
    assert (target, other) == (replica, service.databases.primary)
