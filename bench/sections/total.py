"""What a request costs the machine: CPU of the service, of the pooler and of PostgreSQL, side by side."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from bench import pgbouncer
from bench.load import closed_loop
from bench.measure import Plan, Series
from bench.report import Section
from bench.served import Served, cpu_seconds
from bench.stage import Stage

CLIENTS = 6
WAYS = {
    "floor": "floor",
    "bare_fastapi": "bare FastAPI",
    "textbook": "textbook",
    "ours": "ours",
    "pooled": "ours through PgBouncer",
}
REQUESTS = (("GET", "/patients/7", 200), ("POST", "/patients", 201))
# The kernel tells CPU in hundredths of a second for each of PostgreSQL's processes.
SECONDS = 2

Tell = Callable[[str], None]


@dataclass
class Cost:
    """Microseconds of CPU for each request of one way, by who takes them."""

    service: Series = field(default_factory=Series)
    pooler: Series = field(default_factory=Series)
    postgres: Series = field(default_factory=Series)
    total: Series = field(default_factory=Series)

    def add(self, spent: Sequence[float], requests: int) -> None:
        """Add a round: seconds of CPU of service, pooler and PostgreSQL."""
        for series, seconds in zip((self.service, self.pooler, self.postgres), spent, strict=True):
            series.values.append(seconds / requests * 1e6)
        self.total.values.append(sum(spent) / requests * 1e6)


async def run(stage: Stage, plan: Plan, tell: Tell) -> Section:
    """Load each way in turn, and keep every round but the first."""
    section = Section("What a request costs the machine")
    found, seconds = pgbouncer.version(), plan.seconds if plan.quick else SECONDS
    section.say(
        f"CPU of the service, of PgBouncer and of all processes of primary and replica, for each request; {CLIENTS} "
        "clients kept busy. The other parts compare the service's own CPU; a way that spares the service may burden "
        "the pooler or the server."
    )
    async with AsyncExitStack() as stack:
        pooler, servers = None, []
        if found is not None:
            pooler = await stack.enter_async_context(pgbouncer.pooling(stage.cluster))
        for way in WAYS:
            if way != "pooled":
                servers.append(await stack.enter_async_context(stage.serving(way)))
            elif pooler is not None:
                servers.append(await stack.enter_async_context(stage.serving("ours", pooler.variables, name=way)))
        for method, path, status in REQUESTS[:1] if plan.quick else REQUESTS:
            costs = {server.name: Cost() for server in servers}
            for number in range(plan.rounds + 1):
                for server in servers:
                    tell(f"{method} {path} · {server.name} · round {number} of {plan.rounds}")
                    before = _spent(stage, server, pooler)
                    got = await closed_loop(
                        server.url + path, clients=CLIENTS, seconds=seconds, method=method, expected=status
                    )
                    spent = [now - then for now, then in zip(_spent(stage, server, pooler), before, strict=True)]
                    if number:
                        costs[server.name].add(spent, got.requests)
            _show(section, f"{method} {path}", costs)
    if found is None:
        section.say("PgBouncer is not on PATH: its row is missing.")
    else:
        follows = "follows" if found >= pgbouncer.FOLLOWS_STATEMENTS else "does not follow"
        section.say(f"PgBouncer {found[0]}.{found[1]} in transaction mode {follows} prepared statements.")
    section.say(
        "The floor and bare FastAPI create a patient with as many round trips as ours, the token's among them; the "
        "textbook asks for no token, and reads the row again after its COMMIT. The monitors of ours probe primary and "
        "replica all the time, so every row has a little of that. PostgreSQL runs without fsync: the cost of a disk is "
        "missing."
    )
    return section


def _spent(stage: Stage, server: Served, pooler: pgbouncer.Pooler | None) -> tuple[float, float, float]:
    postgres = sum(cpu_seconds(one.pid) for one in (stage.cluster.primary, stage.cluster.replica))
    through = 0.0 if pooler is None or server.name != "pooled" else cpu_seconds(pooler.pid)
    return server.cpu_seconds(), through, postgres


def _show(section: Section, request: str, costs: Mapping[str, Cost]) -> None:
    floor = costs["floor"]
    section.table(
        [f"`{request}`", "service, µs", "pooler, µs", "PostgreSQL, µs", "all, µs", "service, floors", "all, floors"],
        [
            [
                WAYS[way],
                cost.service.text(),
                cost.pooler.text() if way == "pooled" else "",
                cost.postgres.text(),
                cost.total.text(),
                f"{cost.service.median / floor.service.median:.2f}",
                f"{cost.total.median / floor.total.median:.2f}",
            ]
            for way, cost in costs.items()
        ],
    )
