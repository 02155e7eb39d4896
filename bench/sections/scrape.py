"""For how long a scrape of many series keeps the event loop from everybody else."""

import asyncio
import time
from collections.abc import Callable
from itertools import pairwise

from prometheus_client import generate_latest

from bench.measure import Plan, Series
from bench.report import Section
from bench.stage import Stage
from pglifeguard.fastapi.exposition import in_slices
from pglifeguard.metrics import Metrics
from pglifeguard.registry import Registry

SERIES = 10_000
MOST_MILLISECONDS = 5.0


async def run(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> Section:  # noqa: ARG001  # No server is needed.
    """Write the exposition beside a task that wants every turn of the event loop, and at once."""
    section = Section("Scrape")
    registry = _crowded()
    longest, in_all, at_once = Series(), Series(), Series()
    for number in range(plan.rounds + 1):
        tell(f"scrape · round {number} of {plan.rounds}")
        turns = await _turns(registry)
        started = time.thread_time()
        generate_latest(registry)
        if number:
            longest.values.append(max(turns) * 1e3)
            in_all.values.append(sum(turns) * 1e3)
            at_once.values.append((time.thread_time() - started) * 1e3)
    claim = f"`/metrics` with {SERIES:,} series: {longest.median:.1f} ms of the event loop at a time"
    held = section.verdict(f"{claim}, ≤ {MOST_MILLISECONDS:g} wanted", held=longest.median <= MOST_MILLISECONDS)
    section.table(
        [f"`/metrics` with {SERIES:,} series", "ms of CPU", "bar", ""],
        [
            ["the longest turn of the event loop", longest.text(1), f"≤ {MOST_MILLISECONDS:g}", held],
            ["all turns together", in_all.text(), "-", ""],
            ["by prometheus-client's `generate_latest`, in one turn", at_once.text(), "-", ""],
        ],
    )
    return section


def _crowded() -> Registry:
    """Return a service's figures, most of them the time of requests by their routes."""
    metrics = Metrics()
    samples = route = 0
    while samples < SERIES:
        for _ in range(10):
            route += 1
            metrics.http_seconds.labels("GET", f"/things/{route}/of/{{owner_id}}").observe(0.003)
        samples = sum(len(family.samples) for family in metrics.registry.collect())
    return metrics.registry


async def _turns(registry: Registry) -> list[float]:
    """Return the seconds of CPU of each turn; what else the machine does does not lengthen them."""
    ends = [time.thread_time()]

    async def take_turns() -> None:
        while True:
            ends.append(time.thread_time())
            await asyncio.sleep(0)

    others = asyncio.create_task(take_turns())
    await in_slices(registry)
    others.cancel()
    ends.append(time.thread_time())
    return [end - start for start, end in pairwise(ends)]
