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
from tests.chaos.load import after, ask, offer, quantile, tell
from tests.conftest import Database
from tests.service import serving

PAIRS = 10_000 if FULL else 300
CLIENTS = 8
LATEST_SECONDS = 0.5
# What a read may lose that waits for a replica in vain: REPLICA_WAIT_MILLISECONDS, and a little for the timer.
LOST_SECONDS = 0.02


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


async def test_reads_right_after_writes_stay_on_the_replica(
    database: Database, measured: Callable[[str], None]
) -> None:
    """Each client reads its own write at once, on the replica that is milliseconds behind, and never older data."""
    told, share = [], 0.0
    # Before and after, by the switch.
    for milliseconds, pairs in ((0, PAIRS // 10), (15, PAIRS)):
        answers: Counter[str] = Counter()
        seconds: list[float] = []
        numbers = count()
        async with serving(database.settings(replica_wait_milliseconds=milliseconds)) as service:

            async def work(wait: int, pairs: int, answers: Counter[str], seconds: list[float], numbers: Any) -> None:
                app, path = service.app, ""
                while (number := next(numbers)) < pairs:
                    name = f"Name {number}"
                    if path and number % 2:
                        written = await ask(app, "PATCH", path, {"full_name": name})
                    else:
                        patient = {"mrn": f"R-{wait}-{number}", "full_name": name, "birth_date": "1980-05-17"}
                        written = await ask(app, "POST", "/patients", patient)
                        path = written.headers["location"]
                    read = await ask(app, "GET", path, x_consistency_token=written.headers["x-consistency-token"])
                    fresh = read.status == 200 and read.json()["full_name"] == name
                    answers["fresh" if fresh else f"not fresh, {read.status}"] += 1
                    seconds.append(read.seconds)

            clients = (work(milliseconds, pairs, answers, seconds, numbers) for _ in range(CLIENTS))
            await asyncio.gather(*clients)
            on_replica = sum(
                service.sample("db_consistent_reads_total", outcome=outcome) for outcome in ("known", "replayed")
            )
        share = on_replica / pairs
        p50, p99 = (quantile(seconds, at) * 1000 for at in (0.5, 0.99))
        told.append(
            f"REPLICA_WAIT_MILLISECONDS={milliseconds}: {tell(answers)}, {share:.1%} on the replica, "
            f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"
        )
        assert answers == {"fresh": pairs}

    measured("; ".join(told))
    in_time(share >= 0.95, told)


async def test_stopped_replay_costs_few_reads_a_wait(
    database: Database, breakable_cluster: Cluster, measured: Callable[[str], None]
) -> None:
    """With replay stopped the primary serves the reads; few of them wait for the replica first, and briefly."""
    numbers, seconds = 1000 if FULL else 50, []
    async with serving(database.settings()) as service:
        patient = {"mrn": "S-1", "full_name": "Ada Example", "birth_date": "1980-05-17"}
        path = (await ask(service.app, "POST", "/patients", patient)).headers["location"]
        await breakable_cluster.pause_replay()
        try:
            for number in range(numbers):
                written = await ask(service.app, "PATCH", path, {"full_name": f"Name {number}"})
                read = await ask(service.app, "GET", path, x_consistency_token=written.headers["x-consistency-token"])
                assert read.json()["full_name"] == f"Name {number}"
                seconds.append(read.seconds)
        finally:
            await breakable_cluster.resume_replay()
        missed = service.sample("db_consistent_reads_total", outcome="missed")

    assert 0 < missed < numbers / 4
    p50, slowest = quantile(seconds, 0.5), max(seconds)
    # Those who waited are the slowest ones.
    lost = quantile(sorted(seconds)[-int(missed) :], 0.5) - p50
    measured(
        f"{numbers} reads after writes, all fresh: {missed:.0f} waited for the replica, for {lost * 1000:.0f} ms, "
        f"p50 {p50 * 1000:.1f} ms, slowest {slowest * 1000:.0f} ms"
    )
    in_time(lost <= LOST_SECONDS, lost)
    in_time(slowest - p50 < 0.1, slowest)


async def test_a_flood_of_forged_tokens_loads_no_primary(database: Database, measured: Callable[[str], None]) -> None:
    """Tokens ahead of all that was written, each another one: after the first second no read goes to the primary."""
    rate = 200 if FULL else 50
    async with serving(database.settings()) as service:

        def on_primary() -> float:
            return service.sample("db_reads_routed_total", target="primary", reason="behind_token")

        patient = {"mrn": "F-1", "full_name": "Ada Example", "birth_date": "1980-05-17"}
        written = await ask(service.app, "POST", "/patients", patient)
        cluster, timeline, _ = written.headers["x-consistency-token"].split("-")

        async def read(number: int) -> int:
            token = f"{cluster}-{timeline}-FFFFFFFF/{number:X}"
            return (await ask(service.app, "GET", "/patients?limit=1", x_consistency_token=token)).status

        first = await offer(read, per_second=rate, until=after(1))
        before = on_primary()
        later = await offer(read, per_second=rate, until=after(4 if FULL else 1), first=len(first))
        after_it = on_primary() - before
        counts = Counter([*first, *later])
        refused = service.sample("db_consistency_tokens_total", outcome="ahead")

    measured(
        f"{tell(counts)}; {before:.0f} reads went to the primary in the first second, {after_it:.0f} later; "
        f"{refused:.0f} tokens were not believed"
    )
    assert counts == {200: len(first) + len(later)}
    assert after_it < len(later) / 10
    in_time(after_it == 0, after_it)


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
