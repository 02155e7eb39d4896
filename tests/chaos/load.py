"""Load on the service in the test's own process: requests at a rate that does not wait for answers, and writers.

Requests go straight into the application. An HTTP client would cost three times what they cost the service.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import asyncpg

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What one request got, and when; times are of time.monotonic()."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    asked_at: float
    answered_at: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.answered_at - self.asked_at

    def json(self) -> Any:
        """Decode the body."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The `code` of a problem document, "" of anything else."""
        return str(self.json()["code"]) if self.status >= 400 else ""


async def ask(app: Any, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """Send one request into an ASGI application; headers are written with underscores."""
    content = b"" if body is None else json.dumps(body).encode()
    pairs = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"test"), (b"content-type", b"application/json"), *pairs],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
    started: dict[str, Any] = {}
    received = bytearray()
    asked_at = time.monotonic()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        started.update(message) if message["type"] == "http.response.start" else received.extend(message["body"])

    await app(scope, receive, send)
    answered = {name.decode().lower(): value.decode() for name, value in started["headers"]}
    return Answer(started["status"], answered, bytes(received), asked_at, time.monotonic())


async def offer(
    send: Callable[[int], Awaitable[T]], *, per_second: float, until: Callable[[], bool], first: int = 0
) -> list[T]:
    """Start `send(number)` at a steady rate, whatever becomes of the earlier ones; return all results by number."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    tasks: list[asyncio.Future[T]] = []
    while not until():
        tasks.append(asyncio.ensure_future(send(first + len(tasks))))
        await asyncio.sleep(begun + len(tasks) / per_second - loop.time())
    return list(await asyncio.gather(*tasks))


def after(seconds: float) -> Callable[[], bool]:
    """Return a condition that holds from `seconds` from now on."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def tell(counts: Counter[Any]) -> str:
    """Write counts down for the table, the most frequent first."""
    return ", ".join(f"{count} × {what}" for what, count in counts.most_common())  # noqa: RUF001  # As people write it.


def quantile(values: list[float], share: float) -> float:
    """Return the value that this share of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


@dataclass
class Writers:
    """Patients created at a steady rate, and what each client was told."""

    app: Any
    per_second: float = 200
    stopped: bool = False
    told: dict[str, Answer] = field(default_factory=dict)
    _task: "asyncio.Task[list[None]] | None" = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(offer(self._write, per_second=self.per_second, until=lambda: self.stopped))
        return self

    async def __aexit__(self, *_failure: object) -> None:
        self.stopped = True
        if self._task is not None:
            await self._task

    async def _write(self, number: int) -> None:
        mrn = f"W-{number}"
        patient = {"mrn": mrn, "full_name": "Ada Example", "birth_date": "1980-05-17"}
        self.told[mrn] = await ask(self.app, "POST", "/patients", patient)

    def answered_since(self, moment: float, *, status: int = 201) -> list[float]:
        """Return when answers of this status came to requests sent after a moment, in seconds from it."""
        later = [answer for answer in self.told.values() if answer.asked_at >= moment and answer.status == status]
        return sorted(answer.answered_at - moment for answer in later)

    def outcomes(self) -> Counter[str]:
        """Count the answers by status, or by code where there is one."""
        return Counter(answer.code or str(answer.status) for answer in self.told.values())

    async def reconcile(self, url: str) -> None:
        """Compare what clients were told with what is stored: nothing acknowledged is lost, nothing refused is kept.

        An answer that says "unknown" may be either, and only it may.
        """
        connection = await asyncpg.connect(url, timeout=5)
        try:
            stored = {row["mrn"] for row in await connection.fetch("SELECT mrn FROM patients")}
        finally:
            await connection.close()
        acknowledged = {mrn for mrn, answer in self.told.items() if answer.status == 201}
        unknown = {mrn for mrn, answer in self.told.items() if answer.code == "outcome_unknown"}
        lost, unexpected = acknowledged - stored, stored - acknowledged - unknown
        assert not lost, f"{len(lost)} of {len(acknowledged)} acknowledged writes are lost"
        assert not unexpected, {mrn: self.told[mrn].body for mrn in unexpected}
        assert {answer.status for answer in self.told.values()} <= {201, 503}, self.outcomes()
