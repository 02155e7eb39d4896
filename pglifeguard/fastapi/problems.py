"""Exceptions as answers: RFC 9457 problem documents with a stable `code`, for every exception of a route."""

import math
import random
import re
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import asyncpg
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect, status
from fastapi.concurrency import run_in_threadpool
from fastapi.exception_handlers import http_exception_handler, request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.routing import RouteContext, iter_route_contexts
from sqlalchemy.exc import DBAPIError, NoResultFound, SQLAlchemyError
from starlette._utils import is_async_callable
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.websockets import WebSocketState

from pglifeguard.errors import (
    MEDIA_TYPE,
    PHRASES,
    BodyTooLarge,
    BodyTooSlow,
    Failure,
    NotFound,
    ServiceError,
    classify,
    document,
    retry_after_seconds,
)
from pglifeguard.fastapi.failure_log import report_failure
from pglifeguard.fastapi.sessions import note_failure
from pglifeguard.settings import DatabasesSettings

# Limits of a 422: enough to correct the request, and an answer that is not much larger than the request.
ERRORS_TOLD = 20
LOC_PARTS = 20
LOC_CHARACTERS = 100
MESSAGE_CHARACTERS = 300
# Of the sentence of any other error, which may repeat what the client has sent.
DETAIL_CHARACTERS = 1000
# How long a queue takes is an estimate, and what it waits for may end sooner.
MOST_ESTIMATED_SECONDS = 60


def problem(
    request: Request | WebSocket, failure: Failure, *, retry_after_seconds: float = 0.0, **more: Any
) -> Response:
    """Build the answer: application/problem+json, with Retry-After on every 503, of so many seconds at least.

    A 429 has it where these seconds are known.
    """
    headers = {}
    if failure.status == 503:  # noqa: PLR2004
        # An application that is mounted beneath this one has no databases of its own.
        databases = getattr(request.app.state, "databases", None)
        headers["Retry-After"] = "1" if databases is None else _retry_after(databases.settings, retry_after_seconds)
    elif failure.status == 429 and retry_after_seconds > 0:  # noqa: PLR2004
        headers["Retry-After"] = str(math.ceil(retry_after_seconds))
    if failure.status == 408 or (failure.status == 413 and "expect" in request.headers):  # noqa: PLR2004
        # The rest of the body will not come. After any other 413 it does, and closing before it was read would reset
        # the connection, so that the client loses the answer.
        headers["Connection"] = "close"
    if failure.status == 401:  # noqa: PLR2004
        headers["WWW-Authenticate"] = "Bearer"
    return Response(document(failure, **more), failure.status, headers, MEDIA_TYPE)


def _retry_after(settings: DatabasesSettings, seconds: float) -> str:
    least = max(settings.retry_after_seconds, min(math.ceil(seconds), MOST_ESTIMATED_SECONDS))
    return str(least + random.randint(0, settings.retry_after_spread_seconds))  # noqa: S311  # Not a secret.


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe error answers for OpenAPI: `APIRouter(responses=documented(404, 409))`."""
    text = {"type": "string"}
    properties = {"type": text, "title": text, "status": {"type": "integer"}, "detail": text, "code": text}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Answer every exception of this service with a problem document, and log those that are no client's fault.

    Handlers that the application has already stay, and those that it adds later replace these. So does one for a wider
    class, `SQLAlchemyError` for example; one for `Exception` is asked last.
    """
    # To mypy a handler answers requests or WebSockets; these answer both.
    handlers: dict[type[Exception], Any] = {
        ServiceError: _answer_failure,
        DBAPIError: _answer_database_failure,
        asyncpg.PostgresError: _answer_failure,
        NoResultFound: _answer_database_failure,
        RequestValidationError: _answer_invalid,
        HTTPException: _answer_http,
        ExceptionGroup: _answer_group,
    }
    for kind, handler in handlers.items():
        if app.exception_handlers.get(kind) in {None, http_exception_handler, request_validation_exception_handler}:
            app.add_exception_handler(kind, handler)


async def answer_unforeseen(request: Request, error: Exception) -> Response:
    """Answer a bug with the application's own handler for `Exception` or 500, else with `internal_error`."""
    handlers = request.app.exception_handlers
    handler = handlers.get(HTTPStatus.INTERNAL_SERVER_ERROR) or handlers.get(Exception)
    answer = None if handler is None else await _call(handler, request, error)
    return problem(request, _UNFORESEEN) if answer is None else answer


_UNFORESEEN = Failure(500, "internal_error", "The service failed. The log has the reason by X-Request-ID.")


async def _answer_database_failure(connection: Request | WebSocket, error: Exception) -> Response | None:
    """Answer an exception of SQLAlchemy, unless the application has a handler for a wider class of them.

    `session.get_one(…)` and `.one()` that found nothing are a 404: what the request is about is not there.
    """
    by_class, _ = connection.scope["starlette.exception_handlers"]
    for kind in type(error).__mro__:
        if issubclass(kind, SQLAlchemyError) and by_class.get(kind) not in {None, _answer_database_failure}:
            note_failure(connection.scope, error)
            return await _call(by_class[kind], connection, error)
    if not isinstance(error, NoResultFound):
        return await _answer_failure(connection, error)
    missing = NotFound("Nothing was found.")
    missing.__cause__ = error
    return await _answer_failure(connection, missing)


async def _answer_failure(connection: Request | WebSocket, error: Exception) -> Response | None:
    failure = classify(error)
    if failure is None:
        raise error  # A bug: `ObserveRequests` logs it and answers 500.
    if len(failure.detail) > DETAIL_CHARACTERS:
        failure = failure._replace(detail=f"{failure.detail[:DETAIL_CHARACTERS]}…")
    note_failure(connection.scope, error)
    if failure.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        report_failure(connection, failure, error)
    answer = problem(connection, failure, retry_after_seconds=retry_after_seconds(error))
    return await _send_back(connection, answer)


async def _send_back(connection: Request | WebSocket, answer: Response) -> Response | None:
    """Return the answer to a request. Refuse a WebSocket with it where the server can, else close it."""
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
    """Answer the exceptions of a TaskGroup as the most severe of them, by the handler of that one."""
    failures = [failure for failure in leaves(group) if isinstance(failure, Exception)]
    handlers = [_handler_of(connection, failure) for failure in failures]
    if None in handlers:
        # Several tasks may have waited for the same body; a client that leaves in the middle of it leaves them all.
        unhandled = [failure for failure, handler in zip(failures, handlers, strict=True) if handler is None]
        if all(isinstance(failure, ClientDisconnect) for failure in unhandled):
            raise unhandled[0]
        # A bug. The log must name each of several exceptions.
        raise failures[0] if len(failures) == 1 else group
    chosen = most_severe(group)
    for failure in failures:
        known = classify(failure)
        if failure is not chosen and known is not None and known.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            report_failure(connection, known, failure)
    return await _call(_handler_of(connection, chosen), connection, chosen)


def leaves(error: BaseException) -> list[BaseException]:
    """Return the exceptions in a group and in its nested groups; any other exception is its own only leaf."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in leaves(one)]
    return [error]


def most_severe(error: BaseException) -> BaseException:
    """Return the exception that stands for a group: a cancellation, else a bug, else the highest status."""
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
    # Starlette's order: first the status of an HTTPException, then the classes of the exception.
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
    # The values that were sent are health data: neither the answer nor the log has them.
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
    # FastAPI wraps every exception of reading a body into a 400.
    if isinstance(error.__cause__, ClientDisconnect):
        raise error.__cause__
    if isinstance(error.__cause__, (BodyTooLarge, BodyTooSlow)):
        return await _answer_failure(connection, error.__cause__)
    note_failure(connection.scope, error)
    if error.status_code < HTTPStatus.OK or error.status_code in {204, 205, 304}:
        return Response(status_code=error.status_code, headers=error.headers)  # These have no body.
    # Status, detail and headers are the author's. The detail of FastAPI's own exception may be any JSON value.
    phrase = PHRASES.get(error.status_code)
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
