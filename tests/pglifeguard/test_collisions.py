"""A transaction that collides is run again, whole, a few times; nothing is answered twice and nothing stored twice."""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from typing import Annotated, Any

import asyncpg
import pytest
from fastapi import BackgroundTasks, Depends, HTTPException, Request, Response
from sqlalchemy import Integer, func, literal_column, select, text
from sqlalchemy.exc import DBAPIError

from app.patients import queries
from app.patients.schemas import PatientIn
from pglifeguard.collisions import ATTEMPTS, FIRST_PAUSE_SECONDS, pause_seconds
from pglifeguard.fastapi.idempotency import HEADER, IdempotentRoute
from pglifeguard.fastapi.middleware import RetryOnCollision
from pglifeguard.fastapi.sessions import WRITE, RepeatableReadDB, SerializableDB, WriteDB, serializable_session
from pglifeguard.query import Query
from pglifeguard.sessions import WriteSession
from tests.conftest import Database, Execute
from tests.service import ADA, Service

COUNT = "SELECT count(*) FROM patients"
ADD = text("INSERT INTO patients (mrn, full_name, birth_date) VALUES (:mrn, 'Ada', '1915-12-10')")
LEVEL = text("SELECT current_setting('transaction_isolation')")
# A table whose rows collide at COMMIT, or at once, for as long as the sequence says.
COLLIDE = """
    CREATE SEQUENCE public.attempts;
    GRANT ALL ON SEQUENCE public.attempts TO app_rw;
    CREATE FUNCTION public.collide(state text, times int) RETURNS int LANGUAGE plpgsql AS $$
    BEGIN
        IF nextval('public.attempts') <= times THEN
            RAISE EXCEPTION 'collided' USING ERRCODE = state;
        END IF;
        RETURN currval('public.attempts');
    END $$;
    CREATE FUNCTION public.collide_late() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM public.collide('40001', 2);
        RETURN NULL;
    END $$;
"""
LATE = """
    CREATE CONSTRAINT TRIGGER late AFTER INSERT ON patients DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION public.collide_late()
"""


def collide(times: int, state: str = "40001") -> Any:
    """Return a statement that collides the first times."""
    return text(f"SELECT public.collide('{state}', {times})")


@pytest.fixture
async def colliding(service: Service, database: Database) -> Service:
    """Give a service over a database in which transactions collide."""
    connection = await asyncpg.connect(database.url("postgres"))
    await connection.execute(COLLIDE)
    await connection.close()
    return service


class Meeting:
    """Where two transactions wait for each other once, so that both have read before either writes."""

    def __init__(self) -> None:
        self.attempts = 0
        self._both = asyncio.Event()

    async def __call__(self) -> None:
        """Wait for the other one, the first time."""
        self.attempts += 1
        if self.attempts == 2:
            self._both.set()
        await self._both.wait()


async def book(session: WriteSession, meeting: Meeting, mrn: str) -> None:
    """Store a patient if there is none: right only if nobody else does so meanwhile."""
    taken = (await session.execute(text(COUNT))).scalar_one()
    await meeting()
    if taken:
        raise HTTPException(409)
    await session.execute(ADD, {"mrn": mrn})


@pytest.mark.parametrize(("named", "stored"), [(WriteDB, 2), (SerializableDB, 1)])
async def test_check_then_insert_books_once(service: Service, execute: Execute, named: Any, stored: int) -> None:
    """Two requests that both saw a free place: the default isolation books twice, SERIALIZABLE answers one with 409."""
    meeting = Meeting()

    async def place(session: WriteSession, mrn: str) -> None:
        await book(session, meeting, mrn)

    place.__annotations__["session"] = named
    service.app.add_api_route("/places/{mrn}", place, methods=["POST"], status_code=201)

    answers = await asyncio.gather(*(service.client.post(f"/places/{mrn}") for mrn in ("A", "B")))

    assert sorted(answer.status_code for answer in answers) == ([201, 201] if stored == 2 else [201, 409])
    assert await execute(COUNT) == stored
    assert meeting.attempts == 4 - stored
    assert service.sample("db_transactions_retried_total", reason="serialization_failure") == 2 - stored


async def test_lost_update_is_none(service: Service, execute: Execute) -> None:
    """Read, then update what was read: under REPEATABLE READ both updates count."""
    await execute("INSERT INTO patients (mrn, full_name, birth_date) VALUES ('A-1', '', '1980-01-01')")
    meeting = Meeting()

    @service.app.post("/append/{letter}")
    async def append(session: RepeatableReadDB, letter: str) -> None:
        assert (await session.execute(LEVEL)).scalar_one() == "repeatable read"
        name = (await session.execute(text("SELECT full_name FROM patients"))).scalar_one()
        await meeting()
        await session.execute(text("UPDATE patients SET full_name = :name"), {"name": name + letter})

    answers = await asyncio.gather(*(service.client.post(f"/append/{letter}") for letter in "ab"))

    assert [answer.status_code for answer in answers] == [200, 200]
    assert sorted(await execute("SELECT full_name FROM patients")) == ["a", "b"]


@pytest.mark.parametrize("state", ["40001", "40P01"])
@pytest.mark.parametrize("lane", ["rows", "execute"])
async def test_collisions_are_bounded(colliding: Service, execute: Execute, lane: str, state: str) -> None:
    """After the last attempt the client is told, and may try again later."""
    query: Query[Any] = Query(select(func.public.collide(literal_column(f"'{state}'"), 99, type_=Integer).label("n")))

    @colliding.app.post("/colliding")
    async def endpoint(session: SerializableDB) -> None:
        if lane == "rows":
            await session.rows(query)
        else:
            await session.execute(collide(99, state))

    answer = await colliding.client.post("/colliding")

    code = {"40001": "serialization_failure", "40P01": "deadlock"}[state]
    assert (answer.status_code, answer.json()["code"]) == (503, code)
    assert answer.headers["Retry-After"] == "1"
    assert await execute("SELECT last_value FROM public.attempts") == ATTEMPTS
    assert colliding.sample("db_transactions_retried_total", reason=code) == ATTEMPTS - 1


async def test_collision_at_the_commit_is_run_again(colliding: Service, execute: Execute) -> None:
    """SERIALIZABLE often refuses at COMMIT: the endpoint had ended, and nothing was answered yet."""
    await execute(LATE)

    @colliding.app.post("/late", status_code=201)
    async def late(session: SerializableDB, new: PatientIn) -> None:
        await queries.add_patient(session, vars(new))

    answer = await colliding.client.post("/late", json=ADA)

    assert answer.status_code == 201
    assert "X-Consistency-Token" in answer.headers
    assert await execute(COUNT) == 1
    assert await execute("SELECT last_value FROM public.attempts") == 3


async def test_attempt_begins_from_the_start(colliding: Service) -> None:
    """Each has its own dependencies, which are ended, its own session and the whole body; one answer, one task."""
    sessions: set[WriteSession] = set()
    events: list[str] = []
    tasks: list[str] = []

    async def resource() -> AsyncIterator[str]:
        events.append("open")
        try:
            yield "resource"
        except DBAPIError:
            events.append("failed")
            raise
        events.append("closed")

    @colliding.app.post("/again/{name}")
    async def again(  # noqa: PLR0913, PLR0917  # All that an endpoint may ask for.
        session: SerializableDB,
        request: Request,
        name: str,
        new: PatientIn,
        held: Annotated[str, Depends(resource)],
        background: BackgroundTasks,
    ) -> list[str]:
        sessions.add(session)
        assert (await request.json())["mrn"] == new.mrn
        background.add_task(tasks.append, name)
        assert (await session.execute(LEVEL)).scalar_one() == "serializable"
        await session.execute(collide(2))
        return [name, new.mrn, held]

    answer = await colliding.client.post("/again/x", json=ADA)

    assert (answer.status_code, answer.json()) == (200, ["x", "A-1", "resource"])
    assert len(sessions) == 3
    assert events == ["open", "failed", "open", "failed", "open", "closed"]
    assert tasks == ["x"]


async def test_body_that_is_read_in_pieces_is_read_again(colliding: Service) -> None:
    """Whoever reads it, all of it."""

    @colliding.app.post("/pieces")
    async def pieces(session: SerializableDB, request: Request) -> int:
        length = sum([len(chunk) async for chunk in request.stream()])
        await session.execute(collide(2))
        return length

    async def body() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 1000

    assert (await colliding.client.post("/pieces", content=body())).json() == 10_000


async def test_body_of_a_route_that_runs_once_is_not_kept(service: Service) -> None:
    """An upload that is read in pieces takes the memory of a piece, however large the route lets it be."""
    megabyte = 1024 * 1024

    @service.app.post("/upload", max_body_size=100 * megabyte)
    async def upload(session: WriteDB, request: Request) -> int:
        await session.execute(LEVEL)
        tracemalloc.start()
        try:
            async for _ in request.stream():
                pass
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    async def body() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(megabyte)

    assert (await service.client.post("/upload", content=body())).json() < 5 * megabyte


async def test_failure_in_a_group_is_a_collision(colliding: Service) -> None:
    """A task group wraps what its only task failed with."""

    @colliding.app.post("/grouped")
    async def grouped(session: SerializableDB) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(session.execute(collide(2)))

    assert (await colliding.client.post("/grouped")).status_code == 200


async def test_what_has_committed_is_not_run_again(colliding: Service, execute: Execute) -> None:
    """It would be stored twice."""

    @colliding.app.post("/steps")
    async def steps(session: SerializableDB) -> None:
        await session.execute(ADD, {"mrn": "A-1"})
        await session.commit()
        await session.execute(collide(2))

    answer = await colliding.client.post("/steps")

    assert (answer.status_code, answer.json()["code"]) == (503, "serialization_failure")
    assert await execute(COUNT) == 1
    assert await execute("SELECT last_value FROM public.attempts") == 1


async def test_default_isolation_is_not_run_again(colliding: Service, execute: Execute) -> None:
    """Who names `WriteDB` has not said that the endpoint may run several times."""

    @colliding.app.post("/once")
    async def once(session: WriteDB) -> None:
        await session.execute(collide(2))

    assert (await colliding.client.post("/once")).status_code == 503
    assert await execute("SELECT last_value FROM public.attempts") == 1


async def test_other_failures_are_not_run_again(colliding: Service) -> None:
    """Also those that no handler answers."""
    runs = []

    @colliding.app.post("/bug")
    async def bug(session: SerializableDB) -> None:
        runs.append(await session.execute(text("SELECT 1")))
        raise KeyError

    assert (await colliding.client.post("/bug")).status_code == 500
    assert len(runs) == 1


async def test_dependency_shares_the_isolated_session(colliding: Service) -> None:
    """A guard that names `WriteDB` and runs first has the same session, at the level that its route asks for."""

    async def guard(session: WriteDB) -> WriteSession:
        assert (await session.execute(LEVEL)).scalar_one() == "serializable"
        return session

    @colliding.app.post("/guarded", dependencies=[Depends(guard)])
    async def guarded(
        first: Annotated[WriteSession, Depends(guard)], weak: RepeatableReadDB, session: SerializableDB
    ) -> bool:
        await session.execute(collide(1))
        return first is session is weak

    assert (await colliding.client.post("/guarded")).json() is True


async def test_session_that_was_opened_without_the_level_is_refused(service: Service) -> None:
    """A dependency that is called by hand gets no session at a level that nobody asked for."""
    async with service.databases.writing() as session:
        with pytest.raises(RuntimeError, match="opened without isolation level SERIALIZABLE"):
            await serializable_session(session)
    async with service.databases.writing(isolation="SERIALIZABLE") as session:
        assert await serializable_session(session) is session


async def test_key_and_level_go_together(colliding: Service, execute: Execute) -> None:
    """The key is claimed anew by each attempt, and the answer stored once."""

    async def keyed(session: SerializableDB, response: Response) -> str:
        assert (await session.execute(LEVEL)).scalar_one() == "serializable"
        await session.execute(collide(2))
        await session.execute(ADD, {"mrn": "A-1"})
        response.headers["Location"] = "/somewhere"
        return "done"

    colliding.app.router.add_api_route("/keyed", keyed, methods=["POST"], route_class_override=IdempotentRoute)

    answers = [await colliding.client.post("/keyed", headers={HEADER: "k"}) for _ in range(2)]

    assert [(answer.status_code, answer.json()) for answer in answers] == [(200, "done")] * 2
    assert await execute(COUNT) == 1
    assert await execute("SELECT count(*) FROM idempotency_keys WHERE status = 200") == 1


# Outside a request.


async def test_transaction_of_a_job_is_run_again(colliding: Service, execute: Execute) -> None:
    """And what it returns is returned."""

    async def work(session: WriteSession) -> str:
        await session.execute(ADD, {"mrn": "A-1"})
        await session.execute(collide(2))
        return str((await session.execute(LEVEL)).scalar_one())

    assert await colliding.databases.run_transaction(work) == "serializable"
    assert await execute(COUNT) == 1
    assert colliding.sample("db_transactions_retried_total", reason="serialization_failure") == 2


async def test_transaction_of_a_job_is_bounded(colliding: Service, execute: Execute) -> None:
    """Then the collision is raised."""

    async def work(session: WriteSession) -> None:
        await session.execute(collide(99, "40P01"))

    with pytest.raises(DBAPIError):
        await colliding.databases.run_transaction(work, isolation="REPEATABLE READ")
    assert await execute("SELECT last_value FROM public.attempts") == ATTEMPTS


async def test_job_that_has_committed_is_not_run_again(colliding: Service, execute: Execute) -> None:
    """However it did: the session knows."""

    async def by_commit(session: WriteSession) -> None:
        await session.execute(ADD, {"mrn": "A-1"})
        await session.commit()
        await session.execute(collide(99))

    async def by_begin(session: WriteSession) -> None:
        async with session.begin():
            await session.execute(ADD, {"mrn": "A-2"})
        await session.reset()
        await session.execute(collide(99))

    async def inside(session: WriteSession) -> None:
        await session.execute(ADD, {"mrn": "A-3"})
        await session.run_sync(lambda sync: sync.commit())
        await session.invalidate()
        await session.execute(collide(99))

    for number, work in enumerate((by_commit, by_begin, inside), start=1):
        with pytest.raises(DBAPIError, match="collided"):
            await colliding.databases.run_transaction(work)
        assert await execute("SELECT last_value FROM public.attempts") == number
    assert await execute(COUNT) == 3


async def test_other_failures_of_a_job_are_raised(colliding: Service) -> None:
    """Once."""
    runs = []

    async def work(session: WriteSession) -> None:
        runs.append(await session.execute(text("SELECT 1")))
        raise KeyError

    with pytest.raises(KeyError):
        await colliding.databases.run_transaction(work)
    assert len(runs) == 1


def test_pauses_are_random_and_grow() -> None:
    """Those that collided do not meet again, and nobody waits for long."""
    longest = [pause_seconds(attempt, lambda: 1.0) for attempt in range(ATTEMPTS - 1)]

    assert longest == [FIRST_PAUSE_SECONDS * factor for factor in (1, 2, 4, 8)]
    assert pause_seconds(3, lambda: 0.0) == 0.0
    assert pause_seconds(3) <= longest[3]


async def test_collision_that_no_handler_answers_is_run_again(service: Service) -> None:
    """Where an exception passes everything inside, as where a handler raises it again, it is a collision still."""
    sent: list[str] = []
    attempts: list[int] = []

    async def inner(scope: Any, _receive: Any, send: Any) -> None:
        session = scope[WRITE] = service.databases.writing(isolation="SERIALIZABLE")
        attempts.append(1)
        if len(attempts) == 1:
            session.failure = asyncpg.SerializationError("collided")
            raise session.failure
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await RetryOnCollision(inner, service.databases)({"type": "http"}, receive, send)

    assert (len(attempts), sent) == (2, ["http.response.start"])
