"""What a request costs when clients, rows and workers grow tenfold: it should cost the same."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from bench import clients, plots
from bench.load import steady_loop
from bench.measure import Plan, Row, Series, alternate
from bench.report import Section
from bench.served import Served
from bench.setup import PATIENTS
from bench.stage import Stage

BUSY = 6
OPEN = (1, 100, 1000, 10_000)
ROWS = (PATIENTS, 10_000, 100_000, 1_000_000)
WORKERS = (1, 2, 4)
BARE_WORKERS = (1, 4)
# Processes that take turns on one core differ more from second to second than one does.
WORKER_ROUNDS, WORKER_SECONDS = 5, 2
MOST_OF_WORKERS = 1.15
# Of what one worker answers when it is busy, in so many requests a second for all; over connections that stay open.
STEADY_SHARE, STEADY_CLIENTS = 1 / 3, 24
# The kernel tells a process's time in hundredths of a second, and four workers have four roundings.
STEADY_SECONDS = 6
PATHS = ("/patients/7", "/patients?limit=50")
# Between rounds of the same thing a tenth is usual.
FLAT = 1.15
WHY_CLIENTS = "epoll names only the sockets that have something to say, but more of them wear out the caches."
WHY_ROWS = "the server answers more slowly, so the event loop wakes more often for the same number of answers."

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Workers:
    """What was found of one kind by its number of workers; times are microseconds of CPU for each request."""

    each: Mapping[int, Row]
    """With clients of its own for each worker."""
    shared: Mapping[int, Row]
    """With the same clients for all."""
    steady: Mapping[int, Series]
    """At `rate` requests a second for all."""
    alone: Series
    """One worker at a quarter of `rate`: as much as each of four has."""
    megabytes: Mapping[int, float]
    rate: int


async def run(stage: Stage, plan: Plan, tell: Tell) -> Section:
    """Grow one thing at a time."""
    section = Section("Growth")
    by_workers = await _workers(stage, plan, tell, section)
    async with stage.serving("ours") as server:
        by_clients = await _clients(stage, server, plan, tell, section)
        # Last: the rows stay.
        by_rows = await _rows(stage, server, plan, tell, section)
    panels = [
        plots.Panel(f"By {what}", "µs CPU for one GET /patients/7", what, list(found), {"ours": list(found.values())})
        for what, found in (("open clients", by_clients), ("rows", by_rows), ("workers", by_workers))
    ]
    for panel in panels:
        panel.log_x = True
    section.picture("growth", "CPU for each request by open clients, rows and workers", plots.lines(*panels))
    return section


async def _clients(stage: Stage, server: Served, plan: Plan, tell: Tell, section: Section) -> dict[int, Series]:
    cpu = {count: Series() for count in OPEN}
    memory = {count: Series() for count in OPEN}
    for _ in range(plan.rounds):
        for count in OPEN:
            # Without a request they stay open: uvicorn closes those that idle after an answer in five seconds.
            with clients.connected(server.port, count):
                row = await _one(stage, server, PATHS[0], Plan(1, 1), tell)
                cpu[count].values.append(row.cpu.median)
                memory[count].values.append(server.memory_bytes() / 1e6)
    section.say(
        f"**Open clients**: connections that are open and idle beside {BUSY} busy ones. {_flatness(cpu, WHY_CLIENTS)}"
    )
    section.table(
        ["open", "µs CPU for each request", "resident MB"],
        [[f"{count:,}", cpu[count].text(), memory[count].text(1)] for count in OPEN],
    )
    return cpu


async def _rows(stage: Stage, server: Served, plan: Plan, tell: Tell, section: Section) -> dict[int, Series]:
    found: dict[int, list[Row]] = {}
    for rows in ROWS:
        tell(f"{rows:,} rows · inserting")
        await stage.grow(rows)
        found[rows] = [await _one(stage, server, path, plan, tell) for path in PATHS]
    one_patient = {rows: found[rows][0].cpu for rows in ROWS}
    of_each = " ".join(
        f"`GET {path}`: {_flatness({rows: found[rows][number].cpu for rows in ROWS}, WHY_ROWS)}"
        for number, path in enumerate(PATHS)
    )
    section.say(f"**Rows** in the table; rows only grow, so these rounds do not alternate. {of_each}")
    section.table(
        ["rows", *(f"`GET {path}`, {unit}" for path in PATHS for unit in ("µs CPU", "requests/s"))],
        [[f"{rows:,}", *(text for row in found[rows] for text in (row.cpu.text(), row.rate.text()))] for rows in ROWS],
    )
    return one_patient


async def _workers(stage: Stage, plan: Plan, tell: Tell, section: Section) -> dict[int, Series]:
    longer = plan if plan.quick else Plan(WORKER_ROUNDS, WORKER_SECONDS)
    # One kind after the other: the pools of all these processes together are more than a server's connections.
    ours = await _with_workers(stage, longer, tell, {n: ("ours", f"workers={n}") for n in WORKERS})
    bare = await _with_workers(
        stage, longer, tell, {n: ("bare_fastapi", f"bare, workers={n}") for n in BARE_WORKERS}, rate=ours.rate
    )

    def ratio(found: Mapping[int, Row]) -> float:
        return found[4].cpu.median / found[1].cpu.median

    at_a_third, of_bare = (found.steady[4].median / found.steady[1].median for found in (ours, bare))
    most = max(at_a_third, ratio(ours.each), ratio(ours.shared))
    claim = f"a request of four workers takes {most:.2f} times the CPU of one worker's"
    held = section.verdict(f"{claim}, ≤ {MOST_OF_WORKERS} wanted", held=most <= MOST_OF_WORKERS)
    section.say(
        "**Workers**, all on the one core: what matters here is the price of one request, not the rate. With "
        f"{BUSY} clients for all workers, four take {ratio(ours.shared):.2f} times the CPU of one, with {BUSY} for "
        f"each {ratio(ours.each):.2f} times, and at {ours.rate:,} requests a second over {STEADY_CLIENTS} connections, "
        f"a third of what one worker answers when it is busy, {at_a_third:.2f} times; at most {MOST_OF_WORKERS} is "
        f"wanted of each: {held}. Bare FastAPI's four take {ratio(bare.shared):.2f}, {ratio(bare.each):.2f} and "
        f"{of_bare:.2f} times. Where workers have less to do, each request wakes a process that slept, and what each "
        f"worker does by itself counts. One worker with {ours.rate / 4:,.0f} requests a second, as many as each of the "
        f"four had, takes {ours.alone.text()} µs for each; the four take "
        f"{ours.steady[4].median / ours.alone.median:.2f} times that (bare FastAPI's four "
        f"{bare.steady[4].median / bare.alone.median:.2f} times what one takes so)."
    )
    section.table(
        [
            "workers",
            f"µs CPU at {ours.rate:,}/s",
            *(f"{text}, {BUSY} clients {whose}" for whose in ("each", "in all") for text in ("µs CPU", "requests/s")),
            "resident MB, all processes",
        ],
        [
            [
                str(count),
                ours.steady[count].text(),
                *(
                    text
                    for rows in (ours.each, ours.shared)
                    for text in (rows[count].cpu.text(), rows[count].rate.text())
                ),
                f"{ours.megabytes[count]:.0f}",
            ]
            for count in WORKERS
        ],
    )
    return dict(ours.steady)


async def _with_workers(
    stage: Stage, plan: Plan, tell: Tell, variants: Mapping[int, tuple[str, str]], *, rate: int | None = None
) -> Workers:
    """Measure one kind by workers; without a `rate` it is a third of what one answers when it is busy."""
    async with AsyncExitStack() as stack:
        served = {
            count: await stack.enter_async_context(stage.serving(variant, name=name, workers=count))
            for count, (variant, name) in variants.items()
        }
        servers = list(served.values())
        # Each worker with as much to do as the one has, and then all together with as much.
        clients_of = {server.name: BUSY * count for count, server in served.items()}
        busy = await alternate(stage, servers, PATHS[0], clients=clients_of, plan=plan, tell=tell)
        shared = await alternate(stage, servers, PATHS[0], clients=BUSY, plan=plan, tell=tell)
        rate = rate or round(busy[servers[0].name].rate.median * STEADY_SHARE)
        longer = plan if plan.quick else Plan(plan.rounds, STEADY_SECONDS)
        steady = await _steady(servers, rate, longer, tell)
        alone = await _steady([served[1]], rate / 4, longer, tell)
        megabytes = {count: server.memory_bytes() / 1e6 for count, server in served.items()}
    each, together = ({count: rows[server.name] for count, server in served.items()} for rows in (busy, shared))
    by_count = {count: steady[server.name] for count, server in served.items()}
    return Workers(each, together, by_count, alone[served[1].name], megabytes, rate)


async def _steady(servers: Sequence[Served], rate: float, plan: Plan, tell: Tell) -> dict[str, Series]:
    """Measure CPU microseconds for each request at a rate that is the same for all."""
    found = {server.name: Series() for server in servers}
    for number in range(plan.rounds + 1):
        for server in servers:
            tell(f"{PATHS[0]} at {rate:,.0f}/s · {server.name} · round {number} of {plan.rounds}")
            cpu = server.cpu_seconds()
            sent = await steady_loop(server.url + PATHS[0], rate=rate, seconds=plan.seconds, clients=STEADY_CLIENTS)
            if number:
                found[server.name].values.append((server.cpu_seconds() - cpu) / sent * 1e6)
    return found


def _flatness(cpu: dict[int, Series], why_not: str) -> str:
    """Say how much dearer than at the beginning a request becomes, and why, where it is more than the noise."""
    first, *later = (series.median for series in cpu.values())
    most, at_last = max(later) / first, later[-1] / first
    if most <= FLAT:
        return f"Flat: at most {most:.2f} times the first."
    if at_last <= FLAT:
        return (
            f"Flat from the first to the last, {at_last:.2f} times; one between them stood out by {most:.2f} times, "
            "which is not what grew, since the last would have it too."
        )
    return f"Not flat, {most:.2f} times: {why_not}"


async def _one(stage: Stage, server: Served, path: str, plan: Plan, tell: Tell) -> Row:
    return (await alternate(stage, [server], path, clients=BUSY, plan=plan, tell=tell))[server.name]
