"""Many instances of each way to connect: what 2 and 10 of them do to a server of 100 connections."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from bench import pgbouncer
from bench.load import Closed, Open, closed_loop, open_loop
from bench.measure import Plan, Series
from bench.report import Section
from bench.stage import Stage
from bench.variants import MODULES, WAYS

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


async def measure(stage: Stage, plan: Plan, tell: Tell, section: Section, ways: Sequence[str]) -> None:
    """Measure the ways with each number of instances, one way after the other."""
    crowds = {n: {way: await _together(stage, plan, tell, way, n) for way in ways} for n in INSTANCES}
    _show(section, crowds)
    if "pooled" in ways:
        _against_guides(section, crowds)
    else:
        section.say("PgBouncer is not on PATH: its rows, and the comparison with the guides, are missing.")


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
        peak = await stack.enter_async_context(stage.looks.connections(way))
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
            await stage.looks.quiet(way)
            if number:
                crowd.add(opens, closed, spent)
            else:
                crowd.first = _quantile(opens, 0.99)
        crowd.connections = peak[0]
    return crowd


def _quantile(opens: Sequence[Open], share: float) -> float:
    good = sorted(x for one in opens for x in one.latencies.get(200, []))
    return good[int(share * len(good))] if good else float("nan")


def _show(section: Section, crowds: Mapping[int, Mapping[str, Crowd]]) -> None:
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
