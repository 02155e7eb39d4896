"""Ways to connect: what each costs alone, and what each does to a server of 100 connections with 2 and 10 instances."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import httpx

from bench import pgbouncer, plots, wire
from bench.load import Closed, Open, closed_loop, open_loop
from bench.measure import Plan, Series, alternate
from bench.report import Section
from bench.stage import Stage

CLIENTS = 6
TRIP_REQUESTS = 20
INSTANCES = (2, 10)
# An instance's pool as guides have it, and a client for each of its connections.
POOL_SIZE, MAX_OVERFLOW = 20, 10
CLIENTS_EACH = POOL_SIZE
# postgres/postgresql.conf: max_connections less superuser_reserved_connections.
GRANTED = 97
# An instance of ours also watches the server twice, and its analytics pool has one connection.
BESIDE = 3
# Ten instances ask for 400 queries of 20 ms each second: by Little's law and a fifth 10 connections, of 20 that
# PgBouncer has.
ARRIVALS_EACH = 40
# Ten instances share a core here, so they wait for it longer than a service with cores of its own waits for a
# connection. The textbook waits for 30 s.
PATIENCE = {"DATABASE_POOL_TIMEOUT": "5", "DATABASE_CONNECT_TIMEOUT_SECONDS": "5"}
WAYS = {
    "per_request": "connection for each request",
    "threads": "sync engine in threads (psycopg)",
    "textbook": "textbook: async engine, pre-ping, BEGIN … COMMIT",
    "asyncpg_pool": "asyncpg's own pool",
    "ours_at_work": "ours",
    "pooled": "ours through PgBouncer",
}
MODULES = {"pooled": "ours_at_work"}

Tell = Callable[[str], None]


@dataclass
class Crowd:
    """Many instances of one way: what they did and what the server saw of them."""

    # The p99 of the first second after the start, which is not among the rounds.
    first: float = float("nan")
    rate: Series = field(default_factory=Series)
    cpu: Series = field(default_factory=Series)
    middle: Series = field(default_factory=Series)
    late: Series = field(default_factory=Series)
    requests: int = 0
    errors: int = 0
    connections: int = 0

    def add(self, opens: Sequence[Open], closed: Sequence[Closed], cpu_seconds: float) -> None:
        """Add a round: the instances' open loops, and their closed loops with the CPU that these took."""
        requests, errors = sum(one.requests for one in closed), sum(one.errors for one in closed)
        self.rate.values.append((requests - errors) / max(one.seconds for one in closed))
        self.cpu.values.append(cpu_seconds / requests * 1e6)
        self.middle.values.append(_quantile(opens, 0.5))
        self.late.values.append(_quantile(opens, 0.99))
        self.requests += requests + sum(one.sent for one in opens)
        self.errors += errors + sum(one.sent - one.count(200) for one in opens)


async def run(stage: Stage, plan: Plan, tell: Tell) -> Section:
    """Measure each way alone, then many instances of it."""
    section = Section("Ways to connect")
    found = pgbouncer.version()
    ways = [way for way in WAYS if way != "pooled" or found is not None]
    async with AsyncExitStack() as stack:
        through = await stack.enter_async_context(pgbouncer.pooling(stage.cluster)) if "pooled" in ways else {}
        await _alone(stage, plan, tell, section, ways, through)
    crowds = {n: {way: await _together(stage, plan, tell, way, n) for way in ways} for n in INSTANCES}
    _show_crowds(section, crowds)
    if found is None:
        section.say("PgBouncer is not on PATH: its rows, and the comparison with the guides, are missing.")
    else:
        _against_guides(section, crowds)
    if found is not None and found < pgbouncer.FOLLOWS_STATEMENTS:
        section.say(
            f"PgBouncer {found[0]}.{found[1]} does not follow prepared statements, so ours keeps none behind it "
            "(`DATABASE_STATEMENT_CACHE_SIZE=0`): one more round trip for each statement than behind 1.21 or later."
        )
    return section


async def _alone(  # noqa: PLR0913, PLR0917  # Private, and each is needed.
    stage: Stage, plan: Plan, tell: Tell, section: Section, ways: list[str], through: Mapping[str, str]
) -> None:
    trips = {}
    middle, late = ({way: Series() for way in ways} for _ in range(2))
    async with AsyncExitStack() as stack:
        servers = []
        for way in ways:
            tell(f"{way} · starting")
            variables = through if way == "pooled" else {}
            servers.append(await stack.enter_async_context(stage.serving(MODULES.get(way, way), variables, name=way)))
        found = await alternate(stage, servers, "/patients/7", clients=CLIENTS, plan=plan, tell=tell)
        # One rate for all, which the slowest can still serve: the latencies answer the same question.
        rate = 0.5 * min(row.rate.median for row in found.values())
        for number in range(1, plan.rounds + 1):
            for server in servers:
                tell(f"latency · {server.name} · round {number} of {plan.rounds}")
                got = await open_loop(server.url + "/patients/7", rate=rate, seconds=plan.seconds)
                middle[server.name].values.append(got.quantile(0.5))
                late[server.name].values.append(got.quantile(0.99))
    for way in ways:
        tell(f"round trips · {way}")
        trips[way] = await _trips(stage, way, through if way == "pooled" else {})
    section.say(
        f"One process, {CLIENTS} clients, `GET /patients/7`; latencies at {rate:.0f} arrivals a second, the same for "
        "all. Round trips are counted on the wire between the service and what it is connected to."
    )
    section.table(
        ["way", "requests/s", "CPU µs", "p50 ms", "p99 ms", "round trips", "most connections", "new sessions / 1,000"],
        [
            [
                WAYS[way],
                row.rate.text(),
                row.cpu.text(),
                middle[way].text(1),
                late[way].text(1),
                f"{trips[way]:g}",
                str(row.most_connections),
                f"{row.opened.median:.0f}",
            ]
            for way, row in found.items()
        ],
    )
    figure = plots.bars(
        "GET /patients/7: cost by way to connect",
        "µs of CPU, median and spread of the rounds",
        {WAYS[way]: row.cpu for way, row in found.items()},
    )
    section.picture("ways", "CPU for each request by way to connect", figure)


async def _trips(stage: Stage, way: str, through: Mapping[str, str]) -> float:
    variables = {"DATABASE_REPLICA_URL": stage.environment["DATABASE_REPLICA_URL"], **through}
    port = httpx.URL(variables["DATABASE_REPLICA_URL"]).port
    async with wire.counting(int(port or 0)) as (trips, between):
        variables["DATABASE_REPLICA_URL"] = variables["DATABASE_REPLICA_URL"].replace(f":{port}/", f":{between}/")
        async with (
            stage.serving(MODULES.get(way, way), variables, name=way) as server,
            httpx.AsyncClient(trust_env=False) as client,
        ):
            counts = [trips.count]
            for _ in range(TRIP_REQUESTS):
                await client.get(server.url + "/patients/7")
                counts.append(trips.count)
    # The first ones prepare statements, and the sentinel of ours looks at the replica over the same wire at times.
    return median(after - before for before, after in pairwise(counts))


def _settings(way: str, through: Mapping[str, str], instances: int) -> Mapping[str, str]:
    """Give an instance what guides give it; ours at most what the server's limit leaves each, and warm."""
    if MODULES.get(way, way) != "ours_at_work":
        return {"BENCH_POOL_SIZE": str(POOL_SIZE), "BENCH_MAX_OVERFLOW": str(MAX_OVERFLOW)}
    size = str(POOL_SIZE if through else min(POOL_SIZE, GRANTED // instances - BESIDE))
    sizes = {
        "DATABASE_MAX_OVERFLOW": "0",
        "DATABASE_REPLICA_POOL_SIZE": size,
        "DATABASE_REPLICA_POOL_MIN_SIZE": size,
        "DATABASE_POOL_SIZE": "5",
        "DATABASE_ANALYTICS_POOL_SIZE": "1",
        "DATABASE_ANALYTICS_MAX_OVERFLOW": "0",
    }
    # Without a pooler the service itself refuses to start with more than the server grants.
    budget = {} if through else {"INSTANCES": str(instances), "CONNECTION_LIMIT": "100"}
    return {**through, **sizes, **budget, **PATIENCE}


async def _together(stage: Stage, plan: Plan, tell: Tell, way: str, instances: int) -> Crowd:
    crowd = Crowd()
    async with AsyncExitStack() as stack:
        # PgBouncer keeps its connections to the server, and nobody else is to find them there.
        through = await stack.enter_async_context(pgbouncer.pooling(stage.cluster)) if way == "pooled" else {}
        variables = _settings(way, through, instances)
        tell(f"{instances} instances · {way} · starting")
        servers = await stage.serving_many(stack, instances, MODULES.get(way, way), variables, name=way)
        peak = await stack.enter_async_context(stage.watching_connections(way))
        for number in range(plan.rounds + 1):
            tell(f"{instances} instances · {way} · " + (f"round {number} of {plan.rounds}" if number else "warm-up"))
            opens = await asyncio.gather(
                *(
                    open_loop(s.url + "/wait", rate=ARRIVALS_EACH, seconds=plan.seconds, errors_compared=True)
                    for s in servers
                )
            )
            before = sum(server.cpu_seconds() for server in servers)
            closed = await asyncio.gather(
                *(
                    closed_loop(s.url + "/wait", clients=CLIENTS_EACH, seconds=plan.seconds, errors_compared=True)
                    for s in servers
                )
            )
            spent = sum(server.cpu_seconds() for server in servers) - before
            await stage.quiet(way)
            if number:
                crowd.add(opens, closed, spent)
            else:
                crowd.first = _quantile(opens, 0.99)
        crowd.connections = peak[0]
    return crowd


def _quantile(opens: Sequence[Open], share: float) -> float:
    good = sorted(x for one in opens for x in one.latencies.get(200, []))
    return good[int(share * len(good))] if good else float("nan")


def _show_crowds(section: Section, crowds: Mapping[int, Mapping[str, Crowd]]) -> None:
    for instances, found in crowds.items():
        section.say(
            f"**{instances} instances** and a query that waits 20 ms: {ARRIVALS_EACH * instances} arrivals a second in "
            f"all, for the latencies; then {CLIENTS_EACH} clients for each instance, kept busy. Errors are of both, "
            "connections are the most to one server."
        )
        section.table(
            ["way", "most connections", "answers/s", "errors", "CPU µs", "p50 ms", "p99 ms", "p99 ms, first second"],
            [
                [
                    WAYS[way],
                    str(crowd.connections),
                    crowd.rate.text(),
                    f"{crowd.errors} of {crowd.requests:,}",
                    crowd.cpu.text(),
                    crowd.middle.text(),
                    crowd.late.text(),
                    f"{crowd.first:.0f}",
                ]
                for way, crowd in found.items()
            ],
        )
        for way in ("ours_at_work", "pooled"):
            if way in found and (errors := found[way].errors):
                section.missed.append(f"{instances} instances, {WAYS[way]}: {errors} errors, none wanted")
    direct = GRANTED // INSTANCES[-1] - BESIDE
    section.say(
        "Here errors are what is compared, so they do not end the run; ours alone must have none. The textbook's pools "
        f"have {POOL_SIZE} + {MAX_OVERFLOW} connections an instance, as guides have it. Ours has {POOL_SIZE}, or "
        f"without PgBouncer what the server's {GRANTED} leave each instance: {direct} for each of {INSTANCES[-1]}, "
        "`CONNECTION_LIMIT` and `INSTANCES` being set, so that it would refuse to start with more. All instances share "
        "one core, where each would have its own in production: those of ours open their pools whole at the start "
        "(`DATABASE_REPLICA_POOL_MIN_SIZE`) and wait for a connection for 5 s in place of 0.5, the textbook's for 30. "
        "The instances of two ways do not fit beside each other on the server, so the rounds of one way follow each "
        "other. PgBouncer has the figures of `pgbouncer/pgbouncer.ini`."
    )


def _against_guides(section: Section, crowds: Mapping[int, Mapping[str, Crowd]]) -> None:
    most = INSTANCES[-1]
    without, with_ours = ({n: crowds[n][way] for n in INSTANCES} for way in ("textbook", "pooled"))

    def supported(found: Mapping[int, Crowd]) -> str:
        return str(max((n for n in INSTANCES if not found[n].errors), default="none of them"))

    section.say(
        f"**What guides promise of a pooler**, and what was found: both columns are {most} instances at the same load."
    )
    section.table(
        ["", "the guides' claim", "without: textbook", "with: ours through PgBouncer"],
        [
            ["server connections", "100 → 30", *(str(c[most].connections) for c in (without, with_ours))],
            [
                "connection errors",
                "50–100 a day → 0",  # noqa: RUF001  # A dash, as people write a range.
                *(f"{c[most].errors:,} of {c[most].requests:,}" for c in (without, with_ours)),
            ],
            ["p99, ms", "800 → 45", *(c[most].late.text() for c in (without, with_ours))],
            [
                "p99 of the first second after the start, ms",
                "",
                *(f"{c[most].first:.0f}" for c in (without, with_ours)),
            ],
            ["answers/s when all clients are busy", "", *(c[most].rate.text() for c in (without, with_ours))],
            [
                f"instances supported (of {' and '.join(map(str, INSTANCES))} tried, without an error)",
                "2 → 10+",
                *(supported(c) for c in (without, with_ours)),
            ],
        ],
    )
