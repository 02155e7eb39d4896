"""What a user of FastAPI relies on holds in the service, and in what is made of it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from sqlalchemy import text
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from app import patients
from app.main import create_app
from pglifeguard import NotFound
from pglifeguard.errors import DatabaseUnreachable
from pglifeguard.fastapi import (
    AnalyticsDB,
    ReadDB,
    WriteDB,
    analytics_session,
    databases_of,
    problems,
    read_session,
    write_session,
)
from tests.conftest import Database, Execute
from tests.service import ADA, Service

ON_REPLICA = text("SELECT pg_is_in_recovery()")
Handler = Callable[[Request], Awaitable[Response]]


def client_of(app: Any, **transport: Any) -> httpx.AsyncClient:
    """Give a client of an application whose lifespan is somebody else's."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app, **transport), base_url="http://test")


def deny() -> None:
    """Let nobody in."""
    raise HTTPException(451, "denied")


async def find_on_primary(session: ReadDB) -> str:
    """Find nothing on the replica."""
    if (await session.execute(ON_REPLICA)).scalar_one():
        raise NotFound("Not here.")
    return "found"


# Inclusion and solving


@pytest.mark.parametrize("path", ["/patients", "/users/1", "/reports/summary", "/health/live", "/debug/pool-stats"])
async def test_dependencies_of_the_application_guard_its_routes(database: Database, path: str) -> None:
    """`FastAPI(dependencies=…)` holds for every router of the service."""
    app = create_app(database.settings(replica=False), dependencies=[Depends(deny)])

    async with client_of(app) as client:
        answer = await client.get(path)

    assert (answer.status_code, answer.json()["detail"]) == (451, "denied")


async def test_sessions_can_be_overridden(service: Service) -> None:
    """Each session has a function behind it that `dependency_overrides` takes, in every kind of route."""

    @service.app.get("/names")
    async def names(read: ReadDB, write: WriteDB, report: AnalyticsDB) -> list[Any]:
        return [read, write, report]

    async def alone(session: WriteDB) -> Any:
        return [session]

    router = APIRouter()
    router.add_api_route("/alone", alone)
    service.app.include_router(router, prefix="/v1")
    overrides: dict[Any, Any] = {
        read_session: lambda: "read",
        write_session: lambda: "write",
        analytics_session: lambda: "report",
    }
    service.app.dependency_overrides |= overrides

    assert (await service.client.get("/names")).json() == ["read", "write", "report"]
    assert (await service.client.get("/v1/alone")).json() == ["write"]


async def test_overridden_session_serves_the_routes_of_the_service(service: Service, execute: Execute) -> None:
    """A test that rolls everything back gives its session to the service, an Idempotency-Key's work included."""
    async with service.databases.writing() as session:
        overrides: dict[Any, Any] = dict.fromkeys((read_session, write_session), lambda: session)
        service.app.dependency_overrides |= overrides

        created = await service.client.post("/patients", json=ADA)
        keyed = await service.client.post("/patients", json=ADA | {"mrn": "A-2"}, headers={"Idempotency-Key": "one"})
        again = await service.client.post("/patients", json=ADA | {"mrn": "A-2"}, headers={"Idempotency-Key": "one"})
        found = await service.client.get(created.headers["location"])
        session.pinned = False
        await session.rollback()

    assert [answer.status_code for answer in (created, keyed, again, found)] == [201, 201, 201, 200]
    assert again.content == keyed.content
    assert await execute("SELECT (SELECT count(*) FROM patients) + (SELECT count(*) FROM idempotency_keys)") == 0


async def test_router_keeps_its_own_class_of_routes(service: Service) -> None:
    """A class of routes of one's own, and plain routes, are run once more on the primary as others are."""
    seen = []

    class Timed(APIRoute):
        def get_route_handler(self) -> Any:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                seen.append(request.url.path)
                return await handler(request)

            return handle

    router = APIRouter(route_class=Timed)
    router.add_api_route("/find", find_on_primary)
    service.app.include_router(router, prefix="/own")
    service.app.get("/plain")(find_on_primary)
    service.app.add_api_route("/added", find_on_primary)

    answers = [await service.client.get(path) for path in ("/own/find", "/plain", "/added")]

    assert [answer.json() for answer in answers] == ["found"] * 3
    assert seen == ["/own/find"] * 2


async def test_ids_are_those_that_the_application_wants(database: Database) -> None:
    """`generate_unique_id_function` names the operations of included routers."""
    app = create_app(database.settings(replica=False), generate_unique_id_function=lambda route: f"my-{route.name}")

    paths = app.openapi()["paths"]

    assert paths["/patients"]["get"]["operationId"] == "my-list_patients"


async def test_lifespans_run_inside_the_service(database: Database) -> None:
    """One given to the application, and one of an included router, find the databases open and add to the state."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, int]]:
        async with app.state.databases.reading() as session:
            yield {"one": (await session.execute(text("SELECT 1"))).scalar_one()}

    @asynccontextmanager
    async def of_router(_app: FastAPI) -> AsyncIterator[dict[str, int]]:
        yield {"two": 2}

    app = create_app(database.settings(replica=False), lifespan=lifespan)
    app.include_router(APIRouter(lifespan=of_router))

    async with app.router.lifespan_context(app) as state:
        assert state is not None
        assert (state["one"], state["two"]) == (1, 2)


# Where it is


@pytest.mark.parametrize(
    ("root_path", "sent", "told"),
    [
        ("", "/patients", "/patients"),
        ("/api", "/api/patients", "/api/patients"),
        ("/api", "/patients", "/api/patients"),
        ("", "/v1/patients", "/v1/patients"),
        ("/api", "/v1/patients", "/api/v1/patients"),
        ("", "/outer/patients", "/outer/patients"),
        ("/api", "/api/outer/patients", "/api/outer/patients"),
        ("/a b", "/patients", "/a%20b/patients"),
    ],
)
async def test_links_have_the_path_of_the_client(service: Service, root_path: str, sent: str, told: str) -> None:
    """Location and Link work behind a proxy that strips its prefix or leaves it, in a mount, and in an inclusion."""
    service.app.include_router(patients.router, prefix="/v1")
    outer = FastAPI()
    outer.mount("/outer", service.app)
    app = outer if "outer" in sent else service.app

    async with client_of(app, root_path=root_path) as client:
        created = [await client.post(sent, json=ADA | {"mrn": f"A-{number}"}) for number in range(2)]
        token = {"X-Consistency-Token": created[1].headers["x-consistency-token"]}
        listed = await client.get(sent, params={"limit": 1, "name": "A"}, headers=token)

    assert created[0].headers["location"] == f"{told}/{created[0].json()['id']}"
    assert listed.headers["link"].startswith(f"<{told}?limit=1&name=A&after=")


async def test_service_is_mounted_in_another(service: Service) -> None:
    """Sessions, the second attempt and error documents work beneath another application."""
    outer = FastAPI()
    service.app.add_api_route("/find", find_on_primary)
    outer.mount("/outer", service.app)

    async with client_of(outer) as client:
        found = await client.get("/outer/find")
        missing = await client.get("/outer/patients/1")

    assert (found.status_code, found.json()) == (200, "found")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert service.sample("http_requests_total", method="GET", route="/find", status="200") == 1


async def test_application_beneath_the_service_has_its_sessions(service: Service) -> None:
    """One that is mounted uses the databases of the service, is run once more, and may answer by its handlers."""
    beneath, ran = FastAPI(), []
    problems.install(beneath)

    @beneath.exception_handler(Exception)
    def unforeseen(_request: Request, _error: Exception) -> Response:
        raise AssertionError

    @beneath.get("/find")
    async def find(request: Request, session: ReadDB) -> Any:
        ran.append(request.scope["root_path"])
        return Response("found", 404 if (await session.execute(ON_REPLICA)).scalar_one() else 200)

    @beneath.get("/down")
    async def down(_session: ReadDB) -> None:
        raise DatabaseUnreachable("Away.")

    service.app.mount("/beneath", beneath)

    found, away = await service.client.get("/beneath/find"), await service.client.get("/beneath/down")

    assert (found.status_code, found.text, ran) == (200, "found", ["/beneath"] * 2)
    assert (away.status_code, away.json()["code"], away.headers["retry-after"]) == (503, "database_unreachable", "1")


# Errors


@pytest.mark.parametrize(
    ("status", "detail", "headers", "code"),
    [
        (400, "no such colour", None, "bad_request"),
        (401, "log in", {"WWW-Authenticate": "Basic"}, "unauthorized"),
        (405, "not today", {"Allow": "BREW"}, "method_not_allowed"),
        (409, {"field": "mrn", "taken_by": 7}, None, "conflict"),
        (418, ["short", "stout"], {"X-Pot": "1"}, "i_m_a_teapot"),
        (422, "not this", None, "unprocessable_content"),
        (299, "odd", None, "http_299"),
        (599, None, None, "http_599"),
        (500, "broken", None, "internal_server_error"),
        (503, "tea break", {"Retry-After": "60"}, "service_unavailable"),
    ],
)
async def test_http_exception_is_its_authors(
    service: Service, status: int, detail: Any, headers: dict[str, str] | None, code: str
) -> None:
    """Status, detail and headers are what was raised, whatever they are."""

    @service.app.get("/raise")
    async def fail() -> None:
        raise HTTPException(status, detail, headers)

    answer = await service.client.get("/raise")

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["detail"] == ("" if detail is None else detail)
    assert answer.json()["title"]
    assert {name: answer.headers[name] for name in headers or ()} == (headers or {})


@pytest.mark.parametrize("status", [204, 205, 304])
async def test_http_exception_without_a_body_has_none(service: Service, status: int) -> None:
    """These statuses forbid one."""

    @service.app.get("/raise")
    async def fail() -> None:
        raise HTTPException(status, headers={"X-Why": "because"})

    answer = await service.client.get("/raise")

    assert (answer.status_code, answer.content, answer.headers["x-why"]) == (status, b"", "because")


@pytest.mark.parametrize("given", ["before", "afterwards"])
async def test_handlers_of_the_application_answer(database: Database, given: str) -> None:
    """Those for HTTPException, for a 404 without a route and for an invalid request go before the service's."""

    async def answer(_request: Request, error: Exception) -> Response:
        return PlainTextResponse(type(error).__name__, 444)

    handlers: dict[Any, Any] = {HTTPException: answer, 404: answer, RequestValidationError: answer}
    options = {"exception_handlers": handlers} if given == "before" else {}
    app = create_app(database.settings(replica=False), **options)
    if given == "afterwards":
        for kind, handler in handlers.items():
            app.add_exception_handler(kind, handler)
    app.get("/deny", dependencies=[Depends(deny)])(lambda: None)

    async with app.router.lifespan_context(app), client_of(app) as client:
        answers = [await client.get(path) for path in ("/deny", "/nothing", "/patients?limit=x")]

    assert [answer.status_code for answer in answers] == [444] * 3
    assert [answer.text for answer in answers] == ["HTTPException", "HTTPException", "RequestValidationError"]


@pytest.mark.parametrize("key", [Exception, 500])
@pytest.mark.parametrize("sync", [True, False])
async def test_handler_for_what_nobody_foresaw_answers(service: Service, key: Any, *, sync: bool) -> None:
    """`exception_handler(Exception)` has the answer, and the answer its X-Request-ID and its place in the metrics."""

    async def answer(request: Request, error: Exception) -> Response:
        return PlainTextResponse(f"{request.url.path}: {error}", 599)

    def answer_in_a_thread(request: Request, error: Exception) -> Response:
        return PlainTextResponse(f"{request.url.path}: {error}", 599)

    @service.app.get("/bug")
    async def bug() -> None:
        raise ValueError("what")

    service.app.add_exception_handler(key, answer_in_a_thread if sync else answer)
    answered = await service.client.get("/bug", headers={"X-Request-ID": "one"})

    assert (answered.status_code, answered.text) == (599, "/bug: what")
    assert answered.headers["x-request-id"] == "one"
    assert service.sample("http_requests_total", method="GET", route="/bug", status="599") == 1


async def test_debug_shows_the_traceback(database: Database) -> None:
    """`FastAPI(debug=True)` does what it says."""
    app = create_app(database.settings(replica=False), debug=True)

    @app.get("/bug")
    async def bug() -> None:
        raise ValueError("what")

    async with client_of(app, raise_app_exceptions=False) as client:
        answer = await client.get("/bug")

    assert answer.status_code == 500
    assert "ValueError: what" in answer.text


# What stands beside


async def test_other_middleware_stands_beside(service: Service) -> None:
    """A read that is run once more passes compression and a BaseHTTPMiddleware once."""
    passed = []

    class Passing(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: Handler) -> Response:
            passed.append(request.url.path)
            return await call_next(request)

    service.app.middleware_stack = None  # As before it started: middleware can be added.
    service.app.add_middleware(Passing)
    service.app.add_middleware(GZipMiddleware, minimum_size=1)
    service.app.get("/find")(find_on_primary)

    found = await service.client.get("/find")
    missing = await service.client.get("/patients/1")

    assert (found.json(), found.headers["content-encoding"]) == ("found", "gzip")
    assert missing.status_code == 404
    assert passed == ["/find", "/patients/1"]


async def test_first_attempt_leaves_nothing_behind(service: Service) -> None:
    """Of an answer that is thrown away no background task begins, and dependencies of both lifetimes are ended."""
    said, swallowed = [], []

    async def lasting() -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:
            swallowed.append(error)
            raise
        finally:
            said.append("lasting")

    async def short() -> AsyncIterator[None]:
        yield
        said.append("short")

    async def stream() -> AsyncIterator[str]:
        yield "found"

    @service.app.get("/find", dependencies=[Depends(lasting), Depends(short, scope="function")])
    async def find(session: ReadDB, tasks: BackgroundTasks) -> Response:
        tasks.add_task(said.append, "task")
        status = 404 if (await session.execute(ON_REPLICA)).scalar_one() else 200
        return StreamingResponse(stream(), status)

    answer = await service.client.get("/find")

    assert (answer.status_code, answer.text) == (200, "found")
    assert said == ["short", "lasting", "short", "task", "lasting"]
    assert swallowed == []


async def test_body_of_a_get_is_there_in_the_second_attempt(service: Service) -> None:
    """What the first attempt has read from the client, the second finds."""

    @service.app.api_route("/find", methods=["GET"])
    async def find(request: Request, session: ReadDB) -> Response:
        body = await request.body()
        return Response(body, 404 if (await session.execute(ON_REPLICA)).scalar_one() else 200)

    answer = await service.client.request("GET", "/find", content=b"asked")

    assert (answer.status_code, answer.content) == (200, b"asked")


async def test_committed_write_is_not_run_again(service: Service, execute: Execute) -> None:
    """A GET that has stored something answers what it says, and stores it once."""

    @service.app.get("/visit")
    async def visit(read: ReadDB, write: WriteDB) -> Response:
        await read.execute(ON_REPLICA)
        await write.execute(text("INSERT INTO users (email, full_name) VALUES ('a@b.c', 'x')"))
        return Response(status_code=404)

    assert (await service.client.get("/visit")).status_code == 404
    assert await execute("SELECT count(*) FROM users") == 1


async def test_failure_has_the_handler_of_its_author(service: Service) -> None:
    """A failure of the replica that the application answers itself is run once more before that."""
    service.app.add_exception_handler(DatabaseUnreachable, lambda _request, _error: PlainTextResponse("mine", 555))

    @service.app.get("/find")
    async def find(session: ReadDB) -> str:
        if (await session.execute(ON_REPLICA)).scalar_one():
            raise DatabaseUnreachable("Away.")
        return "found"

    assert (await service.client.get("/find")).json() == "found"


# WebSockets


def test_websockets_are_answered(database: Database) -> None:
    """A failure before the handshake is a problem document, one after it a code; sessions are opened by hand."""
    app = create_app(database.settings(replica=False))

    @app.websocket("/ask")
    async def ask(websocket: WebSocket) -> None:
        await websocket.accept()
        async with databases_of(websocket).reading() as session:
            await websocket.send_json((await session.execute(text("SELECT 1"))).scalar_one())

    @app.websocket("/fail/{moment}/{kind}")
    async def fail(websocket: WebSocket, moment: str, kind: str) -> None:
        if moment != "before":
            await websocket.accept()
        if moment == "closed":
            await websocket.close()
        kinds: dict[str, Exception] = {
            "missing": NotFound("Not here."),
            "away": DatabaseUnreachable("Away."),
            "http": HTTPException(500, "broken"),
        }
        raise kinds[kind]

    @app.websocket("/session")
    async def session(websocket: WebSocket, session: ReadDB) -> None:
        raise AssertionError(websocket, session)

    with TestClient(app) as client:
        with client.websocket_connect("/ask") as socket:
            assert socket.receive_json() == 1
        with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/fail/before/missing"):
            pass
        codes = {}
        for kind in ("missing", "away", "http"):
            with client.websocket_connect(f"/fail/after/{kind}") as socket:
                codes[kind] = socket.receive()["code"]
        with client.websocket_connect("/fail/closed/missing") as socket:
            assert socket.receive()["code"] == 1000
        with pytest.raises(RuntimeError, match="open one for each message"), client.websocket_connect("/session"):
            pass

    assert (denied.value.status_code, denied.value.json()["code"]) == (404, "not_found")
    assert codes == {"missing": 1008, "away": 1013, "http": 1011}


async def test_socket_that_left_is_not_closed_again(service: Service) -> None:
    """A failure after the client has gone has nobody to be told to."""
    sent: list[str] = []
    coming = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1001}]

    @service.app.websocket("/leave")
    async def leave(websocket: WebSocket, kind: Annotated[str, "of failure"] = "") -> None:
        await websocket.accept()
        with pytest.raises(WebSocketDisconnect):
            await websocket.receive_text()
        raise NotFound(kind)

    async def receive() -> Any:
        return coming.pop(0)

    async def send(message: Any) -> None:
        if message["type"] == "websocket.close":
            raise OSError
        sent.append(message["type"])

    scope = {"type": "websocket", "path": "/leave", "headers": [], "query_string": b"", "subprotocols": []}
    await service.app(scope, receive, send)

    assert sent == ["websocket.accept"]


async def test_test_client_serves(database: Database) -> None:
    """FastAPI's own test client runs the lifespan and the routes."""
    with TestClient(create_app(database.settings(replica=False))) as client:
        assert client.post("/patients", json=ADA).status_code == 201
        assert client.get("/nothing").status_code == 404
