"""What the service holds while nobody asks it anything: connections, sessions, memory, files."""

from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import asyncpg
import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.

from fuzz.stage import Stage
from pglifeguard.embedded.waiting import eventually

REST_SECONDS = 20.0
# Of the process after the first pass over the corpus, which loads what is loaded once and fills what is bounded.
GROWN_MEGABYTES = 24.0
# Sockets of the pools come and go within their bounds; those are subtracted. The rest are files, and the listener.
GROWN_DESCRIPTORS = 4
SESSIONS = """
    SELECT count(*) AS sessions, count(*) FILTER (WHERE xact_start IS NOT NULL) AS transactions
    FROM pg_stat_activity
    WHERE usename = current_user AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


@dataclass(frozen=True)
class Rest:
    """Figures of one moment. `pooled` are the connections that the pools and their monitors say they have."""

    resident_megabytes: float
    descriptors: int
    checked_out: int
    waiting: int
    in_progress: int
    pooled: int
    sessions: int
    transactions: int
    failed: dict[str, int]

    def __str__(self) -> str:
        """Say it on one line."""
        return (
            f"{self.resident_megabytes:.0f} MB, {self.descriptors} descriptors, {self.checked_out} connections "
            f"checked out of {self.pooled}, {self.sessions} sessions, {self.transactions} transactions open"
        )

    @property
    def settled(self) -> bool:
        """Whether nothing is at work, and the servers have as many sessions as the pools know of."""
        working = self.checked_out + self.waiting + self.in_progress + self.transactions
        return working == 0 and self.pooled == self.sessions

    def leaked(self) -> Iterator[str]:
        """Say what does not rest."""
        for name in ("checked_out", "waiting", "in_progress", "transactions"):
            if count := getattr(self, name):
                yield f"at rest {count} are {name.replace('_', ' ')}"
        if self.sessions != self.pooled:
            yield f"the servers have {self.sessions} sessions of the service, and its pools {self.pooled} connections"

    def grown_since(self, before: "Rest") -> Iterator[str]:
        """Say what has grown by more than its bound."""
        megabytes = self.resident_megabytes - before.resident_megabytes
        if megabytes > GROWN_MEGABYTES:
            yield f"the service has grown by {megabytes:.0f} MB, and {GROWN_MEGABYTES:.0f} are allowed"
        descriptors = (self.descriptors - self.pooled) - (before.descriptors - before.pooled)
        if descriptors > GROWN_DESCRIPTORS:
            yield f"the service has {descriptors} descriptors more, connections to databases apart"


async def rest(stage: Stage) -> Rest:
    """Wait until the service rests, and return its figures; those of an unrest that lasts as they are."""
    found = await _look(stage)

    async def settled() -> bool:
        nonlocal found
        found = await _look(stage)
        return found.settled

    await eventually(settled, REST_SECONDS)
    return found


async def _look(stage: Stage) -> Rest:
    pools = (await stage.client.get("/debug/pool-stats")).json().values()
    figures = (await stage.client.get("/metrics")).text.splitlines()
    processes = [psutil.Process(pid) for pid in stage.processes()]
    sessions = transactions = 0
    for url in {_server(url): url for name, url in stage.run.environment.items() if _is_database(name)}.values():
        connection = await asyncpg.connect(url, timeout=5)
        try:
            (counted,) = await connection.fetch(SESSIONS)
        finally:
            await connection.close()
        sessions += counted["sessions"]
        transactions += counted["transactions"]
    return Rest(
        resident_megabytes=sum(process.memory_info().rss for process in processes) / 1e6,
        descriptors=sum(process.num_fds() for process in processes),
        checked_out=sum(pool["checked_out"] + pool["connecting"] for pool in pools),
        waiting=sum(pool["waiting"] for pool in pools),
        # The one that asks is one of them.
        in_progress=round(sum(map(_value, _of(figures, "http_requests_in_progress")))) - 1,
        # Beside each pool one connection watches its server.
        pooled=sum(pool["checked_in"] + pool["checked_out"] + 1 for pool in pools),
        sessions=sessions,
        transactions=transactions,
        failed={
            line.rpartition(" ")[0]: round(_value(line))
            for line in _of(figures, "http_requests_total")
            if 'status="5' in line
        },
    )


def _is_database(name: str) -> bool:
    return name.startswith("DATABASE_") and name.endswith("URL")


def _server(url: str) -> tuple[int | None, str | None]:
    parts = urlsplit(url)
    return parts.port, parts.username


def _of(figures: list[str], name: str) -> list[str]:
    return [line for line in figures if line.startswith((f"{name} ", f"{name}{{"))]


def _value(line: str) -> float:
    return float(line.rpartition(" ")[2])
