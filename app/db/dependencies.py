"""The sessions of a request: `ReadDB`, `WriteDB`, `AutocommitDB`, `AnalyticsDB` for endpoints and for dependencies.

A session ends with the endpoint and before the response starts, so a COMMIT that fails is never a 2xx. However often a
request names one kind of session, it has one of them.
"""

import inspect
from collections.abc import Callable, Coroutine, Mapping, MutableMapping
from contextlib import AsyncExitStack, suppress
from functools import wraps
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends, Request, Response

from app.db.sessions import Consistency, ReadSession, WriteSession
from app.errors import NotFound
from app.routing import Route

if TYPE_CHECKING:
    from app.db.engines import Databases

SessionT = TypeVar("SessionT", bound=ReadSession)
Scope = MutableMapping[str, Any]
SAFE_METHODS = frozenset({"GET", "HEAD"})
READ, WRITE, REPORT = "lifeguard.read", "lifeguard.write", "lifeguard.report"
AUTOCOMMIT = "lifeguard.autocommit"


def route_of(scope: Mapping[str, Any]) -> str:
    """Return the template of the route that serves a request, "/patients/{patient_id}"; "unmatched" without one."""
    # FastAPI keeps the path with the prefixes of include_router apart from the route's own.
    context = scope.get("fastapi", {}).get("effective_route_context")
    path = getattr(context or scope.get("route"), "path", None)
    return path if isinstance(path, str) else "unmatched"


def consistency_of(scope: Mapping[str, Any]) -> Consistency:
    """Return what the middleware left for the sessions of this request."""
    found = scope.get("state", {}).get("consistency")
    return found if isinstance(found, Consistency) else Consistency()


def databases_of(request: Request) -> "Databases":
    """Return the databases of the application that serves this request."""
    databases: Databases = request.scope["app"].state.databases
    return databases


def share_write_session(request: Request, session: WriteSession) -> None:
    """Make `WriteDB` of this request this session; whoever opened it commits it."""
    session.pinned = True
    request.scope[WRITE] = session


def _opener(key: str, open_one: Callable[["Databases", Scope], SessionT]) -> Callable[[Request], SessionT]:
    def session_of(request: Request) -> SessionT:
        scope = request.scope
        session: SessionT | None = scope.get(key)
        if session is None:
            session = scope[key] = open_one(databases_of(request), scope)
            # A generator under `Depends(..., scope="function")` is put on it too, by three context managers more.
            stack: AsyncExitStack = scope["fastapi_function_astack"]
            stack.push_async_exit(session)
        return session

    return session_of


def _dependency(opener: Callable[[Request], SessionT]) -> Callable[[Request], Coroutine[Any, Any, SessionT]]:
    # FastAPI runs a plain function in a thread.
    async def open_session(request: Request) -> SessionT:
        return opener(request)

    return open_session


_read = _opener(READ, lambda databases, scope: databases.reading(consistency_of(scope), label=route_of(scope)))
_transaction = _opener(WRITE, lambda databases, scope: databases.writing(consistency_of(scope), label=route_of(scope)))
_alone = _opener(
    AUTOCOMMIT, lambda databases, scope: databases.autocommitting(consistency_of(scope), label=route_of(scope))
)
_report = _opener(REPORT, lambda databases, scope: databases.reporting(label=route_of(scope)))


def _write(request: Request) -> WriteSession:
    if AUTOCOMMIT in request.scope:
        # Two sessions that write could wait for each other, and one would be stored without the other.
        raise RuntimeError(
            "a request that has opened an `AutocommitDB` takes no `WriteDB` any more: name that throughout"
        )
    return _transaction(request)


def _autocommit(request: Request) -> WriteSession:
    # Where a transaction is open, for a dependency or for an Idempotency-Key, the query is part of it.
    shared: WriteSession | None = request.scope.get(WRITE)
    return _alone(request) if shared is None else shared


ReadDB = Annotated[ReadSession, Depends(_dependency(_read), scope="function")]
WriteDB = Annotated[WriteSession, Depends(_dependency(_write), scope="function")]
AutocommitDB = Annotated[WriteSession, Depends(_dependency(_autocommit), scope="function")]
AnalyticsDB = Annotated[ReadSession, Depends(_dependency(_report), scope="function")]
_OPENERS: tuple[tuple[Any, Callable[[Request], ReadSession]], ...] = (
    (ReadDB, _read),
    (WriteDB, _write),
    (AutocommitDB, _autocommit),
    (AnalyticsDB, _report),
)


class SessionRoute(Route):
    """The route of every endpoint that names a session: `APIRouter(route_class=SessionRoute)`.

    A GET that its replica failed, or that found nothing there, it runs once more, on the primary. And it opens the
    session which its endpoint names, and does not leave that to FastAPI to solve: the session is the same, for an
    eleventh of a short read's calls less (docs/performance.md).
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, _opening_its_session(endpoint), **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the route's handler, which solves dependencies, runs the endpoint and makes the answer."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.scope["method"] not in SAFE_METHODS:
                return await handler(request)
            try:
                response = await handler(request)
            except Exception as failure:
                reason = await _why_again(request, failure)
                if reason is None:
                    raise
            else:
                if response.status_code != HTTPStatus.NOT_FOUND:
                    return response
                reason = await _why_again(request, NotFound("The endpoint says so."))
                if reason is None:
                    return response
            again = databases_of(request).once_more.run
            return await again(reason, consistency_of(request.scope), lambda: handler(request))

        return handle


async def _why_again(request: Request, failure: Exception) -> str | None:
    """Say why the request should run once more, and end what its first attempt opened; None when it should not."""
    scope = request.scope
    if AUTOCOMMIT in scope and scope[AUTOCOMMIT].spent:
        # What it wrote stands, and would be written twice.
        return None
    reason = databases_of(request).once_more.reason(consistency_of(scope), failure)
    if reason is not None:
        for key in (READ, WRITE, AUTOCOMMIT, REPORT):
            scope.pop(key, None)
        # As if the request ended with this failure. What its dependencies make of that, nobody gets to hear.
        for name in ("fastapi_function_astack", "fastapi_inner_astack"):
            stack: AsyncExitStack = scope[name]
            with suppress(Exception):
                await stack.pop_all().__aexit__(type(failure), failure, failure.__traceback__)
    return reason


def _opening_its_session(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Let FastAPI give the endpoint its request where it names a session, and turn that into the session."""
    signature = inspect.signature(endpoint)
    parameters = dict(signature.parameters)
    # By identity: what else stands in an annotation need not be hashable.
    sessions = ((n, opener) for n, p in parameters.items() for named, opener in _OPENERS if p.annotation is named)
    name, opener = next(sessions, ("", _read))
    # What is written as a string may be the request: FastAPI resolves it, and solves the session too.
    unresolved = any(isinstance(parameter.annotation, str) for parameter in parameters.values())
    if not name or unresolved or not inspect.iscoroutinefunction(endpoint):
        return endpoint
    # FastAPI gives a request to one parameter only.
    kinds = {other: p.annotation for other, p in parameters.items() if isinstance(p.annotation, type)}
    source = next((other for other, kind in kinds.items() if issubclass(kind, Request)), name)
    if source == name:
        parameters[name] = parameters[name].replace(annotation=Request)
    else:
        del parameters[name]

    @wraps(endpoint)
    async def with_session(**values: Any) -> Any:
        values[name] = opener(values[source])
        return await endpoint(**values)

    with_session.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]  # inspect's own protocol.
    return with_session
