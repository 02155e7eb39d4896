"""The fixtures: `pytest_plugins = ["pglifeguard.testing"]` in the conftest.py at the top gives them to all tests.

Those of a session hold nothing that belongs to an event loop, so each test may have a loop of its own.
"""

import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from functools import partial
from itertools import count
from typing import Any, NoReturn, TypeAlias

import httpx
import pytest
import pytest_asyncio

from pglifeguard.databases import Databases
from pglifeguard.embedded import postgres
from pglifeguard.testing.counting import Trips, counting_round_trips, counting_statements
from pglifeguard.testing.faults import exhausted, replica_away
from pglifeguard.testing.network import Network
from pglifeguard.testing.servers import Database, DatabaseServers, database_servers_of_this_run
from pglifeguard.testing.serving import Running, listening, running

# Makes the tables in the database of a URL, once for all tests.
MakeTables: TypeAlias = Callable[[str], Awaitable[None]]
# What the fixtures of these names give.
ExhaustedPool: TypeAlias = Callable[..., AbstractAsyncContextManager[None]]
ReplicaDown: TypeAlias = Callable[[], AbstractAsyncContextManager[None]]
RoundTrips: TypeAlias = Callable[..., AbstractContextManager[Trips]]
Statements: TypeAlias = Callable[..., AbstractContextManager[list[str]]]
# What asks for a network, which leads every connection of the test through this process and its event loop.
WIRED = {"network", "replica_down", "round_trips"}
_numbers = count(1)


def pytest_configure(config: pytest.Config) -> None:
    """Share the ports out among xdist's processes: none takes the port of a server that another one has stopped."""
    worker: dict[str, Any] | None = getattr(config, "workerinput", None)
    if worker is not None:
        first, step = int(worker["workerid"].removeprefix("gw")), int(worker["workercount"])
        postgres.PORTS = postgres.PORTS[first::step]


@pytest.fixture(scope="session")
def make_tables() -> MakeTables:
    """Override it: return a coroutine function that makes the tables in the database of a URL, as its owner.

    DATABASE_URL and the others lead to that database while it runs; all other DATABASE_… are taken away.
    """

    async def none(_url: str) -> None:
        """Leave the database empty."""

    return none


@pytest.fixture
def app() -> NoReturn:
    """Override it: return the FastAPI application; what it reads of the environment leads to `database`."""
    pytest.fail(
        "No test can know your application: write a fixture `app` that returns it (docs/testing.md).", pytrace=False
    )


@pytest.fixture
def token() -> str | None:
    """Override it: return the bearer token that `client` sends; None sends none."""
    return None


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def database_servers() -> AsyncIterator[DatabaseServers]:
    """Give a primary and a streaming replica: one pair for each process that runs tests.

    PGLIFEGUARD_TEST_URL and PGLIFEGUARD_TEST_REPLICA_URL name servers that are there instead.
    """
    async with database_servers_of_this_run() as servers:
        yield servers


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def template(database_servers: DatabaseServers, make_tables: MakeTables) -> AsyncIterator[str]:
    """Give the name of the database that each test's own is a copy of."""
    name = f"template_{secrets.token_hex(4)}"
    await database_servers.create(name)
    made = Database(name, database_servers)
    try:
        # Its tables may come from modules that read their settings when they are imported.
        with pytest.MonkeyPatch.context() as environment:
            _lead_to(made, environment)
            await make_tables(made.url)
        await database_servers.wait_left(name)
        yield name
    finally:
        await database_servers.drop(name)


@pytest_asyncio.fixture
async def maybe_network(
    request: pytest.FixtureRequest, database_servers: DatabaseServers
) -> AsyncIterator[Network | None]:
    """Give the network of a test that asks for one, by one of the fixtures that need it."""
    if WIRED.isdisjoint(request.fixturenames):
        yield None
        return
    async with database_servers.network() as network:
        yield network


@pytest.fixture
def network(maybe_network: Network | None) -> Network:
    """Give the network between the application and its servers, to break it."""
    if maybe_network is None:
        pytest.fail("The network is laid before the test begins: name the fixture among its arguments.", pytrace=False)
    return maybe_network


@pytest_asyncio.fixture
async def database(
    monkeypatch: pytest.MonkeyPatch, database_servers: DatabaseServers, template: str, maybe_network: Network | None
) -> AsyncIterator[Database]:
    """Give a database with the tables of `make_tables`, which the replica has too, and point the environment at it.

    DATABASE_URL and the others lead to it until the end of the test; all other DATABASE_… are taken away.
    """
    name = f"{template}_{next(_numbers)}"
    await database_servers.create(name, template=template)
    made = Database(name, database_servers, maybe_network)
    _lead_to(made, monkeypatch)
    yield made
    await database_servers.drop(name)


@pytest_asyncio.fixture
async def running_app(app: Any) -> AsyncIterator[Running]:
    """Give the application with its lifespan open."""
    async with running(app) as served:
        yield served


@pytest_asyncio.fixture
async def client(running_app: Running, token: str | None) -> AsyncIterator[httpx.AsyncClient]:
    """Give a client of the application, without a socket between them. It keeps cookies, so it reads what it wrote."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    transport = httpx.ASGITransport(app=running_app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as made:
        yield made


@pytest_asyncio.fixture
async def live_url(running_app: Running) -> AsyncIterator[str]:
    """Give the URL of the application on a real socket of this machine, served by uvicorn."""
    async with listening(running_app) as url:
        yield url


@pytest.fixture
def databases(running_app: Running) -> Databases:
    """Give the application's `Databases`."""
    found: Databases | None = getattr(running_app.app.state, "databases", None)
    if found is None:
        pytest.fail("Lifeguard is not installed in the application: write a fixture `databases`.", pytrace=False)
    return found


@pytest.fixture
def exhausted_pool(databases: Databases) -> ExhaustedPool:
    """Give a function for `async with`: in its block every connection of a pool is held.

    It raises LookupError for a pool that is not there.
    """

    def hold(pool: str = "primary") -> AbstractAsyncContextManager[None]:
        pools = {database.name: database for database in databases.all()}
        if pool not in pools:
            raise LookupError(f"there is no pool {pool!r}, but {', '.join(pools)}")
        return exhausted(pools[pool])

    return hold


@pytest.fixture
def replica_down(network: Network, databases: Databases) -> ReplicaDown:
    """Give a function for `async with`: in its block nothing gets through to the replica."""
    return partial(replica_away, network, databases)


@pytest.fixture
def statements(databases: Databases) -> Statements:
    """Give a function for `with`: its block fails unless it sends as many statements as are said, if a number is."""
    return partial(counting_statements, databases)


@pytest.fixture
def round_trips(network: Network, databases: Databases) -> RoundTrips:
    """Give a function for `with`: its block fails unless each server is waited for as often as is said, if it is."""
    return partial(counting_round_trips, network, databases)


def _lead_to(database: Database, environment: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("DATABASE_")]:
        environment.delenv(variable)
    for variable, value in database.variables.items():
        environment.setenv(variable, value)
