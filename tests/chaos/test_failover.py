"""The primary goes away under 200 writes a second, and another server takes over.

Before failing over, whatever does it must have fenced the old primary: two servers that take writes are beyond what
a client can tell. Acknowledged writes outlive the failover because the primary replicates synchronously.
"""

import time
from collections.abc import Callable

import pytest
from sqlalchemy.engine import make_url

from local.cluster import Cluster
from pglifeguard.embedded.postgres import Server
from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing.proxy import Proxy
from tests.chaos import FULL, in_time
from tests.chaos.load import Writers, tell
from tests.conftest import Database
from tests.service import serving

RESUMED_SECONDS = 3.0
# How long the load goes on after the promotion.
WATCHED_SECONDS = 5.0 if FULL else 1.0


def both_hosts(database: Database) -> str:
    """Return a URL that lists the primary and the standby, in this order."""
    url, standby = make_url(database.url()), make_url(database.replica_url())
    hosts = tuple(f"127.0.0.1:{port}" for port in (url.port, standby.port))
    return url.set(host=None, port=None, query={"host": hosts}).render_as_string(hide_password=False)


@pytest.mark.parametrize("end", ["killed", "stopped", "mute"] if FULL else ["mute"])
async def test_writes_follow_to_the_promoted_standby(
    database: Database, synchronous_cluster: Cluster, measured: Callable[[str], None], end: str
) -> None:
    """A primary that is killed, stopped or mute is left for the promoted standby; no acknowledged write is lost."""
    settings = database.settings(replica=False, primary={"url": both_hosts(database)}, monitor_interval_seconds=0.5)
    async with serving(settings) as service, Writers(service.app) as writers:
        await flowing(writers, time.monotonic())

        await take_away(synchronous_cluster.primary, end)
        promoted = await promote(synchronous_cluster.replica)
        await flowing(writers, promoted + WATCHED_SECONDS)

    measured(f"{end}: {judge(writers, promoted)}")
    await writers.reconcile(database.replica_url("postgres"))


@pytest.mark.parametrize("end", ["killed", "demoted", "mute"] if FULL else ["demoted"])
async def test_writes_follow_behind_a_fixed_address(
    database: Database, synchronous_cluster: Cluster, measured: Callable[[str], None], end: str
) -> None:
    """When one address leads to another server, connections that lead to the old one are given up."""
    async with Proxy(synchronous_cluster.primary.port) as address:
        url = address.url(database.url())
        settings = database.settings(replica=False, primary={"url": url}, monitor_interval_seconds=0.5)
        async with serving(settings) as service, Writers(service.app) as writers:
            await flowing(writers, time.monotonic())

            await take_away(synchronous_cluster.primary, end)
            promoted = await promote(synchronous_cluster.replica)
            address.upstream = synchronous_cluster.replica.port
            await flowing(writers, promoted + WATCHED_SECONDS)

    measured(f"{end}: {judge(writers, promoted)}")
    await writers.reconcile(database.replica_url("postgres"))
    if end == "demoted":
        await order(synchronous_cluster.primary, "ALTER SYSTEM RESET default_transaction_read_only")


async def test_planned_switchover_fails_nobody(
    database: Database, synchronous_cluster: Cluster, measured: Callable[[str], None]
) -> None:
    """An operator pauses the service, exchanges the primary for the standby, and resumes: every write is answered 201,
    at most a second after the pause.
    """
    settings = database.settings(replica=False, primary={"url": both_hosts(database)}, monitor_interval_seconds=0.5)
    async with serving(settings) as service, Writers(service.app, per_second=100) as writers:
        await flowing(writers, time.monotonic())

        paused = time.monotonic()
        answer = await service.client.post("/debug/pause?seconds=30")
        ready = await service.client.get("/health/ready")

        async def nothing_is_at_work() -> bool:
            stats = (await service.client.get("/debug/pool-stats")).json()
            return all(figures["checked_out"] == 0 for figures in stats.values())

        assert await eventually(nothing_is_at_work, 10)
        await synchronous_cluster.primary.stop()
        await promote(synchronous_cluster.replica)
        still_ready = await service.client.get("/health/ready")
        await service.client.post("/debug/resume")
        resumed = time.monotonic()
        await flowing(writers, resumed)

    slowest = max(answer.seconds for answer in writers.told.values())
    measured(f"paused for {resumed - paused:.1f} s, slowest answer {slowest:.1f} s, {tell(writers.outcomes())}")
    assert answer.status_code == 202
    assert ready.json() == still_ready.json() == {"status": "ready", "requests": "paused"}
    assert set(writers.outcomes()) == {"201"}
    in_time(slowest <= resumed - paused + 1, slowest)
    await writers.reconcile(database.replica_url("postgres"))


async def test_nobody_waits_long_for_a_mute_primary(
    database: Database, synchronous_cluster: Cluster, measured: Callable[[str], None]
) -> None:
    """Where nothing takes over from a frozen primary, what it was asked is answered all the same, and within 3 s."""
    settings = database.settings(replica=False, monitor_interval_seconds=0.5)
    async with serving(settings) as service, Writers(service.app) as writers:
        await flowing(writers, time.monotonic())

        synchronous_cluster.primary.freeze()
        frozen, pool = time.monotonic(), service.databases.primary.pool

        async def stuck() -> bool:
            return any(holding.held_seconds > 0.5 for holding in pool.holdings())

        assert await eventually(stuck, 5), pool.figures()

        async def all_told() -> bool:
            return pool.figures().checked_out == 0

        assert await eventually(all_told, 20), writers.outcomes()
        writers.stopped = True

    slowest = max(answer.seconds for answer in writers.told.values())
    waited = max(answer.answered_at for answer in writers.told.values()) - frozen
    measured(f"last answer after {waited:.2f} s, slowest answer {slowest:.2f} s, {tell(writers.outcomes())}")
    if FULL:
        assert slowest <= RESUMED_SECONDS
    synchronous_cluster.primary.thaw()
    await writers.reconcile(database.url("postgres"))


async def take_away(primary: Server, end: str) -> None:
    """Make the primary unable to take writes."""
    if end == "killed":
        await primary.kill()
    elif end == "stopped":
        await primary.stop()
    elif end == "mute":
        primary.freeze()
    else:
        await order(primary, "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")


async def order(server: Server, *statements: str) -> None:
    """Run statements as the superuser."""
    connection = await server.connect()
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def promote(standby: Server) -> float:
    """Promote, and return when that was done."""
    await standby.promote()
    return time.monotonic()


async def flowing(writers: Writers, since: float) -> None:
    """Wait until twenty writes sent after a moment were acknowledged."""

    async def flows() -> bool:
        return len(writers.answered_since(since)) >= 20

    assert await eventually(flows, 20), writers.outcomes()


def judge(writers: Writers, promoted: float) -> str:
    """Check that writes resumed, for good and in time, and that nobody waited for longer; return the figures."""
    resumed = min(writers.answered_since(promoted))
    told = writers.told.values()
    slowest = max(answer.seconds for answer in told)
    failed_late = [answer.code for answer in told if answer.asked_at >= promoted + RESUMED_SECONDS and answer.code]
    figures = f"resumed after {resumed:.2f} s, slowest answer {slowest:.2f} s, {tell(writers.outcomes())}"
    in_time(resumed <= RESUMED_SECONDS, figures)
    in_time(slowest <= RESUMED_SECONDS, figures)
    in_time(not failed_late, figures)
    return figures
