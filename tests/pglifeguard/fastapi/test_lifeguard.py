"""`Lifeguard` in an application that somebody has: what it adds, what it leaves alone, and what it promises."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from sqlalchemy import select, text
from sqlalchemy.exc import NoResultFound, SQLAlchemyError
from starlette.types import Message

from app.patients.models import Patient
from pglifeguard import SettingsError
from pglifeguard.fastapi import Lifeguard, ReadDB, WriteDB
from tests.conftest import Database
from tests.service import Service, write

ORDERS = ("pause", "resume", "drain", "resize?pool=primary")
TENANT = text("SELECT current_setting('app.tenant', true)")


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Open an application and give a client of it."""
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    async with app.router.lifespan_context(app), client:
        yield client


async def count(db: ReadDB) -> int:
    """Count the patients."""
    return len((await db.execute(select(Patient))).all())


@pytest.mark.parametrize("order", ["before", "after"])
async def test_routes_may_come_before_or_after(database: Database, order: str) -> None:
    """What is added before `install` and what is added after it have sessions alike."""
    lifeguard = Lifeguard(database.settings(replica=False))
    app = FastAPI(lifespan=lifeguard.lifespan)
    if order == "before":
        app.get("/count")(count)
    lifeguard.install(app)
    if order == "after":
        app.get("/count")(count)

    async with running(app) as client:
        answer = await client.get("/count")

    assert (answer.status_code, answer.json()) == (200, 0)


@pytest.mark.parametrize("error", [SettingsError("DATABASE_URL leads nowhere."), RuntimeError("a bug")])
async def test_server_is_told_of_a_wrong_setting_by_its_sentence(database: Database, error: Exception) -> None:
    """Whatever the server is: uvicorn logs what it is told. A bug keeps its traceback."""

    def fail() -> dict[str, Any]:
        raise error

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        yield fail()

    app = FastAPI(lifespan=lifespan)
    Lifeguard(database.settings(replica=False)).install(app)
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        sent.append(message)

    with pytest.raises(type(error)):
        await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)

    (told,) = sent
    assert told["type"] == "lifespan.startup.failed"
    assert (told["message"] == str(error)) is isinstance(error, SettingsError)
    assert str(error) in told["message"]


@pytest.mark.parametrize("order", ["before", "after"])
async def test_handlers_of_the_application_win(database: Database, order: str) -> None:
    """Its answer to an exception stays its own, whenever the handler was added."""
    lifeguard = Lifeguard(database.settings(replica=False))
    app = FastAPI(lifespan=lifeguard.lifespan)

    def teapot(_request: Request, _error: Exception) -> Response:
        return Response("mine", 418)

    async def fail() -> None:
        raise HTTPException(409)

    app.get("/fail")(fail)
    if order == "before":
        app.add_exception_handler(HTTPException, teapot)
    lifeguard.install(app)
    if order == "after":
        app.add_exception_handler(HTTPException, teapot)

    async with running(app) as client:
        answer = await client.get("/fail")

    assert (answer.status_code, answer.text) == (418, "mine")


@pytest.mark.parametrize("order", ["before", "after"])
async def test_handler_of_a_wider_class_wins_too(database: Database, order: str) -> None:
    """One for `SQLAlchemyError` has every failure of SQLAlchemy, though the library knows some of them by name."""
    lifeguard = Lifeguard(database.settings(replica=False))
    app = FastAPI(lifespan=lifeguard.lifespan)

    async def mine(_request: Request, error: Exception) -> Response:
        return Response(type(error).__name__, 418)

    @app.get("/missing")
    async def missing(db: ReadDB) -> None:
        await db.get_one(Patient, 999)

    @app.get("/wrong")
    async def wrong(db: ReadDB) -> None:
        await db.execute(text("SELECT 1 / 0"))

    if order == "before":
        app.add_exception_handler(SQLAlchemyError, mine)
    lifeguard.install(app)
    if order == "after":
        app.add_exception_handler(SQLAlchemyError, mine)

    async with running(app) as client:
        answers = [await client.get(path) for path in ("/missing", "/wrong")]

    assert [(answer.status_code, answer.text) for answer in answers] == [(418, "NoResultFound"), (418, "DBAPIError")]


async def test_dependencies_guard_the_operations_routes(database: Database) -> None:
    """Each goes to its own routes, and to no other."""

    def deny(status: int) -> Any:
        async def refuse() -> None:
            raise HTTPException(status)

        return Depends(refuse)

    lifeguard = Lifeguard(database.settings(replica=False))
    app = FastAPI(lifespan=lifeguard.lifespan)
    app.get("/count")(count)
    lifeguard.install(app, open_dependencies=[deny(418)], debug_dependencies=[deny(451)])

    async with running(app) as client:
        paths = ("/health/live", "/metrics", "/debug/pool-stats", "/debug/connections", "/count")
        statuses = [(await client.get(path)).status_code for path in paths]
        changing = [(await client.post(f"/debug/{order}")).status_code for order in ORDERS]

    assert statuses == [418, 418, 451, 451, 200]
    assert changing == [451] * len(ORDERS)


async def test_nobody_pauses_a_service_without_a_guard(database: Database) -> None:
    """Whoever reaches it could make every request wait, so the routes are not there."""
    lifeguard = Lifeguard(database.settings(replica=False))
    app = FastAPI(lifespan=lifeguard.lifespan)
    lifeguard.install(app)

    async with running(app) as client:
        changing = [(await client.post(f"/debug/{order}")).status_code for order in ORDERS]
        figures = await client.get("/debug/pool-stats")

    assert changing == [404] * len(ORDERS)
    assert figures.status_code == 200


async def test_lifespan_of_the_application_goes_around(database: Database) -> None:
    """An application with a lifespan enters this one in its own, and its state reaches its requests."""
    lifeguard = Lifeguard(database.settings(replica=False))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with lifeguard.lifespan(app) as state:
            yield state | {"mine": 1}

    app = FastAPI(lifespan=lifespan)
    app.get("/count")(count)
    lifeguard.install(app)

    async with running(app) as client:
        assert (await client.get("/count")).json() == 0
    assert lifeguard.databases.primary.pool.figures().checked_in == 0


async def test_two_in_a_process_share_nothing(database: Database) -> None:
    """Each application has its own pools and its own figures."""
    both = [Lifeguard(database.settings(replica=False)) for _ in range(2)]
    apps = [FastAPI(lifespan=lifeguard.lifespan) for lifeguard in both]
    for lifeguard, app in zip(both, apps, strict=True):
        app.get("/count")(count)
        lifeguard.install(app)

    async with running(apps[0]) as first, running(apps[1]) as second:
        await first.get("/count")
        metrics = [(await client.get("/metrics")).text for client in (first, second)]

    assert ['route="/count",status="200"' in text for text in metrics] == [True, False]


async def test_what_on_connect_sets_stays(database: Database) -> None:
    """Its codecs and settings are there for every session, also after one that had to be cleaned up after."""
    asked: list[int] = []

    async def on_connect(connection: "asyncpg.Connection[Any]") -> None:
        asked.append(connection.get_server_pid())
        await connection.execute("SET app.tenant = 'everybody'")

    lifeguard = Lifeguard(database.settings(replica=False, pool_size=1, max_overflow=0), on_connect=on_connect)
    app = FastAPI(lifespan=lifeguard.lifespan)
    lifeguard.install(app)

    @app.post("/leaves")
    async def leaves(db: WriteDB) -> None:
        await db.execute(text("SET app.tenant = 'somebody'"))

    @app.get("/tenant")
    async def tenant(db: ReadDB) -> str:
        return str((await db.execute(TENANT)).scalar_one())

    async with running(app) as client:
        before = (await client.get("/tenant")).json()
        assert (await client.post("/leaves")).status_code == 200
        after = (await client.get("/tenant")).json()

    assert (before, after) == ("everybody", "everybody")
    assert len(set(asked)) == len(asked) > 1


async def test_on_connect_that_fails_is_told(database: Database) -> None:
    """A server that refuses what it asks for is a database that cannot be reached, with the reason in the answer."""

    async def on_connect(connection: "asyncpg.Connection[Any]") -> None:
        await connection.execute("SET no_such_parameter = 1")

    lifeguard = Lifeguard(database.settings(replica=False, pool_min_size=0), on_connect=on_connect)
    app = FastAPI(lifespan=lifeguard.lifespan)
    app.get("/count")(count)
    lifeguard.install(app)

    async with running(app) as client:
        answer = await client.get("/count")

    assert (answer.status_code, answer.json()["code"]) == (503, "database_unreachable")
    assert "no_such_parameter" in answer.json()["detail"]


async def test_get_one_that_finds_nothing_is_a_404(service: Service) -> None:
    """SQLAlchemy's own word for it is answered as ours is; who catches it finds it as ever."""

    @service.app.get("/one/{patient_id}")
    async def one(db: ReadDB, patient_id: int) -> str:
        return (await db.get_one(Patient, patient_id)).mrn

    @service.app.get("/caught")
    async def caught(db: ReadDB) -> str:
        with pytest.raises(NoResultFound):
            await db.get_one(Patient, 1)
        return "caught"

    missing = await service.client.get("/one/999")

    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert (await service.client.get("/caught")).json() == "caught"


async def test_get_one_of_a_row_on_its_way_is_retried_on_the_primary(behind: Service) -> None:
    """A row that the replica has not replayed yet is no 404, whichever way it was looked for."""

    @behind.app.get("/one/{patient_id}")
    async def one(db: ReadDB, patient_id: int) -> str:
        return (await db.get_one(Patient, patient_id)).mrn

    created = await write(behind)
    behind.client.cookies.clear()

    answer = await behind.client.get(f"/one/{created.json()['id']}")

    assert (answer.status_code, answer.json()) == (200, created.json()["mrn"])
