"""How many connections: throughput and latency for pools of 1 to 64, for queries that wait and queries that compute."""

from collections.abc import Callable

import httpx

from bench import plots
from bench.load import BenchError, closed_loop, open_loop
from bench.measure import Plan, Series
from bench.report import Section
from bench.served import Served
from bench.stage import Stage
from pglifeguard import budget

SIZES = (1, 2, 4, 8, 16, 32, 64)
PATHS = {"/wait": "waits 20 ms", "/compute": "computes"}
# As many as the largest pool, so that no pool is short of work.
CLIENTS = 64
WAIT_SECONDS = 0.02
# By Little's law four queries that wait 20 ms are under way at this rate: a pool of 4 has no room, one of 8 has.
ARRIVALS = 200
# Of arrivals; where they outrun the pool, its queue takes several times as long to drain.
WINDOW_SECONDS = 0.5
# Nothing is refused, whatever the size: the queue's length is what is looked at.
VARIABLES = {
    "DATABASE_REPLICA_MAX_OVERFLOW": "0",
    "DATABASE_REPLICA_POOL_TIMEOUT": "60",
    "DATABASE_REPLICA_POOL_MAX_WAITING": "10000",
    "DATABASE_REPLICA_POOL_QUEUE_TARGET_SECONDS": "0",
}
# A round ends between two answers.
ROUNDING = 1.2
# Of the best rate: beyond it connections cost the server and bring nothing.
ENOUGH = 0.9


async def run(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> Section:
    """Give one server each size in turn, every round."""
    section = Section("Pool size")
    rates = {path: {size: Series() for size in SIZES} for path in PATHS}
    late = {path: {size: Series() for size in SIZES} for path in PATHS}
    async with stage.serving("ours_at_work", VARIABLES) as server:
        tell("warm-up")
        await _resize(server, SIZES[-1])
        for path in PATHS:
            await closed_loop(server.url + path, clients=CLIENTS, seconds=plan.warm_up_seconds)
        for number in range(1, plan.rounds + 1):
            for size in SIZES:
                await _resize(server, size)
                for path in PATHS:
                    tell(f"pool of {size} · {path} · round {number} of {plan.rounds}")
                    got = await closed_loop(server.url + path, clients=CLIENTS, seconds=plan.seconds)
                    if path == "/wait" and got.rate > ROUNDING * size / WAIT_SECONDS:
                        raise BenchError(f"{size} connections cannot have answered {got.rate:.0f} requests a second.")
                    rates[path][size].values.append(got.rate)
                    await stage.looks.quiet(server.name)
                    arrivals = await open_loop(server.url + path, rate=ARRIVALS, seconds=WINDOW_SECONDS)
                    late[path][size].values.append(arrivals.quantile(0.99))
    for path, words in PATHS.items():
        best = max(series.median for series in rates[path].values())
        enough = next(size for size in SIZES if rates[path][size].median >= ENOUGH * best)
        section.say(
            f"**A query that {words}**: a pool of {enough} reaches {ENOUGH:.0%} of the best rate, with {CLIENTS} "
            f"clients kept busy. p99 at {ARRIVALS} arrivals a second."
        )
        section.table(
            ["connections", "requests/s", "p99 ms"],
            [[str(size), rates[path][size].text(), late[path][size].text()] for size in SIZES],
        )
    cores = stage.database_cores
    formulas = {"cores x 2 + 1": budget.by_cores(cores), "cores x 2 + 4": budget.for_production(cores)}
    by_load = budget.by_load(ARRIVALS, WAIT_SECONDS)
    section.say(
        f"PostgreSQL has {cores} of the cores here, shared with the generator, so the formulas say "
        + " and ".join(f"{formula} = **{size}**" for formula, size in formulas.items())
        + ", for queries that compute: more connections than that share the same processor. For queries that wait it "
        f"is requests/s x query seconds x 1.2: {ARRIVALS} x {WAIT_SECONDS} x 1.2 = **{by_load}**. With fewer, arrivals "
        f"outrun the pool and wait for each other, the longer the longer it lasts: here it lasts {WINDOW_SECONDS:g} s."
    )
    panels = [
        plots.Panel(
            title,
            unit,
            "connections in the pool",
            SIZES,
            {words: list(found[path].values()) for path, words in PATHS.items()},
            log_x=True,
            log_y=True,
            marks={f"{formula} = {size}": size for formula, size in marks.items()},
        )
        for title, unit, found, marks in (
            ("Throughput, 64 clients", "requests/s", rates, formulas),
            (f"Latency at {ARRIVALS} arrivals a second", "p99, ms", late, {"requests/s x seconds x 1.2": by_load}),
        )
    ]
    section.picture("pool_size", "Throughput and p99 by pool size", plots.lines(*panels))
    return section


async def _resize(server: Served, size: int) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        (await client.put(f"{server.url}/pool/{size}", timeout=30)).raise_for_status()
