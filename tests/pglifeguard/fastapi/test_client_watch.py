"""A client that leaves while its request waits for a connection gives its place back, and nothing else is lost."""

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from fastapi import BackgroundTasks, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import Text, literal, select
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import Response
from starlette.types import ASGIApp, Message

from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi.client_watch import ClientWatch
from pglifeguard.fastapi.sessions import RequestDatabases
from pglifeguard.query import Query
from pglifeguard.testing.faults import exhausted
from pglifeguard.testing.serving import Running, listening
from pglifeguard.wait_queue import watch_client
from tests.conftest import Database
from tests.service import Service, serving

DISCONNECT: Message = {"type": "http.disconnect"}
EMPTY: Message = {"type": "http.request", "body": b"", "more_body": False}
BODY = b'{"mrn": "A-1", "full_name": "Ada", "birth_date": "1980-01-01"}'
HEAD = b"%s %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
WRITTEN = Query(select(literal("written", Text)))


class Passing(BaseHTTPMiddleware):
    """A middleware of the kind that many services have: it runs the rest in another task, and receives for it."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Pass the request on."""
        return await call_next(request)


@pytest.fixture
async def small(database: Database) -> AsyncIterator[Service]:
    """Give a service whose requests share one connection and wait for it as long as it takes."""
    async with serving(database.settings(replica=False, pool_size=1, max_overflow=0, pool_timeout=60)) as service:
        yield service


@asynccontextmanager
async def waiting(
    service: Service, sent: bytes, app: ASGIApp | None = None, *, http: str = "auto"
) -> AsyncIterator[asyncio.StreamWriter]:
    """Send a request and let it wait in the queue of the primary; no connection comes free in here."""
    async with (
        listening(Running(service.app if app is None else app), http=http) as url,
        exhausted(service.databases.primary),
    ):
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(sent)
        assert await eventually(in_queue(service, 1), 5)
        yield writer
        writer.transport.abort()


def in_queue(service: Service, number: int) -> Callable[[], Awaitable[bool]]:
    """Return the question whether so many requests wait."""

    async def ask() -> bool:
        return service.databases.primary.pool.figures().waiting == number

    return ask


def counted(service: Service, reason: str) -> float:
    """Return how many acquisitions were given up for a reason."""
    return service.sample("db_connection_cancelled_total", pool="primary", reason=reason)


@pytest.mark.parametrize(("method", "http"), [("GET", "httptools"), ("POST", "httptools"), ("DELETE", "h11")])
async def test_client_that_leaves_gives_its_place_back(
    small: Service, method: str, http: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its request leaves the queue at once, and is counted as given up and as 499; nothing of that is a failure."""
    path, body = ("/patients", BODY) if method == "POST" else ("/patients/1", b"")
    sent = HEAD % (method.encode(), path.encode(), len(body)) + body
    route = path.replace("/1", "/{patient_id}")

    async def left() -> bool:
        return small.sample("http_requests_total", method=method, route=route, status="499") == 1

    async with waiting(small, sent, http=http) as writer:
        writer.transport.abort()

        assert await eventually(in_queue(small, 0), 5)
        assert await eventually(left, 5)

    outcomes = {
        outcome: small.sample("db_connection_wait_seconds_count", pool="primary", outcome=outcome)
        for outcome in ("granted", "refused", "cancelled")
    }
    assert outcomes == {"granted": 0, "refused": 0, "cancelled": 1}
    assert (counted(small, "client_left"), counted(small, "cancelled")) == (1, 0)
    assert small.sample("http_requests_in_progress") == 0
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert (await small.client.get("/patients")).json() == []


async def test_client_is_seen_to_leave_through_other_middleware(small: Service) -> None:
    """A BaseHTTPMiddleware around the layers of the service, and one inside of them, hide nothing."""
    small.app.user_middleware.append(Middleware(Passing))

    async with waiting(small, HEAD % (b"GET", b"/patients/1", 0), Passing(small.app)) as writer:
        writer.transport.abort()

        assert await eventually(in_queue(small, 0), 5)
    assert counted(small, "client_left") == 1


def is_watched() -> bool:
    """Say whether a request that waited here would be given up."""
    watch = watch_client.get()
    return watch is not None and watch() is not None


@pytest.mark.shares_service
async def test_request_that_has_begun_to_work_is_served(service: Service) -> None:
    """What has committed or is answered goes on to its end, and so does another task that the endpoint has started."""
    seen: dict[str, bool] = {}

    async def look(name: str) -> None:
        seen[name] = is_watched()

    async def stream() -> AsyncIterator[bytes]:
        await look("streaming")
        yield b"."

    @service.app.post("/look")
    async def look_around(databases: RequestDatabases) -> None:
        await look("at first")
        await asyncio.create_task(look("in another task"))
        await databases.write_once(WRITTEN)
        await look("after a commit")

    @service.app.post("/late")
    async def look_late(background: BackgroundTasks) -> StreamingResponse:
        background.add_task(look, "in the background")
        return StreamingResponse(stream(), background=background)

    await service.client.post("/look")
    await service.client.post("/late")
    await look("outside")

    assert seen.pop("at first")
    assert seen == dict.fromkeys(
        ("in another task", "after a commit", "streaming", "in the background", "outside"), False
    )


@pytest.mark.shares_service
async def test_body_is_left_to_the_application(service: Service) -> None:
    """A client is watched before a request without a body is read, and after a body was; not while it comes."""
    seen: dict[str, bool] = {}
    read: list[bytes] = []

    async def chunks() -> AsyncIterator[bytes]:
        yield b"a body"
        await asyncio.wait_for(looked.wait(), 5)

    looked = asyncio.Event()

    @service.app.post("/read")
    async def read_late(request: Request) -> None:
        name = request.query_params["is"]
        seen[f"before {name}"] = is_watched()
        reading = asyncio.create_task(request.body())
        await asyncio.sleep(0)
        seen[f"beside a reader of {name}"] = is_watched()
        looked.set()
        read.append(await reading)
        seen[f"after {name}"] = is_watched()
        assert not await request.is_disconnected()

    for name, body in {"none": None, "empty": b"", "one": b"a body", "chunks": chunks()}.items():
        looked.clear()
        answer = await service.client.post("/read", params={"is": name}, content=body)
        assert answer.status_code == 200, answer.text

    assert read == [b"", b"", b"a body", b"a body"]
    assert [name for name, watched in seen.items() if not watched] == [
        "before one", "before chunks", "beside a reader of chunks",
    ]  # fmt: skip


@pytest.mark.shares_service
async def test_disconnect_is_left_to_who_receives_it(service: Service) -> None:
    """An endpoint that waits for the disconnect by itself, in a task, is the only one who asks the server."""
    seen: list[bool] = []

    @service.app.get("/leaving")
    async def notice(request: Request) -> None:
        await request.body()

        async def leave() -> None:
            await request.receive()

        leaving = asyncio.create_task(leave())
        await asyncio.sleep(0)
        seen.append(is_watched())
        leaving.cancel()
        await asyncio.wait([leaving])
        seen.append(is_watched())

    assert (await service.client.get("/leaving")).status_code == 200
    assert seen == [False, True]


async def received(*messages: Message | Exception) -> list[object]:
    """Give these messages to a watch, and return what the application receives in its place, or the error."""
    left = iter(messages)

    async def receive() -> Message:
        message = next(left)
        if isinstance(message, Exception):
            raise message
        return message

    watch = ClientWatch(receive)
    found: list[object] = []
    for _ in range(3):
        try:
            found.append(await watch.receive())
        except RuntimeError as error:
            found.append(str(error))
            break
    found.append(watch.left.done())
    watch.end()
    return found


async def test_no_message_is_lost() -> None:
    """Whatever a server says, the application receives each message once, and errors too; a disconnect stays."""
    part: Message = {"type": "http.request", "body": b"part", "more_body": True}
    failure = RuntimeError("broken")

    assert await received(EMPTY, DISCONNECT) == [EMPTY, DISCONNECT, DISCONNECT, True]
    assert await received(DISCONNECT) == [DISCONNECT, DISCONNECT, DISCONNECT, True]
    # HTTP/2 announces no body.
    assert await received(part, EMPTY, DISCONNECT) == [part, EMPTY, DISCONNECT, False]
    assert await received(EMPTY, EMPTY, DISCONNECT) == [EMPTY, EMPTY, DISCONNECT, False]
    assert await received(EMPTY, failure, failure) == [EMPTY, "broken", False]


async def test_request_that_is_over_says_that_its_client_has_left(service: Service) -> None:
    """A task that goes on receiving beyond the answer is not kept waiting for a request that nobody serves."""
    kept: list[Request] = []

    async def read(request: Request) -> None:
        await request.body()
        kept.append(request)

    service.app.add_api_route("/read", read, methods=["POST"])
    await service.client.post("/read", content=b"{}")

    assert await kept[0].receive() == DISCONNECT


async def test_request_that_waited_leaves_nothing_to_the_garbage_collector() -> None:
    """Two hundred that waited at once were 100,000 objects in cycles, and a collection in which nobody was served."""
    never = asyncio.Event()

    async def receive() -> Message:
        await never.wait()
        raise AssertionError

    watch = ClientWatch(receive)
    await asyncio.sleep(0)
    watching = weakref.ref(watch)
    gc.disable()
    try:
        watch.end()
        del watch
        for _ in range(3):
            await asyncio.sleep(0)

        assert watching() is None
    finally:
        gc.enable()
