"""An endpoint's session is the same session, whoever opens it: its route, a dependency, or both."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.testclient import TestClient

from pglifeguard.fastapi.sessions import ReadDB, SerializableDB, WriteDB, write_session
from pglifeguard.sessions import ReadSession, WriteSession
from tests.service import Service

ADD_ADA = text("INSERT INTO patients (mrn, full_name, birth_date) VALUES ('A-1', 'Ada', '1915-12-10')")


async def _author(session: WriteDB) -> WriteSession:
    return session


async def _audited(session: ReadDB) -> AsyncIterator[ReadSession]:
    assert session.connection_held is None
    yield session


Author = Annotated[WriteSession, Depends(_author)]
Audited = Annotated[ReadSession, Depends(_audited, scope="function")]


@pytest.fixture
def router() -> APIRouter:
    """Give a router as FastAPI has it."""
    return APIRouter()


async def test_endpoint_has_its_session(service: Service, router: APIRouter) -> None:
    """Beside a path parameter, a request, or nothing."""

    @router.get("/alone")
    async def alone(session: ReadDB) -> bool:
        return bool((await session.execute(text("SELECT pg_is_in_recovery()"))).scalar_one())

    @router.get("/beside/{number}")
    async def beside(number: int, request: Request, session: ReadDB) -> list[Any]:
        return [number, request.url.path, (await session.execute(text("SELECT 1"))).scalar_one()]

    @router.get("/behind")
    async def behind(word: Annotated[str, Query(description="Not hashable.")], session: ReadDB) -> list[Any]:
        return [word, (await session.execute(text("SELECT 1"))).scalar_one()]

    @router.get("/without")
    async def without() -> str:
        return "nothing"

    service.app.include_router(router)

    assert (await service.client.get("/alone")).json() is True
    assert (await service.client.get("/beside/7")).json() == [7, "/beside/7", 1]
    assert (await service.client.get("/beside/seven")).status_code == 422
    assert (await service.client.get("/behind?word=a")).json() == ["a", 1]
    assert (await service.client.get("/without")).json() == "nothing"
    assert service.databases.replicas[0].pool.figures().checked_out == 0


async def test_endpoint_and_dependencies_share_a_session(service: Service, router: APIRouter) -> None:
    """One request has one session of a kind, and a session for reading is none for writing."""

    @router.post("/shared")
    async def shared(session: WriteDB, author: Author, audited: Audited) -> list[bool]:
        await author.execute(ADD_ADA)
        return [session is author, session is audited, isinstance(audited, WriteSession)]

    service.app.include_router(router)

    assert (await service.client.post("/shared")).json() == [True, False, False]
    assert service.sample("db_connection_hold_seconds_count", pool="primary", route="/shared") == 1


async def test_session_ends_after_the_answer_was_made(service: Service, router: APIRouter, execute: Any) -> None:
    """An answer that cannot be made takes back what the endpoint did; one that can was committed before it is sent."""

    @router.post("/unfit", response_model=int)
    async def unfit(session: WriteDB) -> str:
        await session.execute(ADD_ADA)
        return "no number"

    service.app.include_router(router)

    assert (await service.client.post("/unfit")).status_code == 500
    assert await execute("SELECT count(*) FROM patients") == 0


async def test_document_does_not_tell_them_apart(service: Service) -> None:
    """A session is no parameter of a request, in whatever way it is opened."""
    document = (await service.client.get("/openapi.json")).json()

    parameters = document["paths"]["/patients/{patient_id}"]["get"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == ["patient_id"]
    assert document["paths"]["/patients"]["post"]["summary"] == "Create Patient"


async def test_request_may_be_annotated_in_any_way(service: Service, router: APIRouter) -> None:
    """As a string, which only FastAPI resolves, or as a class of one's own."""

    class Asked(Request):
        pass

    @router.get("/string")
    async def string(session: ReadDB, request: "Request") -> str:
        return request.method + type(session).__name__

    @router.get("/class")
    async def own_class(session: ReadDB, request: Asked) -> str:
        return request.method + type(session).__name__

    service.app.include_router(router)

    assert (await service.client.get("/string")).json() == "GETReadSession"
    assert (await service.client.get("/class")).json() == "GETReadSession"


async def test_override_may_be_any_session(service: Service, router: APIRouter) -> None:
    """A test's own session has no isolation level that could be compared with the endpoint's."""
    given = AsyncSession()

    @router.post("/at-a-level")
    async def at_a_level(session: SerializableDB) -> bool:
        return session is given

    service.app.include_router(router)
    service.app.dependency_overrides[write_session] = lambda: given

    assert (await service.client.post("/at-a-level")).json() is True


def test_application_without_databases_says_so() -> None:
    """Its author has forgotten `install`."""
    app = FastAPI()

    @app.get("/")
    async def read(session: ReadDB) -> None:
        await session.close()

    with pytest.raises(RuntimeError, match=r"lifeguard\.install\(app\)"):
        TestClient(app).get("/")
