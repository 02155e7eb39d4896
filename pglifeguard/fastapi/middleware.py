"""The layers around a request, pure ASGI, in the order in which it passes them.

`ObserveRequests` (id, metrics, last resort), `ReadYourWrites` and `BodyLimit` stand outside the exception handlers,
`RetryOnPrimary` and `RetryOnCollision` inside them, around the router. Each passes other scope types through; the first
one tells the server of a start that failed.
"""

import asyncio
import logging
import random
import re
import sys
import time
from collections.abc import Coroutine
from contextvars import ContextVar
from functools import lru_cache
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.middleware.body_limit import MAX_BODY_SIZE_SCOPE_KEY
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pglifeguard.collisions import ATTEMPTS, collision, pause_seconds
from pglifeguard.consistency import CURRENT, Consistency
from pglifeguard.databases import Databases
from pglifeguard.environment import SettingsError
from pglifeguard.errors import URL_TOO_LONG, BodyTooLarge, BodyTooSlow, Failure
from pglifeguard.fastapi.answer_headers import AnswerHeaders, RawHeaders
from pglifeguard.fastapi.client_watch import ClientWatch, announces_body, may_be_given_up, note_broken_off
from pglifeguard.fastapi.failure_log import report_bug
from pglifeguard.fastapi.json_depth import Nesting
from pglifeguard.fastapi.problems import answer_unforeseen, most_severe, problem
from pglifeguard.fastapi.sessions import (
    DATABASES,
    SAFE_METHODS,
    WRITE,
    consistency_of,
    isolation_of,
    route_of,
    why_read_failed,
)
from pglifeguard.metrics import Metrics
from pglifeguard.sampling import Sampler
from pglifeguard.server_position import Token
from pglifeguard.sessions import WriteSession
from pglifeguard.settings import DatabasesSettings
from pglifeguard.telemetry import Telemetry
from pglifeguard.wait_queue import client_key, watch_client

logger = logging.getLogger(__name__)

# The id of the request of this context, for log lines.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

# The status by which nginx and others count a client that left before its answer. It is never sent.
CLIENT_LEFT = 499
# Parameters of a query. A validation error for each of many costs a hundred times as much as the parameters.
MAX_PARAMETERS = 1000
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# A replica that replays nothing is noticed sooner than this, even while few bytes are missing.
TOKEN_SECONDS = 3600


def _plain_refusals(send: Send) -> Send:
    """Tell the server of a wrong setting by its sentence, where Starlette (1.10) would send the traceback."""

    async def send_plain(message: Message) -> None:
        error = sys.exception()
        if message["type"] == "lifespan.startup.failed" and isinstance(error, SettingsError):
            message["message"] = str(error)
        await send(message)

    return send_plain


class ObserveRequests:
    """Give each request an id, count and time it, and answer the exceptions that no handler takes.

    The id is the client's X-Request-ID if it is plain, else a new one; the log and the answer carry it. The answer also
    gets those of `headers` that it does not have. These duties share one layer because separate layers cost more calls
    for each request (docs/performance.md).
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        sampler: Sampler,
        telemetry: Telemetry | None = None,
        headers: AnswerHeaders | None = None,
    ) -> None:
        self._app = app
        self._headers: dict[str, RawHeaders] = {} if headers is None else {"http": headers.http, "https": headers.https}
        self._telemetry = telemetry
        self._sampler = sampler
        self._in_progress = metrics.http_in_progress
        self._counter = lru_cache(4096)(lambda *labels: metrics.http_requests.labels(*labels))
        self._timer = lru_cache(1024)(lambda *labels: metrics.http_seconds.labels(*labels))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, _plain_refusals(send) if scope["type"] == "lifespan" else send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        # The id is no secret, and random bytes of the kernel would cost ten times as much.
        chosen = given if _PLAIN_ID.fullmatch(given) else b"%016x" % random.getrandbits(64)
        request_id.set(chosen.decode())
        more = self._headers.get(scope.get("scheme", "http"), ())
        status: int | None = None
        complete = left = False

        async def send_marked(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", chosen)]
                # No call is made where there is nothing to add.
                message["headers"] = (more and _completed(headers, more)) or headers
            elif not message.get("more_body"):
                complete = True
            await send(message)

        started = time.perf_counter()
        self._in_progress.inc()
        try:
            await self._app(scope, receive, send_marked)
            # Servers silently drop data for a client that has left, and Starlette ends a stream to it without an error.
            left = not complete
        except ClientDisconnect:
            left = True
            await _answer_nobody(send_marked, begun=status is not None)
        except asyncio.CancelledError:
            # uvicorn cancels what outlasts the grace at shutdown, and would answer 500 in plain text.
            if status is None:
                failure = _CUT_SAFELY if scope["method"] in SAFE_METHODS else _CUT
                await problem(Request(scope), failure)(scope, receive, send_marked)
            raise
        except Exception as error:
            # The process edge: an exception that comes here is a bug, and the next request must not suffer from it.
            report_bug(self._sampler, scope, error)
            if status is not None or scope["app"].debug:
                raise
            answer = await answer_unforeseen(Request(scope), error)
            await answer(scope, receive, send_marked)
        finally:
            # The protocol of `serve` also sees clients leave while the application neither reads nor sends.
            left = left or scope.get("state", {}).get("client_left", False)
            self._count(scope, CLIENT_LEFT if left else status or 500, time.perf_counter() - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        self._in_progress.dec()
        # A client may send any word as its method; the label may not.
        method = scope["method"] if scope["method"] in METHODS else "other"
        # Otherwise clients could make a new series by each method that a route does not have.
        route = "unmatched" if status == HTTPStatus.METHOD_NOT_ALLOWED else route_of(scope)
        if status == CLIENT_LEFT:
            logger.debug("client left", extra={"route": route})
        self._counter(method, route, str(status)).inc()
        exemplar = None if self._telemetry is None else self._telemetry.exemplar()
        self._timer(method, route).observe(seconds, exemplar)


async def _answer_nobody(send: Send, *, begun: bool) -> None:
    """End a request whose client has left with an answer, which the server drops.

    A layer outside may insist on one: Starlette's BaseHTTPMiddleware makes a RuntimeError of a request without, which
    the server logs with its traceback and answers 500.
    """
    if not begun:
        await send({"type": "http.response.start", "status": CLIENT_LEFT, "headers": []})
        await send({"type": "http.response.body"})


class ReadYourWrites:
    """Let each client read its own writes, whichever database serves it.

    A write answers with the LSN after its COMMIT, the consistency token, in a header and a cookie. A request that sends
    it back reads from a replica only when that replica has replayed this LSN. Unsafe methods read on the primary. Where
    clients are told apart by their address, this layer notes it for the pool's queue.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, settings: DatabasesSettings) -> None:
        self._app = app
        self._by_address = settings.clients_by_address
        # Two services on one domain use different names or paths, so that a browser sends each its own cookie.
        self._cookie_name = name = settings.consistency_cookie_name
        self._cookie = re.compile(rb"(?:^|;\s*)" + re.escape(name.encode()) + rb"=([^;]*)")
        self._cookie_path = settings.consistency_cookie_path
        domain = settings.consistency_cookie_domain
        self._cookie_domain = "" if domain is None else f"; Domain={domain}"
        self._cookie_secure = settings.consistency_cookie_secure
        self._count_token = lru_cache(lambda outcome: metrics.tokens.labels(outcome))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # POST, PUT, PATCH and DELETE are never retried, so their reads go to the primary from the start.
        consistency = Consistency(self._wanted(scope), primary_only=scope["method"] not in SAFE_METHODS)
        scope.setdefault("state", {})["consistency"] = consistency
        # A mount lengthens root_path later.
        path = self._cookie_path or quote(scope.get("root_path", "")) or "/"
        # Also where a trusted proxy says that the client came by HTTPS: the server has put that into the scope.
        secure = "; Secure" if self._cookie_secure or scope.get("scheme") == "https" else ""
        where = f"; Path={path}{self._cookie_domain}{secure}"

        async def send_with_token(message: Message) -> None:
            if message["type"] == "http.response.start":
                consistency.answered = True
                if consistency.token is not None:
                    message["headers"] = [*message.get("headers", ()), *self._token_headers(consistency.token, where)]
            await send(message)

        if self._by_address and scope.get("client"):
            client_key.set(scope["client"][0])
        before = CURRENT.set(consistency)
        try:
            await self._app(scope, receive, send_with_token)
        finally:
            consistency.ended = True
            CURRENT.reset(before)

    def _wanted(self, scope: Scope) -> Token | None:
        """Return the newer of the header's and the cookie's token; None without one."""
        found = []
        for name, value in scope["headers"]:
            if name == b"x-consistency-token":
                found.append(value)
            elif name == b"cookie" and (match := self._cookie.search(value)):
                found.append(match[1])
        wanted: Token | None = None
        for text in found:
            if token := Token.parse(text):
                wanted = token if token.is_newer(wanted) else wanted
                self._count_token("accepted").inc()
            else:
                self._count_token("malformed").inc()
        return wanted

    def _token_headers(self, token: str, where: str) -> tuple[tuple[bytes, bytes], ...]:
        cookie = f"{self._cookie_name}={token}; Max-Age={TOKEN_SECONDS}{where}; HttpOnly; SameSite=Lax"
        return (b"x-consistency-token", token.encode()), (b"set-cookie", cookie.encode())


class BodyLimit:
    """Bound each request's URL, and its body while that is read. A body that is not read is not waited for.

    This layer also watches the client of a request that waits for a connection: all messages of the client pass here.

    FastAPI's `max_body_size=` of a route or a router overrides the setting. An excess is raised where the body is read,
    before the rest of it has arrived.
    """

    def __init__(self, app: ASGIApp, settings: DatabasesSettings) -> None:
        self._app = app
        self._max_bytes = settings.request_body_bytes
        self._max_values = settings.request_body_values
        self._max_depth = settings.request_body_depth
        self._max_url = settings.request_url_bytes
        self._seconds = settings.request_body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._has_too_long_url(scope):
            await problem(Request(scope), URL_TOO_LONG)(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        body: _Body | None = None
        watch: ClientWatch | None = None
        readers = 0

        async def receive_some() -> Message:
            nonlocal body, readers
            if body is None:
                max_bytes = scope.get(MAX_BODY_SIZE_SCOPE_KEY, self._max_bytes)
                body = _Body(
                    scope,
                    max_bytes=max_bytes,
                    max_values=self._max_values,
                    max_depth=self._max_depth,
                    seconds=self._seconds,
                )
            readers += 1
            try:
                message = await body.receive(receive if watch is None else watch.receive)
            finally:
                readers -= 1
            if message["type"] == "http.disconnect" and not body.complete:
                note_broken_off(scope)
            return message

        def watch_this() -> asyncio.Future[None] | None:
            nonlocal watch
            if not may_be_given_up():
                return None
            if watch is None:
                # The watch must not read a body in place of the application, which takes as much as it can work on.
                complete = not announces_body(scope) if body is None else body.complete
                if readers or not complete:
                    return None
                watch = ClientWatch(receive)
            return watch.left

        before = watch_client.set(watch_this)
        try:
            await self._app(scope, receive_some, send)
        finally:
            watch_client.reset(before)
            if watch is not None:
                watch.end()
            # Connections that were opened meanwhile keep this context, and `watch_this` in it. The request is over, and
            # they are not to keep that too.
            scope, receive, watch = {}, _over, None

    def _has_too_long_url(self, scope: Scope) -> bool:
        query: bytes = scope["query_string"]
        url_bytes = len(scope.get("raw_path") or scope["path"]) + len(query)
        return url_bytes > self._max_url or query.count(b"&") >= MAX_PARAMETERS


async def _over() -> Message:
    return {"type": "http.disconnect"}


class RetryOnPrimary:
    """Retry a read on the primary when a replica failed it or did not have its row.

    This layer stands around the router, inside the exception handlers, so it serves plain, included and mounted routes.
    When the first answer is about to start, it is discarded, and the first attempt's dependencies see a cancelled
    request; then the request is routed again. The layer also tells the sessions of a request, in mounted applications
    too, which databases they belong to.
    """

    def __init__(self, app: ASGIApp, databases: Databases) -> None:
        self._app = app
        self._databases = databases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        scope[DATABASES] = self._databases
        record = CURRENT.get()
        if record is not None:
            record.task = asyncio.current_task()
        try:
            if scope["type"] == "http" and scope["method"] in SAFE_METHODS:
                await self._read(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except BaseExceptionGroup as group:
            if isinstance(group, Exception):
                raise
            raise most_severe(group) from None  # Servers and ObserveRequests expect a bare CancelledError.
        finally:
            if record is not None:
                record.task = None

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        before = dict(scope)
        # Closing and opening the databases makes a new one, so it is read for each request.
        primary_retry = self._databases.primary_retry
        messages = _Messages(receive)
        reason: str | None = None

        async def send_unless_failed(message: Message) -> None:
            nonlocal reason
            if message["type"] == "http.response.start":
                failure = why_read_failed(scope, message["status"])
                if failure is not None:
                    reason = primary_retry.reason(consistency_of(scope), most_severe(failure))
            if reason is not None:
                raise _Abandoned
            await send(message)

        while True:
            try:
                await self._app(scope, messages.from_the_first(), send_unless_failed)
            except BaseException as error:
                if reason is None or isinstance(error, asyncio.CancelledError):
                    raise
                # Errors of the dependencies' cleanup are dropped: the client gets the answer of the next attempt.
            if reason is None:
                return
            # Routing, mounts and dependencies have changed the scope.
            scope.clear()
            scope.update(before)
            if not primary_retry.leave_replica(reason, consistency_of(scope)):
                break
            reason = None
        await primary_retry.run(
            reason, consistency_of(scope), lambda: self._app(scope, messages.from_the_first(), send)
        )


class _Messages:
    """The messages that a request has received, for as many attempts as it takes."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._received: list[Message] = []

    def from_the_first(self) -> Receive:
        """Return how an attempt receives: what another one has received before, then what comes."""
        place = 0

        async def receive_next() -> Message:
            nonlocal place
            if place == len(self._received):
                self._received.append(await self._receive())
            place += 1
            return self._received[place - 1]

        return receive_next


class RetryOnCollision:
    """Retry a request whose transaction collided with another one, before any of its answer is sent.

    Only a route that asks for an isolation level (`SerializableDB`) is retried, because it has agreed to run several
    times; and only while it has committed nothing. This layer stands around the router, so each attempt is routed, has
    its own dependencies and session, and reads the body again. The answer of the last attempt is sent as it is.
    """

    def __init__(self, app: ASGIApp, databases: Databases) -> None:
        self._app = app
        self._databases = databases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; WebSockets pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        before = dict(scope)
        received: list[Message] = []

        async def receive_kept() -> Message:
            message = await receive()
            # A body in one piece is small and is kept. An upload is kept only where the route may read it again.
            if not (message.get("more_body") and _runs_once(scope)):
                received.append(message)
            return message

        def send_unless_collided(message: Message) -> Coroutine[Any, Any, None]:
            return _dropped() if WRITE in scope and _may_run_again(scope) else send(message)  # type: ignore[return-value]  # It is a coroutine.

        body: Receive = receive_kept
        for attempt in range(ATTEMPTS - 1):
            try:
                await self._app(scope, body, send_unless_collided)
            except Exception:
                if not _may_run_again(scope):
                    raise
            session = _may_run_again(scope) if WRITE in scope else None
            if session is None:
                return
            self._databases.count_collision(session.failure)
            await asyncio.sleep(pause_seconds(attempt))
            scope.clear()
            scope.update(before)
            body = _replaying(list(received), receive_kept)
        await self._app(scope, body, send)


class _Body:
    """The part of one request's body that has arrived."""

    def __init__(self, scope: Scope, *, max_bytes: int, max_values: int, max_depth: int, seconds: float) -> None:
        headers = dict(scope["headers"])
        self._max_bytes = max_bytes
        self._max_values = max_values
        self._max_depth = max_depth
        self._seconds = seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        # FastAPI reads the first of several such headers, in any case.
        self._is_json = any(name == b"content-type" and b"json" in value.lower() for name, value in scope["headers"])
        self._bytes = 0
        self._commas = 0
        self._opened = 0
        self._nesting: Nesting | None = None
        self.complete = False
        announced = headers.get(b"content-length", b"")
        if announced.isdigit() and (len(announced) > len(str(max_bytes)) or int(announced) > max_bytes):
            raise BodyTooLarge(self._too_many_bytes())

    async def receive(self, receive: Receive) -> Message:
        """Receive the next message. After a complete body only the client's disconnect comes, without a deadline."""
        if self.complete:
            return await receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await receive()
        except TimeoutError:
            raise BodyTooSlow(f"The body was not there within {self._seconds:g} seconds.") from None
        if message["type"] != "http.request":
            return message
        chunk = message.get("body", b"")
        self.complete = not message.get("more_body", False)
        self._bytes += len(chunk)
        if self._bytes > self._max_bytes:
            raise BodyTooLarge(self._too_many_bytes())
        if self._is_json:
            # Each value but the first follows a comma. The count comes before parsing: a validation error for each of
            # many values costs a hundred times as much as the values.
            self._commas += chunk.count(b",")
            # Each array and each object is a value as well.
            self._opened += chunk.count(b"[") + chunk.count(b"{")
            if self._commas >= self._max_values or self._opened > self._max_values:
                raise BodyTooLarge(f"The body has more than {self._max_values} values.")
            if self._opened <= self._max_depth and self.complete:
                return message  # Whatever stands in what: nearly every body, which costs no look at its strings.
            if self._nesting is None:
                self._nesting = Nesting()
            if self._nesting.exceeds(self._max_depth, chunk):
                raise BodyTooLarge(f"The body nests more than {self._max_depth} deep.")
        return message

    def _too_many_bytes(self) -> str:
        return f"The body has more than {self._max_bytes} bytes."


class _Abandoned(BaseException):
    """Ends a first attempt whose answer is discarded, so that its background tasks never start.

    It is a BaseException, so that no `except Exception` of a dependency or a mounted application catches it.
    """


def _completed(headers: list[tuple[bytes, bytes]], more: RawHeaders) -> list[tuple[bytes, bytes]]:
    """Add those whose names are not there yet."""
    there = dict(headers)
    for header in more:
        if header[0] not in there:
            headers.append(header)  # noqa: PERF401  # Before Python 3.12 a comprehension is a call more.
    return headers


def _runs_once(scope: Scope) -> bool:
    """Say whether the request has reached a route without an isolation level, whose body is read once."""
    return isinstance(scope.get("route"), APIRoute) and isolation_of(scope) is None


def _may_run_again(scope: Scope) -> WriteSession | None:
    session: WriteSession | None = scope.get(WRITE)
    if session is None or session.isolation is None or session.committed or not collision(session.failure):
        return None
    return None if consistency_of(scope).committed else session


def _replaying(kept: list[Message], receive: Receive) -> Receive:
    async def replay() -> Message:
        return kept.pop(0) if kept else await receive()

    return replay


async def _dropped() -> None:
    """Discard a message of an attempt that is retried."""


_CUT_SAFELY = Failure(503, "closing", "The service shut down before the answer was there.")
_CUT = Failure(
    503,
    "outcome_unknown",
    "The service shut down during the change, so it may or may not have been made. "
    "Read before you try again, or send the request with an Idempotency-Key.",
)
_PLAIN_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
