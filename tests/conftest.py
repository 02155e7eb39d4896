"""The real databases that tests run on: one primary and one streaming replica per run, one database per test.

`cluster` is `local.cluster.Cluster`: see there for `url()`, `wait_replayed()` and what its two servers can suffer.
A test that stops, kills, freezes or promotes one asks for `breakable_cluster`, and may leave the wreck behind.
"""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import pytest

from app.settings import DatabaseSettings, Settings
from local.cluster import Cluster
from tests.proxy import Proxy
from tests.service import Service, serving

# What a run may take in memory: two servers with their write-ahead logs. Docker gives containers 64 MB by default.
MEMORY_BYTES = 3_000_000_000

# Runs a statement on the primary as its superuser, beside the service, and returns its first value.
Execute: TypeAlias = Callable[..., Awaitable[Any]]

_numbers = count(1)


@dataclass(frozen=True)
class Database:
    """A migrated, empty database that one test has to itself, on the primary and on the replica."""

    name: str
    cluster: Cluster

    def url(self, role: str = "app_rw") -> str:
        """Return where it is on the primary; roles are those of postgres/roles.sql and the superuser `postgres`."""
        return self.cluster.url(role, database=self.name)

    def replica_url(self, role: str = "app_ro") -> str:
        """Return where it is on the replica."""
        return self.cluster.url(role, server="replica", database=self.name)

    def environment(self) -> dict[str, str]:
        """Return the variables that point the service at primary, replica and analytics as in production."""
        return {
            "DATABASE_URL": self.url("app_rw"),
            "DATABASE_REPLICA_URL": self.replica_url(),
            "DATABASE_ANALYTICS_URL": self.replica_url(),
            "MIGRATIONS_URL": self.url("app_owner"),
        }

    def settings(self, *, replica: bool = True, **changes: Any) -> Settings:
        """Return the service's settings over this database: `changes` by field, of all pools or of the service."""
        pools = {name: changes.pop(name) for name in set(changes) & set(DatabaseSettings.model_fields)}
        url = self.replica_url() if replica else self.url()
        fields: dict[str, Any] = {
            "environment": "test",
            "monitor_interval_seconds": 0.05,
            "primary": {"url": self.url(), **pools},
            "replicas": ({"url": url, **pools},) if replica else (),
            "analytics": {"url": url, "pool_size": 2, "max_overflow": 0, "pool_min_size": 0, **pools},
        }
        return Settings(_env_file=None, **(fields | changes))


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Give an empty directory that the account reaches that PostgreSQL runs as when we are root.

    That account is shut out of pytest's own `tmp_path`.
    """
    with _open_directory() as directory:
        yield directory


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> None:
    """Keep a developer's own environment out of the tests."""
    for name in list(os.environ):
        if name.startswith("DATABASE_") or name.lower() in Settings.model_fields:
            del os.environ[name]


@pytest.fixture(scope="session")
async def cluster() -> AsyncIterator[Cluster]:
    """Give the cluster of this run; tests leave both servers as they found them."""
    with _open_directory() as directory:
        async with Cluster(directory) as running:
            yield running
        running.remove()


@pytest.fixture
async def breakable_cluster(cluster: Cluster) -> AsyncIterator[Cluster]:
    """Give the cluster to a test that breaks it, and mend it afterwards: both up, the replica streaming."""
    yield cluster
    await cluster.start()


@pytest.fixture(scope="session")
async def migrated(cluster: Cluster) -> str:
    """Name the database that every test's own is copied from; nobody connects to it."""
    name = "migrated"
    await cluster.create_database(name)
    await cluster.migrate(name)
    return name


@pytest.fixture
async def database(cluster: Cluster, migrated: str) -> AsyncIterator[Database]:
    """Give a migrated, empty database that the replica has already replayed."""
    name = f"test_{next(_numbers)}"
    await cluster.create_database(name, template=migrated)
    await cluster.wait_replayed()
    yield Database(name, cluster)
    await cluster.drop_database(name)


@pytest.fixture
async def service(database: Database) -> AsyncIterator[Service]:
    """Give the service over primary and replica, running, with every setting's default."""
    async with serving(database.settings()) as running:
        yield running


@pytest.fixture
async def behind(breakable_cluster: Cluster, service: Service) -> AsyncIterator[Service]:
    """Give a service whose replica shows nothing new."""
    await breakable_cluster.pause_replay()
    try:
        yield service
    finally:
        await breakable_cluster.resume_replay()


@pytest.fixture
async def proxy(cluster: Cluster) -> AsyncIterator[Proxy]:
    """Give a network in front of the primary."""
    async with Proxy(cluster.primary.port) as running:
        yield running


@pytest.fixture
async def replica_proxy(cluster: Cluster) -> AsyncIterator[Proxy]:
    """Give a network in front of the replica."""
    async with Proxy(cluster.replica.port) as running:
        yield running


@pytest.fixture
async def execute(database: Database) -> AsyncIterator[Execute]:
    """Give a way to the primary beside the service."""
    connection = await asyncpg.connect(database.url("postgres"))

    async def run(statement: str, *arguments: Any) -> Any:
        return await connection.fetchval(statement, *arguments)

    yield run
    await connection.close()


@contextmanager
def _open_directory() -> Iterator[Path]:
    # In memory, a database of one's own is made and replayed in 20 ms; on a disk that others use in 50 to 200.
    memory = Path("/dev/shm")  # noqa: S108  # mkdtemp makes an unguessable name in it.
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > MEMORY_BYTES
    with tempfile.TemporaryDirectory(prefix="lifeguard-tests-", dir=memory if roomy else None) as directory:
        Path(directory).chmod(0o711)
        yield Path(directory)
