"""`Idempotency-Key`: a POST or PATCH that is sent twice is done once, and both times answered alike.

One transaction claims the key, does the work and stores the answer. So a request whose COMMIT was lost can be repeated
safely: either all of it happened or nothing. A second request with the same key waits on the claim of the first. Only a
committed answer is stored; an error rolls the claim back with the work. What is stored, and for how long, is in
kept_answers.py.

Routers opt in by `APIRouter(route_class=IdempotentRoute)`; their routes take `WriteDB` as usual.
"""

import asyncio
import hashlib
import logging
import re
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

from fastapi import Request, Response, params
from fastapi.dependencies.utils import get_dependant, solve_dependencies
from fastapi.routing import APIRoute
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from starlette.types import Message

from pglifeguard.databases import Databases
from pglifeguard.errors import DatabaseUnavailable, ServiceError
from pglifeguard.fastapi.kept_answers import HEADER, Claim, claim_key, replay, store_answer
from pglifeguard.fastapi.problems import documented
from pglifeguard.fastapi.sessions import WriteDB, consistency_of, databases_of
from pglifeguard.sessions import WriteSession

logger = logging.getLogger(__name__)

__all__ = ["HEADER", "IdempotentRoute", "purge_expired", "purge_expired_keys"]
METHODS = frozenset({"POST", "PATCH"})
MAX_CHARACTERS = 255
# Rows deleted by one statement: few enough not to disturb requests.
PURGE_ROWS = 1000
# Seconds between two looks whether a purge is due, and the database awake: shorter than a sleeping one stays awake.
LOOK_SECONDS = 30
# An answer is kept in memory and in a row of the database, inside the transaction.
MAX_BYTES = 1_048_576
_TOO_LONG = (
    f"The answer is longer than {MAX_BYTES} bytes, which cannot be kept with an {HEADER}; send the request without one."
)
_ASKED, _CLAIMED = "lifeguard.idempotency_key", "lifeguard.claimed"
_PARAMETER = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_CHARACTERS, "pattern": "^[!-~]+$"},
    "description": "Sent again with the same key and body, the request is done once and answered alike.",
}


class InvalidIdempotencyKey(ServiceError):
    """The key is empty, too long or not plain ASCII."""

    status = 422
    code = "invalid_idempotency_key"


class AnswerNotKept(ServiceError):
    """The route's answer cannot be kept with the key; nothing was changed."""

    status = 422
    code = "idempotency_not_possible"


class IdempotentRoute(APIRoute):
    """A route that honours the header on POST and PATCH.

    A key belongs to its caller. The library knows no tokens: a guard, or one of the dependencies below, says who calls
    by `request.state.caller`, the subject of a token for example. Where nobody says it, the Authorization header stands
    for the caller, and a retry with a new token is another caller's request.

    The key is claimed after all `dependencies=` of application, inclusion, router and route, so a caller whom these
    refuse gets no stored answer either. The dependencies in the endpoint's signature come after the key: a repeated
    request is answered without them, so a guard does not belong there.
    """

    def __init__(
        self,
        path: str,
        endpoint: Callable[..., Any],
        *,
        methods: Collection[str] | None = None,
        dependencies: Sequence[params.Depends] | None = None,
        **options: Any,
    ) -> None:
        if not METHODS.isdisjoint(methods or ()):
            dependencies = [*(dependencies or ()), params.Depends(_claim)]
            extra = options.get("openapi_extra") or {}
            parameters = [known for known in extra.get("parameters", ()) if known.get("name") != HEADER]
            options["openapi_extra"] = {**extra, "parameters": [*parameters, _PARAMETER]}
            options["responses"] = {**documented(410), **(options.get("responses") or {})}
        super().__init__(
            path, endpoint, methods=None if methods is None else list(methods), dependencies=dependencies, **options
        )

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the route's handler."""
        handler = super().get_route_handler()
        if METHODS.isdisjoint(self.methods or ()):
            return handler

        async def handle(request: Request) -> Response:
            keys = request.headers.getlist(HEADER)
            if not keys or request.method not in METHODS:
                return await handler(request)
            # This reads and keeps the body, also a form's, which FastAPI would read from the socket.
            request.scope[_ASKED] = await _asked(request, keys)
            consistency_of(request.scope).keyed = True
            try:
                response = await handler(request)
            except _Replayed as replayed:
                return replayed.response
            claimed: _Claimed | None = request.scope.get(_CLAIMED)
            if claimed is None:
                return response  # The application overrode `_claim`.
            return await _kept(claimed, request, response)

        return handle


class _Claimed(NamedTuple):
    """The key that this request has claimed, and the session whose transaction holds the claim."""

    session: WriteSession
    claim: Claim


class _Replayed(Exception):  # It carries an answer.
    """Ends a request whose answer is stored, before its endpoint."""

    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


async def _session_of(session: WriteDB) -> None:
    """Name the session for FastAPI's solving; this function is never called."""


_SESSION_OF = get_dependant(path="", call=_session_of, scope="function")


async def _claim(request: Request) -> None:
    """Claim the request's key, if it has one, in the transaction of its `WriteDB`, which commits it."""
    asked: tuple[str, bytes] | None = request.scope.get(_ASKED)
    if asked is None:
        return
    key, fingerprint = asked
    claim = Claim(hashlib.sha256(f"{_caller(request)}\n{key}".encode()).digest(), fingerprint)
    # FastAPI would do the same, `dependency_overrides` included, but open a session for requests without a key too.
    stack: AsyncExitStack = request.scope["fastapi_inner_astack"]
    solved = await solve_dependencies(
        request=request,
        dependant=_SESSION_OF,
        dependency_overrides_provider=request.app,
        async_exit_stack=stack,
        embed_body_fields=False,
    )
    session: WriteSession = solved.values["session"]
    session.pinned = True  # A commit before the end would store a key without its answer.
    settings = databases_of(request).settings
    stored = await claim_key(session, claim, hours=settings.idempotency_hours)
    if stored is not None:
        raise _Replayed(replay(claim, stored, settings.idempotency_seal))
    request.scope[_CLAIMED] = _Claimed(session, claim)


async def _kept(claimed: _Claimed, request: Request, response: Response) -> Response:
    """Store the answer, and return it with its whole body."""
    if type(response).__call__ is not Response.__call__:
        response = await _whole(request, response)
    if len(response.body) > MAX_BYTES:
        raise AnswerNotKept(_TOO_LONG)
    await store_answer(claimed.session, claimed.claim, response, databases_of(request).settings)
    return response


async def _whole(request: Request, response: Response) -> Response:
    """Run an answer that produces its body while it is sent (a stream, a file), and return it with its body.

    Raises: AnswerNotKept when it is too long, or a stream of events, which may never end.
    """
    if (response.media_type or "").startswith("text/event-stream"):
        raise AnswerNotKept("A stream of events cannot be kept with an Idempotency-Key; send the request without one.")
    whole = Response(background=response.background)
    response.background = None  # Background tasks start after the answer was sent.
    body = bytearray()

    async def collect(message: Message) -> None:
        if message["type"] == "http.response.start":
            whole.status_code = message["status"]
            whole.raw_headers = list(message["headers"])
        body.extend(message.get("body", b""))
        if len(body) > MAX_BYTES:
            raise AnswerNotKept(_TOO_LONG)

    # Without extensions Starlette sends a file's content, not its name. A client that leaves must not end an answer
    # that is to be stored: from this version of ASGI on, Starlette notices the client by `send` alone.
    asgi = {"version": "3.0", "spec_version": "2.4"}
    await response({**request.scope, "asgi": asgi, "extensions": {}}, request.receive, collect)
    whole.body = bytes(body)
    if "content-length" not in whole.headers:
        whole.headers["content-length"] = str(len(body))
    return whole


async def purge_expired_keys(databases: Databases, *, hours: float, interval_seconds: float = 3600) -> None:
    """Delete expired keys, every `interval_seconds`, until cancelled; a database that sleeps then, once it is awake."""
    loop = asyncio.get_running_loop()
    due = loop.time() + interval_seconds
    while True:
        await asyncio.sleep(min(interval_seconds, LOOK_SECONDS))
        if loop.time() < due or databases.primary.pool.asleep:
            continue
        due = loop.time() + interval_seconds
        try:
            while await purge_expired(databases, hours=hours) == PURGE_ROWS:
                pass
        except (DatabaseUnavailable, DBAPIError) as error:
            # Nothing is lost: the next round deletes what this one left.
            logger.warning("idempotency keys not purged", extra={"reason": str(error)})


async def purge_expired(databases: Databases, *, hours: float) -> int:
    """Delete a batch of keys older than `hours`, skipping rows that others hold; return how many."""
    statement = text("""
        DELETE FROM idempotency_keys WHERE digest IN (
            SELECT digest FROM idempotency_keys WHERE created_at < now() - make_interval(secs => :seconds)
            LIMIT :rows FOR UPDATE SKIP LOCKED)
        RETURNING digest
    """)
    async with databases.writing(label="idempotency") as session:
        result = await session.execute(statement, {"seconds": hours * 3600, "rows": PURGE_ROWS})
        return len(result.all())


async def _asked(request: Request, keys: list[str]) -> tuple[str, bytes]:
    """Return the request's key and fingerprint."""
    if len(keys) > 1 or re.fullmatch(rf"[!-~]{{1,{MAX_CHARACTERS}}}", keys[0]) is None:
        raise InvalidIdempotencyKey(
            f"{HEADER} must be one of 1 to {MAX_CHARACTERS} printable ASCII characters, no spaces."
        )
    asked = f"{request.method} {request.url.path}?{request.url.query}\n".encode() + await request.body()
    return keys[0], hashlib.sha256(asked).digest()


def _caller(request: Request) -> str:
    """Say whose key it is: `request.state.caller`, as a retry may come with a new token; else by the token itself."""
    caller = getattr(request.state, "caller", None)
    return request.headers.get("authorization", "") if caller is None else str(caller)
