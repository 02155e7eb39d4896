"""Connections cut where a write is stored, before the server hears of it and after: what a retry makes of that."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from itertools import count

import asyncpg

from pglifeguard.fastapi.idempotency import HEADER
from pglifeguard.testing.proxy import Fate, Proxy
from tests.chaos import FULL
from tests.chaos.load import Answer, ask, tell
from tests.conftest import Database
from tests.service import serving

CUTS = 1000 if FULL else 40
CLIENTS = 4
FATES: tuple[Fate, ...] = ("lose_request", "lose_answer")


class Retrying:
    """Clients that send each patient until they hear what became of it, while what stores it is cut at random."""

    def __init__(self, app: object, proxy: Proxy, *, keyed: bool) -> None:
        self._app = app
        self._proxy = proxy
        self._keyed = keyed
        self._chance = random.Random(4)  # noqa: S311  # The same cuts in every run.
        self._numbers = count()
        self.told: Counter[str] = Counter()
        self.created: dict[str, Answer] = {}

    async def run(self, cuts: int) -> None:
        """Go on until so many outcomes were unknown."""
        await asyncio.gather(*(self._client(cuts) for _ in range(CLIENTS)))
        self._proxy.fates.clear()

    async def _client(self, cuts: int) -> None:
        while self.told["outcome_unknown"] < cuts:
            mrn = f"I-{next(self._numbers)}"
            for attempt in range(20):
                self._proxy.fates = {"COMMIT": self._chance.choice(FATES)} if attempt < 2 else {}
                answer = await self.send(mrn)
                self.told[answer.code or str(answer.status)] += 1
                if answer.status != 503:
                    self.created[mrn] = answer
                    break

    async def send(self, mrn: str) -> Answer:
        """Send one patient, with the key that belongs to it."""
        patient = {"mrn": mrn, "full_name": "Ada Example", "birth_date": "1980-05-17"}
        headers = {HEADER: f"key-of-{mrn}"} if self._keyed else {}
        return await ask(self._app, "POST", "/patients", patient, **headers)


async def test_retry_with_a_key_is_exactly_once(database: Database, measured: Callable[[str], None]) -> None:
    """Whatever is cut at COMMIT, a retry with the key ends in one row and in the answer that the first one had."""
    async with Proxy(database.cluster.primary.port) as proxy:
        settings = database.settings(replica=False, primary={"url": proxy.url(database.url())})
        async with serving(settings) as service:
            clients = Retrying(service.app, proxy, keyed=True)
            await clients.run(CUTS)
            again = {mrn: await clients.send(mrn) for mrn in list(clients.created)[:100]}

    stored = await stored_mrns(database)
    measured(f"{len(clients.created)} patients, {tell(clients.told)}, {len(stored)} rows")
    assert clients.told["outcome_unknown"] >= CUTS
    assert set(clients.told) <= {"201", "outcome_unknown", "connection_lost"}
    assert sorted(stored) == sorted(clients.created)
    assert all(answer.body == clients.created[mrn].body for mrn, answer in again.items())
    assert all(answer.headers["location"] == clients.created[mrn].headers["location"] for mrn, answer in again.items())


async def test_retry_without_a_key_cannot_tell(database: Database) -> None:
    """Without the key a client whose write had succeeded is told that somebody else has its number."""
    async with Proxy(database.cluster.primary.port) as proxy:
        settings = database.settings(replica=False, primary={"url": proxy.url(database.url())})
        async with serving(settings) as service:
            clients = Retrying(service.app, proxy, keyed=False)
            await clients.run(20)

    assert clients.told["mrn_taken"] > 0


async def stored_mrns(database: Database) -> list[str]:
    """List the numbers of all patients."""
    connection = await asyncpg.connect(database.url("postgres"), timeout=5)
    try:
        return [row["mrn"] for row in await connection.fetch("SELECT mrn FROM patients")]
    finally:
        await connection.close()
