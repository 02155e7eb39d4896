"""What a request costs when clients, rows and workers grow tenfold: it should cost the same."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench import plots
from bench.measure import Plan, Row, Series, alternate
from bench.report import Section
from bench.stage import PATIENTS, Served, Stage

BUSY = 6
OPEN = (1, 100, 1000, 10_000)
ROWS = (PATIENTS, 10_000, 100_000, 1_000_000)
WORKERS = (1, 2, 4)
PATHS = ("/patients/7", "/patients?limit=50")


async def run(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> Section:
    """Grow one thing at a time."""
    section = Section("Growth")
    curves = {}
    async with stage.serving("ours") as server:
        curves["open clients"] = await _clients(stage, server, plan, tell, section)
    await _workers(stage, plan, tell, section)
    async with stage.serving("ours") as server:
        # Last: the rows stay.
        curves["rows"] = await _rows(stage, server, plan, tell, section)
    panels = [(f"By {what}", "µs CPU for one GET /patients/7", {"ours": points}) for what, points in curves.items()]
    section.picture("growth", "CPU by open clients and rows", plots.lines(panels, x_label="how many", log_x=True))
    return section


Points = tuple[list[float], list[float]]


async def _clients(stage: Stage, server: Served, plan: Plan, tell: Callable[[str], None], section: Section) -> Points:
    cpu = {count: Series() for count in OPEN}
    memory = {count: Series() for count in OPEN}
    for _ in range(plan.rounds):
        for count in OPEN:
            with _idle_connections(server.port, count):
                row = await _one(stage, server, PATHS[0], Plan(1, 1), tell)
                cpu[count].values.append(row.cpu.median)
                memory[count].values.append(server.memory_bytes() / 1e6)
    section.say(f"**Open clients**: connections that are open and idle beside {BUSY} busy ones.")
    section.table(
        ["open", "µs CPU for each request", "resident MB"],
        [[f"{count:,}", cpu[count].text(), memory[count].text(1)] for count in OPEN],
    )
    # Memory that was used is not given back, so the first round alone shows what clients cost.
    grown = (memory[OPEN[-1]].values[0] - memory[OPEN[0]].values[0]) / (OPEN[-1] - OPEN[0]) * 1000
    section.say(f"1,000 idle clients take {grown:.1f} MB; the process itself {memory[OPEN[0]].values[0]:.0f} MB.")
    return list(map(float, OPEN)), [cpu[count].median for count in OPEN]


async def _rows(stage: Stage, server: Served, plan: Plan, tell: Callable[[str], None], section: Section) -> Points:
    found: dict[int, list[Row]] = {}
    for rows in ROWS:
        tell(f"{rows:,} rows · inserting")
        await stage.grow(rows)
        found[rows] = [await _one(stage, server, path, plan, tell) for path in PATHS]
    section.say("**Rows** in the table; rows only grow, so these rounds do not alternate.")
    section.table(
        ["rows", *(f"`GET {path}`, µs CPU" for path in PATHS)],
        [[f"{rows:,}", *(row.cpu.text() for row in found[rows])] for rows in ROWS],
    )
    return list(map(float, ROWS)), [found[rows][0].cpu.median for rows in ROWS]


async def _workers(stage: Stage, plan: Plan, tell: Callable[[str], None], section: Section) -> None:
    table = []
    for workers in WORKERS:
        async with stage.serving("ours", workers=workers) as server:
            row = await _one(stage, server, PATHS[0], plan, tell)
            table.append([str(workers), row.cpu.text(), row.rate.text(), f"{server.memory_bytes() / 1e6:.0f}"])
    section.say("**Workers**, all on the one core: what matters here is the price of one request, not the rate.")
    section.table(["workers", "µs CPU for each request", "requests/s", "resident MB, all processes"], table)


async def _one(stage: Stage, server: Served, path: str, plan: Plan, tell: Callable[[str], None]) -> Row:
    return (await alternate(stage, [server], path, clients=BUSY, plan=plan, tell=tell))[server.name]


@contextmanager
def _idle_connections(port: int, count: int) -> Iterator[None]:
    # They send nothing: uvicorn closes a connection that idles after an answer in five seconds, and waits for a first
    # request without end.
    sockets: list[socket.socket] = []
    try:
        sockets.extend(socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(count))
        yield
    finally:
        for one in sockets:
            one.close()
