"""Each row of the failure table, produced for real, and what the client is told."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from itertools import count
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from starlette.requests import ClientDisconnect

from app.settings import Settings
from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import DatabaseUnreachable, NotFound, PoolExhausted, WriteInReadSession, classify
from pglifeguard.fastapi.problems import leaves
from pglifeguard.fastapi.sessions import ReadDB, WriteDB
from pglifeguard.sessions import ReadSession, WriteSession
from tests.conftest import Database
from tests.service import Service, serving

INSERT = "INSERT INTO patients (mrn, full_name, birth_date) VALUES ('A-1', 'x', '1980-01-01')"
_paths = (f"/made-for-a-test/{number}" for number in count(1))
Work = Callable[[WriteSession], Awaitable[object]]


async def write(service: Service, work: Work) -> httpx.Response:
    """Do the work in a write session of a route of its own, and return what the client gets."""

    async def endpoint(session: WriteDB) -> None:
        await work(session)

    return await request(service, endpoint, "POST")


async def read(service: Service, work: Callable[[ReadSession], Awaitable[object]]) -> httpx.Response:
    """Do the work in a read session."""

    async def endpoint(session: ReadDB) -> None:
        await work(session)

    return await request(service, endpoint, "GET")


async def request(service: Service, endpoint: Callable[..., Awaitable[None]], method: str) -> httpx.Response:
    """Add a route and ask it."""
    path = next(_paths)
    service.app.add_api_route(path, endpoint, methods=[method])
    return await service.client.request(method, path)


def executing(*statements: str) -> Callable[[ReadSession], Awaitable[object]]:
    """Make work of statements."""

    async def work(session: ReadSession) -> None:
        for statement in statements:
            await session.execute(text(statement))

    return work


def raising(sqlstate: str) -> Callable[[ReadSession], Awaitable[object]]:
    """Make work that the server answers with this state, where its real cause would break the machine."""
    return executing(f"DO $$ BEGIN RAISE SQLSTATE '{sqlstate}'; END $$")


def assert_problem(answer: httpx.Response, status: int, code: str) -> None:
    """Check the document: media type, code, and a Retry-After on 503 alone."""
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json()["status"] == status
    assert answer.headers["content-type"] == "application/problem+json"
    # Settings of their own spread it; 1 is the least.
    assert (answer.headers.get("retry-after") in {"1", "2", "3"}) == (status == 503)
    assert answer.headers["x-request-id"]


@pytest.fixture
async def primary(database: Database) -> AsyncIterator[Service]:
    """Give a service on the primary alone, with tables for constraints of every kind."""
    owner = await asyncpg.connect(database.url("app_owner"))
    await owner.execute("""
        CREATE TABLE parents (id int PRIMARY KEY);
        CREATE TABLE children (parent_id int CONSTRAINT fk REFERENCES parents, span int4range,
            late int CONSTRAINT late REFERENCES parents DEFERRABLE INITIALLY DEFERRED,
            kept int CONSTRAINT kept REFERENCES parents ON DELETE RESTRICT,
            CONSTRAINT apart EXCLUDE USING gist (span WITH &&));
    """)
    await owner.close()
    async with serving(database.settings(replica=False)) as running:
        yield running


FAILURES = {
    "unique": (executing(INSERT, INSERT), 409, "conflict"),
    "foreign key": (executing("INSERT INTO children (parent_id) VALUES (1)"), 409, "conflict"),
    "a row that RESTRICT keeps": (
        executing("INSERT INTO parents VALUES (1)", "INSERT INTO children (kept) VALUES (1)", "DELETE FROM parents"),
        409,
        "conflict",
    ),
    "exclusion": (executing(*["INSERT INTO children (span) VALUES ('[1,5]')"] * 2), 409, "conflict"),
    "deferred foreign key, at COMMIT": (executing("INSERT INTO children (late) VALUES (1)"), 409, "conflict"),
    "statement_timeout": (
        executing("SET LOCAL statement_timeout = 50", "SELECT pg_sleep(5)"),
        504,
        "statement_timeout",
    ),
    "transaction_timeout": (
        executing("SET LOCAL transaction_timeout = 50", "SELECT pg_sleep(5)"),
        504,
        "statement_timeout",
    ),
    "backend killed": (executing("SELECT pg_terminate_backend(pg_backend_pid())"), 503, "connection_lost"),
    "disk full": (raising("53100"), 503, "database_overloaded"),
    "out of memory": (raising("53200"), 503, "database_overloaded"),
    "crash": (raising("57P02"), 503, "connection_lost"),
    "starting up": (raising("57P03"), 503, "connection_lost"),
    "pooler lost its server": (raising("08006"), 503, "connection_lost"),
    "input/output": (raising("58030"), 503, "database_failed"),
    "demoted, or read-only": (executing("SET TRANSACTION READ ONLY", INSERT), 503, "database_read_only"),
    "no such table": (executing("SELECT * FROM nowhere"), 500, "internal_error"),
    "division by zero": (executing("SELECT 1 / 0"), 500, "internal_error"),
    "not null": (executing("INSERT INTO patients (mrn) VALUES ('x')"), 500, "internal_error"),
}


@pytest.mark.parametrize(("work", "status", "code"), FAILURES.values(), ids=FAILURES)
async def test_failure_is_answered(primary: Service, work: Work, status: int, code: str) -> None:
    """The client learns status, code and whether to come back; nothing is stored, and the next request is served."""
    answer = await write(primary, work)

    assert_problem(answer, status, code)
    assert (await primary.client.get("/patients")).json() == []
    assert (await write(primary, executing("SELECT 1"))).status_code == 200
    assert primary.databases.primary.pool.figures().checked_out == 0


async def test_lock_timeout_is_answered(primary: Service, database: Database) -> None:
    """Rows that another transaction has locked: 503."""
    blocker = await asyncpg.connect(database.url("app_owner"))
    async with blocker.transaction():
        await blocker.execute("LOCK TABLE parents")

        answer = await write(primary, executing("SET LOCAL lock_timeout = 50", "SELECT * FROM parents"))

    await blocker.close()
    assert_problem(answer, 503, "lock_timeout")


async def test_stale_statement_is_answered(primary: Service, database: Database) -> None:
    """A prepared statement whose result type has changed is a transient failure; the next one is prepared anew."""
    returning = executing("SELECT full_name FROM patients")
    assert (await write(primary, returning)).status_code == 200
    owner = await asyncpg.connect(database.url("app_owner"))
    try:
        await owner.execute("ALTER TABLE patients ALTER COLUMN full_name TYPE varchar(400)")
    finally:
        await owner.close()

    answers = [await write(primary, returning) for _ in range(2)]

    assert_problem(answers[0], 503, "schema_changed")
    assert answers[-1].status_code == 200


async def test_serialization_failure_is_answered(primary: Service, database: Database) -> None:
    """The row was changed since the transaction's snapshot: 503, come again."""
    other = await asyncpg.connect(database.url("app_owner"))
    await other.execute(INSERT)

    async def work(session: WriteSession) -> None:
        await executing("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT * FROM patients")(session)
        await other.execute("UPDATE patients SET full_name = 'y'")
        await session.execute(text("UPDATE patients SET full_name = 'z'"))

    answer = await write(primary, work)

    await other.close()
    assert_problem(answer, 503, "serialization_failure")


async def test_deadlock_is_answered(primary: Service, database: Database) -> None:
    """Two transactions wait for each other: the one that PostgreSQL ends is told to come again."""
    other = await asyncpg.connect(database.url("postgres"))
    await other.execute("INSERT INTO parents VALUES (1), (2)")
    lock = "SELECT FROM parents WHERE id = {} FOR UPDATE"

    async def close_the_circle() -> None:
        async def session_waits() -> bool:
            return bool(await other.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"))

        await eventually(session_waits, 5)
        await other.execute(lock.format(1))

    async with other.transaction():
        await other.execute(lock.format(2))
        circle = asyncio.create_task(close_the_circle())

        answer = await write(primary, executing(lock.format(1), lock.format(2)))

        await circle
    await other.close()
    assert_problem(answer, 503, "deadlock")


async def test_idle_in_transaction_timeout_is_answered(primary: Service) -> None:
    """The server ended a transaction that idled: 503, and nothing was stored."""

    async def work(session: WriteSession) -> None:
        await executing(INSERT, "SET LOCAL idle_in_transaction_session_timeout = 20")(session)
        held = session.connection_held
        assert held is not None
        driver: Any = held.connection.driver_connection

        async def closed() -> bool:
            return bool(driver.is_closed())

        assert await eventually(closed, 5)

    idle_at_commit = await write(primary, work)

    async def work_and_go_on(session: WriteSession) -> None:
        await work(session)
        await session.execute(text("SELECT 1"))

    assert_problem(idle_at_commit, 503, "connection_lost")
    assert_problem(await write(primary, work_and_go_on), 503, "connection_lost")
    assert (await primary.client.get("/patients")).json() == []


async def test_command_timeout_is_answered(database: Database) -> None:
    """A server that says nothing for command_timeout_seconds: 503, and its connection is not used again."""
    settings = database.settings(replica=False, statement_timeout_seconds=0.1, command_timeout_seconds=0.2)
    async with serving(settings) as service:
        answer = await write(service, executing("SELECT pg_sleep(5)"))

        assert_problem(answer, 503, "database_timeout")
        assert service.sample("db_connection_invalidations_total", pool="primary", reason="error") == 1


async def test_swallowed_failure_is_a_bug_and_never_a_success(primary: Service) -> None:
    """PostgreSQL would answer COMMIT of a failed transaction with a silent ROLLBACK: 500, not 2xx."""

    async def work(session: WriteSession) -> None:
        await session.execute(text(INSERT))
        with suppress(DBAPIError):
            await session.execute(text("SELECT 1 / 0"))

    assert_problem(await write(primary, work), 500, "internal_error")
    assert (await primary.client.get("/patients")).json() == []


async def test_write_in_a_read_session_is_a_bug(primary: Service, service: Service) -> None:
    """On the primary and on the replica the database refuses it, and it is no transient failure: 500."""
    for running in (primary, service):
        assert_problem(await read(running, executing(INSERT)), 500, "internal_error")
        assert (await running.client.get("/patients")).json() == []


async def test_os_error_of_our_own_is_a_bug(primary: Service) -> None:
    """An OSError or TimeoutError that a route raises is no failure of the database: 500."""

    async def fail(error: Exception) -> None:
        raise error

    for error in (FileNotFoundError("/etc/x"), TimeoutError("late")):
        answer = await write(primary, lambda _session, error=error: fail(error))  # type: ignore[misc]

        assert_problem(answer, 500, "internal_error")
        assert str(error) not in answer.text


def unreachable(url: str) -> Settings:
    """Give settings for a service whose only database is there."""
    fields: Any = {"primary": {"url": url, "connect_timeout_seconds": 0.2}, "analytics": {"url": url}}
    return Settings(_env_file=None, **fields)


@pytest.fixture
def silent_port() -> Any:
    """Give a port that accepts and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


async def test_database_that_cannot_be_reached_is_answered(silent_port: int, database: Database) -> None:
    """Refused, unknown name, silence, wrong password, no such database: 503, each in bounded time."""
    urls = {
        "refused": f"postgresql://a@127.0.0.1:{free_port()}/x",
        "unknown host": "postgresql://a@nowhere.invalid/x",
        "silent": f"postgresql://a@127.0.0.1:{silent_port}/x",
        "wrong password": database.url().replace("app_rw:", "app_rw:not-"),
        "no such database": f"{database.url()}_not",
    }
    for url in urls.values():
        async with serving(unreachable(url), settled=False) as service:
            answer = await asyncio.wait_for(service.client.get("/patients/1"), 2)

            assert_problem(answer, 503, "database_unreachable")
            assert "not-" not in answer.text


async def test_full_server_is_answered(database: Database) -> None:
    """The server has no connection left: 503 with a code of its own."""
    admin = await asyncpg.connect(database.cluster.url("postgres", database="postgres"))
    await admin.execute(f'ALTER DATABASE "{database.name}" CONNECTION LIMIT 0')
    await admin.close()
    async with serving(unreachable(database.url()), settled=False) as service:
        answer = await service.client.get("/patients/1")

    assert_problem(answer, 503, "too_many_connections")


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (asyncpg.InvalidCachedStatementError("cached statement plan is invalid"), "schema_changed"),
        (asyncpg.FeatureNotSupportedError("whatever a pooler says"), "connection_lost"),
    ],
)
def test_connection_that_a_pooler_closed_is_a_transient_failure(said: Exception, code: str) -> None:
    """PgBouncer hands the server's last words on and closes the connection; the words alone would be a bug of ours."""
    closed = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    closed.__cause__ = said

    answer = classify(closed)

    assert answer is not None
    assert (answer.status, answer.code) == (503, code)


def test_what_is_no_failure_of_a_database_is_not_classified() -> None:
    """Any other exception is a bug."""
    assert classify(ValueError("x")) is None
    assert classify(OSError("x")) is None


async def test_websocket_that_leads_nowhere_is_closed(primary: Service) -> None:
    """There are none here, and who tries one is told so at once."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await primary.app({"type": "websocket", "path": "/nothing", "headers": [], "query_string": b""}, receive, send)

    assert [message["type"] for message in sent] == ["websocket.close"]


# What a TaskGroup raises


class Spilled(Exception):  # It is the application's own.
    """A failure that the application has a handler for."""


def group(*failures: BaseException, depth: int = 1) -> BaseExceptionGroup[BaseException]:
    """Wrap failures as TaskGroups in each other do."""
    wrapped: BaseExceptionGroup[BaseException] = BaseExceptionGroup("unhandled errors in a TaskGroup", failures)
    return wrapped if depth == 1 else group(wrapped, depth=depth - 1)


AWAY, MISSING = DatabaseUnreachable("Away."), NotFound("Not here.")
GROUPS = {
    "not found": (group(MISSING), 404, "not_found"),
    "not found, deeper": (group(MISSING, depth=3), 404, "not_found"),
    "away": (group(AWAY), 503, "database_unreachable"),
    "of Starlette": (group(HTTPException(409, "taken")), 409, "conflict"),
    "of the application": (group(Spilled()), 418, "spilled"),
    "invalid": (group(RequestValidationError([])), 422, "invalid_request"),
    "bug": (group(ValueError("what")), 500, "internal_error"),
    "bug of the database": (group(WriteInReadSession("what")), 500, "internal_error"),
    "twice the same": (group(MISSING, NotFound("Nor here.")), 404, "not_found"),
    "a server's before a client's": (group(MISSING, AWAY, HTTPException(409)), 503, "database_unreachable"),
    "a bug before all": (group(AWAY, group(ValueError("what")), MISSING), 500, "internal_error"),
    "two of a server": (group(AWAY, HTTPException(504, "late")), 504, "gateway_timeout"),
}


@pytest.mark.parametrize(("raised", "status", "code"), GROUPS.values(), ids=GROUPS)
async def test_group_is_answered_as_its_gravest(
    service: Service, raised: BaseException, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One failure out of a TaskGroup is answered as itself; of several, a bug, else the highest status."""

    @service.app.exception_handler(Spilled)
    def spill(_request: Request, _error: Exception) -> Response:
        return JSONResponse({"code": "spilled"}, 418)

    @service.app.get("/fail", dependencies=[])
    async def fail() -> None:
        raise raised

    answer = await service.client.get("/fail")

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    if AWAY in leaves(raised):
        assert "Away." in caplog.text
    if status == 500:
        assert "what" in caplog.text


async def test_handler_of_the_status_is_asked(service: Service) -> None:
    """As Starlette does outside of a group, the handler of an HTTPException's status goes first."""
    service.app.add_exception_handler(409, lambda _request, _error: Response("mine", 444))

    @service.app.get("/fail")
    async def fail() -> None:
        raise group(HTTPException(409))

    assert (await service.client.get("/fail")).status_code == 444


async def test_cancellation_out_of_a_group_is_one(service: Service) -> None:
    """What ends a request from outside ends it in a group, too: it is no failure of the request's."""

    @service.app.post("/cancelled")
    async def fail() -> None:
        raise group(MISSING, asyncio.CancelledError("stop"))

    with pytest.raises(asyncio.CancelledError, match="stop"):
        await service.client.post("/cancelled")

    assert service.sample("http_requests_total", method="POST", route="/cancelled", status="503") == 1


@pytest.mark.parametrize("readers", [1, 2])
async def test_client_that_left_is_one_in_a_group(
    service: Service, caplog: pytest.LogCaptureFixture, readers: int
) -> None:
    """A client that leaves while tasks of a TaskGroup wait for its body is no error, however many do."""

    @service.app.post("/upload")
    async def fail() -> None:
        raise group(*(ClientDisconnect() for _ in range(readers)))

    answer = await service.client.post("/upload")

    assert answer.status_code == 499
    assert service.sample("http_requests_total", method="POST", route="/upload", status="499") == 1
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_refused_clients_do_not_return_together(database: Database) -> None:
    """Each 503 names another time within the spread."""

    async def endpoint() -> None:
        raise DatabaseUnreachable("Away.")

    spread = database.settings(replica=False, retry_after_seconds=3, retry_after_spread_seconds=2)
    async with serving(spread) as service:
        service.app.add_api_route("/away", endpoint)
        answers = [await service.client.get("/away") for _ in range(60)]

    assert {answer.headers["retry-after"] for answer in answers} == {"3", "4", "5"}


@pytest.mark.parametrize(("seconds", "told"), [(0.0, "3"), (2.0, "3"), (6.5, "7"), (3600.0, "60")])
async def test_whoever_is_refused_is_told_when_the_queue_is_served(
    database: Database, seconds: float, told: str
) -> None:
    """The settings name the least; an estimate of more than a minute is none."""

    async def endpoint() -> None:
        raise PoolExhausted("Full.", retry_after_seconds=seconds)

    async with serving(database.settings(replica=False, retry_after_seconds=3)) as service:
        answer = await request(service, endpoint, "GET")

    assert (answer.status_code, answer.headers["retry-after"]) == (503, told)
