"""One pooler with the service behind it, on which the situations are played."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from app.settings import Settings
from pglifeguard.pooler import Pooler
from tests.conftest import Database
from tests.poolers.programs import Mode, Program, Running, Shape
from tests.service import Service, serving

# What the service opens at most. In transaction mode the pooler has fewer server connections than that, in session mode
# it needs one for each, those of a second service included.
POOL: dict[str, Any] = {"pool_size": 4, "max_overflow": 0, "pool_min_size": 1, "pool_timeout": 5}
SHARED, EACH_ITS_OWN = 3, 30


@dataclass(frozen=True)
class Scene:
    """The service, its pooler, and the servers behind that."""

    program: Program
    pooler: Running
    database: Database
    service: Service

    @property
    def url(self) -> str:
        """The primary's database, through the pooler."""
        return self.pooler.url(self.database.url())

    @property
    def mode(self) -> Mode:
        """The pooler's mode."""
        return self.pooler.shape.mode

    @property
    def found(self) -> Pooler:
        """What the service has found in front of its primary."""
        return found_by(self.service)

    @asynccontextmanager
    async def client(self) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        """Give another client of the pooler, which keeps no statements."""
        connection = await asyncpg.connect(self.url, statement_cache_size=0, timeout=5)
        try:
            yield connection
        finally:
            connection.terminate()

    @asynccontextmanager
    async def server(self) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        """Give a superuser's connection past the pooler."""
        connection = await asyncpg.connect(self.database.url("postgres"), timeout=5)
        try:
            yield connection
        finally:
            await connection.close()


def found_by(service: Service) -> Pooler:
    """Return what a service has found in front of its primary."""
    look = service.databases.primary.connector.look
    assert look is not None
    return look.found


def settings(pooler: Running, database: Database, **changes: Any) -> Settings:
    """Return the settings of a service behind a pooler."""
    replica = {"url": pooler.replica_url(database.replica_url()), **POOL}
    fields: dict[str, Any] = {
        "primary": {"url": pooler.url(database.url()), **POOL},
        "replicas": (replica,),
        "analytics": replica | {"pool_size": 1, "pool_min_size": 0},
    }
    return database.settings(**(fields | changes))


def shape_of(program: Program, mode: Mode, database: Database) -> Shape:
    """Return how a pooler is set up for the situations: as small as it may be in its mode."""
    own: dict[str, object] = {"query_wait_timeout": 2} if program.kind == "PgBouncer" else {}
    on_replica = None if program.kind == "pgpool-II" else database.name
    return Shape(mode, SHARED if mode == "transaction" else EACH_ITS_OWN, own, on_replica)


@asynccontextmanager
async def playing(program: Program, pooler: Running, database: Database) -> AsyncIterator[Scene]:
    """Run the service behind a pooler that runs already."""
    async with serving(settings(pooler, database)) as service:
        yield Scene(program, pooler, database, service)
