"""The sessions of a request: `ReadDB`, `WriteDB`, `AnalyticsDB`, for endpoints and for dependencies.

A session ends with the endpoint and before the response starts, so a COMMIT that fails is never a 2xx. However often a
request names one kind of session, it has one of them. `SerializableDB` and `RepeatableReadDB` are the session that
writes, at an isolation level; an endpoint that names one may run several times for one request
(`collision_retry`), so what it does beside the database has to bear that.

Behind each stands a function that `app.dependency_overrides` takes: `read_session`, `write_session`,
`analytics_session`. What stands in for one is the session of endpoints and dependencies, and of an `Idempotency-Key`.
"""

from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import lru_cache, partial
from http import HTTPStatus
from inspect import isasyncgenfunction, iscoroutinefunction, unwrap
from types import TracebackType
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.requests import HTTPConnection
from starlette.routing import Mount

from pglifeguard.databases import Databases
from pglifeguard.errors import NotFound
from pglifeguard.fastapi.collision_retry import Isolated, isolation_of
from pglifeguard.fastapi.scope import FAILURE, WRITE, Scope, consistency_of, databases_of, note_failure, route_of
from pglifeguard.sessions import ReadSession, WriteSession

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
MIXED = (
    "this request's `WriteDB` was opened without isolation level {isolation}, where nobody could see it asked for: the "
    "route or one of its dependencies has to name `SerializableDB` or `RepeatableReadDB` in its signature"
)


async def databases_of_request(connection: HTTPConnection) -> Databases:
    """Return the databases, for `write_once` and for sessions of one's own; what they do counts for the route."""
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


class AtIsolation(Isolated):
    """Gives the request's session that writes, whose transaction is at an isolation level."""

    async def __call__(self, session: WriteDB) -> WriteSession:
        """Return the session; the route has been looked through for this level when it was opened.

        Raises: RuntimeError when it is at a lower level.
        """
        if session.isolation not in {self.isolation, "SERIALIZABLE"}:
            raise RuntimeError(MIXED.format(isolation=self.isolation))
        return session


serializable_session = AtIsolation("SERIALIZABLE")
repeatable_read_session = AtIsolation("REPEATABLE READ")

SerializableDB = Annotated[WriteSession, Depends(serializable_session, scope="function")]
RepeatableReadDB = Annotated[WriteSession, Depends(repeatable_read_session, scope="function")]
_SESSIONS = {read_session, write_session, analytics_session}


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


def why_read_failed(scope: Scope, status: int) -> BaseException | None:
    """Return what a read that is answered with `status` failed with, if it changed nothing and may be run again."""
    consistency = consistency_of(scope)
    written = consistency.committed or (WRITE in scope and scope[WRITE].committed)
    if written or consistency.token is not None:
        return None  # What it wrote stands, and would be written twice.
    failure: BaseException | None = scope.get(FAILURE)
    if failure is None and status == HTTPStatus.NOT_FOUND and WRITE not in scope:
        return NotFound("The endpoint says so.")
    return failure


def _opened(connection: HTTPConnection, key: str, open_one: Callable[[Databases], SessionT]) -> SessionT:
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
