"""What can go wrong, and what a client is told: RFC 9457 problem documents with a stable `code`.

    ServiceError                      code                   status
    ├── NotFound                      not_found              404    (each domain names its own)
    ├── Conflict                      conflict               409    (each domain names its own)
    ├── Unauthorized                  unauthorized           401
    ├── Forbidden                     forbidden              403
    ├── BodyTooSlow                   body_too_slow          408
    ├── BodyTooLarge                  body_too_large         413
    ├── DirectoryFailed               directory_failed       502
    ├── WriteInReadSession            internal_error         500    a bug: a read session was asked to write
    ├── TransactionAborted            internal_error         500    a bug: a statement's failure was swallowed
    └── DatabaseUnavailable           database_unavailable   503    weather: the same request may work in a second
        ├── PoolExhausted             pool_exhausted
        ├── DatabaseUnreachable       database_unreachable
        ├── ConnectionLost            connection_lost
        ├── CommandTimeout            database_timeout
        ├── ReplicaUnavailable        replica_unavailable
        └── OutcomeUnknown            outcome_unknown        the connection died during COMMIT or a lone write

Failures that the server reports stay SQLAlchemy's exceptions; `classify` is the one table that turns their SQLSTATE
into an answer. An OSError or a TimeoutError becomes one of ours where it leaves the driver (`app/db`), so that a bug
elsewhere that raises one is not mistaken for weather.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeAlias

import asyncpg
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect, status
from fastapi.concurrency import run_in_threadpool
from fastapi.exception_handlers import http_exception_handler, request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.routing import RouteContext, iter_route_contexts
from sqlalchemy.exc import DBAPIError
from starlette._utils import is_async_callable
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Scope
from starlette.websockets import WebSocketState

# JSONResponse makes itself an encoder for each answer, which takes as long as encoding.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# By the names of RFC 9110, which some versions of Python have and others not.
_PHRASES = {status.value: status.phrase for status in HTTPStatus} | {
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}
MEDIA_TYPE = "application/problem+json"
# Where a request's scope keeps the failure that its answer was made of.
FAILURE = "lifeguard.failure"
# Of a 422: enough for a person to mend what was sent, and never more than what was sent took.
ERRORS_TOLD = 20
LOC_PARTS = 20
LOC_CHARACTERS = 100
MESSAGE_CHARACTERS = 300


class ServiceError(Exception):
    """Root of the tree. `str(error)` is the sentence that the client reads: no health data, no secrets."""

    status = 500
    code = "internal_error"


class NotFound(ServiceError):
    """The thing that the path names does not exist."""

    status = 404
    code = "not_found"


class Conflict(ServiceError):
    """The request contradicts what is stored."""

    status = 409
    code = "conflict"


class Unauthorized(ServiceError):
    """No bearer token, or not one of ours."""

    status = 401
    code = "unauthorized"


class Forbidden(ServiceError):
    """The token lacks the scope."""

    status = 403
    code = "forbidden"


class BodyTooSlow(ServiceError):
    """The body was not there in time."""

    status = 408
    code = "body_too_slow"


class BodyTooLarge(ServiceError):
    """The body has too many bytes or values."""

    status = 413
    code = "body_too_large"


class DirectoryFailed(ServiceError):
    """The user directory did not give a usable answer."""

    status = 502
    code = "directory_failed"


class WriteInReadSession(ServiceError):
    """A statement that writes was sent through a read session: a bug of ours, never weather."""


class TransactionAborted(ServiceError):
    """A statement failed, somebody swallowed its error, and COMMIT would be a silent ROLLBACK: a bug of ours."""


class DatabaseUnavailable(ServiceError):
    """The database cannot serve this request now; a retry may help."""

    status = 503
    code = "database_unavailable"

    def __init__(self, detail: str, *, database: str | None = None, reason: str | None = None) -> None:
        super().__init__(detail)
        # The database that it is about, where that is known: a request may use several.
        self.database = database
        # Why, in the word that the metrics have for it, where the code says less.
        self.reason = reason


class PoolExhausted(DatabaseUnavailable):
    """Every connection is at work, and the queue is full or the wait was too long."""

    code = "pool_exhausted"


class DatabaseUnreachable(DatabaseUnavailable):
    """No connection could be opened."""

    code = "database_unreachable"


class ConnectionLost(DatabaseUnavailable):
    """The connection went away, and nothing of the request was committed."""

    code = "connection_lost"


class CommandTimeout(DatabaseUnavailable):
    """The server did not answer within command_timeout_seconds; the connection was dropped."""

    code = "database_timeout"


class ReplicaUnavailable(DatabaseUnavailable):
    """The replica cannot serve this read, and the primary may not or is too busy to step in."""

    code = "replica_unavailable"


class OutcomeUnknown(DatabaseUnavailable):
    """The connection died or gave no answer during COMMIT or a write of one query, which may or may not be stored."""

    code = "outcome_unknown"


@dataclass(frozen=True, slots=True)
class Failure:
    """What a client is told about a failure that the database reported."""

    status: int
    code: str
    # A sentence; what the author of an HTTPException gives is left as it is.
    detail: Any


# What is answered before there is a request.
MALFORMED = Failure(400, "malformed_request", "This is no HTTP request.")
HEAD_TOO_SLOW = Failure(408, "head_too_slow", "The headers of the request were not there in time.")
HEAD_TOO_LARGE = Failure(431, "head_too_large", "The URL and headers of the request are too long, or too many.")
_LOST = Failure(503, "connection_lost", "The connection to the database was lost; nothing was committed.")
_UNSTORABLE = Failure(
    422, "unstorable_value", "A value is too long or too large for the database, or holds a character it cannot store."
)
_BUSY = Failure(503, "database_overloaded", "The database is out of a resource.")
_NOT_KEPT = Failure(
    500,
    "statements_not_kept",
    "The pooler in front of the database does not keep prepared statements: set max_prepared_statements there "
    "(PgBouncer 1.21 or later), or DATABASE_STATEMENT_CACHE_SIZE=0 here.",
)
# The first five, three or two characters of an SQLSTATE; the longest match wins.
_FAILURES = {
    "08": _LOST,
    "22001": _UNSTORABLE,
    "22003": _UNSTORABLE,
    "22021": _UNSTORABLE,
    "22P05": _UNSTORABLE,
    "23503": Failure(409, "conflict", "The request refers to something that does not exist or is still in use."),
    "23505": Failure(409, "conflict", "Something with the same unique value exists already."),
    "23P01": Failure(409, "conflict", "The request overlaps something that exists already."),
    "25006": Failure(503, "database_read_only", "The database takes no writes at the moment."),
    "25P03": _LOST,
    "25P04": Failure(504, "statement_timeout", "The transaction took longer than the database allows."),
    "26000": _NOT_KEPT,
    "28": Failure(503, "database_unreachable", "The database did not let the service in."),
    "3D000": Failure(503, "database_unreachable", "The database does not exist."),
    "40001": Failure(503, "serialization_failure", "The transaction collided with another one."),
    "40P01": Failure(503, "deadlock", "The transaction ran into a deadlock and was rolled back."),
    "42P05": _NOT_KEPT,
    "53": _BUSY,
    "53300": Failure(503, "too_many_connections", "The database has no connection left."),
    "55P03": Failure(503, "lock_timeout", "The rows are locked by another transaction."),
    "57014": Failure(504, "statement_timeout", "The statement took longer than the database allows."),
    "57P": _LOST,
    "58": Failure(503, "database_failed", "The database has trouble with its own system."),
}


# Its SQLSTATE, 0A000, stands for bugs as well: only asyncpg's class tells it apart.
_STALE = Failure(503, "schema_changed", "The schema has just changed, and prepared statements are being renewed.")


# What stops the driver from sending a value of the right type: half a surrogate pair, a number too large for it.
_UNSENDABLE = (OverflowError, UnicodeEncodeError)


def sqlstate(error: BaseException | None) -> str | None:
    """Return the five characters with which PostgreSQL names a failure, of SQLAlchemy's or asyncpg's exception."""
    state = None
    cause = error.orig if isinstance(error, DBAPIError) else error
    while cause is not None:
        # The innermost is the server's own: asyncpg wraps its last words into "connection was closed", a 08003.
        state = getattr(cause, "sqlstate", None) or state
        cause = cause.__cause__
    return state


def constraint(error: BaseException) -> str | None:
    """Return the name of the constraint or unique index that a change broke, of SQLAlchemy's or asyncpg's exception."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    while cause is not None and getattr(cause, "constraint_name", None) is None:
        cause = cause.__cause__
    name: str | None = getattr(cause, "constraint_name", None)
    return name


def name_database(error: BaseException, database: str) -> None:
    """Remember with a failure of the driver which of the databases it came from."""
    vars(error).setdefault("database", database)


def database_of(error: BaseException) -> str | None:
    """Return the name of the database that a failure came from, None where nobody knows."""
    cause: BaseException | None = error.orig if isinstance(error, DBAPIError) else error
    while cause is not None:
        if (name := vars(cause).get("database")) is not None:
            return str(name)
        cause = cause.__cause__
    return None


def classify(error: BaseException) -> Failure | None:
    """Say what a client is told about a failure of the database; None is a bug, and a 500."""
    if isinstance(error, (WriteInReadSession, TransactionAborted)):
        return None
    driver_failure = _driver_failure(error)
    if isinstance(driver_failure, asyncpg.InvalidCachedStatementError):
        return _STALE
    if isinstance(driver_failure, asyncpg.DataError) and isinstance(driver_failure.__cause__, _UNSENDABLE):
        return _UNSTORABLE
    state = sqlstate(error) or ""
    if isinstance(error, (DBAPIError, asyncpg.PostgresError, DatabaseUnreachable)):
        for length in (5, 3, 2):
            if failure := _FAILURES.get(state[:length]):
                return failure
    if isinstance(error, ServiceError):
        return Failure(error.status, error.code, str(error))
    return _LOST if isinstance(error, DBAPIError) and error.connection_invalidated else None


def _driver_failure(error: BaseException) -> BaseException | None:
    """Return what asyncpg raised, from inside SQLAlchemy's two layers around it."""
    return error.orig.__cause__ if isinstance(error, DBAPIError) and error.orig is not None else error


def problem(request: Request | WebSocket, failure: Failure, **more: Any) -> Response:
    """Build the answer: application/problem+json, with Retry-After on every 503."""
    headers = {}
    if failure.status == 503:  # noqa: PLR2004
        # An application that is mounted beneath this one has no settings.
        settings = getattr(request.app.state, "settings", None)
        headers["Retry-After"] = "1" if settings is None else str(settings.retry_after_seconds)
    if failure.status == 408 or (failure.status == 413 and "expect" in request.headers):  # noqa: PLR2004
        # The rest of the body will not come. After another 413 it does, and a connection that is closed before it has
        # been read past is reset, which takes the answer from the client.
        headers["Connection"] = "close"
    if failure.status == 401:  # noqa: PLR2004
        headers["WWW-Authenticate"] = "Bearer"
    return Response(document(failure, **more), failure.status, headers, MEDIA_TYPE)


def document(failure: Failure, **more: Any) -> bytes:
    """Write a problem document."""
    body = {
        "type": "about:blank",
        "title": _PHRASES.get(failure.status, f"Status {failure.status}"),
        "status": failure.status,
        "detail": failure.detail,
        "code": failure.code,
        **more,
    }
    return _encode(body).encode()


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe error answers for OpenAPI: `APIRouter(responses=documented(404, 409))`."""
    text = {"type": "string"}
    properties = {"type": text, "title": text, "status": {"type": "integer"}, "detail": text, "code": text}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in statuses
    }


Report: TypeAlias = Callable[["Request | WebSocket", Failure, BaseException], None]


def install(app: FastAPI, report: Report | None = None) -> None:
    """Answer every exception of this service with a problem document, and `report` those that are no client's fault.

    Handlers that the application has already stay, and those that it adds later replace these.
    """
    app.state.report_failure = report
    # To mypy a handler answers requests or WebSockets; these answer both.
    handlers: dict[type[Exception], Any] = {
        ServiceError: _answer_failure,
        DBAPIError: _answer_failure,
        asyncpg.PostgresError: _answer_failure,
        RequestValidationError: _answer_invalid,
        HTTPException: _answer_http,
        ExceptionGroup: _answer_group,
    }
    for kind, handler in handlers.items():
        if app.exception_handlers.get(kind) in {None, http_exception_handler, request_validation_exception_handler}:
            app.add_exception_handler(kind, handler)


async def answer_unforeseen(request: Request, error: Exception) -> Response:
    """Answer a bug by the application's own handler for `Exception` or 500, else by `internal_error`."""
    handlers = request.app.exception_handlers
    handler = handlers.get(HTTPStatus.INTERNAL_SERVER_ERROR) or handlers.get(Exception)
    answer = None if handler is None else await _call(handler, request, error)
    return problem(request, _UNFORESEEN) if answer is None else answer


_UNFORESEEN = Failure(500, "internal_error", "The service failed. The log has the reason by X-Request-ID.")


async def _answer_failure(connection: Request | WebSocket, error: Exception) -> Response | None:
    failure = classify(error)
    if failure is None:
        raise error  # A bug: the last resort in middleware.py logs it and answers 500.
    note_failure(connection.scope, error)
    if failure.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        _report(connection, failure, error)
    return await _send_back(connection, problem(connection, failure))


def note_failure(scope: Scope, error: BaseException) -> None:
    """Remember, for the layers around it, what a request failed with before it was made an answer."""
    scope.setdefault(FAILURE, error)


def _report(connection: Request | WebSocket, failure: Failure, error: BaseException) -> None:
    # An application that is mounted beneath may be answered by these handlers and be nothing else of ours.
    report = getattr(connection.app.state, "report_failure", None)
    if report is not None:
        report(connection, failure, error)


async def _send_back(connection: Request | WebSocket, answer: Response) -> Response | None:
    """Refuse a WebSocket with the answer where the server can, else close it; answer a request."""
    if not isinstance(connection, WebSocket):
        return answer
    if connection.application_state is WebSocketState.CONNECTING:
        if "websocket.http.response" in connection.scope.get("extensions", {}):
            return answer
    elif connection.application_state is WebSocketState.DISCONNECTED:
        return None
    if answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
        code = status.WS_1013_TRY_AGAIN_LATER
    elif answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        code = status.WS_1011_INTERNAL_ERROR
    else:
        code = status.WS_1008_POLICY_VIOLATION
    with suppress(WebSocketDisconnect):  # The client may have left meanwhile.
        await connection.close(code)
    return None


async def _answer_group(connection: Request | WebSocket, group: Exception) -> Response | None:
    """Answer what came out of a TaskGroup as its gravest failure would be, by whoever handles that one."""
    failures = [failure for failure in leaves(group) if isinstance(failure, Exception)]
    handlers = [_handler_of(connection, failure) for failure in failures]
    if None in handlers:
        # A bug. Of several failures the log has to name each.
        raise failures[0] if len(failures) == 1 else group
    chosen = gravest(group)
    for failure in failures:
        known = classify(failure)
        if failure is not chosen and known is not None and known.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _report(connection, known, failure)
    return await _call(_handler_of(connection, chosen), connection, chosen)


def leaves(error: BaseException) -> list[BaseException]:
    """Return the failures of a group, of the groups in it too; what is no group is its own only one."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in leaves(one)]
    return [error]


def gravest(error: BaseException) -> BaseException:
    """Return the failure that stands for a group: a cancellation, else a bug, else the highest status; else the first.

    A group of one is that one.
    """
    return max(leaves(error), key=_severity)


def _severity(error: BaseException) -> int:
    if not isinstance(error, Exception):
        return 2000
    if isinstance(error, RequestValidationError):
        return HTTPStatus.UNPROCESSABLE_ENTITY
    if isinstance(error, HTTPException):
        return error.status_code
    known = classify(error)
    return 1000 if known is None else known.status


def _handler_of(connection: Request | WebSocket, error: BaseException) -> Any:
    # As Starlette looks for it: first by the status of an HTTPException, then by the classes of the error.
    by_class, by_status = connection.scope["starlette.exception_handlers"]
    handler = by_status.get(error.status_code) if isinstance(error, HTTPException) else None
    return handler or next((by_class[kind] for kind in type(error).__mro__ if kind in by_class), None)


async def _call(handler: Any, connection: Request | WebSocket, error: BaseException) -> Response | None:
    if is_async_callable(handler):
        found = await handler(connection, error)
    else:
        found = await run_in_threadpool(handler, connection, error)
    answer: Response | None = found
    return answer


async def _answer_invalid(request: Request, error: Exception) -> Response:
    # What was sent stays out of the answer and the log: it is health data.
    mistakes = error.errors() if isinstance(error, RequestValidationError) else []
    errors = [
        {
            "loc": [part[:LOC_CHARACTERS] if isinstance(part, str) else part for part in mistake["loc"][:LOC_PARTS]],
            "msg": mistake["msg"][:MESSAGE_CHARACTERS],
            "type": mistake["type"],
        }
        for mistake in mistakes[:ERRORS_TOLD]
    ]
    more = {"omitted": len(mistakes) - ERRORS_TOLD} if len(mistakes) > ERRORS_TOLD else {}
    failure = Failure(422, "invalid_request", "The request does not fit its schema.")
    return problem(request, failure, errors=errors, **more)


async def _answer_http(connection: Request | WebSocket, error: HTTPException) -> Response | None:
    # FastAPI wraps whatever keeps it from reading a body into a 400.
    if isinstance(error.__cause__, ClientDisconnect):
        raise error.__cause__
    if isinstance(error.__cause__, (BodyTooLarge, BodyTooSlow)):
        return await _answer_failure(connection, error.__cause__)
    note_failure(connection.scope, error)
    if error.status_code < HTTPStatus.OK or error.status_code in {204, 205, 304}:
        return Response(status_code=error.status_code, headers=error.headers)  # These have no body.
    # Status, detail and headers are its author's. FastAPI's own exception takes details that are no text.
    phrase = _PHRASES.get(error.status_code)
    code = f"http_{error.status_code}" if phrase is None else re.sub("[^a-z]+", "_", phrase.lower())
    answer = problem(connection, Failure(error.status_code, code, error.detail))
    answer.headers.update(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED and isinstance(connection, Request):
        # Starlette lists the methods of the first route of the path only.
        methods = {m for route in _routes_of_path(connection) for m in route.methods or ()}
        if connection.method not in methods:
            answer.headers["Allow"] = ", ".join(sorted(methods))
    return await _send_back(connection, answer)


def _routes_of_path(request: Request) -> list[RouteContext]:
    routes = iter_route_contexts(request.app.routes)
    return [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
