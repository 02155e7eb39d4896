"""Databases are opened in the event loop that uses them, closed, and opened again."""

import asyncio
import gc
import logging
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import literal, select

from app.main import create_app
from pglifeguard.databases import Databases
from pglifeguard.errors import PoolExhausted
from pglifeguard.metrics import Metrics
from pglifeguard.query import Query
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database
from tests.service import ADA, serving

ONE = Query(select(literal(1).label("one")))


async def read(databases: Databases) -> int:
    """Ask for a one."""
    async with databases.reading() as session:
        return int((await session.rows(ONE))[0].one)


def in_a_loop_of_its_own(job: Callable[[], object]) -> None:
    """Run a coroutine function by asyncio.run, as a script does for each of its jobs."""
    asyncio.run(job())  # type: ignore[arg-type]  # A function without a coroutine would be another test.


async def test_each_job_may_have_its_own_loop(database: Database) -> None:
    """One Databases serves job after job, each by asyncio.run, when each opens and closes it."""
    databases, answers = Databases(database.settings(), Metrics()), []

    async def job() -> None:
        async with databases:
            answers.append(await read(databases))

    for _ in range(3):
        await asyncio.to_thread(in_a_loop_of_its_own, job)

    assert answers == [1, 1, 1]


@pytest.mark.parametrize("opener", ["reading", "writing", "reporting"])
async def test_session_before_opening_is_refused(database: Database, opener: str) -> None:
    """A session of databases that nobody opened says how to open them."""
    databases = Databases(database.settings(), Metrics())

    with pytest.raises(RuntimeError, match="not open: `async with Databases"):
        getattr(databases, opener)()


async def test_session_after_closing_is_refused(database: Database) -> None:
    """Closed databases refuse as a shutdown does; opened again, they answer."""
    databases = Databases(database.settings(), Metrics())
    async with databases:
        pass

    with pytest.raises(PoolExhausted):
        await read(databases)
    async with databases:
        assert await read(databases) == 1


async def test_session_in_another_loop_is_refused(database: Database) -> None:
    """A job in a loop of its own is told that the connections belong to another one, and harms nothing."""
    async with Databases(database.settings(), Metrics()) as databases:

        async def job() -> None:
            with pytest.raises(RuntimeError, match="open in another event loop"):
                databases.reading()

        await asyncio.to_thread(in_a_loop_of_its_own, job)

        assert await read(databases) == 1


async def test_opening_twice_is_refused(database: Database) -> None:
    """Databases that are open are not opened once more, in this loop or another."""
    async with Databases(database.settings(), Metrics()) as databases:
        with pytest.raises(RuntimeError, match="open already"):
            await databases.open()

        assert await read(databases) == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_loop_that_ended_without_closing_is_left_behind(database: Database) -> None:
    """After a job that never closed them they are opened anew, with connections of the new loop."""
    databases = Databases(database.settings(), Metrics())

    async def careless() -> None:
        await databases.open()
        await read(databases)

    await asyncio.to_thread(in_a_loop_of_its_own, careless)

    async with databases:
        assert await read(databases) == 1
        gc.collect()  # The sockets that nobody closed warn here, and not in the next test.


async def test_client_without_the_lifespan_is_told(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """A TestClient that is not entered runs no lifespan: the failure says that, and how to write it."""
    client = TestClient(create_app(database.settings()), raise_server_exceptions=False)
    caplog.set_level(logging.ERROR)

    answer = await asyncio.to_thread(client.get, "/patients/1")

    assert answer.status_code == 500
    assert "with TestClient(app) as client" in caplog.text


async def test_one_application_serves_test_after_test(database: Database) -> None:
    """The lifespan may run again and again, as where each test enters a TestClient of one application."""
    app = create_app(database.settings())

    def enter_and_ask() -> int:
        with TestClient(app) as client:
            return client.get("/patients/1").status_code

    for _ in range(2):
        assert await asyncio.to_thread(enter_and_ask) == 404


@pytest.mark.parametrize("question", ["select pg_catalog.version()", "show standard_conforming_strings"])
async def test_connection_that_is_lost_while_sqlalchemy_sets_it_up(
    database: Database, proxy: Proxy, question: str
) -> None:
    """On the first connection of an engine its dialect asks for the version: lost then, the database is unreachable."""
    primary = {"url": proxy.url(database.url()), "pool_min_size": 0}
    async with serving(database.settings(replica=False, primary=primary)) as service:
        proxy.fates[question] = "lose_request"
        lost = await service.client.post("/patients", json=ADA)
        proxy.fates.clear()
        found = await service.client.post("/patients", json=ADA)

    assert (lost.status_code, lost.json()["code"]) == (503, "database_unreachable")
    assert found.status_code == 201
