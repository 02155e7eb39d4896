"""The floor: raw ASGI and asyncpg's own pool, answering the same status, body and content headers as ours.

What a person writes by hand who needs nothing else: no framework, no validation, no metrics, no request id, no bound
on waiting. It takes as many round trips as ours, so that the ratio to it means something: its pool resets nothing
when a connection comes back, as ours does not where nothing was left behind.
"""

import json
import os
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from datetime import date, datetime
from typing import Any

import asyncpg

COLUMNS = "id, mrn, full_name, birth_date, created_at, updated_at"
GET = f"SELECT {COLUMNS} FROM patients WHERE id = $1"
LIST = f"SELECT {COLUMNS} FROM patients WHERE id > $1 ORDER BY id LIMIT $2"
ADD = f"INSERT INTO patients (mrn, full_name, birth_date) VALUES ($1, $2, $3) RETURNING {COLUMNS}"
LSN = "SELECT pg_current_wal_insert_lsn()::text"
JSON = (b"content-type", b"application/json")
PROBLEM = (b"content-type", b"application/problem+json")
POOL_SIZE = 10

Header = tuple[bytes, bytes]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class Floor:
    """The application."""

    def __init__(self) -> None:
        self._reader: Any = None
        self._writer: Any = None

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        path: str = scope["path"]
        if scope["method"] == "POST":
            await self._add(receive, send, alone=path == "/once")
        elif path == "/patients":
            await self._list(scope, send)
        elif path.startswith("/patients/"):
            await self._get(int(path.removeprefix("/patients/")), send)
        elif path == "/health/ready":
            await _answer(send, 200, b"{}")
        else:
            await _answer(send, 404, _problem("Not Found.", "not_found"), PROBLEM)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._reader = await open_pool("DATABASE_REPLICA_URL")
        self._writer = await open_pool("DATABASE_URL")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._reader.close()
        await self._writer.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _get(self, patient_id: int, send: Send) -> None:
        # As ours: what the replica does not have, the primary may have.
        for pool in (self._reader, self._writer):
            async with pool.acquire() as connection:
                row = await connection.fetchrow(GET, patient_id)
            if row is not None:
                await _answer(send, 200, _dump(_as_dict(row)))
                return
        await _answer(send, 404, _problem(f"Patient {patient_id} does not exist.", "not_found"), PROBLEM)

    async def _list(self, scope: dict[str, Any], send: Send) -> None:
        limit = int(scope["query_string"].rpartition(b"=")[2])
        async with self._reader.acquire() as connection:
            rows = await connection.fetch(LIST, 0, limit + 1)
        await _answer(send, 200, _dump([_as_dict(row) for row in rows[:limit]]))

    async def _add(self, receive: Receive, send: Send, *, alone: bool) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        new = json.loads(body)
        async with self._writer.acquire() as connection:
            birth_date = date.fromisoformat(new["birth_date"])
            # A single statement is a transaction of its own: two round trips fewer than BEGIN and COMMIT around it.
            async with nullcontext() if alone else connection.transaction():
                row = await connection.fetchrow(ADD, new["mrn"], new["full_name"], birth_date)
            token = await connection.fetchval(LSN)
        headers = (JSON, (b"location", b"/patients/%d" % row["id"]), (b"x-consistency-token", token.encode()))
        await _answer(send, 201, _dump(_as_dict(row)), *headers)


async def open_pool(variable: str) -> Any:
    """Open a pool that sends nothing of its own between two checkouts."""
    return await asyncpg.create_pool(os.environ[variable], min_size=5, max_size=POOL_SIZE, reset=_nothing)


async def _nothing(_connection: Any) -> None:
    pass


def create_app() -> Floor:
    """Make the application, as `uvicorn --factory` wants it."""
    return Floor()


def _as_dict(row: Any) -> dict[str, Any]:
    return {
        "id": row["id"],
        "mrn": row["mrn"],
        "full_name": row["full_name"],
        "birth_date": row["birth_date"].isoformat(),
        "created_at": _moment(row["created_at"]),
        "updated_at": _moment(row["updated_at"]),
    }


def _moment(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _dump(value: Any) -> bytes:
    return _encode(value).encode()


def _problem(detail: str, code: str) -> bytes:
    return _dump({"type": "about:blank", "title": "Not Found", "status": 404, "detail": detail, "code": code})


async def _answer(send: Send, status: int, body: bytes, *headers: Header) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [length, *(headers or (JSON,))]})
    await send({"type": "http.response.body", "body": body})
