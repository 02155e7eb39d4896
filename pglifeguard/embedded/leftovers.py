"""Servers that an earlier process, killed without warning, left running over a data directory."""

import signal
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # See waiting.py.

from pglifeguard.embedded.waiting import processes_end

END_SECONDS = 5.0


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
