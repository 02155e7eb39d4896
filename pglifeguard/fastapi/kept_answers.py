"""The table of idempotency keys and what is kept in it: claims, answers, and what has become of an answer since.

The database notes which rows an answer tells of, in `idempotency_rows`, and deletes the answer with such a row
(docs/retention.md). So nothing here knows a table of the application.
"""

import logging
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import Response
from sqlalchemy import Column, LargeBinary, MetaData, Row, SmallInteger, Table, Text, func, select, update
from sqlalchemy.dialects.postgresql import TIMESTAMP, insert

from pglifeguard.errors import ServiceError
from pglifeguard.sealing import CannotOpen, Seal
from pglifeguard.sessions import WriteSession
from pglifeguard.settings import DatabasesSettings

logger = logging.getLogger(__name__)

HEADER = "Idempotency-Key"
_HEADERS_APART = frozenset({b"location", b"content-type"})
# What becomes of an answer's headers and body, as IDEMPOTENCY_BODIES said when it was kept. Plain ones have NULL.
_ENCRYPTED = "encrypted"
# Between the headers and the body of what is encrypted.
_BREAK = b"\n\n"
# The fingerprint of a key whose answer was deleted with its row; no request has it.
_FORGOTTEN = b""


class IdempotencyKeyReused(ServiceError):
    """The key was used for another request."""

    status = 422
    code = "idempotency_key_reused"


class AnswerForgotten(ServiceError):
    """A row that the key's request has written was deleted since, and the answer with it."""

    status = 410
    code = "idempotency_forgotten"


_METADATA = MetaData(naming_convention={"pk": "pk_%(table_name)s", "ix": "ix_%(table_name)s_%(column_0_N_name)s"})
# The keys that were used, the requests that used them, and their answers.
# For migrations: Alembic's target_metadata is a list of the application's metadata and this table's.
IDEMPOTENCY_TABLE = Table(
    "idempotency_keys",
    _METADATA,
    # SHA-256 of caller and key: callers cannot reach each other's answers, and the table shows no key.
    Column("digest", LargeBinary, primary_key=True),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("status", SmallInteger),
    Column("location", Text),
    Column("media_type", Text),
    # The other headers of the answer, "name:value" on a line each; cookies have one line each.
    Column("headers", LargeBinary),
    Column("body", LargeBinary),
    Column("created_at", TIMESTAMP(timezone=True), server_default=func.now(), nullable=False, index=True),
    Column("kept", Text),
)
# The rows that requests with a key have written. Triggers keep it; it belongs to the same migrations.
Table(
    "idempotency_rows",
    _METADATA,
    Column("relation", Text, primary_key=True),
    Column("row_id", Text, primary_key=True),
    Column("digest", LargeBinary, primary_key=True, index=True),
)
_KEYS = IDEMPOTENCY_TABLE.c


class Claim(NamedTuple):
    """One request's key: the caller and the key (digest), and the request (fingerprint)."""

    digest: bytes
    fingerprint: bytes


async def claim_key(session: WriteSession, claim: Claim, *, hours: float) -> Row[*tuple[Any, ...]] | None:
    """Claim the key for this transaction: return None, or the row of the request that has claimed it before.

    Waits for a transaction that holds the claim. A key older than `hours` may be claimed again.
    """
    statement = (
        insert(IDEMPOTENCY_TABLE)
        .values(digest=claim.digest, fingerprint=claim.fingerprint)
        .on_conflict_do_update(
            index_elements=[_KEYS.digest],
            set_={"fingerprint": claim.fingerprint, "status": None, "created_at": func.now()},
            where=_KEYS.created_at < func.now() - func.make_interval(0, 0, 0, 0, 0, 0, hours * 3600),
        )
        .returning(_KEYS.digest)
    )
    if (await session.execute(statement)).one_or_none() is not None:
        return None
    columns = (_KEYS.fingerprint, _KEYS.status, _KEYS.location, _KEYS.media_type, _KEYS.headers, _KEYS.body, _KEYS.kept)
    return (await session.execute(select(*columns).where(_KEYS.digest == claim.digest))).one()


def replay(claim: Claim, stored: Row[*tuple[Any, ...]], seal: Seal | None) -> Response:
    """Build the stored answer again, without headers and body where they were not kept or cannot be decrypted.

    Raises: IdempotencyKeyReused when the key belongs to another request, AnswerForgotten when a row was deleted since.
    """
    if stored.fingerprint == _FORGOTTEN:
        raise AnswerForgotten(
            f"What was stored with this {HEADER} was deleted since, and the answer with it. Nothing was done now; to "
            "do it anew, send another key."
        )
    if stored.fingerprint != claim.fingerprint:
        raise IdempotencyKeyReused(f"This {HEADER} was used for another request.")
    if stored.kept is None:
        return _whole(stored, stored.headers, stored.body)
    if stored.kept == _ENCRYPTED and seal is not None:
        try:
            headers, _, body = seal.open(stored.body, claim.digest).partition(_BREAK)
        except CannotOpen:
            pass
        else:
            return _whole(stored, headers, body)
    if stored.kept == _ENCRYPTED:
        logger.error("a kept answer cannot be decrypted: none of IDEMPOTENCY_SECRET fits, so it goes without its body")
    return _minimal(stored)


async def store_answer(session: WriteSession, claim: Claim, response: Response, settings: DatabasesSettings) -> None:
    """Keep the answer with the key, in the transaction of the work: status, body, and every header of the route's."""
    others = [(name, value) for name, value in response.raw_headers if name.lower() not in _HEADERS_APART]
    headers = b"\n".join(name + b":" + value for name, value in others)
    body, kept = bytes(response.body), None
    if settings.idempotency_bodies != "plain":
        kept = settings.idempotency_bodies
        seal = settings.idempotency_seal if kept == _ENCRYPTED else None
        body = b"" if seal is None else seal.close(headers + _BREAK + body, claim.digest)
        headers = b""
    await session.execute(
        update(IDEMPOTENCY_TABLE)
        .where(_KEYS.digest == claim.digest)
        .values(
            status=response.status_code,
            location=response.headers.get("location"),
            media_type=response.headers.get("content-type"),
            headers=headers,
            body=body,
            kept=kept,
        )
    )


def _whole(stored: Row[*tuple[Any, ...]], headers: bytes | None, body: bytes) -> Response:
    # Rows of an early version hold no further headers.
    raw = [(b"content-length", b"%d" % len(body))] if headers is None else _parsed(headers)
    if stored.location is not None:
        raw.append((b"location", stored.location.encode("latin-1")))
    if stored.media_type is not None:
        raw.append((b"content-type", stored.media_type.encode("latin-1")))
    response = Response(body, stored.status)
    response.raw_headers = raw
    return response


def _minimal(stored: Row[*tuple[Any, ...]]) -> Response:
    """Say that it was done, and where it is: what a client gets that prefers return=minimal (RFC 7240)."""
    headers = {"Preference-Applied": "return=minimal"}
    if stored.location is not None:
        headers["Location"] = stored.location
    # An empty body is no JSON: 204 says that there is none.
    return Response(status_code=204 if stored.status == HTTPStatus.OK else stored.status, headers=headers)


def _parsed(headers: bytes) -> list[tuple[bytes, bytes]]:
    pairs = (line.partition(b":") for line in headers.split(b"\n") if line)
    return [(name, value) for name, _, value in pairs]
