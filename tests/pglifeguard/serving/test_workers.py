"""The figures of several workers: on the running service, and file by file."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]  # See local/waiting.py.
import pytest
from prometheus_client.mmap_dict import MmapedDict, mmap_key

from local.waiting import eventually
from pglifeguard.serving.workers import VARIABLE, exposition, shared_figures, tidy
from tests.app.test_cli import MODULE, Process, served, sessions
from tests.conftest import Database

WORKERS = 4
# A process that has ended: above Linux's highest number.
DEAD = 2**22 + 1
ALIVE = os.getpid()


@pytest.fixture
async def server(database: Database, tmp_path: Path) -> AsyncIterator[Process]:
    """Serve with four workers on the primary alone."""
    environment = {"DATABASE_URL": database.url(), "TMPDIR": str(tmp_path)}
    async with served(tmp_path, environment, *MODULE, "--workers", str(WORKERS)) as server:
        yield server


async def _figures(server: Process, pattern: str) -> float:
    """Add up the series of a scrape that fit a pattern; each scrape may be answered by another worker."""
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
        text = (await client.get("/metrics")).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(pattern, line))


def _files(tmp_path: Path) -> list[str]:
    return sorted(file.name for file in tmp_path.glob("lifeguard-metrics-*/*.db"))


def _workers(tmp_path: Path) -> set[int]:
    """List the workers by the files that they write, the archive's apart."""
    return {int(name[:-3].rpartition("_")[2]) for name in _files(tmp_path)} - {0}


async def test_counters_sum_to_what_was_sent_and_survive_a_killed_worker(server: Process, tmp_path: Path) -> None:
    """400 requests on new connections each are 400 in any worker's scrape, before and after two workers are killed;
    the killed ones' gauges leave, and so do their files.
    """
    sent = 400
    requests = r'http_requests_total\{method="GET",route="/health/live"'
    capacity = r'db_pool_connections_total\{pool="primary"\}'

    async def all_report() -> bool:
        return len(_workers(tmp_path)) == WORKERS and await _figures(server, capacity) == WORKERS * 15

    assert await eventually(all_report, 60)
    for _ in range(sent // 20):
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
            await asyncio.gather(*(client.get("/health/live") for _ in range(20)))
    assert {await _figures(server, requests) for _ in range(10)} == {sent}

    for victim in sorted(_workers(tmp_path))[:2]:
        os.kill(victim, signal.SIGKILL)

        async def is_replaced(victim: int = victim) -> bool:
            return victim not in _workers(tmp_path) and await all_report()

        assert await eventually(is_replaced, 60)
        assert {await _figures(server, requests) for _ in range(10)} == {sent}
    kinds = len({name.rpartition("_")[0] for name in _files(tmp_path)})
    assert len(_files(tmp_path)) <= (WORKERS + 1) * kinds


async def test_pool_gauges_are_what_the_server_sees(server: Process, database: Database) -> None:
    """The connections that all workers say are open are those in pg_stat_activity, the two monitors of each apart."""
    opened = r"db_pool_connections_open"

    async def agree() -> bool:
        reported, seen = await _figures(server, opened), await sessions(database)
        return reported > 0 and reported + 2 * WORKERS == seen

    assert await eventually(agree, 60)


async def test_workers_end_with_their_parent(server: Process, tmp_path: Path, database: Database) -> None:
    """A parent that was killed leaves no worker and no connection behind."""

    async def all_there() -> bool:
        return len(_workers(tmp_path)) == WORKERS

    assert await eventually(all_there, 60)
    workers = _workers(tmp_path)
    server.process.kill()

    async def all_gone() -> bool:
        return not any(map(psutil.pid_exists, workers)) and await sessions(database) == 0

    assert await eventually(all_gone, 60)


async def test_folder_is_gone_when_the_service_has_ended(server: Process, tmp_path: Path) -> None:
    """SIGTERM ends the workers and takes their folder away."""
    assert _files(tmp_path)

    await server.stop()

    assert not await asyncio.to_thread(lambda: list(tmp_path.glob("lifeguard-metrics-*")))


def _write(folder: Path, kind: str, pid: int, name: str, value: float) -> None:
    # prometheus-client annotates only parts.
    file = MmapedDict(str(folder / f"{kind}_{pid}.db"))  # type: ignore[no-untyped-call]
    file.write_value(mmap_key(name, name, [], [], "A figure."), value, 0.0)  # type: ignore[no-untyped-call]
    file.close()  # type: ignore[no-untyped-call]


def test_dead_gauges_go_and_dead_counts_are_kept(tmp_path: Path) -> None:
    """Two workers die one after the other: their counts stay in the sum, their gauges leave it, one file is left."""
    _write(tmp_path, "gauge_livesum", ALIVE, "open", 3)
    _write(tmp_path, "counter", ALIVE, "asked", 10)
    for number, count in ((DEAD, 5), (DEAD + 1, 7)):
        _write(tmp_path, "gauge_livesum", number, "open", 100)
        _write(tmp_path, "counter", number, "asked", count)

        tidy(tmp_path)

    text = exposition(tmp_path).decode()
    assert "\nopen 3.0\n" in text
    assert "\nasked 22.0\n" in text
    assert sorted(file.name for file in tmp_path.glob("*.db")) == [
        "counter_0.db",
        f"counter_{ALIVE}.db",
        f"gauge_livesum_{ALIVE}.db",
    ]


def test_file_of_a_worker_that_was_killed_at_its_start(tmp_path: Path) -> None:
    """It was made and has no size yet: there is nothing to add up, and it goes."""
    _write(tmp_path, "counter", ALIVE, "asked", 10)
    (tmp_path / f"counter_{DEAD}.db").touch()

    tidy(tmp_path)

    assert [file.name for file in tmp_path.glob("*.db")] == [f"counter_{ALIVE}.db"]
    assert b"asked 10.0" in exposition(tmp_path)


def test_worker_that_knows_nothing_does_not_count(tmp_path: Path) -> None:
    """A gauge that one worker has forgotten is what another one says; it is absent when none knows it."""

    def exposed_after(last: str) -> str:
        script = f"from pglifeguard.metrics import Metrics; m = Metrics(); {last}"
        subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {VARIABLE: str(tmp_path)})
        return exposition(tmp_path).decode()

    forgotten = exposed_after(
        "m.up.labels('primary').set(1); m.replica_lag_bytes.labels('replica').set(7);"
        "m.forget(m.up, 'primary'); m.forget(m.replica_lag_bytes, 'replica')"
    )
    known = exposed_after("m.up.labels('primary').set(0); m.replica_lag_bytes.labels('replica').set(3)")

    assert [line for line in forgotten.splitlines() if line.startswith(("db_up{", "db_replica_lag_bytes{"))] == []
    assert 'db_up{pool="primary"} 0.0' in known
    assert 'db_replica_lag_bytes{pool="replica"} 3.0' in known


def test_nothing_to_tidy_changes_nothing(tmp_path: Path) -> None:
    """While every worker lives, their files are left alone, and the lock is not even taken."""
    _write(tmp_path, "counter", ALIVE, "asked", 10)

    tidy(tmp_path)

    assert [file.name for file in tmp_path.iterdir()] == [f"counter_{ALIVE}.db"]


@pytest.mark.parametrize("before", [None, "/somewhere/else"])
def test_folder_is_named_to_the_workers_and_forgotten_afterwards(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable that prometheus-client reads holds while the workers run; then it is as it was."""
    if before is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, before)

    with shared_figures():
        folder = Path(os.environ[VARIABLE])
        assert folder.is_dir()

    assert os.environ.get(VARIABLE) == before
    assert not folder.exists()


async def test_parent_tidies_while_its_workers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that a dead worker left is gone within moments, without anybody asking."""
    monkeypatch.setattr("pglifeguard.serving.workers.TIDY_SECONDS", 0.01)
    with shared_figures():
        folder = Path(os.environ[VARIABLE])
        _write(folder, "gauge_livesum", DEAD, "open", 1)

        async def tidied() -> bool:
            return not await asyncio.to_thread(lambda: list(folder.glob("*.db")))

        assert await eventually(tidied, 5)
