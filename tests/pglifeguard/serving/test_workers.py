"""The figures of several workers: on the running service, and worker by worker."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from socket import socket
from struct import pack

import httpx
import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.
import pytest
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest, values
from uvicorn import Config
from uvicorn.config import STARTUP_FAILURE

from pglifeguard.embedded.waiting import eventually, processes_end
from pglifeguard.metrics import Metrics
from pglifeguard.registry import SLICE_SAMPLES, write
from pglifeguard.serving import serve
from pglifeguard.serving.merging import File, add_up
from pglifeguard.serving.server import Worker
from pglifeguard.serving.workers import (
    VARIABLE,
    Buffered,
    Place,
    _read,
    buffer_values,
    exposition,
    shared_figures,
    write_figures,
)
from pglifeguard.settings import DatabasesSettings
from tests.app.test_cli import MODULE, ROOT, Process, served, sessions
from tests.conftest import Database
from tests.service import serving

WORKERS = 4
LIVE = 'http_requests_total{method="GET",route="/health/live",status="200"} 1.0'


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


def _files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.db"))


def _workers(server: Process) -> set[int]:
    """List the workers: the children that multiprocessing has spawned, its tracker of resources apart."""
    found = set()
    for child in psutil.Process(server.process.pid).children():
        with suppress(psutil.NoSuchProcess):  # It has ended meanwhile.
            if "--multiprocessing-fork" in child.cmdline():
                found.add(child.pid)
    return found


async def test_counters_sum_to_what_was_sent_and_survive_a_killed_worker(server: Process, tmp_path: Path) -> None:
    """400 requests on new connections each are 400 in any worker's scrape, before and after two workers are killed;
    the killed ones' gauges leave, and there are no more files than before.
    """
    sent = 400
    requests = r'http_requests_total\{method="GET",route="/health/live"'
    capacity = r'db_pool_connections_total\{pool="primary"\}'

    async def all_report() -> bool:
        return len(_workers(server)) == WORKERS and await _figures(server, capacity) == WORKERS * 15

    async def all_scraped() -> bool:
        # A scrape waits for a worker's figures for a second at most, and may be short of them on a busy machine.
        found = set(await asyncio.gather(*(_figures(server, requests) for _ in range(10))))
        assert max(found) <= sent
        return found == {sent}

    assert await eventually(all_report, 60)
    for _ in range(sent // 20):
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
            await asyncio.gather(*(client.get("/health/live") for _ in range(20)))
    assert await eventually(all_scraped, 10)

    for victim in sorted(_workers(server))[:2]:
        os.kill(victim, signal.SIGKILL)

        async def is_replaced(victim: int = victim) -> bool:
            return victim not in _workers(server) and await all_report()

        assert await eventually(is_replaced, 60)
        assert await eventually(all_scraped, 10)
    (folder,) = await asyncio.to_thread(lambda: list(tmp_path.glob("lifeguard-metrics-*")))
    files = _files(folder)
    assert len(files) == WORKERS * len({name.rpartition("_")[0] for name in files})


class Dying(Worker):
    """A worker that is killed when it was asked for a sign of life."""

    def target(self, sockets: list[socket] | None = None) -> None:
        """Run in the worker's process."""
        del sockets
        self.child_conn.recv()
        os.kill(os.getpid(), signal.SIGKILL)


async def test_worker_that_dies_instead_of_answering_is_noticed() -> None:
    """Its parent would wait for a minute, and replace no other worker meanwhile."""
    worker = Dying(Config("nothing:here"), [])
    worker.start()

    assert not await asyncio.wait_for(asyncio.to_thread(worker.is_alive, 60), 30)
    worker.join()
    assert worker.exitcode == -signal.SIGKILL


REFUSING = """
import sys
from pglifeguard.environment import SettingsError
from pglifeguard.serving import serve
from pglifeguard.settings import DatabasesSettings


def create():
    raise SettingsError("A setting is wrong.")


def leave():
    raise SystemExit("It cannot start.")


if __name__ == "__main__":
    serve(f"refusing:{sys.argv[1]}", DatabasesSettings(), port=0)
"""


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [("create", "A setting is wrong."), ("leave", "It cannot start."), ("absent", '"absent" not found')],
)
async def test_workers_that_cannot_start_end_the_service(tmp_path: Path, factory: str, sentence: str) -> None:
    """Otherwise they would be started for ever; and an exit code of 0 would tell a supervisor that all is well."""
    (tmp_path / "refusing.py").write_text(REFUSING)
    here = {"DATABASE_URL": "postgresql://u:p@127.0.0.1:1/d", "WORKERS": "2", "PYTHONPATH": str(ROOT)}
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "refusing.py", factory],
        cwd=tmp_path,
        env=os.environ | here,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ended.returncode == STARTUP_FAILURE
    assert sentence in ended.stderr


class Refuses:
    """A factory that says why it makes no application."""

    def __init__(self) -> None:
        raise SystemExit("It cannot start.")


class Breaks:
    """A factory with a bug."""

    def __init__(self) -> None:
        raise ValueError("It is broken.")


def _worker(factory: str) -> Worker:
    return Worker(Config(f"{__name__}:{factory}", factory=True, log_config=None), [])


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [("Refuses", "It cannot start."), ("Breaks", "It is broken."), ("Absent", '"Absent" not found')],
)
def test_worker_tells_why_it_cannot_start(
    factory: str, sentence: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """And ends with the status by which its parent knows that another one would fare no better."""
    with pytest.raises(SystemExit) as ended:
        _worker(factory).target([])

    assert ended.value.code == STARTUP_FAILURE
    assert sentence in capsys.readouterr().err + "\n".join(caplog.messages)


def test_worker_that_had_started_ends_as_it_does() -> None:
    """What comes later is no failure to start: its parent starts another one."""
    worker = _worker("Breaks")
    worker.server.started = True

    with pytest.raises(ValueError, match="It is broken"):
        worker.target([])


async def test_failure_to_start_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` exits with it once uvicorn, which returns as after any end, has ended."""
    monkeypatch.setattr(Worker, "failed", False)
    monkeypatch.setenv("DATABASE_URL", "postgresql://a@b/c")
    worker = _worker("Refuses")
    worker.start()

    async def is_gone() -> bool:
        return not await asyncio.to_thread(worker.is_alive, 60)

    assert await eventually(is_gone, 60)
    worker.join()
    assert Worker.failed
    monkeypatch.setattr(uvicorn, "run", lambda *_given, **_options: None)
    with pytest.raises(SystemExit) as ended:
        serve("nothing:here", DatabasesSettings())
    assert ended.value.code == STARTUP_FAILURE


async def test_pool_gauges_are_what_the_server_sees(server: Process, database: Database) -> None:
    """The connections that all workers say are open are those in pg_stat_activity, the two monitors of each apart."""
    opened = r"db_pool_connections_open"

    async def agree() -> bool:
        reported, seen = await _figures(server, opened), await sessions(database)
        return reported > 0 and reported + 2 * WORKERS == seen

    assert await eventually(agree, 60)


async def test_workers_end_with_their_parent(server: Process, database: Database) -> None:
    """A parent that was killed leaves no worker and no connection behind."""

    async def all_there() -> bool:
        return len(_workers(server)) == WORKERS

    assert await eventually(all_there, 60)
    workers = [psutil.Process(pid) for pid in _workers(server)]
    server.process.kill()

    async def no_session() -> bool:
        return await sessions(database) == 0

    assert await processes_end(workers, 60)
    assert await eventually(no_session, 60)


async def test_folder_is_gone_when_the_service_has_ended(server: Process, tmp_path: Path) -> None:
    """SIGTERM ends the workers and takes their folder away."""
    folders = tmp_path.glob
    assert len(list(folders("lifeguard-metrics-*"))) == 1

    await server.stop()

    assert not list(folders("lifeguard-metrics-*"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make this process the first worker of several, with figures in this folder."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    monkeypatch.setattr(Buffered, "place", None)
    buffer_values()
    assert Buffered.place is not None
    held = Buffered.place.held
    yield tmp_path
    values.close_all_multiprocess_files()  # type: ignore[no-untyped-call]  # It annotates only parts.
    os.close(held)


def _run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a worker that ends."""
    script = f"from prometheus_client import Counter, Gauge, Histogram\n{script}"
    environment = os.environ | {VARIABLE: str(folder)}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


async def _exposed(folder: Path) -> list[str]:
    text = (await exposition(folder)).decode()
    return [line for line in text.splitlines() if not line.startswith("#")]


async def test_counts_of_killed_workers_stay_and_their_gauges_go(folder: Path) -> None:
    """Two workers are killed one after the other: the second continues in the first one's files, and loses what it
    counted since it last wrote.
    """
    registry = CollectorRegistry()
    Counter("asked", "Questions.", registry=registry).inc(10)
    Gauge("open", "Connections.", registry=registry, multiprocess_mode="livesum").inc(3)
    killed = """
import os, signal
from pglifeguard.serving.workers import write_figures
asked, opened = Counter("asked", "Questions."), Gauge("open", "Connections.", multiprocess_mode="livesum")
asked.inc({count})
opened.set(100)
write_figures()
asked.inc(1000)
os.kill(os.getpid(), signal.SIGKILL)
"""

    for count in (5, 7):
        assert _run(folder, killed.format(count=count)).returncode == -signal.SIGKILL

    assert sorted(await _exposed(folder)) == ["asked_total 22.0", "open 3.0"]
    assert _files(folder) == [
        "counter_worker1.db",
        "counter_worker2.db",
        "gauge_livesum_worker1.db",
        "gauge_livesum_worker2.db",
    ]


async def test_new_worker_takes_over_no_gauge(folder: Path) -> None:
    """What a gauge was when its worker died is nothing that the next one in its place knows."""
    worker = """
import asyncio, os, pathlib
from pglifeguard.serving.workers import VARIABLE, exposition
Gauge("open", "Connections.", ["pool"], multiprocess_mode="livesum").labels("{pool}").set(1)
print(asyncio.run(exposition(pathlib.Path(os.environ[VARIABLE]))).decode())
"""

    first, second = (_run(folder, worker.format(pool=pool)).stdout for pool in ("first", "second"))

    assert ('open{pool="first"} 1.0' in first, 'open{pool="second"} 1.0' in second) == (True, True)
    assert "first" not in second


async def test_every_kind_of_figure_is_what_it_is_in_one_process(folder: Path) -> None:
    """A histogram, a summary and each way to count come out as from the registry of the process."""
    registry = CollectorRegistry()
    histogram = Histogram("seconds", "Time.", ["route"], registry=registry, buckets=(0.1, 1.0))
    for seconds in (0.05, 0.5, 5.0):
        histogram.labels("/").observe(seconds, {"trace": "1"})
    Summary("bytes", "Size.", registry=registry).observe(3)
    gauge = Gauge("open", "Connections.", registry=registry, multiprocess_mode="livesum")
    gauge.inc(4)
    gauge.set(7)
    gauge.dec(2)
    lines = generate_latest(registry).decode().splitlines()
    of_this_process = [line for line in lines if not line.startswith("#") and "_created" not in line]

    assert sorted(await _exposed(folder)) == sorted(of_this_process)
    assert 'seconds_bucket{le="1.0",route="/"} 2.0' in of_this_process
    assert "open 5.0" in of_this_process


async def test_event_loop_is_held_for_one_slice_at_a_time(folder: Path) -> None:
    """However many series the workers have, others get the event loop after each slice of values and of samples."""
    registry, turns = CollectorRegistry(), 0
    times = Histogram("seconds", "Time.", ["route"], registry=registry, buckets=(1.0,))
    for number in range(SLICE_SAMPLES):
        times.labels(f"/{number}").observe(number)
    write_figures()
    first, second = (folder / f"histogram_worker{number}.db" for number in (1, 2))
    second.write_bytes(first.read_bytes())

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    others = asyncio.create_task(take_turns())
    slices = await add_up([File(first), File(second)])
    parsed = turns
    text = await write(slices)
    others.cancel()

    # For each route a sum and two buckets, twice to be read and once to be sorted; then they have a count, too.
    assert parsed >= (2 + 1) * 3
    assert turns - parsed >= 3
    assert text.count(b"# TYPE") == 1
    assert b'\nseconds_count{route="/7"} 2.0\n' in text


def test_count_stays_in_memory_until_it_is_written(folder: Path) -> None:
    """A request writes to no file: what many counts have added up to is written at once, later."""
    counter = Counter("asked", "Questions.", registry=CollectorRegistry())
    write_figures()
    before = (folder / "counter_worker1.db").read_bytes()

    for _ in range(3):
        counter.inc()
    counted = (folder / "counter_worker1.db").read_bytes()
    write_figures()

    assert counted == before
    assert (folder / "counter_worker1.db").read_bytes().count(pack("d", 3.0)) == 1


async def test_worker_is_asked_for_what_it_has_counted(folder: Path) -> None:
    """A scrape has all that was counted before it, though nobody has written it yet."""
    counter = Counter("asked", "Questions.", registry=CollectorRegistry())
    for _ in range(3):
        counter.inc()

        last = await _exposed(folder)

    assert last == ["asked_total 3.0"]


async def test_blocked_worker_delays_a_scrape_and_does_not_stop_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last figures have to do."""
    monkeypatch.setattr("pglifeguard.serving.workers.SCRAPE_PATIENCE_SECONDS", 0.01)
    blocked = Place(folder)
    assert blocked() == "worker2"
    os.utime(blocked.path, ns=(0, 0))

    assert await _exposed(folder) == []
    os.close(blocked.held)


async def test_metric_that_was_made_too_early_is_counted_and_named(folder: Path) -> None:
    """prometheus-client made it by itself: its figure is right, but its file is that of this process alone."""
    early = 'Counter("early", "A figure.").inc(3)\nimport pglifeguard.serving.workers'

    said = _run(folder, early).stderr

    assert "metrics were made before pglifeguard.serving was imported" in said
    assert await _exposed(folder) == ["early_total 3.0"]


async def test_process_that_was_forked_has_a_place_of_its_own(folder: Path) -> None:
    """A server that imports the application before it forks its workers loses nothing and counts nothing twice."""
    forking = """
import os
from pglifeguard.serving.workers import write_figures
asked = Counter("asked", "Questions.")
if os.fork() == 0:
    asked.inc(5)
    write_figures()
    os._exit(0)
os.wait()
asked.inc(2)
write_figures()
"""

    assert _run(folder, forking).returncode == 0

    assert await _exposed(folder) == ["asked_total 7.0"]
    assert _files(folder) == ["counter_worker2.db", "counter_worker3.db"]


async def test_file_of_a_worker_that_was_killed_at_its_start(folder: Path) -> None:
    """It was made and has no size yet: there is nothing to add up."""
    Counter("asked", "Questions.", registry=CollectorRegistry()).inc()
    (folder / "counter_worker2.db").touch()

    assert await _exposed(folder) == ["asked_total 1.0"]


async def test_worker_that_knows_nothing_does_not_count(folder: Path) -> None:
    """A gauge that this worker has forgotten is what another one says; it is absent when none knows it."""
    metrics = Metrics()
    metrics.up.labels("primary").set(1)
    metrics.forget(metrics.up, "primary")
    metrics.forget(metrics.replica_lag_bytes, "replica")

    async def known() -> list[str]:
        lines = await _exposed(folder)
        return sorted(line for line in lines if line.startswith(("db_up{", "db_replica_lag_bytes{")))

    other = """
import pglifeguard.serving.workers
from pglifeguard.metrics import Metrics
metrics = Metrics()
metrics.up.labels("primary").set(0)
metrics.replica_lag_bytes.labels("replica").set(3)
input()
"""
    with subprocess.Popen(  # noqa: ASYNC220  # It returns at once.
        [sys.executable, "-c", other], env=os.environ | {VARIABLE: str(folder)}, stdin=subprocess.PIPE
    ) as process:

        async def both_known() -> bool:
            return await known() == ['db_replica_lag_bytes{pool="replica"} 3.0', 'db_up{pool="primary"} 0.0']

        assert await eventually(both_known, 30)
        process.communicate(b"\n")
    assert await known() == []


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


async def test_counts_are_written_while_it_serves(folder: Path, database: Database) -> None:
    """So a worker that is killed loses those of a moment, and no more; nobody has to scrape for it."""

    async def is_written() -> bool:
        return LIVE in (await write(await add_up(_read(folder)))).decode()

    async with serving(database.settings(prometheus_multiproc_dir=folder)) as service:
        await service.client.get("/health/live")

        assert await eventually(is_written, 10)


async def test_last_counts_are_written_when_the_lifespan_ends(
    folder: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that ends in good order loses nothing."""
    monkeypatch.setattr("pglifeguard.serving.loop.INTERVAL_SECONDS", 3600)
    async with serving(database.settings(prometheus_multiproc_dir=folder)) as service:
        await service.client.get("/health/live")

    monkeypatch.setattr(Buffered, "place", None)  # From here on this process writes no more.
    assert LIVE in await _exposed(folder)


def test_place_that_is_taken_is_left_to_its_owner(folder: Path) -> None:
    """The kernel frees a place when its worker ends, however it ends; the lowest free one is taken, without gauges."""
    second, third = Place(folder), Place(folder)
    first = Buffered.place
    assert first is not None
    assert (first(), second(), third()) == ("worker1", "worker2", "worker3")

    os.close(second.held)
    gauge = folder / "gauge_livesum_worker2.db"
    gauge.touch()
    again = Place(folder)

    assert again() == "worker2"
    assert not gauge.exists()
    os.close(again.held)
    os.close(third.held)


def test_values_that_were_made_too_early_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their file is named by the process's id, and nobody takes it over."""
    (folder / f"counter_{os.getpid()}.db").touch()

    buffer_values()

    assert "their figures outlive this worker" in caplog.text


def test_values_are_plain_where_no_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process alone keeps prometheus-client's own values."""
    monkeypatch.delenv(VARIABLE, raising=False)
    before = values.ValueClass

    buffer_values()

    assert values.ValueClass is before
