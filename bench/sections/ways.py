"""Ways to connect: what each costs alone, and what each does to a server of 100 connections with 2 and 10 instances."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

import httpx

from bench import pgbouncer, wire
from bench.load import Open, closed_loop, open_loop
from bench.measure import Plan, Row, Series, alternate
from bench.report import Section
from bench.stage import Served, Stage

CLIENTS = 6
# What tutorials give an instance, and as many clients; ours gets what the budget of ten instances leaves it.
POOL = {"BENCH_POOL_SIZE": "20", "BENCH_MAX_OVERFLOW": "10"}
CLIENTS_EACH = 30
# 10 instances x 7 are 70; sentinels and the analytics pool add 3 to each at most: 100, the most a server gives.
BUDGETED = {"DATABASE_POOL_SIZE": "7", "DATABASE_MAX_OVERFLOW": "0", "DATABASE_ANALYTICS_POOL_SIZE": "1"}
POOLED = {"DATABASE_POOL_SIZE": "20", "DATABASE_MAX_OVERFLOW": "10"}
ARRIVALS_EACH = 20
TRIP_REQUESTS = 20
WAYS = {
    "per_request": "connection for each request",
    "threads": "sync engine in threads (psycopg)",
    "textbook": "textbook async engine: pre-ping, BEGIN … COMMIT",
    "asyncpg_pool": "asyncpg's own pool",
    "ours_at_work": "ours",
    "pooled": "ours through PgBouncer",
}


async def run(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> Section:
    """Measure each way alone, then many instances of it."""
    section = Section("Ways to connect")
    ways = [way for way in WAYS if way != "pooled" or pgbouncer.version() is not None]
    async with AsyncExitStack() as stack:
        through = await stack.enter_async_context(pgbouncer.pooling(stage.cluster)) if "pooled" in ways else {}
        await _alone(stage, plan, tell, section, ways, through)
        for instances in (2, 10):
            await _together(stage, plan, tell, section, ways, through, instances)
    if (found := pgbouncer.version()) is None:
        section.say("PgBouncer is not on PATH: its rows are missing.")
    elif found < pgbouncer.FOLLOWS_STATEMENTS:
        section.say(
            f"PgBouncer {found[0]}.{found[1]} does not follow prepared statements, so ours keeps none behind it "
            "(`DATABASE_STATEMENT_CACHE_SIZE=0`): one more round trip for each statement than behind 1.21 or later."
        )
    section.say(
        "The instances' table is where errors are what is compared: a way that runs out of connections shows it there. "
        "Ours alone must answer everything. Textbook pools have 20 + 10 connections an instance, as tutorials have it; "
        "ours has 7 + 0, what the server's 100 leave to each of ten, and through PgBouncer 20 + 10 again. The "
        "instances of two ways do not fit beside each other, so the rounds of one way follow each other here."
    )
    return section


async def _alone(  # noqa: PLR0913, PLR0917  # Private, and each is needed.
    stage: Stage, plan: Plan, tell: Callable[[str], None], section: Section, ways: list[str], through: Mapping[str, str]
) -> None:
    found: dict[str, Row] = {}
    trips, latencies = {}, {}
    async with AsyncExitStack() as stack:
        servers = []
        for way in ways:
            module = "ours_at_work" if way == "pooled" else way
            server = await stack.enter_async_context(stage.serving(module, through if way == "pooled" else {}))
            server.name = way
            servers.append(server)
        found = dict(await alternate(stage, servers, "/patients/7", clients=CLIENTS, plan=plan, tell=tell))
        # One rate for all, which the slowest can still serve: the latencies answer the same question.
        rate = 0.5 * min(row.rate.median for row in found.values())
        for server in servers:
            tell(f"latency · {server.name}")
            latencies[server.name] = await open_loop(server.url + "/patients/7", rate=rate, seconds=2 * plan.seconds)
    for way in ways:
        trips[way] = "" if way == "pooled" else f"{await _trips(stage, way):.1f}"
    section.say(f"One process, {CLIENTS} clients; latencies at {rate:.0f} arrivals a second, the same for all.")
    section.table(
        ["way", "requests/s", "CPU µs", "p50 ms", "p99 ms", "round trips", "most connections", "new sessions / 1,000"],
        [
            [
                WAYS[way],
                row.rate.text(),
                row.cpu.text(),
                f"{latencies[way].quantile(0.5):.1f}",
                f"{latencies[way].quantile(0.99):.1f}",
                trips[way],
                str(row.most_connections),
                f"{row.opened.median:.0f}",
            ]
            for way, row in found.items()
        ],
    )
    section.say("Most connections are those of all servers of this table together: they stand side by side.")


async def _trips(stage: Stage, way: str) -> float:
    port = stage.cluster.replica.port
    async with wire.counting(port) as (trips, between):
        url = stage.environment["DATABASE_REPLICA_URL"].replace(f":{port}/", f":{between}/")
        # The sentinel of ours looks at the replica over the same wire.
        variables = {"DATABASE_REPLICA_URL": url, "MONITOR_INTERVAL_SECONDS": "60"}
        async with stage.serving(way, variables) as server, httpx.AsyncClient(trust_env=False) as client:
            for _ in range(TRIP_REQUESTS):
                await client.get(server.url + "/patients/7")
            before = trips.count
            for _ in range(TRIP_REQUESTS):
                await client.get(server.url + "/patients/7")
            return (trips.count - before) / TRIP_REQUESTS


async def _together(  # noqa: PLR0913, PLR0917  # Private, and each is needed.
    stage: Stage,
    plan: Plan,
    tell: Callable[[str], None],
    section: Section,
    ways: list[str],
    through: Mapping[str, str],
    instances: int,
) -> None:
    rows = []
    for way in ways:
        variables = {"pooled": {**through, **POOLED}, "ours_at_work": BUDGETED}.get(way, POOL)
        module = "ours_at_work" if way == "pooled" else way
        async with AsyncExitStack() as stack:
            tell(f"{instances} instances · {way} · starting")
            servers = await asyncio.gather(
                *(stack.enter_async_context(stage.serving(module, variables)) for _ in range(instances))
            )
            tell(f"{instances} instances · {way}")
            await _busy(servers, plan.warm_up_seconds)
            rounds: list[tuple[int, int]] = []
            opens: list[Open] = []
            async with stage.watching_connections() as peak:
                rounds.extend([await _busy(servers, 1) for _ in range(plan.rounds)])
            for _ in range(plan.rounds):
                opens += await asyncio.gather(
                    *(open_loop(server.url + "/wait", rate=ARRIVALS_EACH, seconds=1) for server in servers)
                )
        good = sorted(x for one in opens for x in one.latencies.get(200, []))
        bad = sum(one.sent - one.count(200) for one in opens)
        errors = sum(failed for _, failed in rounds)
        answers = Series([float(answered) for answered, _ in rounds])
        if errors + bad and way in {"ours_at_work", "pooled"}:
            section.missed.append(f"{instances} instances, {WAYS[way]}: {errors + bad} errors, none wanted")
        p50, p99 = (f"{good[int(share * len(good))]:.0f}" if good else "" for share in (0.5, 0.99))
        rows.append([WAYS[way], str(peak[0]), answers.text(), f"{errors}", f"{bad} of {len(good) + bad}", p50, p99])
    section.say(
        f"**{instances} instances**, {CLIENTS_EACH} clients each kept busy with a query that waits 20 ms; then "
        f"{ARRIVALS_EACH * instances} arrivals a second in all for the latencies."
    )
    section.table(
        [
            "way",
            "most connections (two servers, 100 each)",
            "answers",
            "errors",
            "errors, open loop",
            "p50 ms",
            "p99 ms",
        ],
        rows,
    )


async def _busy(servers: list[Served], seconds: int) -> tuple[int, int]:
    got = await asyncio.gather(
        *(closed_loop(server.url + "/wait", clients=CLIENTS_EACH, seconds=seconds) for server in servers)
    )
    errors = sum(one.errors for one in got)
    return sum(one.requests for one in got) - errors, errors
