"""The sessions of a request: `ReadDB`, `WriteDB`, `AutocommitDB`, `AnalyticsDB` for endpoints and for dependencies.

A session ends with the endpoint and before the response starts, so a COMMIT that fails is never a 2xx. However often a
request names one kind of session, it has one of them.

Behind each stands a function that `app.dependency_overrides` takes: `read_session`, `write_session`,
`autocommit_session`, `analytics_session`. What stands in for one is the session of endpoints and dependencies, and of
an `Idempotency-Key`.
"""

from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AsyncExitStack
from functools import lru_cache, partial
from http import HTTPStatus
from inspect import isasyncgenfunction, iscoroutinefunction, unwrap
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.requests import HTTPConnection
from starlette.routing import Mount

from app.db.collisions import WRITE, isolation_of
from app.db.sessions import Consistency, ReadSession, WriteSession
from app.errors import FAILURE, NotFound, note_failure

if TYPE_CHECKING:
    from app.db.engines import Databases

SessionT = TypeVar("SessionT", bound=ReadSession)
Scope = MutableMapping[str, Any]
SAFE_METHODS = frozenset({"GET", "HEAD"})
DATABASES = "lifeguard.databases"
READ, REPORT = "lifeguard.read", "lifeguard.report"
AUTOCOMMIT, ONE_TRANSACTION = "lifeguard.autocommit", "lifeguard.one_transaction"
SOCKET = (
    "a WebSocket may stay open for hours, and a session would keep its connection for as long: open one for each "
    "message, `async with databases_of(websocket).reading() as session` or `.writing()`"
)

SYNC = (
    "{endpoint} takes a session and is a plain `def`, which runs in a thread and cannot await what the session does: "
    "write `async def`, and await each call; slow work without the database goes to `run_in_threadpool`"
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


def consistency_of(scope: Mapping[str, Any]) -> Consistency:
    """Return what the middleware left for the sessions of this request."""
    found = scope.get("state", {}).get("consistency")
    return found if isinstance(found, Consistency) else Consistency()


def databases_of(connection: HTTPConnection) -> "Databases":
    """Return the databases of the service that serves this request or WebSocket, also in an application beneath it."""
    databases: Databases | None = connection.scope.get(DATABASES)
    return connection.scope["app"].state.databases if databases is None else databases


async def read_session(connection: HTTPConnection) -> ReadSession:
    """Open the request's session that reads from a replica or from the primary."""
    scope = connection.scope
    return _opened(connection, READ, lambda databases: databases.reading(consistency_of(scope), label=route_of(scope)))


async def write_session(connection: HTTPConnection) -> WriteSession:
    """Open the request's session that writes: one transaction, committed when the endpoint has ended.

    Raises: RuntimeError in a request that has opened an `AutocommitDB`.
    """
    if AUTOCOMMIT in connection.scope:
        # Two sessions that write could wait for each other, and one would be stored without the other.
        raise RuntimeError(
            "a request that has opened an `AutocommitDB` takes no `WriteDB` any more: name that throughout"
        )
    return _write(connection)


async def autocommit_session(connection: HTTPConnection) -> WriteSession:
    """Open the request's session for a write of one query, which commits by itself.

    Where a transaction is open, for a dependency or for an Idempotency-Key, the query is part of it.
    """
    scope = connection.scope
    if WRITE in scope or ONE_TRANSACTION in scope:
        return _write(connection)
    return _opened(
        connection,
        AUTOCOMMIT,
        lambda databases: databases.autocommitting(consistency_of(scope), label=route_of(scope)),
    )


async def analytics_session(connection: HTTPConnection) -> ReadSession:
    """Open the request's session for reports: the analytics pool, one snapshot for all its statements."""
    return _opened(connection, REPORT, lambda databases: databases.reporting(label=route_of(connection.scope)))


ReadDB = Annotated[ReadSession, Depends(read_session, scope="function")]
WriteDB = Annotated[WriteSession, Depends(write_session, scope="function")]
AutocommitDB = Annotated[WriteSession, Depends(autocommit_session, scope="function")]
AnalyticsDB = Annotated[ReadSession, Depends(analytics_session, scope="function")]
_SESSIONS = {read_session, write_session, autocommit_session, analytics_session}


def refuse_plain_functions(app: FastAPI) -> None:
    """Refuse endpoints that take a session and could not use it, also in applications mounted beneath.

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
    if all(dependency.call not in _SESSIONS for dependency in route.dependant.dependencies):
        return None
    return SYNC.format(endpoint=getattr(route.endpoint, "__qualname__", route.endpoint))


@lru_cache(4096)
def _is_async(endpoint: Callable[..., Any]) -> bool:
    function = unwrap(endpoint)
    return iscoroutinefunction(function) or isasyncgenfunction(function)


def bind_in_one_transaction(scope: Scope) -> None:
    """Make every session of this request that writes the same one; an `AutocommitDB` too is part of it."""
    scope[ONE_TRANSACTION] = True


def why_read_failed(scope: Scope, status: int) -> BaseException | None:
    """Return what a read that is answered with `status` failed with, if it changed nothing and may be run again."""
    written = (WRITE in scope and scope[WRITE].committed) or (AUTOCOMMIT in scope and scope[AUTOCOMMIT].spent)
    if written or consistency_of(scope).token is not None:
        return None  # What it wrote stands, and would be written twice.
    failure: BaseException | None = scope.get(FAILURE)
    if failure is None and status == HTTPStatus.NOT_FOUND and WRITE not in scope:
        return NotFound("The endpoint says so.")
    return failure


def _write(connection: HTTPConnection) -> WriteSession:
    scope = connection.scope
    return _opened(
        connection,
        WRITE,
        lambda databases: databases.writing(
            consistency_of(scope), label=route_of(scope), isolation=isolation_of(scope)
        ),
    )


def _opened(connection: HTTPConnection, key: str, open_one: Callable[["Databases"], SessionT]) -> SessionT:
    scope = connection.scope
    session: SessionT | None = scope.get(key)
    if session is None:
        if scope["type"] == "websocket":
            raise RuntimeError(SOCKET)
        if sentence := _misuse(scope.get("route")):
            raise RuntimeError(sentence)
        session = scope[key] = open_one(databases_of(connection))
        # FastAPI's stack of what ends before the answer is sent. A generator would be put on it for three context
        # managers more, and on the other stack by whoever leaves out `scope="function"`.
        stack: AsyncExitStack = scope["fastapi_function_astack"]
        stack.push_async_exit(session)
        stack.push(partial(_note, scope))
    return session


def _note(
    scope: Scope, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
) -> None:
    # Whichever handler makes an answer of it: the layer around the router has to know.
    if error is not None:
        note_failure(scope, error)
