"""Ways to connect: what each costs alone; `crowds.py` has what many instances of each do to a server."""

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

from bench import pgbouncer, plots, wire
from bench.load import open_loop
from bench.measure import Plan, Series, alternate
from bench.report import Section
from bench.sections import crowds
from bench.stage import Stage
from bench.variants import MODULES, WAYS

CLIENTS = 6
Tell = Callable[[str], None]


async def run(stage: Stage, plan: Plan, tell: Tell) -> Section:
    """Measure each way alone, then many instances of it."""
    section = Section("Ways to connect")
    found = pgbouncer.version()
    ways = [way for way in WAYS if way != "pooled" or found is not None]
    async with AsyncExitStack() as stack:
        pooled = "pooled" in ways
        through = (await stack.enter_async_context(pgbouncer.pooling(stage.cluster))).variables if pooled else {}
        await _alone(stage, plan, tell, section, ways, through)
    await crowds.measure(stage, plan, tell, section, ways)
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
        variables = through if way == "pooled" else {}
        (trips[way],) = await wire.round_trips(
            stage, MODULES.get(way, way), [("GET", "/patients/7")], variables, name=way
        )
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
