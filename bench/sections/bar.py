"""The bar: CPU for each request against the floor, and throughput against the textbook."""

from collections.abc import Callable

import httpx

from bench import plots, wire
from bench.load import BenchError
from bench.measure import Plan, Row, alternate
from bench.report import Section
from bench.served import Served
from bench.stage import Stage

# Fewer than any pool has connections, and than ours lets ask the primary again after a miss (7): a queue is another
# section's subject.
CLIENTS = 6
# Method, path, expected status, the most that ours may cost in floors.
ROUTES = (
    ("GET", "/patients/7", 200, 2.0),
    ("GET", "/patients?limit=50", 200, 2.5),
    ("POST", "/patients", 201, 2.0),
    ("POST", "/once", 201, 2.0),
    ("GET", "/patients/999999", 404, 2.5),
    ("GET", "/nothing", 404, 2.5),
)
# The most round trips that a request of ours may take; a write's last one asks for its consistency token.
TRIPS = {("GET", "/patients/7"): 1, ("POST", "/patients"): 4, ("POST", "/once"): 2}
TIMES_TEXTBOOK = 2.5
# The most that a read of ours may cost beside FastAPI and asyncpg doing the same work.
TIMES_BARE = 1.1
NAMES = {"bare_fastapi": "bare FastAPI"}


async def run(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> Section:
    """Measure every route of the floor, bare FastAPI and ours in turn; for one patient the textbook too."""
    section = Section("The bar")
    await _round_trips(stage, tell, section)
    rows = []
    async with (
        stage.serving("floor") as floor,
        stage.serving("ours") as ours,
        stage.serving("textbook") as textbook,
        stage.serving("bare_fastapi") as bare,
        stage.serving("ours_at_work", name="ours, write_once") as at_work,
    ):
        for method, path, status, most in ROUTES[:4] if plan.quick else ROUTES:
            # `write_once` is the one route that the service does not have.
            measured = at_work if path == "/once" else ours
            _same_answer(floor, measured, path, method)
            servers = [floor, bare, measured]
            if path == "/patients/7":
                servers.append(textbook)
            found = await alternate(
                stage, servers, path, clients=CLIENTS, plan=plan, tell=tell, method=method, expected=status
            )
            if path == "/patients/7":
                one_patient = found
            floors = {name: row.cpu.median / found["floor"].cpu.median for name, row in found.items()}
            ratio = floors[measured.name]
            claim = f"{method} {path}: {ratio:.2f} floors, at most {most:g} wanted"
            rows.append(
                [
                    f"`{method} {path}` → {status}",
                    found["floor"].cpu.text(),
                    found[measured.name].cpu.text(),
                    f"{floors['bare_fastapi']:.2f}",
                    f"{ratio:.2f}",
                    f"≤ {most:g}",
                    section.verdict(claim, held=ratio <= most),
                ]
            )
    section.table(["request", "floor, µs CPU", "ours, µs CPU", "bare FastAPI, floors", "ours, floors", "bar", ""], rows)
    _against_textbook(section, one_patient["textbook"], one_patient["ours"])
    _against_bare(section, one_patient["bare_fastapi"], one_patient["ours"])
    section.table(
        ["`GET /patients/7`", "µs CPU", "requests/s", "in floors", "new sessions for 1,000 requests"],
        [
            [
                NAMES.get(row.name, row.name),
                row.cpu.text(),
                row.rate.text(),
                f"{row.cpu.median / one_patient['floor'].cpu.median:.2f}",
                f"{row.opened.median:.1f}",
            ]
            for row in one_patient.values()
        ],
    )
    figure = plots.bars(
        "GET /patients/7: what one request costs the server",
        "µs of CPU, median and spread of the rounds",
        {NAMES.get(row.name, row.name): row.cpu for row in one_patient.values()},
    )
    section.picture("bar", "CPU for each request of four variants", figure)
    section.say(
        "The floor answers the same status and body. It has no metrics, request id, gate, routing to the replica, "
        "validation or error handling. Bare FastAPI does the floor's work in FastAPI's routes with a schema for what "
        "comes and goes, and nothing else. `POST /once` is the benchmark's own route, with `databases.write_once`."
    )
    return section


async def _round_trips(stage: Stage, tell: Callable[[str], None], section: Section) -> None:
    found = {}
    for variant in ("floor", "bare_fastapi", "ours_at_work"):
        tell(f"round trips · {variant}")
        found[variant] = await wire.round_trips(stage, variant, list(TRIPS))
    rows = []
    for number, ((method, path), most) in enumerate(TRIPS.items()):
        floor, bare, ours = (trips[number] for trips in found.values())
        if not floor == bare == ours:
            # A ratio to a floor that asks the database more or less often than ours would say nothing.
            raise BenchError(
                f"{method} {path} takes the floor {floor:g} round trips, bare FastAPI {bare:g}, ours {ours:g}"
            )
        claim = f"{method} {path}: {ours:g} round trips, at most {most} wanted"
        verdict = section.verdict(claim, held=ours <= most)
        rows.append([f"`{method} {path}`", f"{floor:g}", f"{bare:g}", f"{ours:g}", f"≤ {most}", verdict])
    section.table(["round trips", "floor", "bare FastAPI", "ours", "bar", ""], rows)
    section.say(
        "Counted on the wire, at the primary and the replica together. `POST /patients` takes BEGIN, INSERT, COMMIT "
        "and the question for the LSN, which is the token; `POST /once` an INSERT that commits by itself, and the LSN."
    )


def _against_textbook(section: Section, textbook: Row, ours: Row) -> None:
    times = ours.rate.median / textbook.rate.median
    claim = f"{times:.2f} times the textbook's requests/s, at least {TIMES_TEXTBOOK:g} wanted"
    section.say(f"Ours serves {claim}: {section.verdict(claim, held=times >= TIMES_TEXTBOOK)}.")


def _against_bare(section: Section, bare: Row, ours: Row) -> None:
    times = ours.cpu.median / bare.cpu.median
    claim = f"{times:.2f} times the CPU of bare FastAPI, at most {TIMES_BARE:g} wanted"
    section.say(f"A read of ours takes {claim}: {section.verdict(claim, held=times <= TIMES_BARE)}.")


def _same_answer(floor: Served, ours: Served, path: str, method: str) -> None:
    if method != "GET":
        return
    a, b = (httpx.get(server.url + path, trust_env=False) for server in (floor, ours))
    # What a person reads after "no such route" is not data.
    if a.status_code != b.status_code or (a.content != b.content and path != "/nothing"):
        raise BenchError(f"The floor answers {path} otherwise than ours: {a.text[:200]} and {b.text[:200]}")
