"""The replica mends itself: it follows through restarts, clones anew when it must, and is never clobbered."""

import time

import httpx
import pytest

from tests.compose.conftest import URL
from tests.compose.runbook import fires, walk
from tests.compose.stack import Stack, eventually
from tests.compose.traffic import Traffic

pytestmark = pytest.mark.timeout(180)

DATA = "/var/lib/postgresql/18/docker"


async def _follows(stack: Stack) -> bool:
    """Tell whether the replica streams from the primary and has replayed all that it wrote."""
    try:
        received = await stack.psql("replica", "SELECT status FROM pg_stat_wal_receiver")
        written = (await stack.psql("primary", "SELECT pg_current_wal_lsn()"))[0][0]
        replayed = await stack.psql("replica", f"SELECT pg_last_wal_replay_lsn() >= '{written}'")
    except AssertionError:  # It is not up at the moment.
        return False
    return received == [["streaming"]] and replayed == [["t"]]


async def _clones(stack: Stack) -> int:
    replica = (await stack.containers("replica"))[0]["Id"]
    return (await stack.docker("logs", replica, check=False)).count("replica: cloned")


async def test_restart_and_kill_are_followed_through(stack: Stack) -> None:
    """Restarted, and its server killed without a word, the replica carries on from its own copy."""
    clones = await _clones(stack)

    await stack.compose("restart", "replica")
    await eventually(lambda: _follows(stack), within=20)
    await stack.compose("exec", "-T", "replica", "bash", "-c", f"kill -KILL $(head -1 {DATA}/postmaster.pid)")
    await eventually(lambda: _follows(stack), within=30)

    assert await _clones(stack) == clones


async def test_lost_slot_means_a_new_clone(stack: Stack) -> None:
    """When the primary no longer keeps the log that it needs, the replica clones it anew, by itself."""
    clones = await _clones(stack)
    await stack.compose("stop", "replica")
    await stack.psql("primary", "SELECT pg_drop_replication_slot('replica')")
    await stack.compose("start", "replica")

    await eventually(lambda: _follows(stack), within=60, every=1)

    assert await _clones(stack) == clones + 1


async def test_lost_timeline_means_a_new_clone(stack: Stack) -> None:
    """The primary is restored from a backup older than the replica: a timeline that the replica cannot follow. It
    clones the restored primary by itself, and the service serves from both again without a restart.
    """
    clones = await _clones(stack)
    before = {c["Id"]: c["State"]["StartedAt"] for c in await stack.containers("app")}
    restore = (
        f"rm -rf {DATA} && mv {DATA}.backup {DATA} && touch {DATA}/recovery.signal"
        f" && echo \"restore_command = 'false'\" >> {DATA}/postgresql.auto.conf"
    )
    await stack.compose(
        *("exec", "-T", "-e", "PGPASSWORD=development-replicator", "primary"),
        *("pg_basebackup", "-h", "primary", "-U", "replicator", "-D", f"{DATA}.backup", "-X", "stream", "-c", "fast"),
    )
    async with Traffic(URL, 50, prefix="AFTERBACKUP") as traffic:
        await traffic.good_for(2, within=15)
    await eventually(lambda: _follows(stack), within=10)

    await stack.compose("stop", "primary")
    await stack.compose("run", "--rm", "--no-deps", "--entrypoint", "bash", "primary", "-c", restore)
    await stack.compose("start", "primary")

    await eventually(lambda: _follows(stack), within=90, every=1)
    timelines = {
        server: (await stack.psql(server, "SELECT timeline_id FROM pg_control_checkpoint()"))[0][0]
        for server in ("primary", "replica")
    }
    assert set(timelines.values()) == {"2"}
    assert await _clones(stack) == clones + 1
    async with Traffic(URL, 50, prefix="RESTORED") as traffic:
        await traffic.good_for(3, within=20)
    assert {c["Id"]: c["State"]["StartedAt"] for c in await stack.containers("app")} == before


async def test_promoted_replica_is_left_alone(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """A server that somebody promoted is told, and never cloned over, neither while it runs nor after a restart."""
    clones = await _clones(stack)
    await stack.psql("replica", "SELECT pg_promote()")
    await stack.psql("replica", "CREATE TABLE precious (n int)")
    promoted_at = time.monotonic()

    async def patience_is_over() -> bool:
        return time.monotonic() - promoted_at > 10  # The suite's patience is 6 s.

    await eventually(patience_is_over, within=15)
    await fires(prometheus, "ServerRoleChanged", within=30, server="replica")
    assert "received promote request" in await walk(stack, prometheus, "ServerRoleChanged")
    await stack.compose("restart", "replica")

    async def answers() -> bool:
        try:
            return await stack.psql("replica", "SELECT count(*) FROM precious") == [["0"]]
        except AssertionError:
            return False

    await eventually(answers, within=20)
    assert await _clones(stack) == clones
    # As the runbook says: what is no longer wanted is removed by hand.
    await stack.compose("rm", "--force", "--stop", "replica")
    await stack.docker("volume", "rm", f"{stack.project}_replica")
    await stack.up("replica")
    await eventually(lambda: _follows(stack), within=30)
