"""What a session commits in steps, what goes by the driver's own connection, and what a request's transaction is."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import date
from typing import Any

import asyncpg
import pytest
from fastapi import HTTPException
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session

from app.patients import queries
from app.patients.models import Patient
from pglifeguard.consistency import Consistency
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import ConnectionLost, OutcomeUnknown, TransactionAborted
from pglifeguard.fastapi.idempotency import HEADER, IdempotentRoute
from pglifeguard.fastapi.sessions import WriteDB
from pglifeguard.server_position import WRITTEN
from pglifeguard.sessions import ReadSession, WriteSession
from pglifeguard.testing.proxy import Fate, Proxy
from tests.conftest import Database, Execute
from tests.service import Service, quiet

pytestmark = pytest.mark.shares_service
COUNT = "SELECT count(*) FROM patients"
MRNS = "SELECT coalesce(string_agg(mrn, ',' ORDER BY mrn), '') FROM patients"
BORN = date(1915, 12, 10)
ADD = text("INSERT INTO patients (mrn, full_name, birth_date) VALUES (:mrn, 'Ada', '1915-12-10')")
INSERT = "INSERT INTO patients (mrn, full_name, birth_date) VALUES ('A-1', 'Ada', '1915-12-10')"
COLUMNS = ("mrn", "full_name", "birth_date")
LANES = ("rows", "execute", "add", "copy")


async def store(session: WriteSession, lane: str, mrn: str) -> None:
    """Store a patient by one of the ways."""
    if lane == "rows":
        await queries.add_patient(session, {"mrn": mrn, "full_name": "Ada", "birth_date": BORN})
    elif lane == "execute":
        await session.execute(ADD, {"mrn": mrn})
    elif lane == "add":
        session.add(Patient(mrn=mrn, full_name="Ada", birth_date=BORN))
    else:
        await session.copy_records("patients", [(mrn, "Ada", BORN)], columns=COLUMNS)


async def driver_of(session: ReadSession) -> Any:
    """Return the driver's connection."""
    return (await (await session.connection()).get_raw_connection()).driver_connection


# In steps.


@pytest.mark.fresh_service
@pytest.mark.parametrize("lane", LANES)
async def test_commit_after_each_batch_stores_each_batch(service: Service, execute: Execute, lane: str) -> None:
    """A job that fails in its third batch has stored two, on one connection."""

    async def job() -> None:
        async with service.databases.writing() as session:
            for number in range(3):
                await store(session, lane, f"A-{number}")
                if number == 2:
                    await session.flush()
                    raise KeyError
                await session.commit()
                assert await execute(COUNT) == number + 1
                assert service.databases.primary.pool.figures().checked_out == 1

    with pytest.raises(KeyError):
        await job()
    assert await execute(MRNS) == "A-0,A-1"
    assert service.sample("db_connection_acquire_seconds_count", pool="primary") == 1


@pytest.mark.parametrize("first", LANES)
@pytest.mark.parametrize("second", LANES)
async def test_every_way_goes_on_after_a_commit(service: Service, execute: Execute, first: str, second: str) -> None:
    """Each lane begins the next transaction, whichever one began the last; a rollback takes back the last one only."""
    async with service.databases.writing() as session:
        await store(session, first, "A-0")
        await session.commit()
        await store(session, second, "A-1")
        await session.rollback()
        await store(session, first, "A-2")
        await store(session, second, "A-3")

    assert await execute(MRNS) == "A-0,A-2,A-3"


async def test_begin_commits_at_the_end_of_its_block(service: Service, execute: Execute) -> None:
    """`session.begin()` is SQLAlchemy's word for a transaction, and it ends where its block ends."""
    async with service.databases.writing() as session:
        for number in range(2):
            async with session.begin():
                await session.execute(ADD, {"mrn": f"A-{number}"})
            assert await execute(COUNT) == number + 1
        with suppress(KeyError):
            async with session.begin():
                await session.execute(ADD, {"mrn": "A-2"})
                raise KeyError

    assert await execute(MRNS) == "A-0,A-1"


@pytest.mark.parametrize("lane", ["rows", "execute"])
async def test_begin_after_the_first_statement_is_refused(service: Service, execute: Execute, lane: str) -> None:
    """As in SQLAlchemy, the first statement has begun a transaction already, in whatever lane; it is not lost."""
    async with service.databases.writing() as session:
        await store(session, lane, "A-0")
        assert session.in_transaction()
        with pytest.raises(InvalidRequestError, match="already begun"):
            await session.begin()
        assert session.get_transaction() is not None

    assert await execute(MRNS) == "A-0"


@pytest.mark.parametrize("lane", LANES)
async def test_commit_in_an_endpoint_stands_when_the_endpoint_fails(
    service: Service, execute: Execute, lane: str
) -> None:
    """What it has committed is stored, and its client may look for it; what came after is not."""

    @service.app.post("/steps")
    async def steps(session: WriteDB) -> None:
        await store(session, lane, "A-0")
        await session.commit()
        await store(session, lane, "A-1")
        raise HTTPException(409)

    answer = await service.client.post("/steps")

    assert answer.status_code == 409
    assert "X-Consistency-Token" in answer.headers
    assert await execute(MRNS) == "A-0"


async def test_commit_in_a_read_session_ends_its_snapshot(service: Service, execute: Execute) -> None:
    """A report that commits sees what has come since, from its next statement on."""
    async with service.databases.reporting() as session:
        assert (await session.execute(text(COUNT))).scalar_one() == 0
        await execute("INSERT INTO patients (mrn, full_name, birth_date) VALUES ('A-1', 'Ada', '1980-01-01')")
        await service.databases.replicas[0].monitor.probe()
        assert (await session.execute(text(COUNT))).scalar_one() == 0
        await session.commit()

        async def seen() -> bool:
            found: int = (await session.execute(text(COUNT))).scalar_one()
            await session.commit()
            return found == 1

        assert await eventually(seen, 5)


@pytest.mark.parametrize("lane", ["rows", "execute"])
async def test_swallowed_failure_is_told_at_the_commit(service: Service, execute: Execute, lane: str) -> None:
    """Also what failed by the driver's own connection, of which SQLAlchemy has heard nothing."""

    async def job(by: str) -> None:
        async with service.databases.writing() as session:
            await store(session, lane, "A-0")
            failing: Any = (await driver_of(session)).fetch if by == "driver" else session.execute
            with pytest.raises(Exception, match="division by zero"):
                await failing("SELECT 1 / 0" if by == "driver" else text("SELECT 1 / 0"))
            await session.commit()

    for by in ("driver", "session"):
        with pytest.raises(TransactionAborted):
            await job(by)
    assert await execute(COUNT) == 0


@pytest.mark.parametrize("lane", ["rows", "execute"])
@pytest.mark.parametrize(("fate", "stored"), [("lose_request", 0), ("lose_answer", 1)])
async def test_connection_lost_in_a_commit_is_an_unknown_outcome(  # noqa: PLR0913, PLR0917  # Fixtures and parameters.
    database: Database, proxy: Proxy, execute: Execute, lane: str, fate: Fate, stored: int
) -> None:
    """In steps as at the end."""
    async with quiet(database.settings(replica=False, primary={"url": proxy.url(database.url())})) as service:

        async def job() -> None:
            async with service.databases.writing() as session:
                await store(session, lane, "A-0")
                proxy.fates["COMMIT"] = fate
                await session.commit()

        with pytest.raises(OutcomeUnknown):
            await job()
        assert await execute(COUNT) == stored


@pytest.mark.parametrize("lane", ["rows", "execute"])
async def test_connection_lost_before_a_commit_has_stored_nothing(
    service: Service, execute: Execute, lane: str
) -> None:
    """And the session says so."""

    async def job() -> None:
        async with service.databases.writing() as session:
            await store(session, lane, "A-0")
            await session.invalidate()
            assert service.databases.primary.pool.figures().checked_out == 0
            await store(session, lane, "A-1")
            driver = await driver_of(session)
            driver.terminate()
            await session.commit()

    with pytest.raises(ConnectionLost):
        await job()
    assert await execute(COUNT) == 0


async def test_begin_that_fails_after_a_commit_leaves_nothing(
    database: Database, proxy: Proxy, execute: Execute
) -> None:
    """The connection dies between two steps: the first is stored, and no permit is lost."""
    async with quiet(database.settings(replica=False, primary={"url": proxy.url(database.url())})) as service:

        async def job() -> None:
            async with service.databases.writing() as session:
                await store(session, "rows", "A-0")
                await session.commit()
                proxy.fates["BEGIN"] = "lose_request"
                await store(session, "rows", "A-1")

        with pytest.raises(asyncpg.PostgresConnectionError):
            await job()
        figures = service.databases.primary.pool.figures()
        assert (figures.checked_out, figures.available) == (0, figures.total)
        assert await execute(MRNS) == "A-0"


# With a key.


@pytest.mark.parametrize("name", ["commit", "rollback", "close", "reset", "invalidate"])
@pytest.mark.parametrize("lane", ["session", "inside"])
async def test_request_with_a_key_is_one_transaction(service: Service, execute: Execute, name: str, lane: str) -> None:
    """Its answer is stored with its work or not at all, so nothing ends the transaction before."""

    async def steps(session: WriteDB) -> None:
        await store(session, "execute", "A-0")
        if lane == "session":
            await getattr(session, name)()
        else:
            await session.run_sync(lambda sync: getattr(sync, name)())

    service.app.router.add_api_route("/steps", steps, methods=["POST"], route_class_override=IdempotentRoute)

    answer = await service.client.post("/steps", headers={HEADER: "k"})

    assert answer.status_code == 500
    assert await execute(COUNT) == 0
    assert await execute("SELECT count(*) FROM idempotency_keys") == 0


async def commit_handle(session: WriteSession) -> None:
    """Commit by the handle that SQLAlchemy's asyncio session gives."""
    transaction = session.get_transaction()
    assert transaction is not None
    await transaction.commit()


async def begin_inside(session: WriteSession) -> None:
    """Commit by the end of a block inside of SQLAlchemy's own session."""

    def work(sync: Session) -> None:
        with sync.begin():
            pass

    await session.run_sync(work)


@pytest.mark.parametrize(
    "end",
    [
        commit_handle,
        begin_inside,
        lambda session: session.run_sync(lambda sync: sync.get_transaction().commit()),
        lambda session: session.run_sync(lambda sync: sync.get_transaction().rollback()),
        lambda session: session.run_sync(lambda sync: sync.get_transaction().close()),
    ],
    ids=["handle", "begin", "commit", "rollback", "close"],
)
async def test_handle_of_a_pinned_transaction_ends_nothing(
    service: Service, execute: Execute, end: Callable[[WriteSession], Awaitable[None]]
) -> None:
    """No handle of the transaction is a way around, and a savepoint is still begun and ended."""
    async with service.databases.writing() as session:
        session.pinned = True
        if end is not begin_inside:
            await store(session, "execute", "A-0")
        with pytest.raises(RuntimeError, match="the request is one transaction"):
            await end(session)
        async with session.begin_nested():
            await store(session, "execute", "A-1")
        assert await execute(COUNT) == 0

    assert await execute(MRNS) == ("A-1" if end is begin_inside else "A-0,A-1")


@pytest.mark.parametrize("name", ["begin", "commit", "rollback", "close", "reset", "invalidate"])
async def test_lease_of_a_pinned_session_is_kept(service: Service, execute: Execute, name: str) -> None:
    """Also while SQLAlchemy's session has not been asked for yet."""
    async with service.databases.writing() as session:
        await store(session, "rows", "A-0")
        session.pinned = True
        with pytest.raises(RuntimeError, match="the request is one transaction"):
            await getattr(session, name)()

    assert await execute(MRNS) == "A-0"


@pytest.mark.parametrize("name", ["rollback", "close", "reset", "invalidate"])
@pytest.mark.parametrize("first", ["nothing", "rows", "execute"])
async def test_session_goes_on_after_it_gave_back(service: Service, execute: Execute, name: str, first: str) -> None:
    """What was not committed is taken back, and what comes next is stored."""
    async with service.databases.writing() as session:
        if first != "nothing":
            await store(session, first, "A-0")
        await getattr(session, name)()
        await session.run_sync(lambda sync: getattr(sync, name)())
        await store(session, "rows", "A-1")

    assert await execute(MRNS) == "A-1"


async def test_options_of_statements_pass(service: Service) -> None:
    """Those that are no transaction's are SQLAlchemy's business."""
    async with service.databases.writing() as session:
        connection = await session.connection(execution_options={"preserve_rowcount": True})
        assert await connection.execution_options(stream_results=False) is connection
        assert connection.sync_connection is session.connection_held


# By the driver's own connection.


async def records() -> AsyncIterator[bytes]:
    """Give a patient as COPY reads it."""
    yield b"A-1\tAda\t1915-12-10\n"


async def by_driver(driver: Any, how: str) -> None:
    """Store a patient by the driver's connection, or take a session's lock."""
    if how == "execute":
        await driver.execute(INSERT)
    elif how == "fetch":
        await driver.fetch(INSERT)
    elif how == "arguments":
        await driver.execute(INSERT.replace("'A-1'", "$1"), "A-1")
    elif how == "copy":
        await driver.copy_to_table("patients", source=records(), columns=COLUMNS)
    elif how == "session lock":
        await driver.fetch("SELECT pg_advisory_lock(7)")
    else:
        async with driver.transaction():
            await driver.execute(INSERT)
        with suppress(KeyError):
            async with driver.transaction():
                await driver.execute(INSERT.replace("A-1", "A-2"))
                raise KeyError


@pytest.mark.parametrize("first", ["nothing", "rows", "execute", "commit"])
@pytest.mark.parametrize("how", ["execute", "fetch", "arguments", "copy", "transaction", "session lock"])
async def test_driver_takes_part_in_the_transaction(service: Service, execute: Execute, first: str, how: str) -> None:
    """What it sends is taken back when the route fails, whatever came before, and stored when it does not."""

    async def work(session: WriteSession) -> None:
        if first in {"rows", "execute"}:
            await store(session, first, "A-0")
        elif first == "commit":
            await session.execute(text("SELECT 1"))
            await session.commit()
        await by_driver(await driver_of(session), how)

    @service.app.post("/work/{status}")
    async def endpoint(session: WriteDB, status: int) -> None:
        await work(session)
        if status == 409:
            raise HTTPException(409)

    assert (await service.client.post("/work/409")).status_code == 409
    assert await execute(COUNT) == 0
    assert (await service.client.post("/work/200")).status_code == 200
    stored = (["A-0"] if first in {"rows", "execute"} else []) + ([] if how == "session lock" else ["A-1"])
    assert await execute(MRNS) == ",".join(stored)
    assert await execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


@pytest.mark.parametrize("how", ["execute", "fetch", "copy"])
async def test_driver_is_refused_outside_the_transaction(service: Service, execute: Execute, how: str) -> None:
    """A driver's connection that was kept over a commit would store at once what nobody could take back."""
    async with service.databases.writing() as session:
        driver = await driver_of(session)
        await session.commit()
        with pytest.raises(RuntimeError, match="the session has ended its transaction"):
            await by_driver(driver, how)
        assert await driver_of(session) is driver
        await driver.execute(INSERT)

    assert await execute(COUNT) == 1


# COPY.


@pytest.mark.parametrize("first", ["nothing", *LANES])
async def test_copy_is_part_of_the_transaction(service: Service, execute: Execute, first: str) -> None:
    """It is counted and timed, seen by the next statement, and taken back with the rest."""

    async def work(*, fail: bool) -> None:
        async with service.databases.writing() as session:
            if first != "nothing":
                await store(session, first, "A-first")
            records = [(f"A-{number}", "Ada", BORN) for number in range(100)]
            assert await session.copy_records("patients", records, columns=COLUMNS, schema="public") == 100
            assert (await session.execute(text(COUNT))).scalar_one() == (100 if first == "nothing" else 101)
            if fail:
                raise KeyError

    with pytest.raises(KeyError):
        await work(fail=True)
    assert await execute(COUNT) == 0
    await work(fail=False)
    assert await execute(COUNT) == (100 if first == "nothing" else 101)


@pytest.mark.parametrize("first", ["nothing", "rows", "execute"])
async def test_copy_that_breaks_a_constraint_is_a_conflict(service: Service, execute: Execute, first: str) -> None:
    """It has the name that the other lanes give it, without the row; a savepoint keeps the rest."""
    await execute("INSERT INTO patients (mrn, full_name, birth_date) VALUES ('A-1', 'Ada', '1915-12-10')")
    async with service.databases.writing() as session:
        if first != "nothing":
            await store(session, first, "A-first")
        with pytest.raises(IntegrityError) as conflict:
            async with session.begin_nested():
                await session.copy_records("patients", [("A-1", "Ada", BORN)], columns=COLUMNS)
        await store(session, "copy", "A-2")

    assert "uq_patients_mrn" in str(conflict.value)
    assert "Ada" not in str(conflict.value)
    assert await execute(MRNS) == ("A-1,A-2" if first == "nothing" else "A-1,A-2,A-first")


async def test_token_is_asked_for_once_a_commit(database: Database, proxy: Proxy) -> None:
    """A session that did nothing since its commit has its token already."""
    async with quiet(database.settings(primary={"url": proxy.url(database.url())})) as service:
        consistency = Consistency()
        async with service.databases.writing(consistency) as session:
            await store(session, "execute", "A-0")
            await session.commit()
            first = consistency.token
        assert first is not None
        assert proxy.statements.count(WRITTEN) == 1
        async with service.databases.writing(consistency) as session:
            await store(session, "execute", "A-1")
            await session.commit()
            await session.close()
            await store(session, "rows", "A-2")
            with pytest.raises(DBAPIError):
                await session.execute(text("SELECT 1 / 0"))
            await session.rollback()
        assert consistency.token != first
