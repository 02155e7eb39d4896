"""Mixed reads and writes at a fixed rate, and a ledger of what was answered.

The rate is kept whatever the answers do (open loop): a service that stalls does not get fewer requests for it.
"""

import asyncio
import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import httpx

# A client that waits longer than this has gone.
CLIENT_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One request: when it was sent and answered, what it was, and how it ended (0: no answer)."""

    sent: float
    done: float
    method: str
    status: int
    detail: str = ""

    @property
    def good(self) -> bool:
        """Whether it did what was asked."""
        return 200 <= self.status < 300


@dataclass
class Traffic:
    """`rate` requests a second, four of five of them reads, while the context lasts."""

    base_url: str
    rate: float = 50.0
    write_share: float = 0.2
    prefix: str = "T"
    answers: list[Answer] = field(default_factory=list)
    # What was acknowledged with 2xx: the ledger that the database is compared with.
    created: dict[int, str] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        """Make the rows that are read, then start."""
        limits = httpx.Limits(max_connections=400, max_keepalive_connections=100)
        self._client = httpx.AsyncClient(base_url=self.base_url, timeout=CLIENT_SECONDS, limits=limits)
        self._numbers = itertools.count()
        self._random = random.Random(7)  # noqa: S311  # A mixture, not a secret.
        self._requests: set[asyncio.Task[None]] = set()
        for _ in range(20):
            await self._write()
        self._rows = list(self.created)
        assert len(self._rows) == 20, self.answers
        self.answers.clear()
        self._loop = asyncio.create_task(self._send())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop sending, and wait for the answers that are due."""
        self._loop.cancel()
        await asyncio.gather(*self._requests)
        await self._client.aclose()

    async def good_for(self, seconds: float, *, within: float) -> float:
        """Wait until every request of `seconds` in a row was good, at the full rate; return when that stretch began.

        Times are time.monotonic(). Fails when it has not begun and ended `within` seconds from now.
        """
        asked = time.monotonic()
        while time.monotonic() < asked + within:
            await asyncio.sleep(0.1)
            now = time.monotonic() - 0.5
            recent = [a for a in self.answers if now - seconds <= a.sent < now]
            oldest_open = min((float(t.get_name()) for t in self._requests), default=now)
            enough = len(recent) >= 0.95 * self.rate * seconds
            if now - seconds >= asked and enough and all(a.good for a in recent) and oldest_open > now - 1.0:
                return now - seconds
        last = self.summary(since=time.monotonic() - seconds)
        raise AssertionError(f"no {seconds:g} s at the full rate within {within:g} s; at last {last}")

    def summary(self, *, since: float = 0.0) -> dict[str, int]:
        """Count the answers by method and status."""
        counts = Counter(f"{a.method} {a.status} {a.detail}".strip() for a in self.answers if a.sent >= since)
        return dict(counts)

    def bad(self, *, since: float = 0.0) -> list[Answer]:
        """List the answers that were not good."""
        return [answer for answer in self.answers if answer.sent >= since and not answer.good]

    async def _send(self) -> None:
        started = time.monotonic()
        for number in itertools.count():
            await asyncio.sleep(max(0.0, started + number / self.rate - time.monotonic()))
            write = self._random.random() < self.write_share
            task = asyncio.create_task(self._write() if write else self._read(), name=str(time.monotonic()))
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)

    async def _read(self) -> None:
        row = self._random.choice(self._rows)
        response = await self._ask("GET", f"/patients/{row}")
        if response is not None and response.is_success:
            assert response.json()["mrn"] == self.created[row]

    async def _write(self) -> None:
        mrn = f"{self.prefix}-{next(self._numbers)}"
        body = {"mrn": mrn, "full_name": "Some Body", "birth_date": "1980-01-01"}
        response = await self._ask("POST", "/patients", body)
        if response is not None and response.is_success:
            self.created[response.json()["id"]] = mrn

    async def _ask(self, method: str, path: str, body: object = None) -> httpx.Response | None:
        sent = time.monotonic()
        try:
            response = await self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            self.answers.append(Answer(sent, time.monotonic(), method, 0, type(error).__name__))
            return None
        detail = "" if response.is_success else str(response.json().get("code", response.text[:80]))
        self.answers.append(Answer(sent, time.monotonic(), method, response.status_code, detail))
        return response
