"""Rounds: variants take turns, a first round is not counted, medians and spreads are kept, errors end the run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from bench.load import closed_loop
from bench.served import Served
from bench.stage import Stage


@dataclass
class Series:
    """The rounds of one figure."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)

    def text(self, digits: int = 0) -> str:
        """Show the median and the spread."""
        return f"{self.median:,.{digits}f} [{min(self.values):,.{digits}f}-{max(self.values):,.{digits}f}]"


@dataclass
class Row:
    """One variant: requests for each second, CPU microseconds for each request, new sessions for each 1,000."""

    name: str
    rate: Series = field(default_factory=Series)
    cpu: Series = field(default_factory=Series)
    opened: Series = field(default_factory=Series)
    most_connections: int = 0


@dataclass(frozen=True)
class Plan:
    """How long and how often."""

    rounds: int
    seconds: int  # wrk takes whole ones.
    warm_up_seconds: int = 1
    quick: bool = False


async def alternate(  # noqa: PLR0913  # Each is a condition of the measurement.
    stage: Stage,
    servers: Sequence[Served],
    path: str,
    *,
    clients: int | Mapping[str, int],
    plan: Plan,
    tell: Callable[[str], None],
    method: str = "GET",
    expected: int = 200,
) -> Mapping[str, Row]:
    """Load the servers in turn, a closed loop each, and keep every round but the first.

    `clients` is the same for all, or for each server by its name.

    Raises: BenchError when an answer is not the expected one.
    """
    rows = {server.name: Row(server.name) for server in servers}
    for number in range(plan.rounds + 1):
        for server in servers:
            tell(f"{path} · {server.name} · " + (f"round {number} of {plan.rounds}" if number else "warm-up"))
            seconds = plan.seconds if number else plan.warm_up_seconds
            busy = clients if isinstance(clients, int) else clients[server.name]
            opened, cpu = await stage.looks.sessions_opened(), server.cpu_seconds()
            async with stage.looks.connections(server.name) as peak:
                got = await closed_loop(
                    server.url + path, clients=busy, seconds=seconds, method=method, expected=expected
                )
            spent = server.cpu_seconds() - cpu
            if number:
                row = rows[server.name]
                row.rate.values.append(got.rate)
                row.cpu.values.append(spent / got.requests * 1e6)
                row.opened.values.append((await stage.looks.sessions_opened() - opened) / got.requests * 1000)
                row.most_connections = max(row.most_connections, peak[0])
    return rows
