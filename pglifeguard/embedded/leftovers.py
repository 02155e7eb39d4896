"""Servers that an earlier process, killed without warning, left running over a data directory.

Where no later run would find them, as in a temporary directory, a guard ends them: see `remove_at_the_end`.
"""

import asyncio
import atexit
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, cast

import psutil  # type: ignore[import-untyped]  # See waiting.py.

from pglifeguard.embedded.waiting import processes_end

END_SECONDS = 5.0
# It imports nothing while it waits, and takes 4 MB then, beside what it shares with its parent.
GUARD = """
import sys
sys.path[:] = sys.argv[1:]
directories = sys.stdin.read().splitlines()
if directories:
    from pglifeguard.embedded.leftovers import remove_what_is_left
    remove_what_is_left(directories)
"""


def postmaster(data: Path) -> psutil.Process | None:
    """Find the process of the PostgreSQL server over this data directory."""
    try:
        pid = int((data / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0])
        process = psutil.Process(pid)
        # A stale file, and a stranger who has got the number since.
        return process if str(data) in process.cmdline() else None
    except (OSError, ValueError, psutil.Error):
        return None


async def end_server(data: Path) -> None:
    """End the PostgreSQL server over this data directory, politely: its next start then need not recover."""
    process = postmaster(data)
    if process is None:
        return
    family = [process]
    with suppress(psutil.Error):  # It may end by itself meanwhile.
        family += process.children(recursive=True)
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
    if not await processes_end(family, END_SECONDS):
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        await processes_end(family, END_SECONDS)


def remove_at_the_end(directory: Path) -> None:
    """Have a directory removed, and the servers below it ended, when this process has ended, however it ends.

    A program that is killed by SIGTERM or SIGKILL, as a test run by `timeout` or by CI, removes nothing itself, and its
    servers would go on. What it has removed itself is gone, and nothing happens.
    """
    # A line is written at once: nobody knows when the end comes.
    _guard(os.getpid()).write(f"{directory}\n")


@cache
def _guard(_pid: int) -> IO[str]:
    """Start this process's guard, and return what it reads until this process has ended: the kernel closes it."""
    process = subprocess.Popen(
        [sys.executable, "-c", GUARD, *sys.path],
        stdin=subprocess.PIPE,
        # Whoever reads what this process writes would wait for the guard, too.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
        # The signals of a terminal, and those of `timeout`, are for the whole group.
        start_new_session=True,
    )
    atexit.register(process.communicate)
    return cast("IO[str]", process.stdin)


def remove_what_is_left(directories: Iterable[str]) -> None:
    """Remove those directories that are still there, and end the servers over them: the guard's work."""
    left = [directory for directory in map(Path, directories) if directory.exists()]
    files = [file for directory in left for depth in ("*", "*/*") for file in directory.glob(f"{depth}/postmaster.pid")]
    # The server may have been started by another way to the same directory.
    asyncio.run(_end_servers({data for file in files for data in (file.parent, file.parent.resolve())}))
    for directory in left:
        shutil.rmtree(directory, ignore_errors=True)


async def _end_servers(directories: Iterable[Path]) -> None:
    await asyncio.gather(*map(end_server, directories))
