"""One database of the service without the service around it, and the bad network in front of primary and replica."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.pool import ConnectionPoolEntry

from app.settings import Settings
from pglifeguard.database import Database as PoolDatabase
from pglifeguard.database import Role
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.embedded.waiting import eventually
from pglifeguard.metrics import Metrics
from pglifeguard.pool import ConnectionPool
from pglifeguard.sampling import Sampler
from pglifeguard.wait_queue import WaitQueue
from tests.conftest import Database
from tests.exported import Exported, receiving

SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'"


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now


@dataclass(frozen=True)
class Pooled:
    """One database of the service: what a test asks of it."""

    database: PoolDatabase
    metrics: Metrics

    @property
    def pool(self) -> ConnectionPool[ConnectionPoolEntry]:
        """The pool under test."""
        return self.database.pool

    def sample(self, name: str, **labels: str) -> float:
        """Return a metric of this database, 0.0 when there is no such series yet."""
        found = self.metrics.registry.get_sample_value(name, {"pool": self.database.name} | labels)
        return 0.0 if found is None else found

    def replaced(self, reason: str) -> float:
        """Count the connections given up for this reason."""
        return self.sample("db_connection_invalidations_total", reason=reason)

    def rejected(self, reason: str) -> float:
        """Count the acquisitions refused for this reason."""
        return self.sample("db_connection_rejected_total", reason=reason)

    async def backend(self) -> int:
        """Use a connection once and return the process id of the session at its other end."""
        async with self.database.engine.connect() as connection:
            return int((await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one())

    async def waiting(self, count: int) -> None:
        """Return when as many requests stand in the queue."""

        async def queued() -> bool:
            return self.pool.figures().waiting == count

        assert await eventually(queued, 5), self.pool.figures()


def service_settings(url: str, **service: Any) -> Settings:
    """Return settings of a service that nobody runs, for what is made of them."""
    fields: dict[str, Any] = {"primary": {"url": url}, "analytics": {"url": url}, "environment": "test"}
    return Settings(_env_file=None, **(fields | service))


@asynccontextmanager
async def pooled(
    url: str,
    *,
    role: Role = "primary",
    clock: Callable[[], float] | None = None,
    service: dict[str, Any] | None = None,
    **pool: Any,
) -> AsyncIterator[Pooled]:
    """Give engine, pool and monitor of one database; at the end every permit must be back."""
    metrics = Metrics()
    settings = DatabaseSettings(url=url, **({"pool_min_size": 0} | pool))
    database = PoolDatabase(role, role, settings, service_settings(url, **(service or {})), metrics, Sampler())
    if clock is not None:
        database.pool._clock = clock
    yield Pooled(database, metrics)
    database.pool.close()
    assert await database.pool.drained(5), database.pool.figures()
    figures = database.pool.figures()
    assert (figures.checked_out, figures.connecting, figures.waiting, figures.available) == (0, 0, 0, figures.total)
    await database.engine.dispose()
    await database.monitor.close()


def grow(queue: WaitQueue[Any], now: float) -> None:
    """Let a queue believe that it grows, and that its server takes a thousand seconds for each request."""
    queue.count_arrival(now)
    queue._grown, queue._before, queue._served_at = 1, (now - 1000, 1), now


async def sessions_end(database: Database, seconds: float = 5) -> bool:
    """Tell whether the last session in this database ends in time."""
    watcher = await asyncpg.connect(database.cluster.url("postgres"))

    async def none() -> bool:
        return bool(await watcher.fetchval(SESSIONS, database.name) == 0)

    try:
        return await eventually(none, seconds)
    finally:
        await watcher.close()


@pytest.fixture(scope="session")
def receiver() -> Iterator[Exported]:
    """Give an OTLP receiver."""
    with receiving() as running:
        yield running


@pytest.fixture
def exported(receiver: Exported, monkeypatch: pytest.MonkeyPatch) -> Exported:
    """Let what is made in this test export to a receiver."""
    for name, value in receiver.environment.items():
        monkeypatch.setenv(name, value)
    return receiver


@pytest.fixture
def clock() -> Clock:
    """Give a clock that stands still."""
    return Clock()
