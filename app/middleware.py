"""Pure ASGI middleware, outermost first: the edge (request id, HTTP metrics, last resort) and consistency.

Each passes other scope types through. What a request's layers tell each other lives in `scope["state"]`.
"""

import asyncio
import logging
import random
import re
import time
from functools import lru_cache
from http import HTTPStatus

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.db.dependencies import SAFE_METHODS, route_of
from app.db.sessions import Consistency
from app.errors import Failure, problem
from app.failures import report_bug
from app.logs import request_id
from app.metrics import Metrics

logger = logging.getLogger(__name__)

# What the field counts for a client that did not wait for its answer; nobody gets to see it.
CLIENT_LEFT = 499
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Longer than a replica that replays nothing stays unnoticed: while few bytes are missing, it goes on serving.
TOKEN_SECONDS = 3600


class Edge:
    """Give each request an id, count and time it, and let no failure leave unanswered.

    The id is the client's own if it is a plain one; it goes into the log and X-Request-ID. Three duties in one layer:
    with layers of their own they took a twelfth of a short read's calls (docs/performance.md).
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._in_progress = metrics.http_in_progress
        self._counter = lru_cache(4096)(lambda *labels: metrics.http_requests.labels(*labels))
        self._timer = lru_cache(1024)(lambda *labels: metrics.http_seconds.labels(*labels))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        # It need not be unguessable, and random bytes of the kernel would cost ten times as much.
        chosen = given if _PLAIN_ID.fullmatch(given) else b"%016x" % random.getrandbits(64)
        request_id.set(chosen.decode())
        status: int | None = None
        complete = left = False

        async def send_marked(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", chosen)]
            elif not message.get("more_body"):
                complete = True
            await send(message)

        started = time.perf_counter()
        self._in_progress.inc()
        try:
            await self._app(scope, receive, send_marked)
            # Servers drop what is sent to a client that has left, and Starlette ends a stream to it, without a word.
            left = not complete
        except ClientDisconnect:
            left = True
        except asyncio.CancelledError:
            # uvicorn cancels what outlasts the grace at shutdown, and would answer 500 in plain text.
            if status is None:
                failure = _CUT_SAFELY if scope["method"] in SAFE_METHODS else _CUT
                await problem(Request(scope), failure)(scope, receive, send_marked)
            raise
        except Exception as error:
            # The edge of the request: whatever comes here is a bug, and the next request must not suffer from it.
            report_bug(scope, error)
            if status is not None:
                raise
            await problem(Request(scope), _UNFORESEEN)(scope, receive, send_marked)
        finally:
            # The protocol of `serve` knows of the others, which the application has no way to see.
            left = left or scope.get("state", {}).get("client_left", False)
            self._count(scope, CLIENT_LEFT if left else status or 500, time.perf_counter() - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        self._in_progress.dec()
        # A client may send any word as its method; the label may not.
        method = scope["method"] if scope["method"] in METHODS else "other"
        # A method that a route does not have is not the route's: anybody could make a series for each.
        route = "unmatched" if status == HTTPStatus.METHOD_NOT_ALLOWED else route_of(scope)
        if status == CLIENT_LEFT:
            logger.debug("client left", extra={"route": route})
        self._counter(method, route, str(status)).inc()
        self._timer(method, route).observe(seconds)


class ReadYourWrites:
    """What a client wrote, it reads, whichever database serves it.

    A write answers with the LSN after its COMMIT, the consistency token, in a header and a cookie; a request that sends
    either back is read from a replica only when that has replayed as much. What changes something reads on the primary.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._count_token = lru_cache(lambda outcome: metrics.tokens.labels(outcome))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # What is not safe is not run once more, so what it looks for it must look for where it is.
        consistency = Consistency(self._wanted(scope), primary_only=scope["method"] not in SAFE_METHODS)
        scope.setdefault("state", {})["consistency"] = consistency

        async def send_with_token(message: Message) -> None:
            if consistency.token is not None and message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_token_headers(consistency.token)]
            await send(message)

        await self._app(scope, receive, send_with_token)

    def _wanted(self, scope: Scope) -> int | None:
        """Return the newer of the header's and the cookie's token, in bytes of WAL; None without one."""
        found = []
        for name, value in scope["headers"]:
            if name == b"x-consistency-token":
                found.append(value)
            elif name == b"cookie" and (match := _COOKIE.search(value)):
                found.append(match[1])
        wanted = None
        for text in found:
            if match := _TOKEN.fullmatch(text):
                wanted = max(wanted or 0, (int(match[1], 16) << 32) + int(match[2], 16))
                self._count_token("accepted").inc()
            else:
                self._count_token("malformed").inc()
        return wanted


def _token_headers(token: str) -> tuple[tuple[bytes, bytes], ...]:
    cookie = f"consistency_token={token}; Max-Age={TOKEN_SECONDS}; Path=/; HttpOnly; SameSite=Lax"
    return (b"x-consistency-token", token.encode()), (b"set-cookie", cookie.encode())


_UNFORESEEN = Failure(500, "internal_error", "The service failed. The log has the reason by X-Request-ID.")
_CUT_SAFELY = Failure(503, "closing", "The service shut down before the answer was there.")
_CUT = Failure(
    503,
    "outcome_unknown",
    "The service shut down during the change, so it may or may not have been made. "
    "Read before you try again, or send the request with an Idempotency-Key.",
)
_PLAIN_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_TOKEN = re.compile(rb"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")
_COOKIE = re.compile(rb"(?:^|;\s*)consistency_token=([^;]*)")
