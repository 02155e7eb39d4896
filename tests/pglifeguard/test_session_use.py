"""A session used in ways that its author did not think of: nothing is lost in silence, and nothing is held for good."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import date
from typing import Any

import pytest
from fastapi import BackgroundTasks
from fastapi.responses import StreamingResponse
from sqlalchemy import text

from app.patients import queries
from pglifeguard.driver_failures import ONE_AT_A_TIME
from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi.sessions import ReadDB, WriteDB
from pglifeguard.sessions import ReadSession, WriteSession
from tests.conftest import Database, Execute
from tests.service import Service, serving

pytestmark = pytest.mark.shares_service
ADA = {"mrn": "A-1", "full_name": "Ada Lovelace", "birth_date": date(1915, 12, 10)}
ADD = text("INSERT INTO patients (mrn, full_name, birth_date) VALUES (:mrn, 'Ada Lovelace', '1915-12-10')")
MRNS = "SELECT coalesce(string_agg(mrn, ',' ORDER BY mrn), '') FROM patients"
LANES = ["rows", "execute"]
Add = Callable[[WriteSession, str], Awaitable[Any]]


@pytest.fixture
def nobody_collects() -> Iterator[None]:
    """Keep the garbage collector from giving back what was left lying about."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=LANES)
def add(request: pytest.FixtureRequest) -> Add:
    """Give a way to store a patient: by the driver, and by SQLAlchemy."""

    async def by_rows(session: WriteSession, mrn: str) -> None:
        await queries.add_patient(session, ADA | {"mrn": mrn})

    async def by_execute(session: WriteSession, mrn: str) -> None:
        await session.execute(ADD, {"mrn": mrn})

    return by_rows if request.param == "rows" else by_execute


async def use(session: WriteSession, first: str) -> None:
    """Use the session as it was used before: not at all, by the driver, or by SQLAlchemy."""
    if first == "rows":
        await queries.list_patients(session, limit=1)
    elif first == "execute":
        await session.execute(text("SELECT 1"))


# Savepoints.


@pytest.mark.parametrize("first", ["nothing", *LANES])
async def test_what_a_savepoint_took_back_is_not_committed(
    service: Service, execute: Execute, add: Add, first: str
) -> None:
    """`begin_nested` holds for queries too, whatever the session did before."""

    @service.app.post("/admit")
    async def admit(session: WriteDB) -> None:
        await use(session, first)
        with suppress(KeyError):
            async with session.begin_nested():
                await add(session, "A-1")
                raise KeyError
        await add(session, "A-2")

    assert (await service.client.post("/admit")).status_code == 200
    assert await execute(MRNS) == "A-2"


@pytest.mark.parametrize("first", ["nothing", *LANES])
async def test_conflict_in_a_savepoint_spoils_nothing(service: Service, execute: Execute, first: str) -> None:
    """What exists already is skipped, and the rest is stored."""
    await execute("INSERT INTO patients (mrn, full_name, birth_date) VALUES ('A-1', 'Ada', '1915-12-10')")

    @service.app.post("/load")
    async def load(session: WriteDB) -> list[str]:
        await use(session, first)
        skipped = []
        for mrn in ("A-1", "A-2"):
            try:
                async with session.begin_nested():
                    await queries.add_patient(session, ADA | {"mrn": mrn})
            except queries.MrnTaken:
                skipped.append(mrn)
        return skipped

    assert (await service.client.post("/load")).json() == ["A-1"]
    assert await execute(MRNS) == "A-1,A-2"


async def test_what_a_begin_block_took_back_is_not_committed(service: Service, execute: Execute, add: Add) -> None:
    """`session.begin()`, SQLAlchemy's own word for a transaction, takes back what its block did."""

    @service.app.post("/admit")
    async def admit(session: WriteDB) -> None:
        with suppress(KeyError):
            async with session.begin():
                await add(session, "A-1")
                raise KeyError

    assert (await service.client.post("/admit")).status_code == 200
    assert await execute(MRNS) == ""


# One thing at a time.


@pytest.mark.parametrize("lanes", ["rows rows", "rows execute", "execute rows", "execute execute"])
async def test_session_takes_one_connection_whoever_asks_at_once(
    database: Database, execute: Execute, lanes: str
) -> None:
    """Of two statements at once one is refused; what the other stored is committed, and nothing is held."""
    taken = []
    async with serving(database.settings(pool_min_size=0)) as service:
        pool = service.databases.primary.pool

        @service.app.post("/both")
        async def both(session: WriteDB) -> list[str]:
            asked: list[Awaitable[Any]] = []
            for number, lane in enumerate(lanes.split()):
                mrn = f"A-{number}"
                if lane == "rows":
                    asked.append(queries.add_patient(session, ADA | {"mrn": mrn}))
                else:
                    asked.append(session.execute(ADD, {"mrn": mrn}))
            done = await asyncio.gather(*asked, return_exceptions=True)
            taken.append(pool.figures().checked_out)
            return [f"A-{n}" for n, outcome in enumerate(done) if not isinstance(outcome, Exception)]

        answer = await service.client.post("/both")
        left = pool.figures().checked_out

    assert answer.status_code == 200
    assert await execute(MRNS) == ",".join(answer.json())
    assert len(answer.json()) == 1
    assert (taken, left) == ([1], 0)


@pytest.mark.parametrize("lane", ["rows", "execute"])
async def test_commit_beside_a_statement_is_a_bug_and_no_outage(
    database: Database, execute: Execute, caplog: pytest.LogCaptureFixture, lane: str
) -> None:
    """It answers 500, which tells no client to try again; nothing is committed, and nothing is held."""
    async with serving(database.settings(pool_min_size=0)) as service:

        @service.app.post("/both")
        async def both(session: WriteDB) -> None:
            await queries.add_patient(session, ADA | {"mrn": "A-1"})
            second = ADA | {"mrn": "A-2"}
            adding = queries.add_patient(session, second) if lane == "rows" else session.execute(ADD, second)
            await asyncio.gather(adding, session.commit())

        answer = await service.client.post("/both")
        after = await service.client.get("/patients")
        left = service.databases.primary.pool.figures().checked_out

    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert ONE_AT_A_TIME in caplog.text or "already in progress" in caplog.text
    assert (after.status_code, await execute(MRNS), left) == (200, "", 0)


# After its end.


@pytest.mark.usefixtures("nobody_collects")
@pytest.mark.parametrize("how", ["generator", "stream", "background"])
async def test_session_is_of_no_use_after_its_end(service: Service, execute: Execute, add: Add, how: str) -> None:
    """A stream or a background task that goes on with the request's session is told so: it would never be committed."""

    async def generator(session: WriteDB) -> AsyncIterator[int]:
        await add(session, "A-1")
        yield 1

    async def stream(session: WriteDB) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            await add(session, "A-1")
            yield "1"

        return StreamingResponse(body())

    async def background(session: WriteDB, tasks: BackgroundTasks) -> None:
        tasks.add_task(add, session, "A-1")

    service.app.add_api_route("/late", locals()[how], methods=["POST"])

    with pytest.raises((RuntimeError, ExceptionGroup)) as failure:
        await service.client.post("/late")

    assert "this session ended" in repr(failure.value)
    assert await execute(MRNS) == ""
    assert service.databases.primary.pool.figures().checked_out == 0


@pytest.mark.usefixtures("nobody_collects")
@pytest.mark.parametrize("lane", LANES)
async def test_session_that_ends_while_it_connects_gives_back(database: Database, lane: str) -> None:
    """Its connection arrives when nobody waits for it any more, and goes back to the pool."""
    async with serving(database.settings(replica=False, pool_size=1, max_overflow=0)) as service:
        pool = service.databases.primary.pool
        holding = await pool.acquire()
        session: ReadSession = service.databases.writing()
        async with session:
            asked: Awaitable[Any] = (
                session.rows(queries.BY_ID, patient_id=1) if lane == "rows" else session.execute(text("SELECT 1"))
            )
            late = asyncio.ensure_future(asked)

            async def in_the_queue() -> bool:
                return pool.figures().waiting == 1

            assert await eventually(in_the_queue, 5)
        pool.release(holding)
        with pytest.raises(RuntimeError, match="this session ended"):
            await late

        assert pool.figures().checked_out == 0


async def test_reads_on_the_replica_end_too(service: Service) -> None:
    """Where each statement has a connection of its own, the end is the end all the same."""

    @service.app.get("/late")
    async def late(session: ReadDB, tasks: BackgroundTasks) -> None:
        tasks.add_task(queries.list_patients, session, limit=1)

    with pytest.raises(RuntimeError, match="this session ended"):
        await service.client.get("/late")


async def test_rows_alone_makes_no_session_of_sqlalchemy(service: Service) -> None:
    """It takes longer to make than a connection to acquire, so it is made when something needs it."""
    async with service.databases.writing() as session:
        await queries.add_patient(session, ADA)
        assert "sync_session" not in vars(session)

        assert not list(session.new)
        assert session.sync_session.owner is session


async def test_session_of_sqlalchemy_that_is_made_after_the_end_refuses(service: Service) -> None:
    """A task of the background that is the first to ask SQLAlchemy is told that the session has ended."""
    async with service.databases.writing() as session:
        await queries.add_patient(session, ADA)

    with pytest.raises(RuntimeError, match="this session ended"):
        await session.execute(text("SELECT 1"))
    with pytest.raises(RuntimeError, match="this session ended"):
        await session.copy_records("patients", [], columns=["mrn"])
    assert session.sync_session.owner is not session
