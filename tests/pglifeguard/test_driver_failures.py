"""A failure of the driver has one meaning, whether the driver or SQLAlchemy ran the statement."""

import logging
from typing import Any

import asyncpg
import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from pglifeguard.consistency import Consistency
from pglifeguard.driver_failures import ONE_AT_A_TIME, Fate, examine
from pglifeguard.errors import CommandTimeout, ConnectionLost, WriteInReadSession, classify, database_of
from pglifeguard.query import Query
from pglifeguard.sessions import ReadSession
from tests.conftest import Database
from tests.pglifeguard.conftest import pooled
from tests.service import Service

KILL = Query(select(func.pg_terminate_backend(func.pg_backend_pid())))
NEXT_NUMBER = Query(select(func.nextval("patients_id_seq")))


async def run(session: ReadSession, query: Query[Any], lane: str) -> None:
    """Run a query by one of the two lanes."""
    if lane == "driver":
        await session.rows(query)
    else:
        await session.execute(query.statement)


@pytest.mark.parametrize("lane", ["driver", "sqlalchemy"])
async def test_session_that_the_server_ends_is_lost(service: Service, lane: str) -> None:
    """Both lanes name the loss and its database, and nobody uses the connection again."""
    pool = service.databases.primary.pool
    idle = pool.figures().checked_in
    with pytest.raises((asyncpg.PostgresError, DBAPIError, ConnectionLost)) as failed:
        async with service.databases.writing() as session:
            await run(session, KILL, lane)

    answer = classify(failed.value)

    assert answer is not None
    assert (answer.code, database_of(failed.value)) == ("connection_lost", "primary")
    assert pool.figures().checked_in == idle - 1


@pytest.mark.parametrize("lane", ["driver", "sqlalchemy"])
async def test_write_in_a_read_session_is_a_bug_and_no_failover(service: Service, lane: str) -> None:
    """Both lanes refuse it by one name, and the connections to a primary that is well stay."""
    pool = service.databases.primary.pool
    idle = pool.figures().checked_in
    with pytest.raises(WriteInReadSession):
        async with service.databases.reading(Consistency(primary_only=True)) as session:
            await run(session, NEXT_NUMBER, lane)

    assert pool.figures().checked_in == idle


def test_bare_failures_get_a_name() -> None:
    """What asyncpg lets through of the operating system is a timeout or a loss, and ends the connection."""
    late = examine(TimeoutError(), None, database="primary", reads_only=False)
    reset = examine(ConnectionResetError(), None, database="primary", reads_only=False)

    assert isinstance(late.error, CommandTimeout)
    assert isinstance(reset.error, ConnectionLost)
    assert {late.fate, reset.fate} == {Fate.CLOSED}


def test_server_that_shuts_down_ends_the_connection() -> None:
    """Its last message is an answer, after which the socket may look open for a moment."""
    ended = examine(asyncpg.AdminShutdownError("terminating connection"), None, database="primary", reads_only=False)

    assert (ended.error, ended.fate) == (None, Fate.CLOSED)


async def test_loss_that_sqlalchemy_names_is_its_own_exception(database: Database) -> None:
    """A connection that asyncpg finds closed is a DBAPIError with `connection_invalidated`, which is answered 503."""
    async with pooled(database.url()) as p, p.database.engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        driver: Any = (await connection.get_raw_connection()).driver_connection
        driver.terminate()

        with pytest.raises(DBAPIError) as failed:
            await connection.execute(text("SELECT 1"))

        answer = classify(failed.value)
        assert answer is not None
        assert (failed.value.connection_invalidated, answer.code) == (True, "connection_lost")


async def test_loss_is_logged_as_sqlalchemy_logs_it(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """By the logger `sqlalchemy.pool`, which is silent at INFO though the rest of the process is not."""
    caplog.set_level(logging.INFO)
    async with pooled(database.url()) as p:
        for level in (logging.NOTSET, logging.INFO):
            caplog.set_level(level, "sqlalchemy.pool")
            async with p.database.engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
                driver: Any = (await connection.get_raw_connection()).driver_connection
                driver.terminate()
                with pytest.raises(DBAPIError):
                    await connection.execute(text("SELECT 1"))

            told = [record.name for record in caplog.records if record.msg.startswith("%sInvalidate connection")]
            assert told == ([] if level == logging.NOTSET else ["sqlalchemy.pool.PoolAdapter"])


async def test_two_tasks_on_one_connection_are_a_bug(database: Database) -> None:
    """That asyncpg finds the connection busy is no loss, and the connection works on."""
    async with pooled(database.url()) as p:
        slot = await p.pool.acquire()
        connection = slot.info["checkout"].connection
        busy = asyncpg.InterfaceError("cannot perform operation: another operation is in progress")

        meaning = examine(busy, connection, database="primary", reads_only=False)

        assert (meaning.error, meaning.fate) == (None, Fate.KEPT)
        # The driver's sentence does not say what to do.
        assert busy.__notes__ == [ONE_AT_A_TIME]
        p.pool.release(slot)


async def test_commit_that_was_not_sent_is_a_lost_connection(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asyncpg has read that the server ended the session, and the event loop has not seen the socket close yet."""

    async def not_sent(*_: object) -> None:
        raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")

    async with pooled(database.url()) as p:
        slot = await p.pool.acquire()
        connection = slot.info["checkout"].connection
        transaction = connection.transaction()
        await transaction.start()
        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.Connection, "execute", not_sent)
            with pytest.raises(ConnectionLost, match="nothing was committed"):
                await transaction.commit()

        assert connection.is_closed()
        p.pool.release(slot)
