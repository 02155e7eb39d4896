"""One server that is measured: its process, its workers, what the kernel says that they took."""

import asyncio
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass

import httpx
import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.

from pglifeguard.embedded.waiting import eventually

READY_SECONDS = 30.0
STOP_SECONDS = 15.0
USABLE = 'db_replica_usable{pool="replica"} 1.0'


@dataclass
class Served:
    """One server: a process, perhaps with workers, that answers on a port."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    ready_seconds: float

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        """User and system time of all its processes by the kernel's account, ended threads included."""
        return cpu_seconds(self.process.pid)

    def memory_bytes(self) -> int:
        """Resident memory of all its processes."""
        return int(sum(process.memory_info().rss for process in self._processes()))

    def proportional_bytes(self) -> int:
        """Resident memory of all its processes (PSS); a page that several processes share counts in parts."""
        return int(sum(process.memory_full_info().pss for process in self._processes()))

    def pin(self, core: int) -> None:
        """Keep it on this core, with the threads that it starts from now on; starting may use all of them."""
        for process in self._processes():
            process.cpu_affinity([core])

    def _processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of all that it has started, ended ones included.

    Raises: psutil.NoSuchProcess when the process itself has ended.
    """
    parent = psutil.Process(pid)
    while True:
        try:
            # The parent first: a child's time becomes the parent's when the child ends, and must not count twice.
            return float(sum(sum(process.cpu_times()[:4]) for process in (parent, *parent.children(recursive=True))))
        except psutil.NoSuchProcess as ended:
            if ended.pid == pid:
                raise


async def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server, its workers too when it does not do so itself."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        await asyncio.to_thread(process.wait, STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await asyncio.to_thread(process.wait)


async def until_ready(process: subprocess.Popen[bytes], port: int, variant: str) -> float | None:
    """Wait until it serves as it is to be measured; return when it first said that it was ready, None if never."""
    ready = 0.0
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=1, trust_env=False) as client:

        async def ready_or_ended() -> bool:
            nonlocal ready
            if process.poll() is not None:
                return True
            with suppress(httpx.TransportError):
                if not (await client.get("/health/ready")).is_success:
                    return False
                ready = ready or time.perf_counter()
                # Until its first looks at the replica, ours reads from the primary, and would be measured doing that.
                return not variant.startswith("ours") or USABLE in (await client.get("/metrics")).text
            return False

        in_time = await eventually(ready_or_ended, READY_SECONDS)
    return ready if in_time and process.poll() is None else None
