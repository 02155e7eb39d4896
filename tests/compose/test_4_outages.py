"""Alerts about what has gone or grown slow: the fault is made, the alert fires, and its section can be followed."""

import json

import httpx
import pytest

from tests.compose.meanwhile import asking, reading
from tests.compose.runbook import fires, walk
from tests.compose.stack import Stack

pytestmark = pytest.mark.timeout(300)

# From which on a replica lags, and how much more it is given.
LAG_BYTES = 8 * 1024**2
SLOW = """
    CREATE FUNCTION walk_is_slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(1.5); RETURN NEW; END';
    CREATE TRIGGER walk_is_slow BEFORE INSERT ON patients FOR EACH ROW EXECUTE FUNCTION walk_is_slow()
"""


async def test_slow_statements(stack: Stack, prometheus: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    """Statements that are slow are in the log with the alert, and so is the queue that grows behind them."""
    await stack.psql("primary", SLOW)
    try:
        async with asking(client, clients=12, pause=0.1):
            await fires(prometheus, "SlowQueries", within=60, pool="primary")
            assert "slow query" in await walk(stack, prometheus, "SlowQueries")
            await fires(prometheus, "DatabasePoolContention", within=60, pool="primary")
            assert '"pool": "primary"' in await walk(stack, prometheus, "DatabasePoolContention")
            await fires(prometheus, "SlowConnectionAcquisition", within=60, pool="primary")
            assert '"pool": "primary"' in await walk(stack, prometheus, "SlowConnectionAcquisition")
    finally:
        await stack.psql("primary", "DROP FUNCTION walk_is_slow CASCADE")


async def test_writes_that_hang(stack: Stack, prometheus: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    """A synchronous standby that is frozen is told, and the sessions that wait for it are shown."""
    (replica,) = await stack.containers("replica")
    await stack.psql("primary", "SELECT pg_reload_conf()", "-c", "ALTER SYSTEM SET synchronous_standby_names = '*'")
    await stack.docker("pause", replica["Id"])
    try:
        async with asking(client, clients=3, pause=0.5):
            await fires(prometheus, "DatabaseWritesStalled", within=60, pool="primary")

            assert "COMMIT" in await walk(stack, prometheus, "DatabaseWritesStalled")
    finally:
        await stack.docker("unpause", replica["Id"])
        await stack.psql("primary", "SELECT pg_reload_conf()", "-c", "ALTER SYSTEM RESET synchronous_standby_names")


async def test_a_replica_that_lags(stack: Stack, prometheus: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    """A replica that does not replay is told, and so is the primary that serves its reads."""
    more = "SELECT pg_logical_emit_message(true, 'walk', repeat('x', 1000000)) FROM generate_series(1, 20)"
    await stack.psql("replica", "SELECT pg_wal_replay_pause()")
    try:
        await stack.psql("primary", more)
        async with reading(client):
            await fires(prometheus, "ReplicaLagging", within=120)
            (standby, *_), *_ = (
                json.loads(shown) for shown in (await walk(stack, prometheus, "ReplicaLagging")).splitlines()
            )
            assert int(standby[-1]) > LAG_BYTES
            await fires(prometheus, "ReadsFallingBack", within=120)
            assert '"reason": "lagging"' in await walk(stack, prometheus, "ReadsFallingBack")
    finally:
        await stack.psql("replica", "SELECT pg_wal_replay_resume()")


async def test_a_replica_that_is_gone(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """A replica that is stopped is told by the service, by its exporter and by its slot."""
    await stack.compose("stop", "replica")
    try:
        await fires(prometheus, "ReplicaUnusable", within=90)
        assert "Exited" in await walk(stack, prometheus, "ReplicaUnusable")
        await fires(prometheus, "TargetDown", within=90, severity="warning", server="replica")
        assert '"server": "replica"' in await walk(stack, prometheus, "TargetDown")
        await fires(prometheus, "ReplicationSlotInactive", within=120)
        assert '"f"' in await walk(stack, prometheus, "ReplicationSlotInactive")
    finally:
        await stack.up()


async def test_a_primary_that_is_gone(stack: Stack, prometheus: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    """A primary that is stopped is told by the service and by its exporter, while reads go on."""
    await stack.compose("stop", "primary")
    try:
        await fires(prometheus, "DatabaseDown", within=90, pool="primary")
        assert "database system is shut down" in await walk(stack, prometheus, "DatabaseDown")
        await fires(prometheus, "TargetDown", within=90, severity="critical", server="primary")
        assert '"server": "primary"' in await walk(stack, prometheus, "TargetDown")
        assert (await client.get("/patients?limit=1")).status_code == 200
    finally:
        await stack.up()
