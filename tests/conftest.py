"""The real databases that tests run on: a primary and a streaming replica per process, one database per test.

`pglifeguard.testing` has the fixtures that a service gets from the library (docs/testing.md); here they lead to ours.
`cluster` is `local.cluster.Cluster`: see there for `url()`, `wait_replayed()` and what its two servers can suffer.
A test or a file marked `shares_service` has its database and its service from the tests before it: tables are empty,
connections and metrics are not new. One that needs a new service, or leaves more than rows, is marked `fresh_service`.
A test that stops, kills, freezes, promotes or reconfigures a server asks for `breakable_cluster`. All that it uses,
`database` and `service` too, is then on servers that the other tests do not share; it may leave the wreck behind.
"""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import pytest
from starlette.routing import BaseRoute

from app.models import Base, load_models
from app.settings import Settings
from local.cluster import Cluster
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.embedded.directories import open_directory
from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi import IDEMPOTENCY_TABLE
from pglifeguard.testing.network import Network
from pglifeguard.testing.proxy import Proxy
from pglifeguard.testing.servers import DatabaseServers
from pglifeguard.testing.serving import Running
from tests import moving
from tests.servers import Servers, last_lines, setting
from tests.service import Service, serving
from tests.stopwatch import Stopwatch

pytest_plugins = ["pglifeguard.testing"]

# Runs a statement on the primary as its superuser, beside the service, and returns its first value.
Execute: TypeAlias = Callable[..., Awaitable[Any]]

load_models()
# What a test may have left in the database that it shares with others, in the tables of whatever domains there are.
TABLES = [*Base.metadata.tables, *IDEMPOTENCY_TABLE.metadata.tables]
EMPTY = f"TRUNCATE {', '.join(TABLES)} RESTART IDENTITY"
# What `make test-fast` leaves out: what starts programs, breaks servers, or does something a hundred times.
SLOW_FOLDERS = {"bench", "browser", "chaos", "embedded", "examples", "local", "poolers", "release", "testing"}
SLOW_FILES = {
    "pglifeguard": {
        "test_checkout", "test_collisions", "test_credentials", "test_databases", "test_host_search", "test_lazy",
        "test_lease", "test_members", "test_on_connect", "test_otel", "test_pool", "test_pool_storms", "test_pooler",
        "test_primary_retry", "test_read_your_writes", "test_replica", "test_sampling", "test_servers",
        "test_session_commits", "test_session_names", "test_session_state", "test_session_use", "test_sleeping",
        "test_standbys", "test_tls", "test_tls_server", "test_write_once", "test_errors", "test_extras",
    },
    "fastapi": {
        "test_failures", "test_health", "test_idempotency", "test_limits", "test_middleware", "test_shared",
        "test_tracing",
    },
    "serving": {"test_protocol", "test_workers"},
    "app": {"test_cli", "test_doctor", "test_main", "test_openapi", "test_security"},
    "tests": {
        "test_alerts", "test_balancer", "test_concurrently", "test_cost", "test_credentials", "test_extending",
        "test_migrations", "test_patterns", "test_servers",
    },
    "users": {"test_sync"},
}  # fmt: skip

# The tests that coverage is measured in: those that mirror the packages, and a few that reach what those do not. To
# trace Python doubles what it costs, so the others go without.
MEASURED = {
    Path(__file__).parent / name
    for name in (
        "app", "pglifeguard", "chaos/test_loop.py", "test_credentials.py", "test_extending.py", "test_patterns.py",
        "test_transactions.py",
    )
}  # fmt: skip

_numbers = count(1)
_failed = pytest.StashKey[bool]()


@dataclass(frozen=True)
class Database:
    """A migrated, empty database that one test has to itself, on the primary and on the replica."""

    name: str
    cluster: Cluster
    # What a pool keeps open unless a test says otherwise.
    pool_min_size: int | None = 1
    # What stands between, for a test that counts round trips or breaks the network.
    network: Network | None = None

    def url(self, role: str = "app_rw") -> str:
        """Return where it is on the primary; roles are those of postgres/roles.sql and the superuser `postgres`."""
        url = self.cluster.url(role, database=self.name)
        return url if self.network is None else self.network.primary.url(url)

    def replica_url(self, role: str = "app_ro") -> str:
        """Return where it is on the replica."""
        url = self.cluster.url(role, server="replica", database=self.name)
        return url if self.network is None else self.network.replica.url(url)

    def environment(self) -> dict[str, str]:
        """Return the variables that point the service at primary, replica and analytics as in production."""
        return {
            "DATABASE_URL": self.url("app_rw"),
            "DATABASE_REPLICA_URL": self.replica_url(),
            "DATABASE_ANALYTICS_URL": self.replica_url(),
            "MIGRATIONS_URL": self.url("app_owner"),
        }

    def settings(self, *, replica: bool = True, **changes: Any) -> Settings:
        """Return the service's settings over this database: `changes` by field, of all pools or of the service.

        A pool keeps one connection, and analytics none: to open the default's five takes longer than most tests.
        """
        pools = {name: changes.pop(name) for name in set(changes) & set(DatabaseSettings.model_fields)}
        kept = {"pool_min_size": self.pool_min_size} | pools
        url = self.replica_url() if replica else self.url()
        fields: dict[str, Any] = {
            "environment": "test",
            "retry_after_spread_seconds": 0,
            "monitor_interval_seconds": 0.05,
            "primary": {"url": self.url(), **kept},
            "replicas": ({"url": url, **kept},) if replica else (),
            "analytics": {"url": url, "pool_size": 2, "max_overflow": 0, "pool_min_size": 0, **pools},
        }
        return Settings(_env_file=None, **(fields | changes))


class SharedService:
    """One service over one database that many tests use in turn: starting one takes longer than most tests do."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._running = AsyncExitStack()
        self._database: Database | None = None
        self._service: Service | None = None
        self._routes: list[BaseRoute] = []

    async def database(self) -> Database:
        """Return the database with empty tables, on the primary and on the replica."""
        cluster = await self._servers.take()
        if self._database is None or self._database.cluster is not cluster:
            await self.end()
            # Not among the names that the inspection of the servers drops, which may come between two tests.
            self._database = Database(f"shared_{next(_numbers)}", cluster)
            await self._servers.create_database(self._database.name)
        else:
            connection = await cluster.primary.connect(self._database.name)
            await connection.execute(EMPTY)
            await connection.close()
            await self._servers.wait_replayed()
        return self._database

    async def service(self) -> Service:
        """Return the service over `database()`, without the routes and overrides that other tests have added."""
        if self._service is None:
            assert self._database is not None
            self._service = await self._running.enter_async_context(serving(self._database.settings()))
            self._routes = self._service.app.router.routes[:]
        self._service.app.router.routes[:] = self._routes
        self._service.app.dependency_overrides.clear()
        self._service.client.cookies.clear()
        return self._service

    async def end(self) -> None:
        """Stop the service; the next test has a new one over a new database."""
        self._database = self._service = None
        await self._running.aclose()


def pytest_configure(config: pytest.Config) -> None:
    """Show on a terminal that a long test runs.

    And undo what pytest-xdist tells its workers about the terminal: `rich` would keep that width for every test.
    """
    config.pluginmanager.register(moving)
    # A handler that a test has set up writes to the standard error of that test, which is closed for later ones.
    logging.raiseExceptions = False
    if hasattr(config, "workerinput"):
        os.environ.pop("COLUMNS", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-fast` leaves out."""
    for item in items:
        folder = item.path.parent.name
        if folder in SLOW_FOLDERS or item.path.stem in SLOW_FILES.get(folder, ()):
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let the fixtures know that their test failed."""
    report = yield
    if report.failed:
        item.stash[_failed] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Stop coverage's tracer, if there is one, for a test that is not measured."""
    if not MEASURED.isdisjoint([item.path, *item.path.parents]):
        return (yield)
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


def _shares(item: pytest.Item) -> bool:
    return bool(item.get_closest_marker("shares_service") and not item.get_closest_marker("fresh_service"))


@pytest.fixture(name="open_directory")
def _open_directory() -> Iterator[Path]:
    """Give an empty directory that the account reaches that PostgreSQL runs as when we are root.

    That account is shut out of pytest's own `tmp_path`.
    """
    with open_directory() as directory:
        yield directory


@pytest.fixture
async def stopwatch() -> AsyncIterator[Stopwatch]:
    """Give a clock that runs only while this process is let run."""
    async with Stopwatch() as watch:
        yield watch


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> None:
    """Keep a developer's own environment out of the tests."""
    for name in list(os.environ):
        setting = name.lower().removesuffix("_file")
        if name.startswith(("DATABASE_", "MIGRATIONS_", "OTEL_")) or setting in Settings.model_fields:
            del os.environ[name]
    # Coverage is measured in the processes that run tests, not in the programs that tests start.
    os.environ.pop("COVERAGE_PROCESS_CONFIG", None)


@pytest.fixture(scope="session")
async def shared_servers() -> AsyncIterator[Servers]:
    """Give the servers of the tests that break none."""
    servers = Servers("shared")
    yield servers
    await servers.end()


@pytest.fixture(scope="session")
async def breakable_servers() -> AsyncIterator[Servers]:
    """Give the servers of the tests that break them."""
    servers = Servers("breakable")
    yield servers
    await servers.end()


@pytest.fixture(scope="session")
async def shared_service(shared_servers: Servers) -> AsyncIterator[SharedService]:
    """Give what the tests marked `shares_service` use in turn."""
    shared = SharedService(shared_servers)
    yield shared
    await shared.end()


@pytest.fixture
def servers(request: pytest.FixtureRequest, shared_servers: Servers, breakable_servers: Servers) -> Servers:
    """Give the servers that the test is on."""
    return breakable_servers if "breakable_cluster" in request.fixturenames else shared_servers


@pytest.fixture
async def cluster(request: pytest.FixtureRequest, servers: Servers) -> AsyncIterator[Cluster]:
    """Give the shared cluster, which the test leaves as it found it; beside `breakable_cluster`, that one."""
    taken = await servers.take()
    yield taken
    if request.node.stash.get(_failed, False):
        for server in (taken.primary, taken.replica):
            request.node.add_report_section(
                "teardown", server.log.name, await asyncio.to_thread(last_lines, server.log)
            )
    if "breakable_cluster" in request.fixturenames or request.node.stash.get(_failed, False):
        await servers.inspect()


@pytest.fixture
async def breakable_cluster(cluster: Cluster) -> Cluster:
    """Give the cluster to a test that breaks it; it is mended or replaced afterwards."""
    return cluster


@pytest.fixture
def database_servers(cluster: Cluster) -> DatabaseServers:
    """Give the servers of this test to the library's fixtures."""
    return DatabaseServers.of(cluster)


@pytest.fixture
async def database(
    request: pytest.FixtureRequest,
    servers: Servers,
    cluster: Cluster,
    shared_service: SharedService,
    maybe_network: Network | None,
) -> AsyncIterator[Database]:
    """Give a migrated, empty database that the replica has already replayed."""
    if _shares(request.node):
        yield await shared_service.database()
        if request.node.stash.get(_failed, False):
            await shared_service.end()
        return
    name = f"test_{next(_numbers)}"
    await servers.create_database(name)
    yield Database(name, cluster, network=maybe_network)
    if "breakable_cluster" not in request.fixturenames:  # Else the servers may be down; their inspection drops it.
        await servers.drop_database(name)


@pytest.fixture
async def service(
    request: pytest.FixtureRequest, database: Database, shared_service: SharedService
) -> AsyncIterator[Service]:
    """Give the service over primary and replica, running, with the settings of `Database.settings()`."""
    if _shares(request.node):
        yield await shared_service.service()
        return
    async with serving(database.settings()) as running:
        yield running


@pytest.fixture
def running_app(service: Service) -> Running:
    """Give the service to the library's fixtures."""
    return Running(service.app)


@pytest.fixture
async def behind(breakable_cluster: Cluster, service: Service) -> AsyncIterator[Service]:
    """Give a service whose replica shows nothing new."""
    await breakable_cluster.pause_replay()
    try:
        yield service
    finally:
        await breakable_cluster.resume_replay()


@pytest.fixture
async def no_autovacuum(cluster: Cluster) -> AsyncIterator[None]:
    """Let nothing be cleaned up by itself.

    For who waits until the replica has replayed while a transaction there keeps its snapshot: replay of a row's removal
    would wait for that transaction, and end it.
    """
    async with setting(cluster.primary, "autovacuum", "off"):
        connection = await cluster.primary.connect()

        async def at_rest() -> bool:
            return not await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'autovacuum%'"
            )

        assert await eventually(at_rest, 10)
        await connection.close()
        yield


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
    connection, one_at_a_time = await asyncpg.connect(database.url("postgres")), asyncio.Lock()

    async def run(statement: str, *arguments: Any) -> Any:
        async with one_at_a_time:
            return await connection.fetchval(statement, *arguments)

    yield run
    connection.terminate()  # It says goodbye without waiting for an answer, which a frozen server would not give.


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """Give the root logger to a test that configures logging, and put back afterwards what that changes."""
    logger, others = logging.getLogger(), [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
    handlers, level, filters = logger.handlers[:], logger.level, [other.filters[:] for other in others]
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)
    for other, before in zip(others, filters, strict=True):
        other.filters[:] = before
