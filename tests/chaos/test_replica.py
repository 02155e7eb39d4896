"""The replica goes away, or mute, under reads."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import pytest

from local.cluster import Cluster
from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing.proxy import Proxy
from tests.chaos import FULL, in_time
from tests.chaos.load import Answer, after, ask, offer, quantile, tell
from tests.conftest import Database
from tests.service import Service, serving

READS_PER_SECOND = 100
SECONDS = 5 if FULL else 0.5
# The default, with which a silence is noticed within one second; the short form has too few reads for a 99th part.
MONITOR_SECONDS = 0.5 if FULL else 0.25
# After the first second, at the 99th percentile.
ADDED_SECONDS = 0.05


async def reads(service: Service, path: str, seconds: float) -> list[Answer]:
    """Read one row at a steady rate."""
    return await offer(lambda _: ask(service.app, "GET", path), per_second=READS_PER_SECOND, until=after(seconds))


async def reads_from_now(service: Service, path: str) -> tuple[list[Answer], list[Answer]]:
    """Go on reading; return what was asked in the first second, and what was asked after it."""
    begun = time.monotonic()
    answers = await reads(service, path, 1 + SECONDS)
    first = [answer for answer in answers if answer.asked_at < begun + 1]
    return first, answers[len(first) :]


async def a_patient(service: Service, cluster: Cluster) -> str:
    """Create a patient that the replica has, and return its path."""
    patient = {"mrn": "R-1", "full_name": "Ada Example", "birth_date": "1980-05-17"}
    path = (await ask(service.app, "POST", "/patients", patient)).headers["location"]
    await cluster.wait_replayed()
    return path


def p99(answers: list[Answer]) -> float:
    """Return the 99th percentile of the seconds that answers took."""
    return quantile([answer.seconds for answer in answers], 0.99)


@pytest.mark.parametrize("end", ["frozen", "killed", "black_holed"] if FULL else ["black_holed"])
async def test_reads_go_on_without_the_replica(
    database: Database, breakable_cluster: Cluster, measured: Callable[[str], None], end: str
) -> None:
    """Reads are answered by the primary: all of them, and after the first second as fast as before."""
    async with Proxy(breakable_cluster.replica.port) as proxy:
        replica = {"url": proxy.url(database.replica_url())}
        settings = database.settings(replicas=(replica,), monitor_interval_seconds=MONITOR_SECONDS)
        async with serving(settings) as service:
            path = await a_patient(service, breakable_cluster)
            before = await reads(service, path, SECONDS)

            if end == "frozen":
                breakable_cluster.replica.freeze()
            elif end == "killed":
                await breakable_cluster.replica.kill()
            else:
                proxy.hang()
            first, later = await reads_from_now(service, path)
            if end == "frozen":
                breakable_cluster.replica.thaw()
            proxy.resume()

    statuses = Counter(answer.code or str(answer.status) for answer in [*before, *first, *later])
    measured(
        f"{end}: p99 {p99(before) * 1000:.1f} ms before, {p99(first) * 1000:.0f} ms in the first second, "
        f"{p99(later) * 1000:.1f} ms after; {tell(statuses)}"
    )
    assert set(statuses) == {"200"}
    in_time(p99(later) <= p99(before) + ADDED_SECONDS)


async def test_reads_hang_where_nobody_looks(database: Database, breakable_cluster: Cluster) -> None:
    """Without the monitor, reads wait for a mute replica for as long as it is mute."""
    settings = database.settings(monitor_interval_seconds=60)
    async with serving(settings, settled=False) as service:
        for one in service.databases.all():
            await one.monitor.probe()
        path = await a_patient(service, breakable_cluster)
        breakable_cluster.replica.freeze()
        hanging = [asyncio.create_task(ask(service.app, "GET", path)) for _ in range(3)]

        async def at_work() -> bool:
            return service.databases.replicas[0].pool.figures().checked_out == 3

        assert await eventually(at_work, 5)
        frozen = time.monotonic()

        async def second_passed() -> bool:
            return time.monotonic() - frozen >= 2

        await eventually(second_passed, 5)
        done = [task.done() for task in hanging]
        breakable_cluster.replica.thaw()
        answers = [await task for task in hanging]

    assert done == [False] * 3
    assert min(answer.seconds for answer in answers) >= 2


async def test_one_broken_replica_of_two_costs_nothing(
    database: Database, breakable_cluster: Cluster, measured: Callable[[str], None]
) -> None:
    """With one of two replicas mute the other serves the reads; only those caught on the mute one go to the primary."""
    async with Proxy(breakable_cluster.replica.port) as proxy:
        urls = (database.replica_url(), proxy.url(database.replica_url()))
        settings = database.settings(
            replicas=tuple({"url": url} for url in urls), monitor_interval_seconds=MONITOR_SECONDS
        )
        async with serving(settings) as service:
            path = await a_patient(service, breakable_cluster)
            before = await reads(service, path, SECONDS)
            proxy.hang()
            first, later = await reads_from_now(service, path)
            on_primary = service.sample("db_reads_routed_total", target="primary", reason="broken")
            proxy.resume()

    measured(f"p99 {p99(before) * 1000:.1f} ms before, {p99(later) * 1000:.1f} ms after")
    assert {answer.status for answer in [*before, *first, *later]} == {200}
    assert on_primary == 0
    in_time(p99(later) <= p99(before) + ADDED_SECONDS)
