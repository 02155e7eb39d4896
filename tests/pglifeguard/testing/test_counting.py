"""What a block sends is counted, and a wrong number is told with what was sent."""

import asyncio

import asyncpg
import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from pglifeguard import Databases
from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing import Database, Network, RoundTrips, Statements


async def test_statements_are_counted_without_the_librarys_own(
    databases: Databases, client: httpx.AsyncClient, statements: Statements
) -> None:
    """Of every pool, the failed ones too; neither the frame of a transaction, nor what happens outside of the block."""
    await client.get("/books")
    with statements() as sent:
        await client.post("/books", params={"title": "Notes"})
        async with databases.reporting() as session:
            await session.execute(text("SELECT 1"))
        with pytest.raises(DBAPIError):
            async with databases.writing() as session:
                await session.execute(text("SELECT 1/0"))
    await client.get("/books")

    assert [statement.split()[0] for statement in sent] == ["INSERT", "SELECT", "SELECT"]


async def test_wrong_number_of_statements_lists_them(client: httpx.AsyncClient, statements: Statements) -> None:
    """In their order; the right number is no error, and neither hides the block's own."""
    with statements(1):
        await client.get("/books")
    with pytest.raises(AssertionError, match=r"^1 statements, 2 expected:\n1\. SELECT title FROM"), statements(2):
        await client.get("/books")
    with pytest.raises(ZeroDivisionError), statements(1):
        _ = 1 / 0


async def test_round_trips_are_counted_without_the_monitors(
    databases: Databases, network: Network, round_trips: RoundTrips
) -> None:
    """Monitors ask twenty times a second here, and the application has asked nothing."""
    before = network.primary.round_trips

    async def monitors_have_asked() -> bool:
        return network.primary.round_trips >= before + 3

    with round_trips(primary=0, replica=0) as trips:
        assert await eventually(monitors_have_asked, 5)
    async with databases.reading() as session:
        await session.execute(text("SELECT 1"))

    assert (trips.primary, trips.replica) == (0, 0)


async def test_wrong_number_of_round_trips_is_told(client: httpx.AsyncClient, round_trips: RoundTrips) -> None:
    """For each server; a server without a number may have any."""
    await client.post("/books", params={"title": "Notes"})
    client.cookies.clear()

    with round_trips(primary=4) as trips:
        await client.post("/books", params={"title": "Notes"})
        await client.get("/books")
    told = r"^4 round trips to the primary \(3 expected\) and 0 round trips to the replica \(any expected\)$"
    with pytest.raises(AssertionError, match=told), round_trips(primary=3):
        await client.post("/books", params={"title": "Notes"})

    assert trips.replica > 0


async def test_login_counts(database: Database, round_trips: RoundTrips) -> None:
    """A connection that a block opens is part of what it costs."""
    with round_trips() as trips:
        connection = await asyncpg.connect(database.url)
        await connection.fetchval("SELECT 1")
        await asyncio.wait_for(connection.close(), 5)

    assert trips.primary >= 3
