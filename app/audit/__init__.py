"""The audit trail: who read or changed which row, and whom the guard refused. Off unless AUDIT says otherwise.

`AUDIT=log` writes one line for each request to a domain, and for each refusal, to the logger `app.audit`. `AUDIT=table`
also names the caller and the request in the transaction of each change, and triggers write a row of `audit_trail` with
it (migration 0006). Neither holds health data: subject, action, ids, request id, outcome. docs/audit.md has the rest.
"""

import json
import logging
import re
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.dependencies.utils import get_dependant, solve_dependencies
from fastapi.routing import APIRoute
from sqlalchemy import bindparam, func, select, true
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pglifeguard import Query, WriteSession
from pglifeguard.fastapi import WriteDB, request_id

logger = logging.getLogger(__name__)

# An answer that is longer is sent as any other, and its line says that its ids were not read.
MAX_BYTES = 1_048_576
_REFUSALS = frozenset({401, 403})
_MISSING = frozenset({404, 410})
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
# What is an id: a number, or a UUID. Any other word of a path or an answer may be a name.
_UUID = "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_IN_PATH = re.compile(f"/([0-9]{{1,19}}|{_UUID})(?=/|$)")
_MARK = Query(
    select(
        func.set_config("app.audit", "on", true()).label("marked"),
        func.set_config("app.audit_subject", bindparam("subject"), true()).label("subject"),
        func.set_config("app.audit_request", bindparam("request"), true()).label("request"),
    )
)


class AuditTrail:
    """Write a line for each request to one of these domains, and for each refusal, when its answer has been sent.

    It stands outside of the guard and of the error answers, and inside of what gives requests their ids. The answer
    passes through as it is; its ids are read from a copy.
    """

    def __init__(self, app: ASGIApp, *, domains: frozenset[str]) -> None:
        self._app = app
        self._domains = domains

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, body, whole = 0, bytearray(), False

        async def send_read(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                if len(body) <= MAX_BYTES:
                    body.extend(message.get("body", b""))
                whole = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, send_read)
        finally:
            # Also when the client left or the endpoint failed: what was shown until then was shown.
            # Without an answer there was an exception, which the layer around this one answers.
            self._report(scope, status or 500, bytes(body) if whole and len(body) <= MAX_BYTES else None)

    def _report(self, scope: Scope, status: int, body: bytes | None) -> None:
        domain = _domain_of(scope, self._domains)
        if domain is None and status not in _REFUSALS:
            return
        shown = _ids_of(body) if 200 <= status < 300 else {}  # noqa: PLR2004  # The statuses of success.
        fields = {
            "subject": scope.get("state", {}).get("caller"),
            "action": scope["method"],
            "resource": domain,
            "ids": sorted({*_IN_PATH.findall(scope["path"]), *shown.pop("id", ())}, key=_number),
            "related": {name: sorted(ids, key=_number) for name, ids in shown.items()},
            "outcome": _outcome(status),
            "status": status,
            # What cannot be read is said: nobody should take an empty list for an empty answer.
            "ids_read": body is not None,
        }
        logger.info("access", extra=fields)


def _domain_of(scope: Scope, domains: frozenset[str]) -> str | None:
    # The guard refuses before there is a route, so the path says which domain is meant, behind whatever prefix.
    return next((word for word in scope["path"].split("/") if word in domains), None)


def _number(identifier: str) -> tuple[int, str]:
    """Sort 10 behind 9."""
    return len(identifier), identifier


def _outcome(status: int) -> str:
    if status in _REFUSALS:
        return "refused"
    if status in _MISSING:
        return "not_found"
    return "allowed" if 200 <= status < 400 else "failed"  # noqa: PLR2004  # Success, and redirects to it.


def _ids_of(body: bytes | None) -> dict[str, set[str]]:
    """Return the ids of an answer by their names: of an object or a list of objects, "id" and what ends in "_id"."""
    try:
        answer = json.loads(body or b"null")
    except (ValueError, RecursionError):  # It is no JSON, so it shows no ids that could be told from other words.
        return {}
    found: dict[str, set[str]] = {}
    for each in answer if isinstance(answer, list) else [answer]:
        for name, value in each.items() if isinstance(each, dict) else ():
            # A number that is written as a text may be that of a passport.
            if (name == "id" or name.endswith("_id")) and (
                isinstance(value, int) or (isinstance(value, str) and re.fullmatch(_UUID, value))
            ):
                found.setdefault(name, set()).add(str(value))
    return found


async def _session_of(session: WriteDB) -> None:
    """Name the session for FastAPI's solving; this function is never called."""


_SESSION_OF = get_dependant(path="", call=_session_of, scope="function")


async def mark_change(request: Request) -> None:
    """Mark the transaction of a request's `WriteDB`, for the routers that take one; reads pay nothing."""
    if request.method in _SAFE:
        return
    solved = await solve_dependencies(
        request=request,
        dependant=_SESSION_OF,
        dependency_overrides_provider=request.app,
        async_exit_stack=request.scope["fastapi_inner_astack"],
        embed_body_fields=False,
    )
    await mark(solved.values["session"], request)


async def mark(session: WriteSession, request: Request) -> None:
    """Name the caller and the request in a transaction, for its rows of the trail: one round trip with AUDIT=table.

    A route that opens its session itself calls this first, and one that commits in between once more.
    """
    if request.app.state.settings.audit != "table":
        return
    caller: Any = request.scope.get("state", {}).get("caller")
    await session.rows(_MARK, subject="anonymous" if caller is None else str(caller), request=request_id.get() or "")


def install(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Write a line for each request to these routers. The library's middleware is added afterwards, around it."""
    domains = frozenset(
        route.path.split("/")[1] for router in routers for route in router.routes if isinstance(route, APIRoute)
    )
    app.add_middleware(AuditTrail, domains=domains)
