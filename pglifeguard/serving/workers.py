"""The metrics of several worker processes as one: counted in memory, written to shared files ten times a second.

prometheus-client gives each worker files, and adds them up at a scrape. It writes to them at every count, which makes
a count three times as dear. Here a worker counts in memory and writes what has changed each time that `LoopWatch`
measures: a worker that is killed loses the counts of a tenth of a second, and no more. What a scrape has shown was in a
file, so no counter falls. A scrape waits until each worker has written once more, so it shows all that happened before
it.

prometheus-client names the files by process, so a killed worker's gauges stay in the sums, and its files stay for
good. Here they are named by place: a new worker takes the lowest that is free, continues the counts that it finds there
and deletes the gauges. A place is a lock, which the kernel takes from a process that ends, however it ends.

prometheus-client asks the environment at its import whether there are several workers; this module does the same. A
metric that is made between the two imports is right while no worker dies. With one process, the recommended way,
nothing here is used.
"""

import asyncio
import fcntl
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prometheus_client import values

from pglifeguard.registry import write
from pglifeguard.serving.merging import File, add_up

logger = logging.getLogger(__name__)
# Values that have counted since they were last written.
_unwritten: "deque[Buffered]" = deque()

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
# How long a scrape waits for a worker whose event loop is blocked. Then that worker's last figures have to do.
SCRAPE_PATIENCE_SECONDS = 1.0
SCRAPE_LOOK_SECONDS = 0.01


@contextmanager
def shared_figures() -> Iterator[None]:
    """Give the workers that start in this block a folder for their metrics."""
    folder = Path(tempfile.mkdtemp(prefix="lifeguard-metrics-"))
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
        shutil.rmtree(folder)


async def exposition(folder: Path) -> bytes:
    """Return the metrics of all workers as Prometheus reads them: gauges of the living, counts of all."""
    asked = time.monotonic_ns()
    write_figures()
    with suppress(TimeoutError):
        async with asyncio.timeout(SCRAPE_PATIENCE_SECONDS):
            # No event reaches another process.
            while any(place.stat().st_mtime_ns < asked for place in _taken(folder)):  # noqa: ASYNC110
                await asyncio.sleep(SCRAPE_LOOK_SECONDS)
    return await write(await add_up(await asyncio.to_thread(_read, folder)))


def write_figures() -> None:
    """Write what has changed since the last time, and the time. Without several workers, do nothing.

    Raises: OSError when the folder is gone, which programs that clean up /tmp can do.
    """
    place = Buffered.place
    if place is not None:
        begun = time.monotonic_ns()
        while _unwritten:
            _unwritten.popleft().write()
        # Programs that clean up /tmp look at the other time.
        os.utime(place.path, ns=(time.time_ns(), begun))


def buffer_values() -> None:
    """Let prometheus-client make its values here from now on, where the environment names a folder for them."""
    folder = Path(os.environ.get(VARIABLE, "-"))
    if not folder.is_dir():
        return
    if list(folder.glob(f"*_{os.getpid()}.db")):
        logger.warning("metrics were made before pglifeguard.serving was imported: their figures outlive this worker")
    Buffered.place = Place(folder)
    # At its first call for a value it makes a file, in the folder that the environment names then.
    Buffered.in_files = values.MultiProcessValue(Buffered.place)  # type: ignore[no-untyped-call]  # It annotates only parts.
    values.ValueClass = Buffered


class Place:
    """This process's place among the workers. Its name is in the names of its files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pid: int | None = None
        self.path: Path
        # The lock is on this file, which is open until the process ends.
        self.held: int

    def __call__(self) -> str:
        """Return the name; prometheus-client asks at every write. A process that was forked takes its own place."""
        if self._pid != os.getpid():
            self._take()
        return self.path.stem

    def _take(self) -> None:
        with _locked(self._folder, fcntl.LOCK_EX):
            number = 1
            while not self._is_free(number):
                number += 1
            for file in self._folder.glob(f"gauge_*_{self.path.stem}.db"):
                file.unlink()
            # The time of day is later than each monotonic time: no scrape waits for a worker that has yet to write.
            os.utime(self.path)
        self._pid = os.getpid()

    def _is_free(self, number: int) -> bool:
        """Take the place of this number, and say whether that was free."""
        self.path = self._folder / f"worker{number}.lock"
        self.held = os.open(self.path, os.O_RDONLY | os.O_CREAT)
        free = _lock(self.held, fcntl.LOCK_EX)
        if not free:
            os.close(self.held)
        return free


class Buffered:
    """A value of a metric, made by prometheus-client: counts in memory, which `write_figures` adds to the file."""

    _multiprocess = True  # prometheus-client asks.
    _lock = threading.Lock()
    place: Place | None = None
    in_files: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take what prometheus-client gives to each value: type, names, labels, help, mode."""
        self._in_file = self.in_files(*args, **options)
        self._unwritten = 0.0
        self._waits = False

    def inc(self, amount: float) -> None:
        """Count in memory."""
        with self._lock:
            self._unwritten += amount
            if not self._waits:
                self._waits = True
                _unwritten.append(self)

    def set(self, value: float, timestamp: float | None = None) -> None:
        """Write it at once: gauges are set every second, not at every request."""
        with self._lock:
            self._unwritten = 0.0
            self._in_file.set(value, timestamp)

    def write(self) -> None:
        """Add to the file what has been counted since the last time."""
        with self._lock:
            self._in_file.inc(self._unwritten)
            self._unwritten, self._waits = 0.0, False

    def get(self) -> float:
        """Return the file's value and what is not in it yet."""
        with self._lock:
            return float(self._in_file.get() + self._unwritten)

    def set_exemplar(self, exemplar: object) -> None:
        """Forget it: the files have no room for exemplars."""

    def get_exemplar(self) -> None:
        """Return none."""


def _read(folder: Path) -> list[File]:
    """Read the files of all workers: gauges of those that live, counts of all."""
    with _locked(folder, fcntl.LOCK_SH):
        dead = {place.stem for place in folder.glob("worker*.lock")} - {place.stem for place in _taken(folder)}
        return [
            File(path)
            for path in folder.glob("*.db")
            # A worker that is killed at its start leaves a file of no size, which cannot be read.
            if path.stat().st_size > 0 and not (path.stem.startswith("gauge") and path.stem.rpartition("_")[2] in dead)
        ]


def _taken(folder: Path) -> Iterator[Path]:
    """List the places of workers that live."""
    for path in folder.glob("worker*.lock"):
        with path.open("rb") as lock:
            if not _lock(lock.fileno(), fcntl.LOCK_SH):
                yield path


def _lock(file: int, how: int) -> bool:
    """Lock a file until it is closed. False when another process has it."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Hold the folder's lock: LOCK_SH to read, LOCK_EX to take a place. Held for milliseconds."""
    with (folder / "lock").open("ab") as lock:
        fcntl.flock(lock, how)
        yield


buffer_values()
