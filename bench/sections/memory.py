"""Memory of one process of the service, and of the clients that keep their connection to it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.

from bench import clients
from bench.load import BenchError, closed_loop
from bench.measure import Plan, Series
from bench.report import Section
from bench.served import Served
from bench.stage import Stage

BUSY = 6
IDLE = 1000
WAYS = ("textbook", "ours")
MOMENTS = ("at start", "after load", f"with {IDLE:,} idle clients")
# It takes no query, so all clients have had their answer before uvicorn closes the first of them, after 5 s.
CHEAP = "/health/ready"


@dataclass
class Memory:
    """One way: megabytes at each moment, resident and in proportion; and kilobytes for each idle client."""

    resident: tuple[Series, ...] = field(default_factory=lambda: tuple(Series() for _ in MOMENTS))
    proportional: tuple[Series, ...] = field(default_factory=lambda: tuple(Series() for _ in MOMENTS))
    each: Series = field(default_factory=Series)

    def note(self, moment: int, server: Served) -> None:
        """Add what the server takes now."""
        self.resident[moment].values.append(server.memory_bytes() / 1e6)
        self.proportional[moment].values.append(server.proportional_bytes() / 1e6)


async def run(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> Section:
    """Start each way anew in every round, since memory that was used once is not given back."""
    section = Section("Memory")
    found = {way: Memory() for way in WAYS}
    backends = Series()
    for number in range(1, plan.rounds + 1):
        for way in WAYS:
            tell(f"{way} · round {number} of {plan.rounds}")
            async with stage.serving(way) as server:
                await _measure(server, found[way], plan)
                if way == "ours":
                    backends.values.append(_of_a_backend(stage))
    section.table(
        ["one process", "", "RSS, MB", "PSS, MB", "for each idle client, kB"],
        [
            [
                way,
                moment,
                memory.resident[number].text(1),
                memory.proportional[number].text(1),
                memory.each.text(1) if moment == MOMENTS[-1] else "",
            ]
            for way, memory in found.items()
            for number, moment in enumerate(MOMENTS)
        ],
    )
    section.say(
        "RSS is resident memory; PSS is less, because a page that several processes map counts in parts. Load is "
        f"{plan.seconds} s of `GET /patients/7` by {BUSY} clients. An idle client has had an answer and keeps its "
        "connection; what it takes is the growth of PSS, and it holds no connection to a database. A backend of "
        f"PostgreSQL, by contrast, takes {backends.text(1)} MB of its own beside the shared buffers."
    )
    return section


async def _measure(server: Served, memory: Memory, plan: Plan) -> None:
    memory.note(0, server)
    await closed_loop(f"{server.url}/patients/7", clients=BUSY, seconds=plan.seconds)
    memory.note(1, server)
    with clients.connected(server.port, IDLE) as idle:
        # Few at a time: a thousand requests in flight take memory too, and would be taken for the clients'.
        statuses = clients.ask(idle, CHEAP, together=BUSY)
        memory.note(2, server)
        statuses += clients.ask(idle, CHEAP, together=BUSY)
    if statuses != {200: 2 * IDLE}:
        raise BenchError(f"Not every idle client was still connected to {server.name}: answers {dict(statuses)}.")
    growth = memory.proportional[2].values[-1] - memory.proportional[1].values[-1]
    memory.each.values.append(growth * 1e3 / IDLE)


def _of_a_backend(stage: Stage) -> float:
    """Return megabytes that belong to no other process, on average of the replica's backends that serve ours."""
    backends = [
        process.memory_full_info().uss
        for process in psutil.Process(stage.cluster.replica.pid).children()
        if "app_ro" in " ".join(process.cmdline())
    ]
    return float(sum(backends) / len(backends) / 1e6)
