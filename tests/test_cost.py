"""What a request costs, counted and not timed: calls that Python makes, and statements that the databases get.

Counts do not depend on the machine or on what else it does, so a regression shows as a failure and not as noise. The
bands are two-sided: an improvement must lower them, or the next regression hides in the room that it left.
"""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest

from local.seed import seed
from tests.conftest import Database
from tests.plans import noting_statements
from tests.service import Service, serving

# Counted on CPython 3.11, where runs differ by less than 1 %. Later ones inline comprehensions and differ elsewhere.
BAND = 0.05 if sys.version_info[:2] == (3, 11) else 0.20
WARM_UP = 20
REPETITIONS = 50
# Calls of Python functions for one request, resumed coroutines included, from the outermost middleware inwards.
CALLS = {
    "read one": 435,
    "list 50": 1080,
    "no such route": 259,
    "create": 923,
}
# Statements through SQLAlchemy. BEGIN, COMMIT and the token's look at the LSN are not among them: see the wire tests.
STATEMENTS = {"read one": 1, "list 50": 1, "no such route": 0, "create": 1}


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

    def __init__(self, service: Service) -> None:
        self._app = service.app
        self._number = 0

    async def request(self, method: str, path: str, query: bytes = b"", body: bytes = b"") -> int:
        """Send one request and return the status."""
        status = 0
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
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
        return status

    async def read_one(self) -> None:
        """Read a patient from the replica."""
        assert await self.request("GET", "/patients/7") == 200

    async def list_50(self) -> None:
        """Read a page of patients."""
        assert await self.request("GET", "/patients", b"limit=50") == 200

    async def no_such_route(self) -> None:
        """Ask for what is not there, and costs no connection."""
        assert await self.request("GET", "/nothing") == 404

    async def create(self) -> None:
        """Store a patient."""
        self._number += 1
        body = b'{"mrn": "NEW-%d", "full_name": "Ada Example", "birth_date": "1980-05-17"}' % self._number
        assert await self.request("POST", "/patients", body=body) == 201


REQUESTS: dict[str, Callable[[Client], Awaitable[None]]] = {
    "read one": Client.read_one,
    "list 50": Client.list_50,
    "no such route": Client.no_such_route,
    "create": Client.create,
}


@pytest.fixture
async def counted(database: Database) -> AsyncIterator[Service]:
    """Give a service over a hundred patients that looks at its databases rarely, so that requests alone are counted."""
    await seed(database.url(), 100)
    await database.cluster.wait_replayed()
    async with serving(database.settings(monitor_interval_seconds=1)) as running:
        yield running


@pytest.mark.parametrize("name", REQUESTS)
async def test_calls(counted: Service, name: str) -> None:
    """A request makes as many Python calls as is written down, within the band."""
    client, send = Client(counted), REQUESTS[name]
    for _ in range(WARM_UP):  # Caches fill: routes, labels, compiled and prepared statements.
        await send(client)

    with counting_calls() as calls:
        for _ in range(REPETITIONS):
            await send(client)

    made, expected = calls.count / REPETITIONS, CALLS[name]
    assert expected * (1 - BAND) <= made <= expected * (1 + BAND), f"{made:.0f} calls, {expected} written down"


@pytest.mark.parametrize("name", REQUESTS)
async def test_statements(counted: Service, name: str) -> None:
    """A request sends as many statements as is written down, the first time and later."""
    client = Client(counted)

    for _ in range(2):
        async with noting_statements(counted) as statements:
            await REQUESTS[name](client)

        assert len(statements.sent) == STATEMENTS[name], [statement for statement, _ in statements.sent]
