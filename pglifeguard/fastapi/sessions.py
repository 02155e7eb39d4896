"""The sessions of a request: `ReadDB`, `WriteDB`, `AnalyticsDB`, for endpoints and for dependencies.

A session ends with the endpoint and before the response starts, so a COMMIT that fails is never a 2xx. A request has
one session of each kind, however often it names it. `SerializableDB` and `RepeatableReadDB` are the session that
writes, at an isolation level; an endpoint that names one may run several times for one request
(`RetryOnCollision`), so its effects outside the database must allow that.

Behind each stands a function that `app.dependency_overrides` takes: `read_session`, `write_session`,
`analytics_session`. An override is the session of endpoints and dependencies, and of an `Idempotency-Key`.

The layers of a request share state in its ASGI scope; the functions at the top read it.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AsyncExitStack
from functools import lru_cache, partial
from http import HTTPStatus
from inspect import isasyncgenfunction, iscoroutinefunction, unwrap
from types import TracebackType
from typing import Annotated, Any, TypeVar, get_args, get_type_hints
from urllib.parse import quote

from fastapi import Depends, FastAPI, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts
from starlette._utils import get_route_path
from starlette.requests import HTTPConnection
from starlette.routing import Mount

from pglifeguard.consistency import Consistency
from pglifeguard.database import Isolation
from pglifeguard.databases import Databases
from pglifeguard.errors import NotFound
from pglifeguard.sessions import ReadSession, WriteSession

Scope = MutableMapping[str, Any]
SAFE_METHODS = frozenset({"GET", "HEAD"})
DATABASES = "lifeguard.databases"
# The scope's key of the request's `WriteSession`.
WRITE = "lifeguard.write"
# The scope's key of the exception that the answer was made of.
FAILURE = "lifeguard.failure"
SessionT = TypeVar("SessionT", bound=ReadSession)
READ, REPORT = "lifeguard.read", "lifeguard.report"
SOCKET = (
    "a WebSocket may stay open for hours, and a session would keep its connection for as long: open one for each "
    "message, `async with databases_of(websocket).reading() as session` or `.writing()`"
)
SYNC = (
    "{endpoint} takes a session and is a plain `def`, which runs in a thread and cannot await what the session does: "
    "write `async def`, and await each call; slow work without the database goes to `run_in_threadpool`"
)
NOT_INSTALLED = (
    "this application has no databases: `lifeguard.install(app)` gives it those of a `Lifeguard`, and the ones of the "
    "application around it come with a request that passes that"
)
MIXED = (
    "this request's `WriteDB` was opened without isolation level {isolation}: the route or one of its dependencies has "
    "to name `SerializableDB` or `RepeatableReadDB` in its signature"
)


def route_of(scope: Mapping[str, Any]) -> str:
    """Return the template of the route that serves a request, "/patients/{patient_id}"; "unmatched" without one."""
    route = scope.get("route")
    # FastAPI keeps the path with the prefixes of include_router apart from the route's own. An application around this
    # one may have left the context of its own route.
    context = scope.get("fastapi", {}).get("effective_route_context")
    if context is not None and context.original_route is route:
        route = context
    path = getattr(route, "path", None)
    return path if isinstance(path, str) else "unmatched"


def public_path(request: Request) -> str:
    """Return the path by which the client reached this request, as it stands in a URL.

    `root_path` is part of it, whether the proxy in front has left it in the path or taken it off; and so is the path at
    which the application is mounted.
    """
    root_path: str = request.scope.get("root_path", "")
    return quote(root_path.rstrip("/") + get_route_path(request.scope), safe="/:@!$&'()*+,;=~-._")


def consistency_of(scope: Mapping[str, Any]) -> Consistency:
    """Return what `ReadYourWrites` noted for the sessions of this request."""
    found = scope.get("state", {}).get("consistency")
    return found if isinstance(found, Consistency) else Consistency()


def databases_of(connection: HTTPConnection) -> Databases:
    """Return the databases of the service that serves this request or WebSocket, also in an application beneath it."""
    consistency_of(connection.scope).label = route_of(connection.scope)
    databases: Databases | None = connection.scope.get(DATABASES)
    if databases is None:
        # A middleware outside of the router asks before the layer that notes them.
        databases = getattr(connection.scope["app"].state, "databases", None)
    if databases is None:
        raise RuntimeError(NOT_INSTALLED)
    return databases


def note_failure(scope: Scope, error: BaseException) -> None:
    """Keep the first exception of a request for the layers around it, which see only the answer."""
    scope.setdefault(FAILURE, error)


def isolation_of(scope: Mapping[str, Any]) -> Isolation | None:
    """Return the strictest isolation level that this request's route asks for; None for the server's default.

    The session is opened at this level by whichever dependency comes first, a guard or an Idempotency-Key.
    """
    context = scope.get("fastapi", {}).get("effective_route_context")
    asked = {
        call.isolation
        for route in (context, scope.get("route"))
        for call in _calls(getattr(route, "dependant", None))
        if isinstance(call, AtIsolation)
    }
    strictest: tuple[Isolation, ...] = ("SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED")
    return next((level for level in strictest if level in asked), None)


async def databases_of_request(connection: HTTPConnection) -> Databases:
    """Return the databases, for `write_once` and for further sessions; metrics count both for the route."""
    return databases_of(connection)


RequestDatabases = Annotated[Databases, Depends(databases_of_request)]


async def read_session(connection: HTTPConnection) -> ReadSession:
    """Open the request's session that reads from a replica or from the primary."""
    scope = connection.scope
    return _opened(connection, READ, lambda databases: databases.reading(consistency_of(scope), label=route_of(scope)))


async def write_session(connection: HTTPConnection) -> WriteSession:
    """Open the request's session that writes: one transaction, committed when the endpoint has ended."""
    scope = connection.scope
    return _opened(
        connection,
        WRITE,
        lambda databases: databases.writing(
            consistency_of(scope), label=route_of(scope), isolation=isolation_of(scope)
        ),
    )


async def analytics_session(connection: HTTPConnection) -> ReadSession:
    """Open the request's session for reports: the analytics pool, one snapshot for all its statements."""
    return _opened(connection, REPORT, lambda databases: databases.reporting(label=route_of(connection.scope)))


ReadDB = Annotated[ReadSession, Depends(read_session, scope="function")]
WriteDB = Annotated[WriteSession, Depends(write_session, scope="function")]
AnalyticsDB = Annotated[ReadSession, Depends(analytics_session, scope="function")]


class AtIsolation:
    """A dependency that gives the request's `WriteSession`, whose transaction is at an isolation level."""

    def __init__(self, isolation: Isolation) -> None:
        self.isolation = isolation

    async def __call__(self, session: WriteDB) -> WriteSession:
        """Return the session, which was opened at the strictest level that the route names.

        Raises: RuntimeError when it is at a lower level. A test's own session, an override, is taken as it is.
        """
        given: object = session
        if isinstance(given, WriteSession) and session.isolation not in {self.isolation, "SERIALIZABLE"}:
            raise RuntimeError(MIXED.format(isolation=self.isolation))
        return session


serializable_session = AtIsolation("SERIALIZABLE")
repeatable_read_session = AtIsolation("REPEATABLE READ")

SerializableDB = Annotated[WriteSession, Depends(serializable_session, scope="function")]
RepeatableReadDB = Annotated[WriteSession, Depends(repeatable_read_session, scope="function")]
_SESSIONS = {read_session, write_session, analytics_session}


def refuse_plain_functions(app: FastAPI) -> None:
    """Refuse plain `def` endpoints that take a session, also in mounted applications.

    Raises: RuntimeError with the endpoint's name and what to write.
    """
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        if isinstance(route, Mount) and isinstance(route.app, FastAPI):
            refuse_plain_functions(route.app)
        elif sentence := _misuse(route):
            raise RuntimeError(sentence)


def _misuse(route: object) -> str | None:
    """Say why the endpoint of this route cannot use the session that it takes."""
    if not isinstance(route, APIRoute) or _is_async(route.endpoint):
        return None
    if not _annotated_with_session(route.endpoint) and not any(
        dependency.call in _SESSIONS or isinstance(dependency.call, AtIsolation)
        for dependency in route.dependant.dependencies
    ):
        return None
    return SYNC.format(endpoint=getattr(route.endpoint, "__qualname__", route.endpoint))


@lru_cache(4096)
def _annotated_with_session(endpoint: Callable[..., Any]) -> bool:
    """Say whether a parameter is a session, whichever dependency gives it: that of a tenant, `SerializableDB`."""
    try:
        hints = get_type_hints(unwrap(endpoint))
    except (AttributeError, NameError, TypeError):
        return False  # A name that only a type checker knows; or no function.
    kinds = [kind for hint in hints.values() for kind in (hint, *get_args(hint))]
    return any(isinstance(kind, type) and issubclass(kind, ReadSession) for kind in kinds)


@lru_cache(4096)
def _is_async(endpoint: Callable[..., Any]) -> bool:
    function = unwrap(endpoint)
    return iscoroutinefunction(function) or isasyncgenfunction(function)


def why_read_failed(scope: Scope, status: int) -> BaseException | None:
    """Return the exception behind a read's answer with `status`; None if the read must not be retried."""
    if consistency_of(scope).committed:
        return None  # A retry would write a second time.
    failure: BaseException | None = scope.get(FAILURE)
    if failure is None and status == HTTPStatus.NOT_FOUND and WRITE not in scope:
        return NotFound("The endpoint says so.")
    return failure


def _calls(dependant: Dependant | None) -> Iterator[Any]:
    if dependant is not None:
        yield dependant.call
        for inner in dependant.dependencies:
            yield from _calls(inner)


def _opened(connection: HTTPConnection, key: str, open_one: Callable[[Databases], SessionT]) -> SessionT:
    scope = connection.scope
    session: SessionT | None = scope.get(key)
    if session is None:
        if scope["type"] == "websocket":
            raise RuntimeError(SOCKET)
        if sentence := _misuse(scope.get("route")):
            raise RuntimeError(sentence)
        session = scope[key] = open_one(databases_of(connection))
        # FastAPI unwinds this stack before the answer is sent. A generator dependency would cost three more context
        # managers, and without `scope="function"` FastAPI would end it after the answer.
        stack: AsyncExitStack = scope["fastapi_function_astack"]
        stack.push_async_exit(session)
        stack.push(partial(_note, scope))
    return session


def _note(
    scope: Scope, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
) -> None:
    # A handler turns the exception into an answer; `RetryOnPrimary` needs the exception.
    if error is not None:
        note_failure(scope, error)
