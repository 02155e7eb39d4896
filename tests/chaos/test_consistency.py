"""What a client wrote, it reads, while the replica replays half a second late."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

from local.cluster import Cluster
from tests.chaos import FULL, in_time
from tests.chaos.load import ask, tell
from tests.conftest import Database
from tests.service import serving

PAIRS = 10_000 if FULL else 300
CLIENTS = 8
LATEST_SECONDS = 0.5


@asynccontextmanager
async def late_replay(cluster: Cluster) -> AsyncIterator[None]:
    """Let the replica replay in steps, each up to half a second late."""
    chance = random.Random(5)  # noqa: S311  # The same delays in every run.
    control = await cluster.replica.connect()

    async def step_for_ever() -> None:
        while True:
            await control.execute("SELECT pg_wal_replay_pause()")
            await asyncio.sleep(chance.uniform(0, LATEST_SECONDS))
            await control.execute("SELECT pg_wal_replay_resume()")

    stepping = asyncio.create_task(step_for_ever())
    try:
        yield
    finally:
        stepping.cancel()
        await asyncio.gather(stepping, return_exceptions=True)
        await control.close()
        await cluster.resume_replay()


class Client:
    """A client that creates a patient, changes it, and looks after each write, with its token and without."""

    def __init__(self, app: Any, counts: Counter[str]) -> None:
        self._app = app
        self._counts = counts
        self._path = ""

    async def pair(self, number: int) -> None:
        """Write, then read."""
        name = f"Name {number}"
        if self._path and number % 2:
            written = await ask(self._app, "PATCH", self._path, {"full_name": name})
        else:
            patient = {"mrn": f"C-{number}", "full_name": name, "birth_date": "1980-05-17"}
            written = await ask(self._app, "POST", "/patients", patient)
            self._path = written.headers["location"]
        token = written.headers["x-consistency-token"]
        for how, headers in (("with", {"x_consistency_token": token}), ("without", {})):
            read = await ask(self._app, "GET", self._path, **headers)
            fresh = read.status == 200 and read.json()["full_name"] == name
            self._counts[f"{how} token: {'fresh' if fresh else 'stale' if read.status == 200 else read.status}"] += 1


async def test_reads_follow_writes(
    database: Database, breakable_cluster: Cluster, measured: Callable[[str], None]
) -> None:
    """With the token no read is stale; without it some are, and still none says 404 for a row that was created."""
    counts: Counter[str] = Counter()
    numbers = count()

    async def work(app: Any) -> None:
        client = Client(app, counts)
        while (number := next(numbers)) < PAIRS:
            await client.pair(number)

    async with serving(database.settings()) as service, late_replay(breakable_cluster):
        await asyncio.gather(*(work(service.app) for _ in range(CLIENTS)))
        on_replica = service.sample("db_reads_routed_total", target="replica", reason="replica")
        retried = service.sample("db_reads_retried_total", reason="not_found")

    reads = f"{on_replica:.0f} reads went to the replica, {retried:.0f} retried on the primary"
    measured(f"{PAIRS} pairs: {tell(counts)}; {reads}")
    assert counts["with token: fresh"] == PAIRS
    assert set(counts) == {"with token: fresh", "without token: fresh", "without token: stale"}
    assert retried > 0


async def test_a_token_that_is_never_reached_does_not_block(
    database: Database, measured: Callable[[str], None]
) -> None:
    """A token from before a failover, ahead of everything that any server will have, is read on the primary at once."""
    async with serving(database.settings()) as service:
        patient = {"mrn": "T-1", "full_name": "Ada Example", "birth_date": "1980-05-17"}
        path = (await ask(service.app, "POST", "/patients", patient)).headers["location"]

        started = time.monotonic()
        read = await ask(service.app, "GET", path, x_consistency_token="FFFFFFFF/FFFFFFFF")

        seconds = time.monotonic() - started

    measured(f"answered {read.status} after {seconds:.2f} s")
    assert read.status == 200
    in_time(seconds < 0.5, seconds)
