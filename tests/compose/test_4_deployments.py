"""Alerts about what was set up wrongly: the fault is made, the alert fires, and its section can be followed."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress

import httpx
import pytest

from tests.compose.meanwhile import meanwhile
from tests.compose.runbook import fires, walk
from tests.compose.stack import SUPERUSER_PASSWORD, Stack, eventually
from tests.watching import alert_state

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def careless(stack: Stack) -> AsyncIterator[Stack]:
    """Replace the service by two instances of docker-compose.careless.yml, and afterwards by one of its own."""
    deployed = stack.with_file("tests/compose/docker-compose.careless.yml")
    await deployed.up("--scale", "app=2")
    yield deployed
    await stack.up("--scale", "app=1")


async def test_a_careless_deployment(careless: Stack, prometheus: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    """Connections that are held for nothing are told with the route, and pools too large with the sum."""

    async def ask() -> None:
        while True:
            with suppress(httpx.TransportError):
                await client.post("/careless")

    async with meanwhile(*(ask() for _ in range(4))):
        await fires(prometheus, "ConnectionHeldTooLong", within=60, pool="primary", route="/careless")
        assert "connection held for long" in await careless.compose("logs", "app")
        assert '"route": "/careless"' in await walk(careless, prometheus, "ConnectionHeldTooLong")
        await fires(prometheus, "ConnectionsHeldIdle", within=120, pool="primary", route="/careless")
        assert "connection held idle" in await careless.compose("logs", "app")
        assert '"route": "/careless"' in await walk(careless, prometheus, "ConnectionsHeldIdle")
        await fires(prometheus, "ConnectionBudgetExceeded", within=60)
        shown = await walk(careless, prometheus, "ConnectionBudgetExceeded")

    _, opened, granted, instances = (json.loads(line)[0]["value"][1] for line in shown.splitlines())
    assert (int(opened), int(granted), int(instances)) == (34, 20, 2)


async def test_connections_past_the_pooler(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """Who takes most of a server's connections, past PgBouncer, is shown by name."""
    load = "exec pgbench -n -U postgres -c 80 -T 200 -f <(echo 'SELECT pg_sleep(0.5);') lifeguard"
    many = asyncio.create_task(
        stack.compose(
            *("exec", "-T", "-e", f"PGPASSWORD={SUPERUSER_PASSWORD}", "-e", "PGAPPNAME=past-the-pooler"),
            *("primary", "bash", "-c", load),
            check=False,
        )
    )
    try:
        await fires(prometheus, "ConnectionBudgetNearlySpent", within=150, server="primary")
        assert "past-the-pooler" in await walk(stack, prometheus, "ConnectionBudgetNearlySpent")
    finally:
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'past-the-pooler'"
        await stack.psql("primary", ended)
        await many


async def test_rights_that_the_exporter_lacks(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """An exporter that may not see what alerts ask for is told: they would be silent."""
    assert await alert_state(prometheus, "SeriesMissing") == "inactive"
    await stack.psql("primary", "REVOKE USAGE ON SCHEMA monitor FROM monitor")
    try:
        await fires(prometheus, "SeriesMissing", within=120, instance="primary-exporter:9187")

        assert "primary-exporter" in await walk(stack, prometheus, "SeriesMissing")
    finally:
        await stack.psql("primary", "GRANT USAGE ON SCHEMA monitor TO monitor")


async def test_a_password_that_nobody_was_told(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """With another password of `replicator` the standby receives nothing and nothing is backed up: both are told."""
    backup = ("--profile", "backup")
    await stack.compose(*backup, "build", "--quiet", "backup")
    (before,) = await stack.containers("replica")
    await stack.psql("primary", "ALTER ROLE replicator PASSWORD 'another'")
    try:
        await stack.compose(*backup, "up", "--detach", "--wait", "backup")
        await stack.psql("primary", "SELECT pg_terminate_backend(pid) FROM pg_stat_replication")
        await fires(prometheus, "StandbyNotReceiving", within=150, server="replica")
        assert "password authentication failed" in await walk(stack, prometheus, "StandbyNotReceiving")
        assert "refuses the login of replicator" in await stack.compose("logs", "replica")
        (after,) = await stack.containers("replica")
        assert after["State"]["StartedAt"] == before["State"]["StartedAt"], "it could not be cloned, and was stopped"
        await fires(prometheus, "BackupChecksFailing", within=120)
        assert "PostgreSQL streaming: FAILED" in await walk(stack, prometheus, "BackupChecksFailing")
        await fires(prometheus, "BackupTooOld", within=60)
        assert "Impossible to start WAL streaming" in await walk(stack, prometheus, "BackupTooOld")
        await stack.psql("primary", "ALTER ROLE replicator PASSWORD 'development-replicator'")

        async def over() -> bool:
            return await alert_state(prometheus, "BackupTooOld") == "inactive"

        await eventually(over, within=120, every=1)
    finally:
        await stack.psql("primary", "ALTER ROLE replicator PASSWORD 'development-replicator'")
        await stack.compose(*backup, "rm", "--stop", "--force", "backup", "backup-role")
        # `down --volumes` leaves that of a profile, and the next run would find a backup in it.
        await stack.docker("volume", "rm", f"{stack.project}_backup")
        await stack.up()
