"""`Idempotency-Key`: a POST or PATCH that is sent twice is done once, and answered twice alike.

The key is claimed, the work done and the answer stored in one transaction, so a COMMIT that was lost or never known is
safe to repeat: either all of it happened or nothing. A twin that comes while the first is at work waits for it on the
claim. Only an answer that was committed is stored; an error rolls the claim back with the work.

Routers opt in by `APIRouter(route_class=IdempotentRoute)`; their routes take `WriteDB` or `AutocommitDB` as ever.
"""

import asyncio
import hashlib
import logging
import re
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi import Request, Response
from sqlalchemy import LargeBinary, Row, SmallInteger, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base
from app.db.dependencies import SessionRoute, consistency_of, databases_of, route_of, share_write_session
from app.db.engines import Databases
from app.db.sessions import WriteSession
from app.errors import DatabaseUnavailable, ServiceError

logger = logging.getLogger(__name__)

HEADER = "Idempotency-Key"
METHODS = frozenset({"POST", "PATCH"})
MAX_CHARACTERS = 255
# Rows deleted by one round of housekeeping: few enough not to be felt.
PURGE_ROWS = 1000
OPENAPI = {
    "parameters": [
        {
            "name": HEADER,
            "in": "header",
            "required": False,
            "schema": {"type": "string", "minLength": 1, "maxLength": MAX_CHARACTERS, "pattern": "^[!-~]+$"},
            "description": "Sent again with the same key and body, the request is done once and answered alike.",
        }
    ]
}


class InvalidIdempotencyKey(ServiceError):
    """The key is empty, too long or not plain ASCII."""

    status = 422
    code = "invalid_idempotency_key"


class IdempotencyKeyReused(ServiceError):
    """The key was used for another request."""

    status = 422
    code = "idempotency_key_reused"


class IdempotencyKey(Base):
    """A key that was used, the request that used it, and its answer."""

    __tablename__ = "idempotency_keys"

    # SHA-256 of caller and key: nobody meets another caller's answer, and no key can be read from the table.
    digest: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    fingerprint: Mapped[bytes] = mapped_column(LargeBinary)
    status: Mapped[int | None] = mapped_column(SmallInteger)
    location: Mapped[str | None]
    media_type: Mapped[str | None]
    body: Mapped[bytes | None] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)


@dataclass(frozen=True, slots=True)
class Claim:
    """One request's key: whose and which (digest), and what was asked (fingerprint)."""

    digest: bytes
    fingerprint: bytes


class IdempotentRoute(SessionRoute):
    """A route that honours the header on POST and PATCH."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the route's handler."""
        handler = super().get_route_handler()
        if METHODS.isdisjoint(self.methods or ()):
            return handler

        async def handle(request: Request) -> Response:
            key = request.headers.get(HEADER)
            if key is None or request.method not in METHODS:
                return await handler(request)
            claim = await _claim_of(request, key)
            hours = request.app.state.settings.idempotency_hours
            databases = databases_of(request)
            label = route_of(request.scope)
            async with databases.writing(consistency_of(request.scope), label=label) as session:
                stored = await claim_key(session, claim, hours=hours)
                if stored is not None:
                    return replay(claim, stored)
                share_write_session(request, session)
                async with AsyncExitStack() as stack:
                    # What dependencies do at their end is part of the transaction, and may still refuse it.
                    request.scope["fastapi_function_astack"] = stack
                    response = await handler(request)
                await store_answer(session, claim, response)
                return response

        return handle


async def claim_key(session: WriteSession, claim: Claim, *, hours: float) -> Row[*tuple[Any, ...]] | None:
    """Take the key for this transaction: None when it is ours, else the row of the request that had it.

    Waits for a twin that is at work with it. A key older than `hours` is as good as new.
    """
    keys = IdempotencyKey
    statement = (
        insert(keys)
        .values(digest=claim.digest, fingerprint=claim.fingerprint)
        .on_conflict_do_update(
            index_elements=[keys.digest],
            set_={"fingerprint": claim.fingerprint, "status": None, "created_at": func.now()},
            where=keys.created_at < func.now() - func.make_interval(0, 0, 0, 0, 0, 0, hours * 3600),
        )
        .returning(keys.digest)
    )
    if (await session.execute(statement)).one_or_none() is not None:
        return None
    columns = (keys.fingerprint, keys.status, keys.location, keys.media_type, keys.body)
    return (await session.execute(select(*columns).where(keys.digest == claim.digest))).one()


def replay(claim: Claim, stored: Row[*tuple[Any, ...]]) -> Response:
    """Answer as the first time.

    Raises: IdempotencyKeyReused when the key belongs to another request.
    """
    if stored.fingerprint != claim.fingerprint:
        raise IdempotencyKeyReused(f"This {HEADER} was used for another request.")
    headers = {} if stored.location is None else {"Location": stored.location}
    return Response(stored.body, stored.status, headers, stored.media_type)


async def store_answer(session: WriteSession, claim: Claim, response: Response) -> None:
    """Keep the answer with the key, in the transaction of the work."""
    await session.execute(
        update(IdempotencyKey)
        .where(IdempotencyKey.digest == claim.digest)
        .values(
            status=response.status_code,
            location=response.headers.get("location"),
            media_type=response.headers.get("content-type"),
            body=bytes(response.body),
        )
    )


async def keep_house(databases: Databases, *, hours: float, interval_seconds: float = 3600) -> None:
    """Delete expired keys, every `interval_seconds`, until cancelled."""
    while True:
        await asyncio.sleep(interval_seconds)
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


async def _claim_of(request: Request, key: str) -> Claim:
    if re.fullmatch(rf"[!-~]{{1,{MAX_CHARACTERS}}}", key) is None:
        raise InvalidIdempotencyKey(f"{HEADER} must be 1 to {MAX_CHARACTERS} printable ASCII characters, no spaces.")
    caller = request.headers.get("authorization", "")
    asked = f"{request.method} {request.url.path}?{request.url.query}\n".encode() + await request.body()
    return Claim(hashlib.sha256(f"{caller}\n{key}".encode()).digest(), hashlib.sha256(asked).digest())
