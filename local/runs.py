"""Other runs over the same directory: the one that is alive, and the service that a killed one left behind."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.

from pglifeguard.embedded.account import EmbeddedError, remove_tree
from pglifeguard.embedded.waiting import processes_end

END_SECONDS = 5.0
# The variable that tells a service's processes, workers included, from all others.
MARK = "LIFEGUARD_LOCAL"


class Place:
    """The directory of a run that nobody else uses."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._made = [path for path in (directory, *directory.parents) if not path.exists()]
        self._was_used = (directory / "lock").exists()
        directory.mkdir(parents=True, exist_ok=True)

    def keep(self) -> None:
        """Let what is in it stay, whatever comes: somebody may have stored something."""
        self._made, self._was_used = [], True

    def clear(self) -> None:
        """Remove what this run has made: the directory and those above it, or in one that was there the lock."""
        if self._made:
            remove_tree(self.directory / "data")
            remove_tree(self.directory)
        elif not self._was_used:
            (self.directory / "lock").unlink()
        for path in self._made[1:]:
            with suppress(OSError):  # Somebody has put something else into it meanwhile.
                path.rmdir()


@contextmanager
def alone_in(directory: Path) -> Iterator[Place]:
    """Hold the directory's lock, which the kernel releases even after kill -9; what fails before `keep()` is cleared.

    Raises: EmbeddedError when another run holds it.
    """
    place = Place(directory)
    with _opened(directory / "lock") as lock:
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield place
        except BaseException:
            place.clear()
            raise


def _opened(path: Path) -> TextIO:
    """Open and lock a file that is still there afterwards: a run that fails takes the one that it has made away."""
    while True:
        lock = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            lock.close()
            raise EmbeddedError(
                f"Another run (process {holder}) uses {path.parent}: stop it, or give this one a directory and a port "
                'of its own: make run ARGS="--directory /tmp/second --port 8001"'
            ) from None
        lock.close()


def marked(mark: str) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """List the processes of the service that carry this mark, each with its environment."""
    for process in psutil.process_iter():
        # Others' processes are closed to us, and some end while we look.
        with suppress(psutil.Error):
            environment = process.environ()
            if environment.get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process, environment


async def end_service(mark: str) -> bool:
    """End the processes of the service that carry this mark; tell whether there were any."""
    family = []
    for process, _ in marked(mark):
        with suppress(psutil.NoSuchProcess):
            process.kill()
            family.append(process)
    await processes_end(family, END_SECONDS)
    return bool(family)
