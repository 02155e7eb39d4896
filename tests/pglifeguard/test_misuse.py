"""Misuse that would lose data in silence raises an error whose sentence says what to write."""

from collections.abc import Awaitable, Callable
from datetime import date
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from app.patients.models import Patient
from pglifeguard.driver_failures import SWALLOWED
from pglifeguard.errors import ConnectionLost, TransactionAborted
from pglifeguard.orm import ENDED
from pglifeguard.query import Query
from pglifeguard.sessions import ReadSession, WriteSession
from tests.conftest import Database, Execute
from tests.pglifeguard.conftest import pooled
from tests.service import Service

COUNT = Query(select(func.count().label("count")).select_from(Patient))
INSERT = text("INSERT INTO patients (mrn, full_name, birth_date) VALUES ('A-1', 'Ada', '1915-12-10')")
NUMBERS = text("SELECT generate_series(1, 10000)")
ONE: dict[str, Any] = {"pool_size": 1, "max_overflow": 0}


def ada() -> Patient:
    """Make a patient of whom there may be one."""
    return Patient(mrn="A-1", full_name="Ada", birth_date=date(1915, 12, 10))


async def by_statement(session: WriteSession) -> None:
    """Store her by a statement."""
    await session.execute(INSERT)


async def by_flush(session: WriteSession) -> None:
    """Store her by the unit of work."""
    session.add(ada())
    await session.flush()


async def execute_more(session: WriteSession) -> None:
    """Go on by SQLAlchemy."""
    await session.execute(text("SELECT 1"))


async def read_more(session: WriteSession) -> None:
    """Go on by a query."""
    await session.rows(COUNT)


async def flush_more(session: WriteSession) -> None:
    """Go on by the unit of work."""
    session.add(Patient(mrn="A-2", full_name="Ada", birth_date=date(1915, 12, 10)))
    await session.flush()


async def end(session: WriteSession) -> None:
    """Go on to the commit."""


@pytest.mark.parametrize("go_on", [execute_more, read_more, flush_more, end])
@pytest.mark.parametrize("store", [by_statement, by_flush])
async def test_swallowed_failure_is_told(
    service: Service,
    execute: Execute,
    store: Callable[[WriteSession], Awaitable[None]],
    go_on: Callable[[WriteSession], Awaitable[None]],
) -> None:
    """PostgreSQL refuses what comes after a failure; the sentence says how to go on."""
    await execute(str(INSERT))

    async def swallow() -> None:
        async with service.databases.writing() as session:
            try:
                await store(session)
            except IntegrityError:
                await go_on(session)

    with pytest.raises(TransactionAborted) as told:
        await swallow()

    assert str(told.value) == SWALLOWED


async def test_swallowed_loss_of_the_connection_is_a_loss(service: Service, execute: Execute) -> None:
    """Whoever goes on without a connection is told what became of it."""

    async def swallow() -> None:
        async with service.databases.writing() as session:
            process = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            await execute("SELECT pg_terminate_backend($1)", process)
            with pytest.raises((DBAPIError, ConnectionLost)):
                await session.execute(text("SELECT 1"))
            await session.execute(text("SELECT 1"))

    with pytest.raises(ConnectionLost, match="nothing was committed"):
        await swallow()


@pytest.mark.parametrize("way", ["add", "add_all", "delete"])
async def test_what_is_added_after_the_end_is_told(service: Service, way: str) -> None:
    """Nobody would store it: a background task has the session of its request, which is over."""
    async with service.databases.writing() as session:
        await session.execute(text("SELECT 1"))

    async def go_on() -> None:
        if way == "delete":
            await session.delete(ada())
        else:
            getattr(session, way)([ada()] if way == "add_all" else ada())

    with pytest.raises(RuntimeError) as told:
        await go_on()

    assert str(told.value) == ENDED


async def test_commit_after_the_end_is_told(service: Service) -> None:
    """It would not store what a background task has changed in an object of its request."""
    async with service.databases.writing() as session:
        session.add(patient := ada())
        await session.flush()
    patient.full_name = "Ada Lovelace"

    with pytest.raises(RuntimeError) as told:
        await session.commit()

    assert str(told.value) == ENDED


@pytest.mark.parametrize("way", ["stream", "stream_scalars"])
async def test_stream_that_outlives_its_session_is_told(database: Database, way: str) -> None:
    """And the transaction of whoever has the connection now goes on: it would be aborted."""
    async with pooled(database.url(), **ONE) as p:
        async with ReadSession(p.database, p.database.reads, label="first") as session:
            over = await getattr(session, way)(text("SELECT 1"))
            assert len(await over.all()) == 1
            rows = await getattr(session, way)(NUMBERS)
            await anext(rows)
        async with ReadSession(p.database, p.database.reads, label="second") as other:
            await other.execute(text("SELECT 1"))

            with pytest.raises(RuntimeError) as told:
                async for _ in rows:
                    pass

            assert (await other.execute(text("SELECT 2"))).scalar_one() == 2
    assert str(told.value) == ENDED


async def test_stream_that_is_read_to_its_end_is_let_go(database: Database) -> None:
    """A job that streams all day in one session keeps none of it."""
    async with pooled(database.url()) as p, ReadSession(p.database, p.database.reads, label="job") as session:
        for _ in range(3):
            assert len(await (await session.stream(NUMBERS)).all()) == 10_000

        assert session.connection_held is not None
        assert len(session.connection_held._streams) == 1
