"""Writes, reads and probes of liveness at steady rates, and when a member became the leader."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Self

import asyncpg

from local.patroni import Member
from tests.chaos import FULL
from tests.chaos.load import Answer, Writers, offer, quantile, tell
from tests.chaos.wire import Client

# Requests a second. The short form runs on machines that do other things too.
WRITES, READS, PROBES = (50, 50, 20) if FULL else (15, 15, 5)
WATCH_SECONDS = 0.02
RECOVERS = "SELECT pg_is_in_recovery()"


class RemoteWriters(Writers):
    """Writers whose service is a process of its own: `app` is its client."""

    async def _write(self, number: int) -> None:
        mrn = f"W-{number}"
        patient = {"mrn": mrn, "full_name": "Ada Example", "birth_date": "1980-05-17"}
        self.told[mrn] = await self.app.ask("POST", "/patients", patient)


@dataclass
class Traffic:
    """All that is asked of the service while something breaks."""

    client: Client
    writers: RemoteWriters
    reads: list[Answer] = field(default_factory=list)
    probes: list[Answer] = field(default_factory=list)
    _tasks: "list[asyncio.Task[list[Answer]]]" = field(default_factory=list)

    @classmethod
    def on(cls, client: Client) -> Self:
        """Prepare traffic on the service of this client."""
        return cls(client, RemoteWriters(client, per_second=WRITES))

    async def __aenter__(self) -> Self:
        for path, rate in (("/patients?limit=1", READS), ("/health/live", PROBES)):
            self._tasks.append(asyncio.create_task(self._ask(path, rate)))
        await self.writers.__aenter__()
        return self

    async def __aexit__(self, *_failure: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Ask nothing more, and wait for all answers; then the figures are whole."""
        await self.writers.__aexit__()
        self.reads, self.probes = await asyncio.gather(*self._tasks)

    async def _ask(self, path: str, rate: float) -> list[Answer]:
        async def ask(_number: int) -> Answer:
            return await self.client.ask("GET", path)

        return await offer(ask, per_second=rate, until=lambda: self.writers.stopped)

    @property
    def failed_reads(self) -> Counter[str]:
        """Count the reads that were not answered 200, by code."""
        return Counter(answer.code for answer in self.reads if answer.status != 200)

    @property
    def slow_probe(self) -> float:
        """The seconds within which 99 % of the probes of liveness were answered."""
        return quantile([answer.seconds for answer in self.probes], 0.99)

    def figures(self) -> str:
        """Write down what was answered."""
        failed = f", reads that failed: {tell(self.failed_reads)}" if self.failed_reads else ", no read failed"
        return f"{tell(self.writers.outcomes())}{failed}, live p99 {self.slow_probe * 1000:.0f} ms"


async def becomes_primary(*standbys: Member, seconds: float) -> float:
    """Wait until one of the standbys takes writes; return when. Asked on connections that were open before."""
    connections = [await standby.server.connect() for standby in standbys]
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            for connection in connections:
                try:
                    if not await connection.fetchval(RECOVERS, timeout=1):
                        return time.monotonic()
                except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    continue  # It is being restarted, or frozen; another one is promoted then.
            await asyncio.sleep(WATCH_SECONDS)
    finally:
        for connection in connections:
            connection.terminate()
    raise AssertionError(f"no standby was promoted within {seconds:g} s")
