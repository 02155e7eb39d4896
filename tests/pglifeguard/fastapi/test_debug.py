"""What operators look at when it is slow."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from local.cluster import Cluster
from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.metrics import Metrics
from tests.conftest import Database
from tests.service import Service, serving

POOL_STATS = {
    "pool_size",
    "max_overflow",
    "total",
    "checked_out",
    "checked_in",
    "connecting",
    "overflow",
    "available",
    "waiting",
}


@pytest.fixture
async def warm(database: Database) -> AsyncIterator[Service]:
    """Give a service whose pools open their connections at the start, as by default."""
    async with serving(database.settings(pool_min_size=5, analytics={"url": database.replica_url()})) as running:
        yield running


async def test_pool_stats_count_what_is_held(warm: Service) -> None:
    """One connection at work is one checked out and one less available, of that pool alone."""
    before = (await warm.client.get("/debug/pool-stats")).json()
    async with warm.databases.primary.engine.connect():
        during = (await warm.client.get("/debug/pool-stats")).json()
    after = (await warm.client.get("/debug/pool-stats")).json()

    assert list(before) == ["primary", "replica", "analytics"]
    assert set(before["primary"]) == POOL_STATS
    assert (before["primary"]["checked_out"], before["primary"]["available"]) == (0, 15)
    assert (during["primary"]["checked_out"], during["primary"]["available"]) == (1, 14)
    assert after == before
    assert during["replica"] == before["replica"]


async def test_connections_are_counted_by_application_and_state(warm: Service) -> None:
    """The server's own view, and who holds what in this process."""
    async with warm.databases.primary.engine.connect():
        body = (await warm.client.get("/debug/connections")).json()

    assert list(body) == ["primary", "replica", "analytics"]
    (held,) = body["primary"]["held"]
    assert held["holder"] == "background"
    assert held["held_seconds"] >= held["idle_seconds"] >= 0
    mine = [row for row in body["primary"]["server"] if row["application"] == "lifeguard"]
    assert sum(row["connections"] for row in mine) >= 6
    assert set(mine[0]) == {"application", "state", "connections", "longest_seconds"}


@pytest.fixture
async def granted(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncIterator[bool]:
    """Run the test with and without the service's right to see other roles' sessions."""
    connection = await cluster.primary.connect()
    if not request.param:
        await connection.execute("REVOKE pg_read_all_stats FROM app_rw")
    yield request.param
    await connection.execute("GRANT pg_read_all_stats TO app_rw")
    await connection.close()


@pytest.mark.parametrize("granted", [True, False], indirect=True)
async def test_who_blocks_whom_is_told(database: Database, *, granted: bool) -> None:
    """The session that holds a lock is in the list whatever its role, its state where the service may see that.

    A blocker that waits itself is told apart from the one to end.
    """
    owner = await asyncpg.connect(database.url("app_owner"), server_settings={"application_name": "migration"})
    second = await asyncpg.connect(database.url("app_owner"), server_settings={"application_name": "second"})
    await owner.execute("BEGIN; LOCK TABLE patients IN ACCESS SHARE MODE")
    async with serving(database.settings(replica=False)) as service:
        locking = asyncio.create_task(second.execute("BEGIN; LOCK TABLE patients"))
        assert await eventually(lambda: _waiting(owner, 1), 5)
        reading = asyncio.create_task(service.client.get("/patients"))
        assert await eventually(lambda: _waiting(owner, 2), 5)
        body = (await service.client.get("/debug/connections")).json()["primary"]
        await owner.execute("ROLLBACK")
        await locking
        await second.execute("ROLLBACK")
        await reading
    await owner.close()
    await second.close()

    first, root = sorted(body["blocked"], key=lambda pair: pair["blocker_waits"], reverse=True)
    assert (first["application"], first["lock"]) == ("lifeguard", "AccessShareLock on relation patients")
    assert (first["blocker_pid"], first["blocker_application"]) == (second.get_server_pid(), "second")
    assert (first["blocker_waits"], root["blocker_waits"]) == (True, False)
    assert root["pid"] == first["blocker_pid"]
    assert (root["blocker_pid"], root["blocker_role"]) == (owner.get_server_pid(), "app_owner")
    assert root["blocker_state"] == ("idle in transaction" if granted else "unknown")
    assert (root["blocker_transaction_seconds"] is not None) is granted
    assert root["waited_seconds"] >= 0
    states = {row["application"]: row["state"] for row in body["server"]}
    assert states["migration"] == ("idle in transaction" if granted else "unknown")
    assert "LOCK TABLE" not in str(body)


async def _waiting(connection: "asyncpg.Connection[asyncpg.Record]", count: int) -> bool:
    asked = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'patients'::regclass"
    return bool(await connection.fetchval(asked) == count)


async def test_nobody_blocked_is_an_empty_list(service: Service) -> None:
    """Each server is asked; where it cannot be asked, the answer says so and not that nobody waits."""
    body = (await service.client.get("/debug/connections")).json()

    assert [body[name]["blocked"] for name in body] == [[], [], []]


async def test_server_that_is_down_is_said_to_be(database: Database) -> None:
    """What this process holds is told all the same."""
    primary = {"url": f"postgresql://a@127.0.0.1:{free_port()}/x"}
    async with serving(database.settings(replica=False, primary=primary), settled=False) as service:
        body = (await service.client.get("/debug/connections")).json()["primary"]

    assert (body["held"], body["server"], body["blocked"]) == ([], None, None)
    assert "cannot be reached" in body["error"]


async def test_metrics_are_exposed_with_the_pools_of_now(service: Service) -> None:
    """Every figure of pglifeguard/metrics.py has its help, and the gauges are those of the moment of the scrape."""
    async with service.databases.primary.engine.connect():
        answer = await service.client.get("/metrics")

    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    declared = {family.name for family in Metrics().registry.collect()}
    assert set(families) == declared
    gauges = {
        name: {sample.labels["pool"]: sample.value for sample in families[name].samples}
        for name in ("db_pool_connections_total", "db_pool_connections_available", "db_pool_connections_checked_out")
    }
    assert gauges["db_pool_connections_total"] == {"primary": 15, "replica": 15, "analytics": 2}
    assert gauges["db_pool_connections_available"]["primary"] == 14
    assert gauges["db_pool_connections_checked_out"]["primary"] == 1


async def test_metrics_of_several_workers_come_from_their_directory(database: Database, tmp_path: Path) -> None:
    """With PROMETHEUS_MULTIPROC_DIR the exposition is what the workers left there, not this process's registry."""
    async with serving(database.settings(prometheus_multiproc_dir=tmp_path)) as service:
        answer = await service.client.get("/metrics")

    assert answer.status_code == 200
    assert "http_requests" not in answer.text


@pytest.mark.parametrize("path", ["/debug/pool-stats", "/debug/connections"])
async def test_operators_need_their_scope(database: Database, path: str) -> None:
    """With AUTH_SECRET set, nobody looks without a token; probes stay open."""
    async with serving(database.settings(auth_secret="x" * 32)) as service:
        refused = await service.client.get(path)
        probe = await service.client.get("/health/live")

    assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    assert probe.status_code == 200


def test_this_process_is_not_in_multiprocess_mode() -> None:
    """The tests above measure the registry of one process."""
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
