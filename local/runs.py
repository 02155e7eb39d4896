"""Other runs over the same directory: the one that is alive, and the service that a killed one left behind."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.

from pglifeguard.embedded.account import EmbeddedError
from pglifeguard.embedded.waiting import processes_end

END_SECONDS = 5.0
# The variable that tells a service's processes, workers included, from all others.
MARK = "LIFEGUARD_LOCAL"


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, which the kernel releases even after kill -9.

    Raises: EmbeddedError when another run holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise EmbeddedError(
                f"Another run (process {lock.read().strip()}) uses {directory}: stop it, or give this one a "
                "directory of its own with --directory."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


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
