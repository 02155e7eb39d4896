"""Tokens open the routes that their scopes name, before any connection is taken."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import jwt
import pytest
from fastapi import APIRouter, FastAPI, Request, Response, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.staticfiles import StaticFiles
from fastapi.testclient import TestClient
from pydantic import SecretStr
from starlette.routing import Match

from app import security
from app.main import DOMAINS, create_app
from app.security import OPEN, BearerGuard, issue_token, needs, scopes_of
from app.settings import Settings
from app.tokens import TokenVerifier
from pglifeguard.fastapi import client_key, debug, exposition, health, pools
from tests.conftest import Database
from tests.service import Service, serving

SECRET = "0123456789abcdef" * 4


@pytest.fixture
async def guarded(database: Database) -> AsyncIterator[Service]:
    """Give a service with a secret."""
    async with serving(database.settings(auth_secret=SECRET, replica=False)) as running:
        yield running


def bearer(*scopes: str, hours: float = 1, secret: str = SECRET) -> dict[str, str]:
    """Give the header of a token."""
    token = issue_token(SecretStr(secret), subject="test", scopes=list(scopes), lifetime=timedelta(hours=hours))
    return {"Authorization": f"Bearer {token}"}


def verifier(database: Database) -> TokenVerifier:
    """Make what verifies the tokens of the secret."""
    return TokenVerifier(database.settings(auth_secret=SECRET, replica=False), count=lambda _: None)


def signed(claims: dict[str, Any], algorithm: str = "HS256") -> dict[str, str]:
    """Give the header of a token with these claims."""
    return {"Authorization": f"Bearer {jwt.encode(claims, '' if algorithm == 'none' else SECRET, algorithm)}"}


async def test_callers_take_turns_for_connections(guarded: Service) -> None:
    """The queue of a pool tells clients apart by the subject of their token."""
    seen: list[str | None] = []

    async def look() -> None:
        seen.append(client_key.get())

    guarded.app.add_api_route("/look", look, dependencies=[needs("ops")])
    await guarded.client.get("/look", headers=bearer("ops"))

    assert seen == ["test"]


async def test_scopes_open_their_methods(guarded: Service) -> None:
    """Each domain has a scope to read and one to write, `ops` operates; none of them does the others' work."""
    requests: list[tuple[str, str, str]] = [
        ("GET", "/patients", "patients:read"),
        ("GET", "/reports/summary", "reports:read"),
        ("POST", "/patients", "patients:write"),
        ("DELETE", "/patients/1", "patients:write"),
        ("GET", "/debug/pool-stats", "ops"),
        ("GET", "/debug/connections", "ops"),
        ("GET", "/debug/pools/figures", "ops"),
        ("GET", "/debug/pools/sessions", "ops"),
        ("POST", "/debug/end?pool=primary&pid=1", "ops"),
    ]
    for method, path, needed in requests:
        for scope in [*scopes_of(guarded.app), "read", "write", "patients", "patients:*", "*"]:
            answer = await guarded.client.request(method, path, headers=bearer(scope))

            if scope == needed:
                assert answer.status_code not in {401, 403}, (method, path, scope)
            else:
                assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), (method, path, scope)


LATER = datetime.now(UTC) + timedelta(hours=1)
WRONG = {
    "none": {},
    "another scheme": {"Authorization": "Basic YTpi"},
    "no token": {"Authorization": "Bearer "},
    "no JWT": {"Authorization": "Bearer x.y.z"},
    "another secret": bearer("patients:read", secret="another-secret-another-secret-12345"),
    "expired": bearer("patients:read", hours=-1),
    "without an end": signed({"sub": "x", "scope": "patients:read"}),
    "without a subject": signed({"exp": LATER, "scope": "patients:read"}),
    "empty subject": signed({"sub": "", "exp": LATER, "scope": "patients:read"}),
    "subject with a line break": signed({"sub": "a\nb", "exp": LATER, "scope": "patients:read"}),
    "subject of half a character": signed({"sub": "\ud800", "exp": LATER, "scope": "patients:read"}),
    "subject too long": signed({"sub": "x" * 256, "exp": LATER, "scope": "patients:read"}),
    "deep header": {"Authorization": f"Bearer {'W1tb' * 6000}.e30.x"},
    "unsigned": signed({"sub": "x", "exp": LATER, "scope": "patients:read"}, "none"),
    "another algorithm": signed({"sub": "x", "exp": LATER, "scope": "patients:read"}, "HS384"),
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
async def test_wrong_token_is_401_before_any_connection(guarded: Service, headers: dict[str, str]) -> None:
    """The answer says how to come in, repeats no token, and the database hears nothing."""
    answer = await guarded.client.get("/patients", headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.sample("db_connection_acquire_seconds_count", pool="primary") == 0


async def test_token_without_scopes_opens_nothing(guarded: Service) -> None:
    """A scope that is neither text nor a list of texts, or missing, is none."""
    for claims in ({}, {"scope": None}, {"scope": 5}, {"scope": "patients:reader"}, {"scope": ["x", 5, None]}):
        answer = await guarded.client.get("/patients", headers=signed({"sub": "x", "exp": LATER} | claims))

        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


async def test_probes_metrics_and_documentation_need_no_token(guarded: Service) -> None:
    """A balancer and Prometheus have no secret, and nobody has one before reading how to get it."""
    for path in ("/health/live", "/health/ready", "/health/db", "/metrics", "/docs", "/openapi.json", "/debug/pools"):
        assert (await guarded.client.get(path)).status_code == 200


async def test_document_says_that_a_token_is_needed(guarded: Service, database: Database) -> None:
    """The OpenAPI document names the scheme where there is a secret, and none where there is not."""
    document = (await guarded.client.get("/openapi.json")).json()
    async with serving(database.settings(replica=False)) as unguarded:
        free = (await unguarded.client.get("/openapi.json")).json()

    assert document["security"] == [{"bearer": []}]
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert "security" not in free


async def test_refusal_comes_before_validation(guarded: Service) -> None:
    """Who may not write learns nothing of what a body must look like."""
    answer = await guarded.client.post("/patients", json={"mrn": 1}, headers=bearer("patients:read"))

    assert answer.status_code == 403


# What mounts the routes that are optional; a project may have taken their domain out.
EVERY_ROUTE = {name: "http://127.0.0.1:1" for name in ("directory_url",) if name in Settings.model_fields}
OPEN_TEMPLATES = {"/health/live", "/health/ready", "/health/db", "/metrics", "/docs", "/openapi.json", "/debug/pools"}
# Each with the dependencies that the service includes it with.
ROUTERS: list[tuple[Any, list[Any]]] = [
    *((import_module(f"app.{domain}").router, []) for domain in DOMAINS),
    (health.router, [security.OPEN]),
    (exposition.router, [security.OPEN]),
    (debug.router, [security.needs("ops")]),
    (pools.page_router, [security.OPEN]),
    (pools.router, [security.needs("ops")]),
]


def needed_by(method: str, template: str) -> str:
    """Say which scope a route needs, by the rules that the documentation gives."""
    domain = template.split("/")[1]
    if domain == "debug":
        return "ops"
    reads = method in {"GET", "HEAD"} and not template.endswith("/sync")
    return f"{domain}:{'read' if reads or domain == 'reports' else 'write'}"


@dataclass(frozen=True)
class Shape:
    """A way to reach a service: what a client writes in front of a route's path, and what the server says of it."""

    before: str = ""
    root_path: str = ""
    prefix: str = ""
    mounted: bool = False


SHAPES = {
    "plain": Shape(),
    "proxy that leaves the prefix": Shape(before="/api", root_path="/api"),
    "proxy that strips the prefix": Shape(root_path="/api"),
    "mounted": Shape(before="/outer", mounted=True),
    "mounted, behind a proxy": Shape(before="/api/outer", root_path="/api", mounted=True),
    "included": Shape(before="/v1", prefix="/v1"),
    "included, behind a proxy": Shape(before="/api/v1", root_path="/api", prefix="/v1"),
}


async def ask(app: Any, method: str, path: str, headers: dict[str, str], *, root_path: str = "") -> int:
    """Send a request as a server hands it over, its path as it is, and return the status; a WebSocket is `WEBSOCKET`.

    A WebSocket that is accepted answers 101, and one that is closed before answers 403, as servers do.
    """
    is_socket = method == "WEBSOCKET"
    scope: dict[str, Any] = {
        "type": "websocket" if is_socket else "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "ws" if is_socket else "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": root_path,
        "headers": [(k.lower().encode(), v.encode()) for k, v in ({"Host": "test"} | headers).items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "extensions": {"websocket.http.response": {}},
    }
    if not is_socket:
        scope["method"] = method
    statuses: list[int] = []
    coming = [{"type": "websocket.connect"} if is_socket else {"type": "http.request", "body": b""}]

    async def receive() -> dict[str, Any]:
        if not coming:
            await asyncio.Event().wait()  # The client stays.
        return coming.pop()

    async def send(message: Any) -> None:
        known = {"websocket.accept": 101, "websocket.close": 403}
        statuses.append(message.get("status") or known.get(message["type"], 0))

    await app(scope, receive, send)
    return statuses[0]


def walk(app: FastAPI, shape: Shape) -> Iterator[tuple[str, str, str]]:
    """List every route and method, those that a route has not included: method, path as a client has it, template."""
    for route in iter_route_contexts(app.routes):
        if route.path is not None and route.path.startswith(shape.prefix):
            template = route.path.removeprefix(shape.prefix)
            path = shape.before + re.sub(r"\{\w+\}", "1", template)
            for method in sorted({*(route.methods or ()), "HEAD", "OPTIONS", "BREW"}):
                yield method, path, template


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
async def test_every_route_is_open_to_whom_it_says(guarded: Service, shape: Shape) -> None:
    """However the service is reached: without a token 401, with every other scope 403, with its own it is served."""
    app: FastAPI = guarded.app
    for router, dependencies in ROUTERS if shape.prefix else ():
        app.include_router(router, prefix=shape.prefix, dependencies=dependencies)
    outer = app
    if shape.mounted:
        outer = FastAPI()
        outer.mount("/outer", app)
    send = partial(ask, outer, root_path=shape.root_path)
    closed: list[tuple[str, str, str]] = []
    scopes = scopes_of(app)

    for method, path, template in walk(app, shape):
        if template in OPEN_TEMPLATES:
            assert await send(method, path, {}) in {200, 405}, (method, path)
            continue
        needed = needed_by(method, template)
        others = bearer(*(scope for scope in scopes if scope != needed))
        assert await send(method, path, {}) == 401, (method, path)
        assert await send(method, path, others) == 403, (method, path)
        closed.append((method, path, needed))

    assert guarded.sample("db_connection_acquire_seconds_count", pool="primary") == 0
    for method, path, needed in closed:
        assert await send(method, path, bearer(needed)) not in {401, 403}, (method, path)
    assert len(closed) > 30


NOWHERE = [
    "/nothing",
    "/",
    "",
    "/docsets",
    "/docs/",
    "/docs/x",
    "/openapi.jsonx",
    "/metrics/",
    "/metricsx",
    "/health",
    "/healthy",
    "/health/",
    "/health/live/",
    "/health/live/x",
    "/HEALTH/LIVE",
    "//health/live",
    "/health//live",
    "/health/../debug/connections",
    "/health/live/../../debug/connections",
    "/debug/./connections",
    "/./debug/connections",
    "/DEBUG/connections",
    "/debug%2Fconnections",
    "//debug/connections",
    "/debug/connections/",
    "/patients/1/../../debug/connections",
    "/api/debug/connections",
]


def test_read_and_write_are_declared_together() -> None:
    """With one of them alone the other methods would be open."""
    with pytest.raises(ValueError, match="belong together"):
        needs(read="things:read")
    with pytest.raises(ValueError, match="belong together"):
        needs(write="things:write")


async def test_every_route_declares_its_scopes(database: Database) -> None:
    """The inventory: each route of the service, those of every setting included, says whom it is for."""
    settings = database.settings(auth_secret=SECRET, replica=False, **EVERY_ROUTE)
    app = create_app(settings)
    guard = app.router.middleware_stack
    assert isinstance(guard, BearerGuard)

    inventory = {(path, method): needed for path, method, needed in guard.operations(app)}
    app.add_api_route("/forgotten", lambda: 1)
    forgotten = {(path, method) for path, method, needed in guard.operations(app) if needed is None}

    assert [route for route, needed in inventory.items() if needed is None] == []
    assert {path for (path, _), needed in inventory.items() if not needed} == OPEN_TEMPLATES
    for (path, method), needed in inventory.items():
        assert needed == (frozenset() if path in OPEN_TEMPLATES else {needed_by(method, path)}), (method, path)
    assert forgotten == {("/forgotten", "GET")}


@pytest.mark.parametrize("path", NOWHERE)
async def test_unknown_path_is_refused_like_a_known_one(guarded: Service, path: str) -> None:
    """Nobody without a token learns which paths there are, and no path is nearly an open one."""
    for method in ("GET", "POST", "BREW"):
        assert await ask(guarded.app, method, path, {}) == 401
        assert await ask(guarded.app, method, path, bearer("ops", hours=-1)) == 401
        assert await ask(guarded.app, method, path, bearer()) == 404


async def test_what_a_copier_adds_is_closed(guarded: Service, tmp_path: Path) -> None:
    """Routers beside open names, Starlette's routes, mounts, static files, hosts, frontends and WebSockets."""
    app: FastAPI = guarded.app
    docsets, beneath = APIRouter(prefix="/docsets"), FastAPI()
    (tmp_path / "index.html").write_text("page")

    @docsets.get("/one")
    @beneath.get("/one")
    async def get_one() -> str:
        return "one"

    @docsets.websocket("/socket")
    @beneath.websocket("/socket")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()

    async def plain(_request: Request) -> Response:
        return Response("plain")

    app.include_router(docsets)
    app.websocket("/metrics/socket")(talk)
    app.router.add_websocket_route("/plain-socket", talk)
    app.add_route("/plain", plain)
    app.mount("/beneath", beneath)
    app.mount("/static", StaticFiles(directory=tmp_path))
    app.host("other", beneath)
    app.frontend("/pages", directory=tmp_path)
    closed = [
        ("GET", "/docsets/one"),
        ("WEBSOCKET", "/docsets/socket"),
        ("WEBSOCKET", "/metrics/socket"),
        ("WEBSOCKET", "/plain-socket"),
        ("GET", "/plain"),
        ("GET", "/beneath/one"),
        ("WEBSOCKET", "/beneath/socket"),
        ("GET", "/beneath/docs"),
        ("GET", "/static/index.html"),
        ("GET", "/pages/index.html"),
    ]
    for method, path in closed:
        assert await ask(app, method, path, {}) == 401, path
        assert await ask(app, method, path, bearer(*scopes_of(app), "read", "write")) == 403, path
    assert await ask(app, "GET", "/one", {"Host": "other"}) == 401
    assert await ask(app, "GET", "/one", {"Host": "other"} | bearer("ops")) == 403


async def test_copier_declares_what_is_open(database: Database, tmp_path: Path) -> None:
    """By a dependency of an inclusion, a router or a route; mounts by their path, and what is closed above stays so."""
    (tmp_path / "index.html").write_text("page")
    opened, half_open = APIRouter(dependencies=[OPEN]), APIRouter(dependencies=[OPEN])

    @opened.get("/opened")
    @half_open.get("/half-open", dependencies=[needs("ops")])
    async def get_opened() -> str:
        return "opened"

    @opened.get("/signed")
    async def get_signed(_allowed: Annotated[None, needs("ops")]) -> str:
        return "signed"

    @opened.websocket("/socket")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()

    app = create_app(database.settings(replica=False))
    app.include_router(opened, prefix="/v1")
    app.include_router(opened, prefix="/ops", dependencies=[needs("ops", "more")])
    app.include_router(half_open)
    app.mount("/static", StaticFiles(directory=tmp_path))
    app.mount("/files", StaticFiles(directory=tmp_path))
    app.mount("/drawer", StaticFiles(directory=tmp_path))
    app.host("other", opened)
    drawer = needs(read="drawer:read", write="drawer:write")
    security.install(app, verifier(database), open_paths=["/static"], needed_by_path={"/drawer": drawer, "other": OPEN})

    assert await ask(app, "GET", "/v1/opened", {}) == 200
    assert await ask(app, "WEBSOCKET", "/v1/socket", {}) == 101
    assert await ask(app, "GET", "/static/index.html", {}) == 200
    assert await ask(app, "GET", "/files/index.html", {}) == 401
    assert await ask(app, "GET", "/files/index.html", bearer("ops")) == 403
    assert await ask(app, "GET", "/drawer/index.html", bearer("drawer:write")) == 403
    assert await ask(app, "GET", "/drawer/index.html", bearer("drawer:read")) == 200
    assert await ask(app, "POST", "/drawer/index.html", bearer("drawer:read")) == 403
    assert await ask(app, "POST", "/drawer/index.html", bearer("drawer:write")) == 405
    assert await ask(app, "GET", "/opened", {"Host": "other"}) == 200
    assert await ask(app, "GET", "/half-open", {}) == 401
    assert await ask(app, "GET", "/half-open", bearer("ops")) == 200
    assert await ask(app, "GET", "/ops/opened", bearer("ops")) == 403
    assert await ask(app, "GET", "/ops/opened", bearer("ops", "more")) == 200
    # What stands in a signature alone, the guard does not see: the dependency itself closes it.
    assert await ask(app, "GET", "/v1/signed", {}) == 403


async def test_scopes_are_free_without_a_guard(database: Database) -> None:
    """Without AUTH_SECRET nobody has a token, and nobody needs one."""
    app = create_app(database.settings(replica=False))

    assert await ask(app, "GET", "/debug/pool-stats", {}) == 200


async def test_guard_decides_as_a_route_of_ones_own_matches(guarded: Service) -> None:
    """A class of routes that matches by a header is asked itself, included or not: no other route decides for it."""

    class Versioned(APIRoute):
        def matches(self, scope: Any) -> tuple[Match, Any]:
            version = dict(scope["headers"]).get(b"x-version", b"").decode()
            return super().matches(scope) if self.name == version else (Match.NONE, {})

    router = APIRouter(route_class=Versioned)
    router.add_api_route("/versions", lambda: 1, name="one", dependencies=[OPEN])
    router.add_api_route("/versions", lambda: 2, name="two", dependencies=[needs("ops")])
    guarded.app.include_router(router, prefix="/v1")

    assert await ask(guarded.app, "GET", "/v1/versions", {"X-Version": "one"}) == 200
    assert await ask(guarded.app, "GET", "/v1/versions", {"X-Version": "two"}) == 401
    assert await ask(guarded.app, "GET", "/v1/versions", {"X-Version": "two"} | bearer("ops")) == 200


async def test_refusal_passes_the_middleware_around_it(guarded: Service) -> None:
    """A browser may read a 401 of another origin, and its preflight, which carries no token, is answered."""
    guarded.app.middleware_stack = None  # As before it started: middleware can be added.
    guarded.app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["GET"])
    preflight = {"Origin": "http://else", "Access-Control-Request-Method": "GET"}

    refused = await guarded.client.get("/patients", headers={"Origin": "http://else"})
    asked = await guarded.client.options("/patients", headers=preflight)

    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "*")
    assert asked.status_code == 200


async def test_document_says_what_is_open(guarded: Service) -> None:
    """A client that reads the document sends no token where none is needed, and knows which one is."""
    paths = (await guarded.client.get("/openapi.json")).json()["paths"]

    assert paths["/health/live"]["get"]["security"] == []
    assert paths["/debug/connections"]["get"]["security"] == [{"bearer": ["ops"]}]
    assert paths["/patients"]["get"]["security"] == [{"bearer": ["patients:read"]}]
    assert paths["/patients"]["post"]["security"] == [{"bearer": ["patients:write"]}]


async def test_socket_is_closed_where_it_cannot_be_answered(guarded: Service) -> None:
    """A server that cannot refuse a WebSocket with an answer closes it before it was accepted."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/nothing", "headers": [], "query_string": b""}
    await guarded.app(scope, receive, send)

    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]


async def test_scopes_of_nested_inclusions_add_up(guarded: Service) -> None:
    """A router in a router in the application: each may ask for more."""
    inner, outer = APIRouter(), APIRouter(dependencies=[needs("one")])
    inner.add_api_route("/deep", lambda: 1, dependencies=[needs("two")])
    outer.include_router(inner, prefix="/inner")
    guarded.app.include_router(outer, prefix="/outer", dependencies=[needs("ops")])

    assert await ask(guarded.app, "GET", "/outer/inner/deep", {}) == 401
    assert await ask(guarded.app, "GET", "/outer/inner/deep", bearer("one", "two")) == 403
    assert await ask(guarded.app, "GET", "/outer/inner/deep", bearer("one", "two", "ops")) == 200


def test_guard_lets_the_lifespan_pass(database: Database) -> None:
    """A server starts the guarded service, and what it serves is guarded."""
    with TestClient(create_app(database.settings(auth_secret=SECRET, replica=False))) as client:
        assert client.get("/health/live").status_code == 200
        assert client.get("/patients").status_code == 401
