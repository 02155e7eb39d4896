"""The metrics of several worker processes as one: prometheus-client's files, kept right and kept few.

prometheus-client gives each worker a file for each kind of metric and adds the files up at a scrape. Without more, the
gauges of a killed worker stay in the sums, and its files stay for good. The parent process outlives the workers, so it
tidies: it deletes a dead worker's gauges, and adds its counters and histograms to an archive. A lock keeps a scrape
from reading a figure twice meanwhile.

Both simpler ways were measured. Deleting the counters too makes a sum fall by a quarter when one of four workers dies;
Prometheus takes that for a restart, and `rate()` counts the other three quarters again. Leaving the files costs each
scrape 3.4 ms for each worker that ever died: 3.4 s and 128 MB after a thousand restarts.

With one process, the recommended way, nothing here is used.
"""

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from pglifeguard.registry import Registry

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
# Seconds between two checks for dead workers; the parent notices and replaces them in about the same time.
TIDY_SECONDS = 1.0
# No worker has this process id.
ARCHIVE = 0


@contextmanager
def shared_figures() -> Iterator[None]:
    """Give the workers that start in this block a folder for their metrics, and tidy it until they have ended."""
    folder = Path(tempfile.mkdtemp(prefix="lifeguard-metrics-"))
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(folder)
    ended = threading.Event()
    tidier = threading.Thread(target=_tidy_until, args=(folder, ended), name="tidy-metrics", daemon=True)
    tidier.start()
    try:
        yield
    finally:
        ended.set()
        tidier.join()
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
        shutil.rmtree(folder)


def exposition(folder: Path) -> bytes:
    """Return the metrics of all workers, living and dead, as Prometheus reads them."""
    registry = Registry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]  # prometheus-client annotates only parts.
    with _locked(folder, fcntl.LOCK_SH):
        return generate_latest(registry)


def tidy(folder: Path) -> None:
    """Remove the files of dead workers: delete the gauges, add counters and histograms to the archive."""
    dead = [file for file in folder.glob("*.db") if not _is_alive(_owner(file))]
    if not dead:
        return
    with _locked(folder, fcntl.LOCK_EX):
        for file in dead:
            kind = file.stem.split("_")[0]
            # A worker that is killed at its start leaves a file of no size, which cannot be read.
            if kind != "gauge" and file.stat().st_size > 0:
                _add_up(folder / f"{kind}_{ARCHIVE}.db", file)
            file.unlink()


def _tidy_until(folder: Path, ended: threading.Event) -> None:
    while not ended.wait(TIDY_SECONDS):
        tidy(folder)


def _add_up(archive: Path, file: Path) -> None:
    """Add a file's values to the archive. A new file gets the archive's name when it is complete."""
    total: dict[str, float] = {}
    for source in (archive, file):
        if source.exists():
            for key, value, _, _ in MmapedDict.read_all_values_from_file(source):  # type: ignore[no-untyped-call]
                total[key] = total.get(key, 0.0) + value
    fresh = archive.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    values = MmapedDict(str(fresh))  # type: ignore[no-untyped-call]
    for key, value in total.items():
        values.write_value(key, value, 0.0)  # type: ignore[no-untyped-call]
    values.close()  # type: ignore[no-untyped-call]
    fresh.replace(archive)


def _owner(file: Path) -> int:
    """Return the process id in a file's name: counter_123.db, gauge_livesum_123.db."""
    return int(file.stem.rpartition("_")[2])


def _is_alive(pid: int) -> bool:
    if pid == ARCHIVE:
        return True
    try:
        os.kill(pid, 0)
    except OSError:
        return False  # It has ended, or another user's process has its id now.
    return True


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Hold the folder's lock: LOCK_SH to read, LOCK_EX to change. Held for milliseconds."""
    with (folder / "lock").open("ab") as lock:
        fcntl.flock(lock, how)
        yield
