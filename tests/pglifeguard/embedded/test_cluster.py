"""The two servers start, replicate, suffer and recover."""

import asyncio
import stat
from pathlib import Path

import asyncpg
import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.
import pytest

from local.cluster import Cluster
from pglifeguard.embedded import cluster as cluster_module
from pglifeguard.embedded import directories, programs
from pglifeguard.embedded.account import EmbeddedError
from pglifeguard.embedded.cluster import Cluster as PlainCluster


async def query(url: str, statement: str) -> object:
    """Run one statement on a connection of its own and return its first value."""
    connection = await asyncpg.connect(url, timeout=5)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_replica_streams_and_refuses_writes(cluster: Cluster) -> None:
    """The second server is a hot standby of the first."""
    assert await query(cluster.url("app_ro", server="replica"), "SELECT pg_is_in_recovery()") is True
    assert await query(cluster.url("app_ro"), "SELECT pg_is_in_recovery()") is False

    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await query(cluster.url("app_owner", server="replica"), "CREATE TABLE refused ()")


async def test_wait_replayed_waits_for_what_is_committed(breakable_cluster: Cluster) -> None:
    """A row written before the call is on the replica after it; a paused replica makes it time out instead."""
    await breakable_cluster.create_database("replayed")
    owner, reader = (
        breakable_cluster.url("app_owner", database="replayed"),
        breakable_cluster.url("app_ro", server="replica", database="replayed"),
    )
    await query(owner, "CREATE TABLE numbers AS SELECT 1 AS number")
    await breakable_cluster.wait_replayed()
    await breakable_cluster.pause_replay()
    try:
        await query(owner, "INSERT INTO numbers VALUES (2)")
        with pytest.raises(TimeoutError, match="has replayed"):
            await breakable_cluster.wait_replayed(timeout_seconds=0.05)
        before = await query(reader, "SELECT count(*) FROM numbers")
    finally:
        await breakable_cluster.resume_replay()

    await breakable_cluster.wait_replayed()

    assert (before, await query(reader, "SELECT count(*) FROM numbers")) == (1, 2)
    await breakable_cluster.drop_database("replayed")


async def test_new_database_is_a_copy_with_the_roles_privileges(cluster: Cluster) -> None:
    """Default privileges travel with the template: app_rw writes tables made later by app_owner."""
    await cluster.create_database("copied")
    await query(cluster.url("app_owner", database="copied"), "CREATE TABLE things (id int)")

    await query(cluster.url("app_rw", database="copied"), "INSERT INTO things VALUES (1)")

    await cluster.drop_database("copied")


async def test_restart_keeps_the_port(breakable_cluster: Cluster) -> None:
    """A restarted server is where its clients look for it."""
    for server in (breakable_cluster.replica, breakable_cluster.primary):
        port, pid = server.port, server.pid

        await server.restart()

        assert (server.port, server.pid != pid) == (port, True)


async def test_frozen_server_accepts_and_does_not_answer(breakable_cluster: Cluster) -> None:
    """A frozen server is a black hole, not a refusal."""
    breakable_cluster.replica.freeze()

    _, writer = await asyncio.open_connection("127.0.0.1", breakable_cluster.replica.port)
    writer.close()
    with pytest.raises(TimeoutError):
        await asyncpg.connect(breakable_cluster.url("app_ro", server="replica"), timeout=0.2)
    breakable_cluster.replica.thaw()

    assert await query(breakable_cluster.url("app_ro", server="replica"), "SELECT 1") == 1


async def test_killed_primary_comes_back_with_its_rows(breakable_cluster: Cluster) -> None:
    """After SIGKILL to every process of the primary, start() recovers it and the replica follows again."""
    await breakable_cluster.create_database("survivor")
    url = breakable_cluster.url("app_owner", database="survivor")
    await query(url, "CREATE TABLE kept AS SELECT 42 AS answer")

    await breakable_cluster.primary.kill()
    with pytest.raises(OSError, match="Connect call failed"):
        await query(url, "SELECT 1")
    await breakable_cluster.start()

    await breakable_cluster.wait_replayed()
    reader = breakable_cluster.url("app_owner", server="replica", database="survivor")
    assert await query(reader, "SELECT answer FROM kept") == 42
    await breakable_cluster.drop_database("survivor")


async def test_promoted_replica_is_cloned_anew(breakable_cluster: Cluster) -> None:
    """A replica that has become a primary cannot follow; start() replaces it."""
    await breakable_cluster.replica.promote()
    assert await query(breakable_cluster.url("app_rw", server="replica"), "SELECT pg_is_in_recovery()") is False

    await breakable_cluster.start()

    assert await query(breakable_cluster.url("app_ro", server="replica"), "SELECT pg_is_in_recovery()") is True
    await breakable_cluster.wait_replayed()


async def test_replica_that_lost_its_slot_is_cloned_anew(breakable_cluster: Cluster) -> None:
    """A replica whose log is gone from the primary does not keep the cluster from starting."""
    await breakable_cluster.replica.stop()
    await query(breakable_cluster.url("postgres"), "SELECT pg_drop_replication_slot('replica')")

    await breakable_cluster.start()

    await breakable_cluster.wait_replayed()
    assert await query(breakable_cluster.url("postgres"), "SELECT active FROM pg_replication_slots") is True


async def test_servers_left_by_a_killed_process_are_taken_over(tmp_path: Path) -> None:
    """A second Cluster over the same directory ends the first one's servers and keeps its data and passwords."""
    first = Cluster(tmp_path / "cluster")
    try:
        await first.start()
        await query(first.url("app_owner"), "CREATE TABLE kept AS SELECT 42 AS answer")
        orphans = first.primary.pid, first.replica.pid

        async with Cluster(tmp_path / "cluster") as second:
            assert {second.primary.pid, second.replica.pid}.isdisjoint(orphans)
            assert (first.primary.running, first.replica.running) == (False, False)
            assert await query(second.url("app_owner"), "SELECT answer FROM kept") == 42
    finally:
        await first.stop()
        first.remove()


async def test_passwords_are_random_and_private(tmp_path: Path) -> None:
    """Two directories never share a password, and nobody else may read the file."""
    clusters = [Cluster(tmp_path / name) for name in ("one", "two")]

    assert set(clusters[0].passwords.values()).isdisjoint(clusters[1].passwords.values())
    assert len(set(clusters[0].passwords.values())) == len(clusters[0].passwords)
    assert stat.S_IMODE((tmp_path / "one" / "passwords.json").stat().st_mode) == 0o600
    for cluster in clusters:
        cluster.remove()


async def test_cluster_of_the_library_has_one_plain_role(tmp_path: Path) -> None:
    """It owns its databases, and is no superuser; a second start finds everything made, and the replica follows."""
    cluster = PlainCluster(tmp_path / "cluster")
    try:
        async with cluster:
            assert await query(cluster.url(), "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
            await query(cluster.url(), "CREATE TABLE kept AS SELECT 42 AS answer")
        async with cluster:
            await cluster.start()
            await cluster.wait_replayed()
            assert await query(cluster.url(server="replica"), "SELECT answer FROM kept") == 42
    finally:
        cluster.remove()


@pytest.mark.skipif(programs._of_system() is None, reason="the system has no PostgreSQL: apt-get install postgresql")
async def test_cluster_of_the_systems_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no wheel, whatever its version is from 15 on."""
    monkeypatch.setattr(programs, "find_spec", lambda _name: None)
    for remembered in (programs.programs, programs.major_version):
        remembered.cache_clear()
    cluster = PlainCluster(tmp_path / "cluster")
    try:
        async with cluster:
            assert await query(cluster.url(server="replica"), "SELECT pg_is_in_recovery()") is True
            assert int(str(await query(cluster.url(), "SHOW server_version_num"))) >= 150_000
    finally:
        for remembered in (programs.programs, programs.major_version):
            remembered.cache_clear()
        cluster.remove()


async def test_disk_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started, and nothing is left running."""
    monkeypatch.setattr(cluster_module, "NEEDED_BYTES", 10**18)
    cluster = PlainCluster(tmp_path / "cluster", durable=True)

    with pytest.raises(EmbeddedError, match="free some space"):
        await cluster.__aenter__()

    assert not cluster.primary.running
    cluster.remove()


async def test_replica_that_does_not_follow_is_told(
    breakable_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one that cannot log in at the primary is worth a sentence."""
    monkeypatch.setattr(cluster_module, "FOLLOW_SECONDS", 0.1)
    breakable_cluster.replica.settings["primary_conninfo"] = "host=127.0.0.1 port=1"

    with pytest.raises(EmbeddedError, match="does not follow the primary"):
        await breakable_cluster.clone_replica()


async def test_replica_that_cannot_start_is_cloned_anew(breakable_cluster: Cluster) -> None:
    """Half of a data directory is of no use."""
    await breakable_cluster.replica.stop()
    (breakable_cluster.replica.data / "global/pg_control").unlink()

    await breakable_cluster.start()

    await breakable_cluster.wait_replayed()


async def test_replica_that_does_not_pause_is_told(breakable_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that replays has to confirm it, and here it is stopped."""
    monkeypatch.setattr(cluster_module, "FOLLOW_SECONDS", 0.1)
    processes = psutil.Process(breakable_cluster.replica.pid).children()
    (replaying,) = (each for each in processes if "startup" in " ".join(each.cmdline()))
    replaying.suspend()

    with pytest.raises(TimeoutError, match="does not pause"):
        await breakable_cluster.pause_replay()

    replaying.resume()


async def test_slot_in_use_is_not_taken(breakable_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that still streams has it; the primary notices within seconds when one was killed."""
    monkeypatch.setattr(directories, "SLOT_SECONDS", 0.1)

    with pytest.raises(asyncpg.DuplicateObjectError):
        await directories._renew_slot(breakable_cluster.primary)
