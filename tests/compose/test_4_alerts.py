"""Alerts that name a cause: the fault is made, the alert fires, and its section of the runbook shows who it is."""

import asyncio
from contextlib import suppress

import httpx
import pytest

from tests.compose.meanwhile import NEW, asking, somebody
from tests.compose.runbook import fires, walk
from tests.compose.stack import Stack, eventually
from tests.watching import alert_state

pytestmark = pytest.mark.timeout(300)

# Clients of PgBouncer beside the service: many that only hold their places, and more at work than it has servers for.
CROWD = """
import asyncio, os, asyncpg
async def busy(n):
    await asyncio.sleep(n / 10)
    while True:
        try:
            client = await asyncpg.connect(os.environ["DATABASE_URL"], timeout=30)
            await client.execute("SELECT pg_sleep(25)")
            await client.close()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            pass
async def main():
    idle = [await asyncpg.connect(os.environ["DATABASE_URL"], timeout=30) for _ in range(840)]
    await asyncio.gather(*map(busy, range(80)))
asyncio.run(main())
"""


async def test_a_forgotten_lock(stack: Stack, prometheus: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    """Somebody locks a table and leaves: each alert about it leads to the session, and ending that ends it."""
    assert await alert_state(prometheus, "SessionsBlocked") == "inactive"
    assert await alert_state(prometheus, "IdleInTransaction") == "inactive"
    lock = ("BEGIN", "LOCK TABLE patients")
    async with (
        somebody(stack, "forgotten", *lock, seconds=280),
        asking(client, clients=12, pause=0.5),
    ):
        await fires(prometheus, "SessionsBlocked", within=60, server="primary")
        assert "forgotten" in await walk(stack, prometheus, "SessionsBlocked")
        await fires(prometheus, "ErrorBudgetBurning", within=60, severity="critical")
        assert '"status": "503"' in await walk(stack, prometheus, "ErrorBudgetBurning")
        await fires(prometheus, "IdleInTransaction", within=90, application_name="forgotten", usename="postgres")
        assert "forgotten" in await walk(stack, prometheus, "IdleInTransaction")
        await fires(prometheus, "SlowRoute", within=60, route="/patients")
        assert '"/patients"' in await walk(stack, prometheus, "SlowRoute")
        await fires(prometheus, "DatabaseSheddingLoad", within=60, pool="primary")
        assert '"pool"' in await walk(stack, prometheus, "DatabaseSheddingLoad")
        await fires(prometheus, "DatabasePoolMostlyExhausted", within=90, pool="primary")
        assert '"reason": "timeout"' in await walk(stack, prometheus, "DatabasePoolMostlyExhausted")
        await fires(prometheus, "DatabasePoolNearlyExhausted", within=60, pool="primary")
        assert "forgotten" in await walk(stack, prometheus, "DatabasePoolNearlyExhausted")

    async def over() -> bool:
        return await alert_state(prometheus, "SessionsBlocked") == "inactive"

    await eventually(over, within=90, every=1)
    assert (await client.post("/patients", json=NEW | {"mrn": "WALK-AFTER"})).status_code == 201


async def test_a_long_statement(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """A statement that takes long is named by role and program."""
    async with somebody(stack, "report", "SELECT pg_sleep(60)", seconds=60):
        await fires(prometheus, "LongTransaction", within=50, application_name="report", usename="postgres")

        assert "pg_sleep" in await walk(stack, prometheus, "LongTransaction")


async def test_deadlocks(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """Sessions that lock in different orders are in the server's log."""
    orders = ((1, 2), (2, 1))
    for _ in range(4):
        await asyncio.gather(
            *(
                stack.psql(
                    "primary",
                    f"BEGIN; SELECT pg_advisory_xact_lock({first}), pg_sleep(1);"
                    f" SELECT pg_advisory_xact_lock({second}); COMMIT",
                )
                for first, second in orders
            ),
            return_exceptions=True,
        )

    await fires(prometheus, "DeadlocksRepeating", within=40, server="primary")

    assert "deadlock detected" in await walk(stack, prometheus, "DeadlocksRepeating")


async def test_a_slot_that_nobody_reads(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """A slot for which the primary keeps half a gigabyte is named, and goes as the section says."""
    await stack.psql("primary", "SELECT pg_create_physical_replication_slot('nobody', true)")
    try:
        await write_segments(stack, 34)
        await fires(prometheus, "ReplicationSlotKeepsLog", within=150, server="primary", slot_name="nobody")

        assert '"nobody", "physical", "f"' in await walk(stack, prometheus, "ReplicationSlotKeepsLog")
        await write_segments(stack, 20)  # A gigabyte is kept at most.
        await fires(prometheus, "ReplicationSlotNearlyLost", within=90, slot_name="nobody")
        assert '"nobody", "f"' in await walk(stack, prometheus, "ReplicationSlotNearlyLost")
    finally:
        await stack.psql("primary", "SELECT pg_drop_replication_slot('nobody')")


async def write_segments(stack: Stack, count: int) -> None:
    """Write so many segments of log, of 16 MB each."""
    write = "PERFORM pg_logical_emit_message(false, 'walk', 'x'); PERFORM pg_switch_wal()"
    await stack.psql("primary", f"DO $$ BEGIN FOR i IN 1..{count} LOOP {write}; END LOOP; END $$")


async def test_transaction_ids(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """The age of the oldest transaction is shown by database and table. The rules' copy asks for fewer."""
    spend = "DO $$ BEGIN FOR i IN 1..25000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$"
    await stack.psql("primary", spend, "-c", "SET synchronous_commit = off")

    await fires(prometheus, "TransactionIdsAging", within=40, server="primary", datname="lifeguard")

    assert '"lifeguard", "2' in await walk(stack, prometheus, "TransactionIdsAging")


async def test_a_restart(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """A server that was started anew is told, and its log says by whose order."""
    await stack.compose("restart", "replica")

    await fires(prometheus, "ServerRestarted", within=60, server="replica")

    assert "received fast shutdown request" in await walk(stack, prometheus, "ServerRestarted")


async def test_logins_without_end(stack: Stack, prometheus: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    """Connections that are opened anew without end are told with the reason: here an order, given again and again."""

    async def drain() -> bool:
        await stack.compose("exec", "-T", "app", "python", "-m", "app", "drain", "--pool", "primary")
        return await alert_state(prometheus, "LoginStorm", pool="primary") == "firing"

    async with asking(client, clients=10, pause=0.1):
        await eventually(drain, within=150)
        shown = await walk(stack, prometheus, "LoginStorm")

    assert '"reason": "disposed"' in shown


async def test_an_instance_that_stands_still(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """An instance that gets no processor for seconds at a time is named, and is one of those that the balancer uses."""
    (instance,) = await stack.containers("app")

    async def stopped() -> bool:
        await stack.docker("pause", instance["Id"])
        try:
            await asyncio.sleep(3)  # The fault itself.
        finally:
            await stack.docker("unpause", instance["Id"])
        await asyncio.sleep(1)
        return await alert_state(prometheus, "EventLoopLagging") == "firing"

    await eventually(stopped, within=120)

    assert instance["Name"].lstrip("/") in await walk(stack, prometheus, "EventLoopLagging")


async def test_a_crowd_at_the_pooler(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """Clients that hold nearly all places of PgBouncer, and wait in its queue, are shown by their role."""
    crowd = asyncio.create_task(stack.compose("exec", "-T", "app", "python", "-c", CROWD, check=False))
    try:
        await fires(prometheus, "PgBouncerNearlyFull", within=150)
        shown = await walk(stack, prometheus, "PgBouncerNearlyFull")
        assert shown.count('"user": "app_rw"') > 800
        await fires(prometheus, "PgBouncerWaitTooLong", within=120, database="lifeguard")
        shown = await walk(stack, prometheus, "PgBouncerWaitTooLong")
        assert '"cl_waiting": "0"' in shown
        assert "PgSleep" in shown or "Timeout" in shown
        await fires(prometheus, "PgBouncerClientsWaiting", within=60, database="lifeguard")
        assert '"database": "lifeguard"' in await walk(stack, prometheus, "PgBouncerClientsWaiting")
    finally:
        await stack.compose("restart", "app")
        crowd.cancel()
        with suppress(asyncio.CancelledError):
            await crowd
        await stack.up()


async def test_a_balancer_without_instances(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """With every instance stopped the balancer has none, and the section shows them as they are."""
    await stack.compose("stop", "app")
    try:
        await fires(prometheus, "BalancerWithoutInstances", within=90, proxy="instances")

        assert "Exited" in await walk(stack, prometheus, "BalancerWithoutInstances")
        await fires(prometheus, "ServiceDown", within=90)
        assert "Application shutdown complete" in await walk(stack, prometheus, "ServiceDown")
    finally:
        await stack.compose("start", "app")
        await eventually(lambda: balances(stack), within=60)
        await stack.up()


async def balances(stack: Stack) -> bool:
    """Whether the balancer calls itself healthy again: `up --wait` gives up at once where it does not."""
    (balancer,) = await stack.containers("balancer")
    return bool(balancer["State"]["Health"]["Status"] == "healthy")
