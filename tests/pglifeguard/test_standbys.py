"""What is not this primary's standby serves no reads, and a token is honoured by the server that answers."""

import asyncio
import logging

import pytest
from sqlalchemy import select

from app.patients.models import Patient
from local.cluster import Cluster
from pglifeguard.embedded.postgres import Server
from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi.sessions import ReadDB
from pglifeguard.replica import State
from pglifeguard.server_position import Token
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database, Execute
from tests.servers import Servers
from tests.service import ADA, Service, serving
from tests.standbys import balancing, second_standby


async def becomes(service: Service, state: State) -> None:
    """Return when the only replica is in this state."""
    replica = service.databases.router.replicas[0]

    async def there() -> bool:
        return replica.state == state

    assert await eventually(there, 10), replica.state


async def order(server: Server, statement: str) -> None:
    """Run a statement as the superuser."""
    connection = await server.connect()
    await connection.execute(statement)
    await connection.close()


def patient(number: int) -> dict[str, str]:
    """Make a patient of that number."""
    return ADA | {"mrn": f"S-{number}"}


async def write(service: Service, number: int) -> tuple[str, dict[str, str]]:
    """Store a patient; return its path and the header of its token."""
    answer = await service.client.post("/patients", json=patient(number))
    service.client.cookies.clear()
    assert answer.status_code == 201, answer.text
    token = answer.headers.get("x-consistency-token")
    return answer.headers["location"], {} if token is None else {"x-consistency-token": token}


async def test_promoted_replica_serves_nothing(database: Database, breakable_cluster: Cluster) -> None:
    """A replica that was promoted while its primary goes on is left, with and without a token, and it shows why."""
    async with serving(database.settings()) as service:
        _, before = await write(service, 1)
        await breakable_cluster.replica.promote()
        await becomes(service, "promoted")
        # Its own log runs ahead of all that the primary writes.
        await order(breakable_cluster.replica, "SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000))")
        path, after = await write(service, 2)
        await service.databases.replicas[0].monitor.probe()

        for headers in ({}, before, after):
            assert (await service.client.get(path, headers=headers)).status_code == 200
        health = (await service.client.get("/health/db")).json()["databases"]["replica"]

        assert (health["state"], health["lag_bytes"]) == ("promoted", None)
        assert service.sample("db_replica_usable", pool="replica") == 0
        assert service.sample("db_reads_routed_total", target="primary", reason="promoted") >= 3
        # Positions of another timeline say nothing of a token, however far they are.
        assert not service.databases.router.replicas[0].covers(Token(0, 1))


async def test_primary_may_be_its_own_replica(database: Database) -> None:
    """Where both names lead to one server, its reads are as good under the one as under the other."""
    async with serving(database.settings(replicas=({"url": database.url()},))) as service:
        await becomes(service, "usable")
        path, token = await write(service, 1)

        async def from_the_replica() -> bool:
            answer = await service.client.get(path, headers=token)
            assert answer.status_code == 200
            return service.sample("db_reads_routed_total", target="replica", reason="replica") > 0

        assert await eventually(from_the_replica, 5)


async def test_standby_of_another_cluster_serves_nothing(
    database: Database, breakable_cluster: Cluster, shared_servers: Servers
) -> None:
    """A replica's URL that leads to another system is found out by its identifier."""
    other = await shared_servers.take()
    assert other is not breakable_cluster
    url = other.url("app_ro", server="replica")
    async with serving(database.settings(replicas=({"url": url},)), settled=False) as service:
        await becomes(service, "foreign")

        assert (await service.client.get("/patients")).json() == []


async def test_standby_on_the_timeline_of_before_serves_nothing(database: Database, breakable_cluster: Cluster) -> None:
    """After a failover a standby that still follows the old primary is left, however far it has replayed."""
    async with second_standby(breakable_cluster) as second:
        await breakable_cluster.replica.promote()
        behind = database.url("app_ro").replace(str(breakable_cluster.primary.port), str(second.port))
        primary = {"url": database.replica_url("app_rw")}
        settings = database.settings(primary=primary, replicas=({"url": behind},), analytics=primary)
        # What the old primary writes and nobody else has.
        await order(breakable_cluster.primary, "SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000))")
        async with serving(settings, settled=False) as service:
            await becomes(service, "diverged")
            path, token = await write(service, 1)

            assert (await service.client.get(path, headers=token)).status_code == 200
            assert (await service.client.get(path)).status_code == 200


async def test_token_is_honoured_by_the_server_that_answers(
    database: Database, breakable_cluster: Cluster, execute: Execute
) -> None:
    """Behind one address of two standbys, of which one shows nothing new, no read with a token is stale."""
    path, stale, paths = "", 0, ["/patients/{}", "/slow/{}"]
    async with (
        second_standby(breakable_cluster) as second,
        balancing(breakable_cluster.replica.port, second.port) as balancer,
    ):
        url = balancer.url(database.replica_url())
        async with serving(database.settings(replicas=({"url": url},))) as service:
            service.app.get("/slow/{patient_id}")(slow_read)
            await order(second, "SELECT pg_wal_replay_pause()")
            for number in range(15):
                path, token = await write(service, number)
                await breakable_cluster.wait_replayed()
                await service.databases.replicas[0].monitor.probe()
                changed = await service.client.patch(path, json={"full_name": f"Ada {number}"})
                token = {"x-consistency-token": changed.headers["x-consistency-token"]}
                service.client.cookies.clear()
                await breakable_cluster.wait_replayed()
                await service.databases.replicas[0].monitor.probe()
                patient_id = path.rpartition("/")[2]
                reads = [service.client.get(p.format(patient_id), headers=token) for p in paths * 2]
                for answer in await asyncio.gather(*reads):
                    stale += answer.status_code != 200 or answer.json()["full_name"] != f"Ada {number}"
            on_replica = service.sample("db_reads_routed_total", target="replica", reason="replica")
            left = service.sample("db_reads_routed_total", target="primary", reason="behind_token")
        await order(second, "SELECT pg_wal_replay_resume()")

    assert stale == 0
    # Both happened: connections that led to the good standby served, the others were left.
    assert on_replica > left > 0
    assert await execute("SELECT count(*) FROM patients") == 15


async def slow_read(patient_id: int, session: ReadDB) -> dict[str, str]:
    """Read by SQLAlchemy's session, in its transaction."""
    row = (await session.execute(select(Patient.full_name).where(Patient.id == patient_id))).one_or_none()
    return {"full_name": "nobody" if row is None else row.full_name}


async def test_replica_serves_where_the_primary_was_never_seen(database: Database, breakable_cluster: Cluster) -> None:
    """An instance that starts while the primary is away reads from its standby, with a token too; writes are 503."""
    async with serving(database.settings()) as service:
        path, token = await write(service, 1)
    await breakable_cluster.wait_replayed()
    await breakable_cluster.primary.stop()
    async with serving(database.settings(), settled=False) as service:
        await becomes(service, "alone")

        answers = [await service.client.get(path), await service.client.get(path, headers=token)]
        refused = await service.client.post("/patients", json=patient(2))
        ready = await service.client.get("/health/ready")
        health = (await service.client.get("/health/db")).json()["databases"]["replica"]

        assert [answer.status_code for answer in answers] == [200, 200]
        assert (refused.status_code, refused.json()["code"]) == (503, "database_unreachable")
        assert (ready.status_code, health["status"], health["state"]) == (503, "healthy", "alone")
        await breakable_cluster.primary.start()
        await becomes(service, "usable")


SHADOWS = {
    "lsn": ("pg_current_wal_insert_lsn() RETURNS pg_lsn", "pg_last_wal_replay_lsn() RETURNS pg_lsn"),
    "control": ("pg_control_checkpoint(OUT timeline_id integer)", "pg_control_system(OUT system_identifier bigint)"),
    "start": ("pg_postmaster_start_time() RETURNS timestamptz",),
    "all": (
        "pg_current_wal_insert_lsn() RETURNS pg_lsn",
        "pg_is_in_recovery() RETURNS boolean",
        "pg_postmaster_start_time() RETURNS timestamptz",
    ),
}


@pytest.mark.parametrize("code", ["0A000", "42501", "42883"])
@pytest.mark.parametrize("missing", SHADOWS)
async def test_missing_feature_is_no_outage(database: Database, execute: Execute, missing: str, code: str) -> None:
    """A server that lacks functions, or forbids them, is healthy and ready, and no write costs a connection."""
    await execute("CREATE SCHEMA without")
    await execute("GRANT USAGE ON SCHEMA without TO PUBLIC")
    for signature in SHADOWS[missing]:
        body = f"BEGIN RAISE EXCEPTION 'not here' USING ERRCODE = '{code}'; END"
        await execute(f"CREATE FUNCTION without.{signature} LANGUAGE plpgsql AS $${body}$$")
    await execute(f"ALTER DATABASE {database.name} SET search_path = without, pg_catalog, public")
    await database.cluster.wait_replayed()
    async with serving(database.settings(), settled=False) as service:
        primary, replica = service.databases.primary, service.databases.router.replicas[0]

        async def known() -> bool:
            return primary.monitor.healthy and replica.state not in {"unknown", "broken"}

        assert await eventually(known, 10), (primary.monitor.last, replica.state)
        path, token = await write(service, 1)
        for number in range(2, 12):
            await write(service, number)
        reads = [await service.client.get(path, headers=headers) for headers in ({}, token)]
        ready = await service.client.get("/health/ready")
        health = (await service.client.get("/health/db")).json()

        assert [answer.status_code for answer in (*reads, ready)] == [200, 200, 200]
        assert health["status"] == "healthy"
        assert service.sample("db_connection_invalidations_total", pool="primary", reason="closed") == 0
        assert service.sample("db_connection_invalidations_total", pool="primary", reason="error") == 0
        assert bool(token) == (missing in {"control", "start"})
        assert replica.state == ("unmeasured" if missing in {"lsn", "all"} else "usable")


async def test_write_stall_shows(
    database: Database, breakable_cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """While a synchronous standby does not answer, health, log and a metric say that writes wait, and for how long."""
    caplog.set_level(logging.INFO, "pglifeguard.monitor")
    primary = breakable_cluster.primary
    primary.settings["synchronous_standby_names"] = "replica"
    await primary.restart()
    await breakable_cluster.start()
    async with serving(database.settings(replica=False)) as service:
        await write(service, 1)
        flowing = (await service.client.get("/health/db")).json()["databases"]["primary"]
        breakable_cluster.replica.freeze()
        stuck = asyncio.create_task(service.client.post("/patients", json=patient(2)))

        async def stalled() -> bool:
            health = (await service.client.get("/health/db")).json()
            assert health["status"] == "healthy"
            described = health["databases"]["primary"]
            return bool(described["writes"] == "stalled" and described["write_stall_seconds"] >= 1)

        assert await eventually(stalled, 20)
        assert service.sample("db_write_stall_seconds", pool="primary") >= 1
        assert (await service.client.get("/health/ready")).status_code == 200
        breakable_cluster.replica.thaw()
        assert (await stuck).status_code == 201

        async def flows() -> bool:
            await service.databases.primary.monitor.probe()
            return service.sample("db_write_stall_seconds", pool="primary") == 0

        assert await eventually(flows, 5)
    said = [record.getMessage() for record in caplog.records if "stalled" in record.getMessage()]
    assert said == ["writes are stalled", "writes are stalled no more"]
    assert (flowing["writes"], flowing["write_stall_seconds"]) == ("flowing", 0)


@pytest.mark.parametrize("row", ["there", "not there yet"])
async def test_read_that_dies_with_the_leader_is_served_by_another_replica(database: Database, row: str) -> None:
    """The leader is named among the replicas too. A read that it loses cannot be run again on the primary.

    A row that the other replica has not replayed yet is no 404, as long as the primary does not say so.
    """
    async with Proxy(database.cluster.primary.port) as leader:
        url = leader.url(database.url())
        replicas = ({"url": leader.url(database.url("app_ro"))}, {"url": database.replica_url()})
        settings = database.settings(primary={"url": url}, replicas=replicas, monitor_interval_seconds=1)
        async with serving(settings) as service:
            await database.cluster.wait_replayed()
            if row == "not there yet":
                await database.cluster.pause_replay()
            path, _ = await write(service, 1)
            if row == "there":
                await database.cluster.wait_replayed()
            # Of two that are as free the first one is chosen.
            leader.freeze()
            read = asyncio.create_task(service.client.get(path))

            async def on_the_leader() -> bool:
                return service.databases.replicas[0].pool.figures().checked_out == 1

            assert await eventually(on_the_leader, 5)
            leader.refuse()
            leader.reset()
            answer = await read
            if row == "not there yet":
                await database.cluster.resume_replay()

            assert answer.status_code == (200 if row == "there" else 503)
            assert service.sample("db_reads_retried_total", reason="connection_lost") == 1
            assert service.sample("db_reads_routed_total", target="replica-2", reason="replica") == 1
