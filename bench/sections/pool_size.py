"""How many connections: throughput and latency for pools of 1 to 64, for queries that wait and queries that compute."""

import os
from collections.abc import Callable

from app.db import budget
from bench import plots
from bench.load import BenchError, closed_loop, open_loop
from bench.measure import Plan, Series
from bench.report import Section
from bench.stage import Stage

SIZES = (1, 2, 4, 8, 16, 32, 64)
PATHS = {"/wait": "waits 20 ms", "/compute": "computes"}
# As many as the largest pool, so that no pool is short of work.
CLIENTS = 64
# Of the best rate of any size: where a good pool is comfortable and a small one is not.
SHARE = 0.5


async def run(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> Section:
    """Run every size once a round."""
    section = Section("Pool size")
    rates = {path: {size: Series() for size in SIZES} for path in PATHS}
    late = {path: {size: Series() for size in SIZES} for path in PATHS}
    offered: dict[str, float] = {}
    for number in range(1, plan.rounds + 1):
        # From the largest: its rate in the first round sets what is offered to all.
        for size in reversed(SIZES):
            variables = {
                "DATABASE_REPLICA_POOL_SIZE": str(size),
                "DATABASE_REPLICA_MAX_OVERFLOW": "0",
                "DATABASE_REPLICA_POOL_MIN_SIZE": str(size),
                "DATABASE_REPLICA_POOL_TIMEOUT": "60",
                "DATABASE_REPLICA_POOL_MAX_WAITING": "10000",
            }
            async with stage.serving("ours_at_work", variables) as server:
                for path in PATHS:
                    tell(f"pool of {size} · {path} · round {number} of {plan.rounds}")
                    got = await closed_loop(server.url + path, clients=CLIENTS, seconds=1)
                    if got.errors:
                        raise BenchError(f"A pool of {size} answered {got.errors} of {got.requests} wrongly.")
                    rates[path][size].values.append(got.rate)
                    rate = offered.setdefault(path, SHARE * got.rate)
                    arrivals = await open_loop(server.url + path, rate=rate, seconds=1)
                    late[path][size].values.append(arrivals.quantile(0.99))
    for path, words in PATHS.items():
        best = max(series.median for series in rates[path].values())
        # The smallest within a tenth of the best: beyond it connections cost the server and bring nothing.
        enough = next(size for size in SIZES if rates[path][size].median >= 0.9 * best)
        section.say(f"**A query that {words}**; p99 at {offered[path]:.0f} arrivals a second. Enough: {enough}.")
        section.table(
            ["connections", "requests/s", "p99 ms"],
            [[str(size), rates[path][size].text(), late[path][size].text()] for size in SIZES],
        )
    cores = os.cpu_count() or 1
    formulas = {"cores x 2 + 1": budget.by_cores(cores), "cores x 2 + 4": budget.for_production(cores)}
    section.say(
        "The formulas say "
        + " and ".join(f"{formula} = {size}" for formula, size in formulas.items())
        + " here. They are for queries that compute, on cores of the database's own; PostgreSQL shares one core with "
        "the generator in this run. For queries that wait, the rate times the seconds of a query is what is at work "
        "at once."
    )
    figure = plots.lines(
        [
            (title, unit, {PATHS[path]: (SIZES, [found[path][size].median for size in SIZES]) for path in PATHS})
            for title, unit, found in (("Throughput", "requests/s", rates), ("Latency", "p99, ms", late))
        ],
        x_label="connections in the pool",
        log_x=True,
        log_y=(True, True),
        marks={name: float(size) for name, size in formulas.items()},
    )
    section.picture("pool_size", "Throughput and p99 by pool size", figure)
    return section
