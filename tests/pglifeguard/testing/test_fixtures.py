"""Each fixture of the plugin gives what it says; docs/testing.md shows them together."""

import os
from types import SimpleNamespace
from typing import Any, cast

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from pglifeguard import DatabasesSettings
from pglifeguard.embedded import postgres
from pglifeguard.embedded.account import EmbeddedError
from pglifeguard.testing import (
    Database,
    DatabaseServers,
    ExhaustedPool,
    Network,
    eventually,
    fixtures,
    pytest_configure,
)
from pglifeguard.testing.serving import Running

# A fixture's function, without pytest around it.
APP, DATABASES, NETWORK, TABLES, TEMPLATE, TOKEN = (
    cast("Any", getattr(fixtures, name)).__wrapped__
    for name in ("app", "databases", "network", "make_tables", "template", "token")
)


async def test_each_test_has_a_database_of_its_own(database: Database, client: httpx.AsyncClient) -> None:
    """With the tables and without rows; the environment leads there, and nothing else of a developer's is left."""
    assert await database.execute("SELECT count(*) FROM books") == 0
    assert (await client.post("/books", params={"title": "Notes"})).json() == 1
    assert (await client.get("/books")).json() == ["Notes"]
    assert os.environ["DATABASE_URL"] == database.url
    assert {name for name in os.environ if name.startswith("DATABASE_")} <= set(database.variables)


@pytest.fixture
def of_a_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what somebody has set for another purpose."""
    monkeypatch.setenv("DATABASE_POOL_SIZE", "17")


@pytest.mark.usefixtures("of_a_developer", "database")
def test_settings_of_a_developer_are_out_of_the_way() -> None:
    """A test is the same on every machine."""
    assert "DATABASE_POOL_SIZE" not in os.environ


async def test_next_test_finds_nothing_of_it(database: Database) -> None:
    """The first row of a table has the first number."""
    assert await database.execute("INSERT INTO books (title) VALUES ($1) RETURNING id", "Notes") == 1


async def test_application_is_on_a_socket(live_url: str, client: httpx.AsyncClient) -> None:
    """It is the one that `client` calls, and its lifespan is open once."""
    await client.post("/books", params={"title": "Notes"})
    async with httpx.AsyncClient(base_url=live_url, cookies=client.cookies) as other:
        assert (await other.get("/books")).json() == ["Notes"]


class TestToken:
    """With a fixture `token` of one's own."""

    @pytest.fixture
    def token(self) -> str:
        """Give a token."""
        return "abc"

    async def test_client_sends_the_token(self, client: httpx.AsyncClient) -> None:
        """As a bearer token."""
        assert client.headers["Authorization"] == "Bearer abc"


async def test_pool_without_connections_refuses(client: httpx.AsyncClient, exhausted_pool: ExhaustedPool) -> None:
    """Each pool by its name; the others go on, and all is given back."""
    async with exhausted_pool():
        refused = await client.post("/books", params={"title": "Notes"})
        read = await client.get("/books")
    async with exhausted_pool("replica"):
        written = await client.post("/books", params={"title": "Notes"})

    assert (refused.status_code, refused.json()["code"], read.status_code) == (503, "pool_exhausted", 200)
    assert written.status_code == 200
    with pytest.raises(LookupError, match="there is no pool 'replicca', but primary, replica, analytics"):
        exhausted_pool("replicca")


async def test_network_is_between(network: Network, client: httpx.AsyncClient, database: Database) -> None:
    """Every connection of the application goes through it; `execute` is beside it."""
    network.primary.refuse()
    network.primary.cut()

    assert (await client.post("/books", params={"title": "Notes"})).status_code == 503
    assert await database.execute("SELECT count(*) FROM books") == 0


async def test_what_is_missing_is_told() -> None:
    """With what to write."""
    with pytest.raises(pytest.fail.Exception, match="write a fixture `app`"):
        APP()
    with pytest.raises(pytest.fail.Exception, match="write a fixture `databases`"):
        DATABASES(Running(FastAPI()))
    with pytest.raises(pytest.fail.Exception, match="among its arguments"):
        NETWORK(None)
    assert (await TABLES()("postgresql://nowhere"), TOKEN()) == (None, None)


async def test_environment_leads_to_the_template_while_tables_are_made(
    database_servers: DatabaseServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that makes a Lifeguard when it is imported can be imported there; afterwards all is as it was."""
    monkeypatch.setenv("DATABASE_POOL_SIZE", "7")
    before = dict(os.environ)
    led_to: list[str] = []

    async def make_tables(url: str) -> None:
        assert (os.environ["DATABASE_URL"], "DATABASE_POOL_SIZE" in os.environ) == (url, False)
        led_to.append(DatabasesSettings().primary.parameters.database)

    making = TEMPLATE(database_servers, make_tables)
    name = await anext(making)
    await making.aclose()

    assert led_to == [name]
    assert dict(os.environ) == before


async def test_connection_that_make_tables_leaves_is_told(database_servers: DatabaseServers) -> None:
    """Before the first test, and the database is not left behind on servers that are there."""
    left: list[asyncpg.Connection[asyncpg.Record]] = []

    async def make_tables(url: str) -> None:
        left.append(await asyncpg.connect(url))

    with pytest.raises(EmbeddedError, match="close the connections that make_tables opens"):
        await anext(TEMPLATE(database_servers, make_tables))

    async def ended_by_the_server() -> bool:
        return left[0].is_closed()

    assert await eventually(ended_by_the_server, 5)


def test_processes_share_the_ports_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of xdist's has ports of its own, and together they have all; one process alone has all."""
    monkeypatch.setattr(postgres, "PORTS", range(20_000, 20_010))
    pytest_configure(cast("pytest.Config", SimpleNamespace()))
    alone = postgres.PORTS

    shares = []
    for number in range(3):
        monkeypatch.setattr(postgres, "PORTS", alone)
        worker = SimpleNamespace(workerinput={"workerid": f"gw{number}", "workercount": 3})
        pytest_configure(cast("pytest.Config", worker))
        shares.append(set(postgres.PORTS))

    assert sorted(port for share in shares for port in share) == list(alone) == list(range(20_000, 20_010))
