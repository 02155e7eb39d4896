"""More requests than the database can serve: a queue of 30 seconds against ours, which refuses what it cannot do."""

from collections.abc import Callable, Mapping

from bench import plots
from bench.load import SETTLING_SECONDS, BenchError, closed_loop, open_loop, quantile
from bench.measure import Plan, Series
from bench.report import Section
from bench.stage import Stage

POOL = 4
LOADS = (0.5, 0.9, 1.0, 2.0, 3.0, 5.0)
CALM, OVERLOADS = 0.9, (2.0, 3.0, 5.0)
# The first 0.35 s of an overload are taken for a burst; a short window would be mostly that.
WINDOW_SECONDS = 3
# Whoever asked has given up after this long; an answer that comes later did work for nobody.
USEFUL_MILLISECONDS = 1000
OURS: Mapping[str, str] = {"DATABASE_REPLICA_POOL_SIZE": str(POOL), "DATABASE_REPLICA_MAX_OVERFLOW": "0"}
VARIABLES: Mapping[str, Mapping[str, str]] = {
    "textbook": {"BENCH_POOL_SIZE": str(POOL), "BENCH_MAX_OVERFLOW": "0"},
    "plain queue": {**OURS, "DATABASE_REPLICA_POOL_QUEUE_TARGET_SECONDS": "0"},
    "ours": OURS,
}
# Five times what the work takes.
ACCEPTED_MILLISECONDS = 100
KEPT = 0.95
SHED_MILLISECONDS = 5
# Those whose overload is compared with ours; both are our service.
SERVICES = ("plain queue", "ours")


async def run(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> Section:
    """Offer each load to both in turn."""
    section = Section("Overload")
    useful = {name: {load: Series() for load in LOADS} for name in VARIABLES}
    late = {name: {load: Series() for load in LOADS} for name in VARIABLES}
    refused: dict[float, list[float]] = {load: [] for load in LOADS}
    settled: dict[float, list[float]] = {load: [] for load in LOADS}
    other = dict.fromkeys(VARIABLES, 0)
    async with (
        stage.serving("textbook", VARIABLES["textbook"]) as textbook,
        stage.serving("ours_at_work", VARIABLES["plain queue"]) as plain,
        stage.serving("ours_at_work", VARIABLES["ours"]) as ours,
    ):
        servers = {"textbook": textbook, "plain queue": plain, "ours": ours}
        # Twice as many clients as connections: a connection that is given back is taken at once.
        await closed_loop(textbook.url + "/wait", clients=2 * POOL, seconds=1)
        capacity = (await closed_loop(ours.url + "/wait", clients=2 * POOL, seconds=3)).rate
        for number in range(1, plan.rounds + 1):
            for load in LOADS:
                for name, server in servers.items():
                    tell(f"{load:g} x capacity · {name} · round {number} of {plan.rounds}")
                    got = await open_loop(
                        server.url + "/wait", rate=load * capacity, seconds=WINDOW_SECONDS, errors_compared=True
                    )
                    in_time = [x for x in got.latencies.get(200, []) if x <= USEFUL_MILLISECONDS]
                    useful[name][load].values.append(len(in_time) / got.seconds)
                    late[name][load].values.append(got.quantile(0.99))
                    other[name] += got.sent - got.count(200) - got.count(503)
                    if any(other[service] for service in SERVICES):
                        raise BenchError(f"At {load:g} x capacity {name} gave {dict(got.statuses)}; 0 is no answer.")
                    if name == "ours":
                        refused[load] += got.latencies.get(503, [])
                        settled[load] += got.settled.get(503, [])
    section.say(
        f"A pool of {POOL}, a query that waits 20 ms: {capacity:.0f} answers a second are possible. Useful is a 200 "
        f"within {USEFUL_MILLISECONDS / 1000:g} s of its arrival; the rate is taken up to the last answer, which comes "
        f"after the {WINDOW_SECONDS:g} s of arrivals when a queue is left. Neither 200 nor 503: ours none, or "
        f"the run would have ended; the textbook {other['textbook']}. The plain queue is ours with "
        "`DATABASE_POOL_QUEUE_TARGET_SECONDS=0`: first come, first served, whatever comes."
    )
    section.table(
        [
            "offered",
            *(text for name in VARIABLES for text in (f"{name}: useful/s", "p99 ms of 200s")),
            "ours: 503s",
            "p99 ms of 503s",
            "later",
        ],
        [
            [
                f"{load:g} x",
                *(text for name in VARIABLES for text in (useful[name][load].text(), late[name][load].text())),
                str(len(refused[load])),
                _p99(refused[load]),
                _p99(settled[load]),
            ]
            for load in LOADS
        ],
    )
    section.say(
        f"*later*: of those that came {SETTLING_SECONDS:g} s after the first or later. Until the queue is known to be "
        "none that a burst made, those who come wait; from then on a refusal is told at once."
    )
    for load in OVERLOADS:
        kept, waited = useful["ours"][load].median / capacity, late["ours"][load].median
        told = quantile(settled[load], 0.99)
        claims = [
            (f"{kept:.0%} of capacity in useful answers, at least {KEPT:.0%} wanted", kept >= KEPT),
            (
                f"p99 of the accepted {waited:.0f} ms, at most {ACCEPTED_MILLISECONDS} wanted",
                waited <= ACCEPTED_MILLISECONDS,
            ),
            (f"p99 of later refusals {told:.1f} ms, less than {SHED_MILLISECONDS} wanted", told < SHED_MILLISECONDS),
        ]
        said = [f"{claim}: {section.verdict(f'at {load:g} x capacity {claim}', held=held)}" for claim, held in claims]
        section.say(f"Ours at {load:g} x capacity: {'; '.join(said)}.")
    shed = len(refused[CALM])
    claim = f"{shed} refused at {CALM:g} x capacity, 0 wanted"
    section.say(f"Ours: {claim}: {section.verdict(claim, held=not shed)}.")
    panels = [
        plots.Panel(
            title,
            unit,
            "offered load, times capacity",
            LOADS,
            {name: list(found[name].values()) for name in VARIABLES},
            log_y=found is late,
            marks={"capacity": 1.0},
        )
        for title, unit, found in (
            ("Useful answers", "200s within 1 s, for each second", useful),
            ("Latency of 200s", "p99, ms", late),
        )
    ]
    section.picture("overload", "Useful answers and p99 by offered load", plots.lines(*panels))
    return section


def _p99(found: list[float]) -> str:
    return f"{quantile(found, 0.99):.0f}" if found else ""
