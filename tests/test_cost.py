"""What a request costs, counted and not timed: calls that Python makes, round trips, and statements.

Counts do not depend on the machine or on what else it does, so a regression shows as a failure and not as noise. The
bands are two-sided: an improvement must lower them, or the next regression hides in the room that it left.
"""

import gc
import logging
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from types import FrameType
from typing import Any

import pytest

from local.seed import seed
from pglifeguard.testing import RoundTrips
from pglifeguard.testing.counting import counting_statements
from tests.conftest import Database
from tests.service import Service, serving

# Counted on CPython 3.11, where runs differ by less than 1 %. Later ones inline comprehensions and differ elsewhere.
BAND = 0.05 if sys.version_info[:2] == (3, 11) else 0.20
WARM_UP = 20
REPETITIONS = 50
PATIENT = b'{"mrn": "NEW-%d", "full_name": "Ada Example", "birth_date": "1980-05-17"}'
USER = b'{"email": "new-%d@example.com", "full_name": "Ada Example"}'


@dataclass(frozen=True)
class Cost:
    """A request, the status of its answer, and what it may cost once everything is warm.

    Trips are turns on the wire at the primary and at the replica. Statements are those of `db_query_seconds`: without
    BEGIN, COMMIT, ROLLBACK and the question for the LSN.
    Calls are of Python functions, resumed coroutines included, from the outermost middleware inwards.
    """

    request: str
    status: int
    primary: int
    replica: int
    statements: int
    calls: int | None = None
    body: bytes = b""


# The token is the last trip of a write; a miss is retried on the primary.
COSTS = {
    "read one": Cost("GET /patients/7", 200, 0, 1, 1, calls=456),
    "list 50": Cost("GET /patients?limit=50", 200, 0, 1, 1, calls=785),
    "search": Cost("GET /patients?name=a&limit=5", 200, 0, 1, 1),
    "find": Cost("GET /patients?mrn=MRN-000007", 200, 0, 1, 1),
    "create": Cost("POST /patients", 201, 4, 0, 1, calls=849, body=PATIENT),
    "change": Cost("PATCH /patients/8", 200, 4, 0, 1, body=b'{"full_name": "Ada King %d"}'),
    "delete": Cost("DELETE /patients/%d", 204, 4, 0, 1),
    "miss": Cost("GET /patients/999999", 404, 3, 1, 2, calls=1061),
    "create user": Cost("POST /users", 201, 4, 0, 1, body=USER),
    "list users": Cost("GET /users", 200, 0, 1, 1),
    "report": Cost("GET /reports/summary", 200, 0, 5, 3),
    "invalid": Cost("POST /patients", 422, 0, 0, 0, body=b'{"mrn": ""}'),
    "no such route": Cost("GET /nothing", 404, 0, 0, 0, calls=266),
    "live": Cost("GET /health/live", 200, 0, 0, 0),
    "ready": Cost("GET /health/ready", 200, 0, 0, 0),
    "pool figures": Cost("GET /debug/pool-stats", 200, 0, 0, 0),
    "metrics": Cost("GET /metrics", 200, 0, 0, 0),
}


@dataclass
class Calls:
    """How many Python functions were entered."""

    count: int = 0

    def note(self, _frame: FrameType, event: str, _argument: Any) -> None:
        """Listen as `sys.setprofile` wants it."""
        self.count += event == "call"


@contextmanager
def counting_calls() -> Iterator[Calls]:
    """Count in this thread, and in whatever its event loop runs meanwhile."""
    calls = Calls()
    before = sys.getprofile()
    sys.setprofile(calls.note)
    try:
        yield calls
    finally:
        sys.setprofile(before)


class Client:
    """Sends requests to the application itself: an HTTP client would cost more than what it measures."""

    def __init__(self, service: Service, *, number: int = 10) -> None:
        self._app = service.app
        self._number = number

    async def send(self, cost: Cost) -> None:
        """Send the request, with another number where it has one, and check the status."""
        self._number += 1
        line = cost.request % self._number if "%d" in cost.request else cost.request
        method, _, target = line.partition(" ")
        path, _, query = target.partition("?")
        body = cost.body % self._number if b"%d" in cost.body else cost.body
        status = 0
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(b"host", b"test"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        await self._app(scope, receive, send)
        assert status == cost.status


@pytest.fixture
async def seeded(database: Database) -> Database:
    """Give a database of a hundred patients, on the replica too."""
    await seed(database.url(), 100)
    await database.cluster.wait_replayed()
    return database


@pytest.fixture
async def counted(seeded: Database) -> AsyncIterator[Service]:
    """Give a service that looks at its databases rarely, so that requests alone are counted."""
    async with serving(seeded.settings(monitor_interval_seconds=1)) as running:
        yield running


@pytest.mark.parametrize("name", [name for name, cost in COSTS.items() if cost.calls is not None])
async def test_calls(counted: Service, name: str) -> None:
    """A request makes as many Python calls as is written down, within the band."""
    client, cost = Client(counted), COSTS[name]
    for _ in range(WARM_UP):  # Caches fill: routes, labels, compiled and prepared statements.
        await client.send(cost)

    counts = []
    with counting_calls() as calls:
        for _ in range(REPETITIONS):
            before = calls.count
            await client.send(cost)
            counts.append(calls.count - before)

    # The median leaves out what the service does by itself, of which more falls into a request on a busy machine.
    made, expected = median(counts), cost.calls
    assert expected is not None
    assert expected * (1 - BAND) <= made <= expected * (1 + BAND), f"{made:.0f} calls, {expected} written down"


# With a handler that writes nothing: what others make of a line is theirs.
AUDITED = {("read one", "log"): 42, ("list 50", "log"): 91, ("create", "log"): 45, ("create", "table"): 261}


@pytest.mark.parametrize(("name", "audit"), AUDITED)
async def test_calls_of_the_audit_trail(
    seeded: Database, monkeypatch: pytest.MonkeyPatch, name: str, audit: str
) -> None:
    """A line and a row cost as many calls more as is written down in docs/audit.md."""
    trail = logging.getLogger("app.audit")
    monkeypatch.setattr(trail, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(trail, "propagate", False)
    monkeypatch.setattr(trail, "level", logging.INFO)
    trail.manager._clear_cache()  # type: ignore[attr-defined]  # Who sets a level otherwise does so.
    counts: dict[str, float] = {}
    for setting in ("off", audit):
        async with serving(seeded.settings(monitor_interval_seconds=1, audit=setting)) as service:
            client, made = Client(service, number=10 + 1000 * len(counts)), []
            for _ in range(WARM_UP):
                await client.send(COSTS[name])
            with counting_calls() as calls:
                for _ in range(REPETITIONS):
                    before = calls.count
                    await client.send(COSTS[name])
                    made.append(calls.count - before)
        counts[setting] = median(made)

    more, expected = counts[audit] - counts["off"], AUDITED[name, audit]
    assert expected * 0.8 <= more <= expected * 1.2, f"{more:.0f} calls more, {expected} written down"


@pytest.mark.parametrize("name", COSTS)
async def test_statements(counted: Service, name: str) -> None:
    """A request sends as many statements as is written down, the first time and later."""
    client = Client(counted)

    for _ in range(2):
        with counting_statements(counted.databases, COSTS[name].statements):
            await client.send(COSTS[name])


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("name", COSTS)
async def test_round_trips(service: Service, round_trips: RoundTrips, name: str) -> None:
    """A request speaks with the databases as often as is written down, once its statements are prepared."""
    cost, client = COSTS[name], Client(service)
    await client.send(cost)

    with round_trips(primary=cost.primary, replica=cost.replica):
        await client.send(cost)


@pytest.mark.parametrize("name", COSTS)
async def test_leaves_nothing_to_the_garbage_collector(counted: Service, name: str) -> None:
    """What a request has made is freed with its answer: no object is part of a cycle."""
    client, cost = Client(counted), COSTS[name]
    for _ in range(WARM_UP):
        await client.send(cost)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(REPETITIONS):
            await client.send(cost)
        gc.collect()
        # What runs beside the requests, such as the monitor, leaves a handful.
        kinds = Counter(type(thing).__qualname__ for thing in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()

    assert not {kind: count for kind, count in kinds.items() if count >= REPETITIONS}
