"""The servers that tests run on, and the database that each test has to itself there."""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from sqlalchemy.engine import make_url

from pglifeguard.embedded.account import EmbeddedError
from pglifeguard.embedded.cluster import Cluster
from pglifeguard.embedded.databases import ask, copy_database, drop_database, wait_replayed
from pglifeguard.embedded.directories import open_directory
from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing.network import Network
from pglifeguard.testing.proxy import Proxy

PRIMARY, REPLICA = "PGLIFEGUARD_TEST_URL", "PGLIFEGUARD_TEST_REPLICA_URL"
REPLAY_SECONDS = 10.0
# A connection that was closed is gone in milliseconds.
LEAVE_SECONDS = 1.0
NOBODY = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = $1)"
# Small pools, because to open the default's five connections takes longer than most tests; a fast monitor, because
# tests wait for what it finds; and patience, because where tests run the machine is busy, and that is no overload.
QUICK = {
    "DATABASE_POOL_TIMEOUT": "2",
    "DATABASE_POOL_MIN_SIZE": "1",
    "DATABASE_ANALYTICS_POOL_SIZE": "2",
    "DATABASE_ANALYTICS_MAX_OVERFLOW": "0",
    "DATABASE_ANALYTICS_POOL_MIN_SIZE": "0",
    "MONITOR_INTERVAL_SECONDS": "0.05",
    "RETRY_AFTER_SPREAD_SECONDS": "0",
}


@dataclass(frozen=True)
class DatabaseServers:
    """A primary and its replica, None where there is none; `maintenance` is the URL to make and drop databases by."""

    maintenance: str
    primary: str
    replica: str | None

    @classmethod
    def of(cls, cluster: Cluster) -> Self:
        """Return those of a cluster: the application gets its plain role, and the superuser makes the databases."""
        return cls(
            cluster.url("postgres", database="postgres"),
            cluster.url(database="postgres"),
            cluster.url(server="replica", database="postgres"),
        )

    async def create(self, name: str, *, template: str = "template1") -> None:
        """Copy a database that nobody is connected to; returns when the replica has the copy."""
        owner = str(make_url(self.primary).username)
        await copy_database(self.maintenance, name, template=template, owner=owner)
        await self.wait_replayed()

    async def wait_left(self, name: str) -> None:
        """Wait until nobody is connected to a database. Raises: EmbeddedError when somebody stays."""

        async def left() -> bool:
            return bool(await ask(self.maintenance, NOBODY, name))

        if not await eventually(left, LEAVE_SECONDS):
            raise EmbeddedError(
                "Each test's database is a copy of the one in which make_tables makes the tables, and nobody may be "
                "connected to that: close the connections that make_tables opens."
            )

    async def drop(self, name: str) -> None:
        """Drop a database, disconnecting whoever is in it."""
        await drop_database(self.maintenance, name)

    async def wait_replayed(self) -> None:
        """Wait until the replica shows what is committed on the primary now. Raises: TimeoutError."""
        if self.replica is not None:
            await wait_replayed(self.primary, self.replica, REPLAY_SECONDS)

    @asynccontextmanager
    async def network(self) -> AsyncIterator[Network]:
        """Put a proxy in front of each server, for as long as the block lasts."""
        async with _proxy(self.primary) as primary:
            if self.replica is None:
                yield Network(primary, primary)
                return
            async with _proxy(self.replica) as replica:
                yield Network(primary, replica)


def _proxy(url: str) -> Proxy:
    parts = make_url(url)
    return Proxy(parts.port or 5432, host=parts.host or "localhost")


@dataclass(frozen=True)
class Database:
    """A database that one test has to itself; `url` and `replica_url` are where the application finds it."""

    name: str
    servers: DatabaseServers
    network: Network | None = None
    url: str = field(init=False)
    replica_url: str | None = field(init=False)

    def __post_init__(self) -> None:
        primary, replica = (
            _at(self.servers.primary, self.name),
            self.servers.replica and _at(self.servers.replica, self.name),
        )
        if self.network is not None:
            primary, replica = self.network.primary.url(primary), replica and self.network.replica.url(replica)
        object.__setattr__(self, "url", primary)
        object.__setattr__(self, "replica_url", replica)

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment of an application that uses it."""
        replica = {} if self.replica_url is None else {"DATABASE_REPLICA_URL": self.replica_url}
        analytics = self.replica_url or self.url
        return {"DATABASE_URL": self.url, **replica, "DATABASE_ANALYTICS_URL": analytics, **QUICK}

    async def execute(self, statement: str, *arguments: Any) -> Any:
        """Run a statement beside the application; return its first value when the replica shows what it did."""
        value = await ask(_at(self.servers.primary, self.name), statement, *arguments)
        await self.servers.wait_replayed()
        return value


def _at(url: str, database: str | None = None) -> str:
    """Return a URL as asyncpg takes it, of another database if one is named."""
    parts = make_url(url).set(drivername="postgresql")
    return parts.set(database=database or parts.database).render_as_string(hide_password=False)


@asynccontextmanager
async def database_servers_of_this_run() -> AsyncIterator[DatabaseServers]:
    """Give the servers that the environment names, else a primary and a replica that are started, and removed again.

    Raises: EmbeddedError when no PostgreSQL is found.
    """
    if url := os.environ.get(PRIMARY):
        replica = os.environ.get(REPLICA)
        yield DatabaseServers(_at(url), _at(url), replica and _at(replica))
        return
    with open_directory() as directory:
        async with Cluster(directory) as cluster:
            yield DatabaseServers.of(cluster)
