"""Each part of the stack fails under 50 requests a second, and the service is back without a restart of its own.

The ledger of the traffic is compared with the primary afterwards: whatever was answered 2xx is there.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from tests.compose.conftest import URL
from tests.compose.stack import Stack, eventually
from tests.compose.traffic import Traffic

pytestmark = pytest.mark.timeout(240)

RATE = 50.0
# A stretch of this many seconds, every request of it good, is "back to full rate".
STRETCH_SECONDS = 3.0


async def _restart(stack: Stack, service: str) -> None:
    await stack.compose("restart", service)


async def _pgbouncer_restarted(stack: Stack) -> None:
    await _restart(stack, "pgbouncer")


async def _primary_restarted(stack: Stack) -> None:
    await _restart(stack, "primary")


async def _replica_stopped_and_started(stack: Stack) -> None:
    await stack.compose("stop", "replica")
    await asyncio.sleep(3)  # The outage itself: reads go on without it.
    await stack.compose("start", "replica")


@pytest.mark.parametrize(
    ("break_it", "recovers_within"),
    [(_pgbouncer_restarted, 5.0), (_replica_stopped_and_started, 5.0), (_primary_restarted, 10.0)],
)
async def test_comes_back_by_itself(
    stack: Stack, break_it: Callable[[Stack], Awaitable[None]], recovers_within: float
) -> None:
    """PgBouncer restarted, replica stopped and started, primary restarted: full rate within seconds, nothing lost."""
    before = await _started(stack)
    async with Traffic(URL, RATE, prefix=break_it.__name__.strip("_").split("_")[0].upper()) as traffic:
        await traffic.good_for(STRETCH_SECONDS, within=20)

        broken = time.monotonic()
        await break_it(stack)
        mended = time.monotonic()
        back = await traffic.good_for(STRETCH_SECONDS, within=recovers_within + 2 * STRETCH_SECONDS)

    _report(break_it.__name__, traffic, broken, mended, back)
    assert back - mended <= recovers_within
    assert await _lost(stack, traffic) == []
    assert await _started(stack) == before


async def test_reads_go_on_without_the_replica(stack: Stack) -> None:
    """While the replica is stopped the primary serves its reads; when it is back, it serves them again."""
    routed = "SELECT sum(idx_tup_fetch) FROM pg_stat_user_tables WHERE relname = 'patients'"
    async with Traffic(URL, RATE, prefix="NOREPLICA") as traffic:
        await stack.compose("stop", "replica")
        stopped = time.monotonic()
        await traffic.good_for(STRETCH_SECONDS, within=15)
        without = await stack.psql("primary", routed)
        await stack.compose("start", "replica")

        async def reads_again() -> bool:
            rows = await stack.psql("replica", "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app_ro'")
            return int(rows[0][0]) > 0

        await eventually(reads_again, within=30)

    assert int(without[0][0]) > 0
    # The replica's end cuts what it was answering; that is retried on the primary, so clients see next to nothing.
    assert len(traffic.bad(since=stopped)) <= RATE, traffic.summary()
    assert await _lost(stack, traffic) == []


async def test_killed_instance_is_not_missed(stack: Stack) -> None:
    """Of two instances one is killed without a word: the other carries on at the full rate, at once."""
    await stack.up("--scale", "app=2", "--no-recreate")
    victim, survivor = await stack.containers("app")
    try:
        async with Traffic(URL, RATE, prefix="KILLED") as traffic:
            await traffic.good_for(STRETCH_SECONDS, within=20)

            killed = time.monotonic()
            await stack.docker("kill", victim["Id"])
            back = await traffic.good_for(STRETCH_SECONDS, within=3 + 2 * STRETCH_SECONDS)

        _report("app_killed", traffic, killed, killed, back)
        assert back - killed <= 3
        # Only what the dead one had in its hands may be lost: the balancer sends the rest to the other.
        assert len(traffic.bad(since=killed - 1)) <= RATE / 5, traffic.summary(since=killed - 1)
        assert await _lost(stack, traffic) == []
        assert (await stack.containers("app"))[-1]["State"]["StartedAt"]
        still = {c["Id"]: c["State"]["StartedAt"] for c in await stack.containers("app")}
        assert still[survivor["Id"]] == survivor["State"]["StartedAt"]
    finally:
        await stack.docker("rm", "--force", victim["Id"])
        await stack.up("--scale", "app=1", "--no-recreate")


async def test_migration_that_changes_a_result_fails_nobody_after_reconnect(stack: Stack) -> None:
    """A column changes its type under load: prepared statements go stale, and the migration job's RECONNECT makes
    them good again, on both servers.
    """
    change = "ALTER TABLE patients ALTER COLUMN full_name TYPE {}"
    kind = (
        "SELECT data_type FROM information_schema.columns WHERE (table_name, column_name) = ('patients', 'full_name')"
    )
    was = (await stack.psql("primary", kind))[0][0]
    assert was == "text"

    for changed in ("varchar(400)", "text"):
        async with Traffic(URL, RATE, prefix=f"DDL{changed[:3].upper()}") as traffic:
            await traffic.good_for(STRETCH_SECONDS, within=20)
            await stack.psql("primary", f"SET ROLE app_owner; SET lock_timeout = '4s'; {change.format(changed)}")
            await stack.compose("run", "--rm", "--no-deps", "migrate")
            reconnected = time.monotonic()
            await asyncio.sleep(5)  # The claim is about these five seconds.

        print(f"\nDDL to {changed}: {traffic.summary()}; after RECONNECT: {traffic.summary(since=reconnected)}")  # noqa: T201
        assert traffic.bad(since=reconnected) == []
        assert {(answer.status, answer.detail) for answer in traffic.bad()} <= {(503, "schema_changed")}
        assert len([a for a in traffic.answers if a.sent >= reconnected]) >= 4.5 * RATE
        assert await _lost(stack, traffic) == []


async def _started(stack: Stack) -> dict[str, str]:
    return {c["Id"]: c["State"]["StartedAt"] for c in await stack.containers("app")}


async def _lost(stack: Stack, traffic: Traffic) -> list[str]:
    """List what was acknowledged and is not on the primary."""
    rows = await stack.psql("primary", "SELECT mrn FROM patients")
    return sorted(set(traffic.created.values()) - {mrn for (mrn,) in rows})


def _report(what: str, traffic: Traffic, broken: float, mended: float, back: float) -> None:
    outage = f"{what}: {mended - broken:.1f} s until the command was done, full rate {back - mended:+.1f} s after it"
    print(f"\n{outage}; answers since the fault: {traffic.summary(since=broken - 0.5)}")  # noqa: T201
