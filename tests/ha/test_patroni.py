"""What the service does while Patroni fails over, in each way in which a service reaches such a cluster.

In every situation: no acknowledged write is lost, so none was acknowledged by a leader of before; the first write after
the promotion is answered within three seconds of it; reads go on; and the event loop does.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from local.patroni import TTL, Member, PatroniCluster
from pglifeguard.embedded.waiting import eventually
from tests.app.test_cli import MODULE, served
from tests.chaos import FULL, in_time
from tests.chaos.wire import Client
from tests.ha.traffic import Traffic, becomes_primary
from tests.ha.ways import Way, reached

RESUMED_SECONDS = 3.0
LIVE_SECONDS = 0.1
# A switchover, or the end of a leader whose manager has gone with it.
PROMOTED_SECONDS = TTL + 20.0
BEFORE_SECONDS = AFTER_SECONDS = 2.0
# Beside other work a request may not get its turn within the usual half a second: then that would be tested.
SETTINGS = {"ENVIRONMENT": "test", "LOG_LEVEL": "INFO"} | ({} if FULL else {"DATABASE_POOL_TIMEOUT": "2"})
WAYS: tuple[Way, ...] = ("direct", "haproxy", "pgbouncer")


@dataclass
class Scene:
    """A service under load on a settled cluster: who leads, who stands by, and what is told of both."""

    cluster: PatroniCluster
    leader: Member
    traffic: Traffic
    way: Way

    @property
    def standbys(self) -> list[Member]:
        """All members but the leader of the beginning."""
        return [member for member in self.cluster.members if member is not self.leader]

    async def standby(self, role: str) -> Member:
        """Find the synchronous standby, or the other one."""
        for member in self.standbys:
            if await self.cluster.role(member) == role:
                return member
        raise AssertionError(f"no member is {role}")

    async def flows(self, since: float, seconds: float = 20) -> None:
        """Wait until twenty writes sent after a moment were acknowledged."""

        async def flowing() -> bool:
            return len(self.traffic.writers.answered_since(since)) >= 20

        assert await eventually(flowing, seconds), self.traffic.writers.outcomes()

    async def end(self, changed: float) -> float:
        """Let the load go on for a while, and the cluster settle; return when writes were acknowledged again."""
        await self.flows(changed + AFTER_SECONDS, 60)
        await self.traffic.stop()
        await self.cluster.settle()
        return min(self.traffic.writers.answered_since(changed))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    """Give each way to the cluster."""
    chosen: Way = request.param
    return chosen


@pytest.fixture
async def scene(cluster: PatroniCluster, way: Way, tmp_path: Path, folder: Path) -> AsyncIterator[Scene]:
    """Give a service under load, and check afterwards what must hold whatever happened."""
    async with (
        reached(cluster, way, folder) as variables,
        served(tmp_path, variables | SETTINGS, *MODULE) as service,
    ):
        client = Client(service.url)
        scene = Scene(cluster, await cluster.leader(), Traffic.on(client), way)
        try:
            async with scene.traffic:
                await scene.flows(time.monotonic())
                yield scene
        finally:
            client.close()
    await scene.traffic.writers.reconcile(cluster.url("postgres", await cluster.leader()))
    in_time(scene.traffic.slow_probe <= LIVE_SECONDS, scene.traffic.figures())
    assert not scene.traffic.failed_reads, scene.traffic.figures()


@asynccontextmanager
async def promotion(scene: Scene) -> AsyncIterator[Callable[[], float]]:
    """Watch for a standby that is promoted by what the block does; the call then tells when that was."""
    watched = asyncio.create_task(becomes_primary(*scene.standbys, seconds=PROMOTED_SECONDS))
    try:
        yield watched.result
        await watched
    finally:
        watched.cancel()


async def test_planned_switchover(scene: Scene, measured: Callable[[str], None]) -> None:
    """An operator orders it, and tells the service nothing."""
    async with promotion(scene) as promoted:
        await scene.cluster.switch_over()
    judge(scene, await scene.end(promoted()), measured)


async def test_planned_switchover_with_a_pause(scene: Scene, measured: Callable[[str], None]) -> None:
    """The service is paused meanwhile: no request fails, and none takes longer than the pause and a second."""
    paused = time.monotonic()
    answer = await scene.traffic.client.ask("POST", "/debug/pause?seconds=30")
    await scene.cluster.switch_over()
    if scene.way != "direct":
        await scene.cluster.settle()  # By then the balancer has noticed.
    await scene.traffic.client.ask("POST", "/debug/resume")
    resumed = time.monotonic()
    await scene.end(resumed)
    slowest = max(told.seconds for told in scene.traffic.writers.told.values())

    measured(f"{scene.way}: paused for {resumed - paused:.1f} s, slowest {slowest:.1f} s, {scene.traffic.figures()}")
    assert answer.status == 202
    assert set(scene.traffic.writers.outcomes()) == {"201"}
    in_time(slowest <= resumed - paused + 1, slowest)


@pytest.mark.parametrize("what", ["server", "manager and server"])
async def test_leader_is_killed(scene: Scene, measured: Callable[[str], None], what: str) -> None:
    """Its manager starts a server that died again; where both are gone, a standby takes over after the ttl."""
    if what == "server":
        await scene.leader.kill_server()
        came = await becomes_primary_again(scene.leader)
    else:
        async with promotion(scene) as promoted:
            await scene.leader.kill()
        came = promoted()
        scene.leader.start_manager(scene.cluster.account)
    judge(scene, await scene.end(came), measured, what)


async def test_leader_is_frozen_and_thawed(scene: Scene, measured: Callable[[str], None]) -> None:
    """It wakes up as a leader of before, and its clients' connections are open; it acknowledges no write."""
    async with promotion(scene) as promoted:
        scene.leader.freeze()
    resumed = asyncio.create_task(scene.flows(promoted()))
    scene.leader.thaw()
    await resumed
    judge(scene, await scene.end(promoted()), measured)


async def test_etcd_is_gone(scene: Scene, measured: Callable[[str], None]) -> None:
    """The leader gives up when it cannot renew its lock; reads go on, and writes when etcd is back."""
    scene.cluster.freeze_etcd()
    await asyncio.sleep(TTL)  # As long as the line of the table says: nothing is waited for.
    scene.cluster.thaw_etcd()
    back = time.monotonic()
    assert await eventually(lambda: has_leader(scene.cluster), 60)
    came = time.monotonic()
    resumed = await scene.end(came)
    measured(f"{scene.way}: a leader {came - back:.1f} s after etcd, {told(scene, resumed)}")
    in_time(resumed <= RESUMED_SECONDS, scene.traffic.figures())


async def test_synchronous_standby_is_frozen(scene: Scene, measured: Callable[[str], None]) -> None:
    """Writes hang until Patroni takes another one; nothing is lost, nothing else suffers."""
    standby = await scene.standby("sync_standby")
    frozen = time.monotonic()
    standby.freeze()

    async def another() -> bool:
        roles = [await scene.cluster.role(member) for member in scene.standbys if member is not standby]
        return "sync_standby" in roles

    assert await eventually(another, 60)
    changed = time.monotonic()
    standby.thaw()
    resumed = await scene.end(changed)
    measured(f"{scene.way}: another one after {changed - frozen:.1f} s, {told(scene, resumed)}")


async def test_replica_is_made_anew(scene: Scene, measured: Callable[[str], None]) -> None:
    """An operator reinitialises a replica: it serves nothing meanwhile, and no request fails."""
    replica = await scene.standby("replica")
    begun = time.monotonic()
    await scene.cluster.reinitialise(replica)

    async def left() -> bool:
        return await scene.cluster.role(replica) != "replica"

    assert await eventually(left, 20)
    await scene.cluster.settle()
    await scene.end(time.monotonic())
    measured(f"{scene.way}: made anew in {time.monotonic() - begun:.1f} s, {scene.traffic.figures()}")
    assert set(scene.traffic.writers.outcomes()) == {"201"}


def judge(scene: Scene, resumed: float, measured: Callable[[str], None], what: str = "") -> None:
    """Check that writes were acknowledged soon after there was a leader again, and note the figures."""
    measured(f"{scene.way}{', ' if what else ''}{what}: {told(scene, resumed)}")
    in_time(resumed <= RESUMED_SECONDS, scene.traffic.figures())


def told(scene: Scene, resumed: float) -> str:
    """Write down when writes were acknowledged again, and what was answered."""
    return f"resumed after {resumed:.2f} s, {scene.traffic.figures()}"


async def has_leader(cluster: PatroniCluster) -> bool:
    """Whether a member leads."""
    return "leader" in [await cluster.role(member) for member in cluster.members]


async def becomes_primary_again(leader: Member) -> float:
    """Wait until a server that died takes writes again."""

    async def writes() -> bool:
        try:
            connection = await leader.server.connect()
        except (OSError, TimeoutError, asyncpg.PostgresError):
            return False
        try:
            return not await connection.fetchval("SELECT pg_is_in_recovery()")
        finally:
            await connection.close()

    assert await eventually(writes, 60)
    return time.monotonic()
