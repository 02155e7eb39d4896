"""What a connection may take before there is a request, from the outside, byte by byte."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.
import pytest
from starlette.types import Receive, Scope, Send

from app.settings import Settings
from pglifeguard.embedded.waiting import eventually
from pglifeguard.metrics import Metrics
from pglifeguard.serving.limits import LIMITS, OTHER_FILES, ConnectionLimits
from pglifeguard.serving.protocol import MAX_HEADERS, MAX_PIPELINED, LimitedProtocol
from pglifeguard.testing.serving import listening
from tests.app.test_cli import MODULE, served
from tests.conftest import Database
from tests.crowd import crowd
from tests.service import ADA

URL: Any = {"url": "postgresql://a@b/c"}
GET = b"GET / HTTP/1.1\r\nHost: test\r\n"
LIMIT = 4096


@dataclass
class Server:
    """An application behind the protocol: it answers `answer` when it may, and remembers how its clients left.

    While it `watches` it does not answer, and waits for its clients to leave.
    """

    metrics: Metrics = field(default_factory=Metrics)
    answer: bytes = b"here"
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    url_bytes: int = 2 * LIMIT
    hosts: list[bytes] = field(default_factory=list)
    watches: bool = False
    asked: int = 0
    left: int = 0
    port: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or keep the limits for the connections."""
        if scope["type"] == "lifespan":
            scope["state"][LIMITS] = ConnectionLimits(
                LIMIT, 0.5, 0.5, 20, self.metrics.connections_refused, self.url_bytes
            )
            for done in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{done}.complete"})
            return
        self.asked += 1
        self.hosts += [value for name, value in scope["headers"] if name == b"host"]
        if self.watches:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left += scope["state"].get("client_left", False)
            return
        await self.may_answer.wait()
        headers = [(b"content-length", b"%d" % len(self.answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.answer})
        self.left += scope["state"].get("client_left", False)

    def refused(self, reason: str) -> float:
        """Return how many connections were ended for a reason."""
        return self.metrics.registry.get_sample_value("http_connections_refused_total", {"reason": reason}) or 0.0


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """Give a server with small limits that answers at once."""
    serving = Server()
    serving.may_answer.set()
    async with listening(serving, http=LimitedProtocol) as url:
        serving.port = int(url.rpartition(":")[2])
        yield serving


async def exchange(server: Server, *pieces: bytes, reads: bool = True) -> bytes:
    """Send pieces, each when the one before is on its way, and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        async with asyncio.timeout(15):
            return await reader.read() if reads else b""
    except ConnectionResetError:
        return b""
    finally:
        writer.transport.abort()


def document(answer: bytes) -> tuple[int, str]:
    """Return the status and the code of a problem document."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split(b" ")[1]), json.loads(body)["code"]


async def test_ordinary_requests_pass(server: Server) -> None:
    """Requests with and without a body, one after the other on a connection, are answered as ever."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        answers = [await client.get("/"), await client.post("/", content=b"x" * 100_000), await client.get("/?a=b")]

    assert {answer.content for answer in answers} == {b"here"}
    assert server.metrics.connections_refused._metrics == {}


TOO_LARGE = {
    "URL": b"GET /" + b"x" * LIMIT + b" HTTP/1.1\r\n",
    "URL without end": b"GET /" + b"x" * LIMIT,
    "header": GET + b"X-Long: " + b"x" * LIMIT + b"\r\n\r\n",
    # What comes with the beginning in one read is not counted; that is at most 256 kB.
    "name without end": GET + b"x" * 300_000,
    "headers together": GET + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 100) for n in range(50)) + b"\r\n",
    "number of headers": GET + b"X: 1\r\n" * MAX_HEADERS + b"\r\n",
    "cookies": GET + b"Cookie: a=1\r\n" * MAX_HEADERS + b"\r\n",
}


@pytest.mark.parametrize("what", TOO_LARGE)
@pytest.mark.parametrize("at_once", [True, False])
async def test_head_that_is_too_large_is_refused(server: Server, what: str, at_once: bool) -> None:  # noqa: FBT001
    """In one piece or in small ones, the answer is 431, and the connection is closed."""
    sent = TOO_LARGE[what]
    pieces = [sent] if at_once else [sent[start : start + 1500] for start in range(0, len(sent), 1500)]

    answer = await exchange(server, *pieces)

    assert not answer or document(answer) == (431, "head_too_large")
    assert (server.asked, server.refused("head_too_large")) == (0, 1)


@pytest.mark.parametrize("end", [b" HTTP/1.1\r\n", b""])
@pytest.mark.parametrize("size", [1, LIMIT])
async def test_url_that_is_too_long_is_refused_as_one(server: Server, end: bytes, size: int) -> None:
    """Where a URL has less room than the head, it is a 414, however it comes, and the answer is kept nowhere."""
    server.url_bytes = 1000
    async with listening(server, http=LimitedProtocol) as url:
        server.port = int(url.rpartition(":")[2])
        sent = b"GET /" + b"x" * 1000 + end

        answer = await exchange(server, *[sent[start : start + size] for start in range(0, len(sent), size)])

    assert document(answer) == (414, "url_too_long")
    assert b"\r\ncache-control: no-store\r\nx-content-type-options: nosniff\r\n" in answer
    assert (server.asked, server.refused("url_too_long")) == (0, 1)


@pytest.mark.parametrize(
    ("target", "hosts"),
    [
        (b"/", [b"test"]),
        (b"/?next=http://other/", [b"test"]),
        (b"http://other/", [b"other"]),
        (b"HTTP://Other:81/a/b?c", [b"Other:81"]),
        (b"http://[::1]:8000/", [b"[::1]:8000"]),
    ],
)
async def test_target_names_the_host(server: Server, target: bytes, hosts: list[bytes]) -> None:
    """A request line with a whole URL says whom it asks, and the header does not count: RFC 9112, section 3.2.2."""
    request = b"GET " + target + b" HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"

    answer = await exchange(server, request)

    assert answer.endswith(b"here")
    assert server.hosts == hosts


async def test_header_without_end_takes_no_memory(server: Server) -> None:
    """The parser keeps a header until it is whole: what one client may make it keep is bounded, trailers too."""
    chunked = GET.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Trailer: "
    before = psutil.Process().memory_info().rss
    for beginning in (GET + b"X-Long: ", chunked):
        await exchange(server, beginning, *[b"x" * 65_536] * 320, reads=False)

    assert psutil.Process().memory_info().rss - before < 15_000_000


async def test_chunk_that_says_much_and_holds_nothing_is_cut_off(server: Server) -> None:
    """A chunk's extension is read by the parser without a word to anybody, and is bounded like a header."""
    begun = GET.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\n1;"

    await exchange(server, begun, *[b"x" * 1000] * 40)

    assert server.refused("head_too_large") == 1


SLOW = {
    "request line": (b"GET /", b"x"),
    "header": (GET + b"X-Slow: ", b"x"),
    "empty lines": (GET + b"\r\n", b"\r\n"),
    "second request": (GET + b"\r\n" + b"GET /", b"x"),
    "body of a request that is answered": (GET.replace(b"GET", b"POST") + b"Content-Length: 99999\r\n\r\n", b"x"),
}


@pytest.mark.parametrize("what", SLOW)
async def test_slow_head_is_cut_off(server: Server, what: str) -> None:
    """A byte now and then does not prolong the time for all of it."""
    begun, drip = SLOW[what]
    async with crowd(server.port, 5, begun=begun, drip=drip) as held:
        assert await held.cut_off(15)

    assert sum(b"head_too_slow" in member.received for member in held.members) == server.refused("head_too_slow")
    assert server.refused("head_too_slow") + server.refused("idle") >= 4


async def test_silent_client_is_cut_off_without_a_word(server: Server) -> None:
    """Browsers open connections that they may never need: those are closed, and not scolded."""
    async with crowd(server.port, 5, begun=b"") as held:
        assert await held.cut_off(15)

    assert {member.received for member in held.members} == {b""}
    assert server.refused("idle") == 5


async def test_slow_client_may_wait_for_its_answer(server: Server) -> None:
    """The time for a head is over when the head is there, however long the answer takes."""
    server.may_answer.clear()
    async with crowd(server.port, 1, begun=GET + b"\r\n") as held:
        assert not await held.cut_off(1.2)
        server.may_answer.set()

        async def answered() -> bool:
            return b"here" in held.members[0].received

        assert await eventually(answered, 5)


async def test_clients_past_the_limit_are_closed(server: Server) -> None:
    """Those who are in stay in, and when they leave others come in."""
    server.may_answer.clear()
    async with crowd(server.port, 20, begun=GET + b"\r\n") as inside, crowd(server.port, 5, begun=GET) as outside:
        assert await outside.cut_off(5)
        assert inside.held == 20
    server.may_answer.set()

    async def let_in() -> bool:
        return b"200 OK" in await exchange(server, GET + b"Connection: close\r\n\r\n")

    assert await eventually(let_in, 5)
    assert server.refused("too_many") >= 5


@pytest.mark.parametrize("keep", [b"keep-alive", b"close"])
async def test_client_that_never_reads_is_cut_off(server: Server, keep: bytes) -> None:
    """An answer that nobody takes is given up, whether the connection was to stay or not."""
    server.answer = b"x" * 10_000_000
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
    writer.write(GET + b"Connection: " + keep + b"\r\n\r\n")

    async def given_up() -> bool:
        return server.refused("stalled") == 1

    assert await eventually(given_up, 15)
    assert server.asked == 1
    writer.transport.abort()
    del reader


async def test_slow_reader_gets_all_of_its_answer(server: Server) -> None:
    """Only one that reads nothing at all is given up."""
    server.answer = b"x" * 10_000_000
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(GET + b"\r\n")
    received = 0
    while received < len(server.answer):
        await asyncio.sleep(0.02)
        received += len(await reader.read(1_000_000))
    writer.transport.abort()

    assert server.refused("stalled") == 0


async def test_waiting_requests_of_a_connection_are_bounded(server: Server) -> None:
    """A few requests ahead are kept, thousands are not."""
    server.may_answer.clear()
    few = asyncio.create_task(exchange(server, (GET + b"\r\n") * 50 + GET + b"Connection: close\r\n\r\n"))
    many = asyncio.create_task(exchange(server, (GET + b"\r\n") * (MAX_PIPELINED + 10)))

    assert await many == b""
    server.may_answer.set()
    assert (await few).count(b"here") == 51


@pytest.mark.parametrize("requests", [1, 2, 3])
async def test_request_that_is_served_is_told_that_its_client_left(server: Server, requests: int) -> None:
    """Also when others wait behind it on the same connection, of which uvicorn tells the last one alone."""
    server.watches = True
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write((GET + b"\r\n") * requests)

    async def asked() -> bool:
        return server.asked == 1

    async def left() -> bool:
        return server.left == 1

    assert await eventually(asked, 5)
    writer.transport.abort()

    assert await eventually(left, 5)
    assert server.asked == 1


@pytest.mark.parametrize("requests", [2, 3])
async def test_request_that_has_waited_is_told_as_well(server: Server, requests: int) -> None:
    """The one that is served after an answer is told, and not the one that is behind it."""
    server.may_answer.clear()
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write((GET + b"\r\n") * requests)

    async def asked() -> bool:
        return server.asked == 2

    async def left() -> bool:
        return server.left == 1

    async def first_is_asked() -> bool:
        return server.asked == 1

    assert await eventually(first_is_asked, 5)
    server.watches = True
    server.may_answer.set()
    assert await eventually(asked, 5)
    writer.transport.abort()

    assert await eventually(left, 5)


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20, b"hello\r\n\r\n", b"GET / FTP/1\r\n\r\n"],
)
async def test_what_is_no_request_is_told_so(server: Server, sent: bytes) -> None:
    """TLS on this port, or anything else, is 400 as a problem document."""
    answer = await exchange(server, sent)

    assert document(answer) == (400, "malformed_request")
    assert server.refused("malformed_request") == 1


async def test_what_is_wrong_twice_is_refused_once(server: Server) -> None:
    """Neither a header nor of a size that one may have: one answer, and one count."""
    async with crowd(server.port, 1, begun=GET + b"X-Na", drip=b"\0" * 2 * LIMIT) as held:
        assert await held.cut_off(10)

    assert document(held.members[0].received) == (400, "malformed_request")
    assert (server.refused("malformed_request"), server.refused("head_too_large")) == (1, 0)


async def test_connection_that_idles_after_its_answer_is_closed() -> None:
    """Uvicorn's own time for it stays; nothing is said, and nothing is counted as refused."""

    class Hasty(LimitedProtocol):
        """Waits for a tenth of a second."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # As uvicorn has it.
            """Take the client."""
            self.timeout_keep_alive = 0.1  # type: ignore[assignment]  # uvicorn counts whole seconds.
            super().connection_made(transport)

    serving = Server()
    serving.may_answer.set()
    async with (
        listening(serving, http=Hasty) as url,
        crowd(int(url.rpartition(":")[2]), 3, begun=GET + b"\r\n") as held,
    ):
        assert await held.cut_off(10)

    assert {member.received.endswith(b"here") for member in held.members} == {True}
    assert serving.metrics.connections_refused._metrics == {}


async def test_second_request_that_is_none_does_not_end_up_in_the_first_ones_answer(server: Server) -> None:
    """While an answer is due, the connection ends without another one."""
    server.may_answer.clear()

    assert await exchange(server, GET + b"\r\n", b"nonsense\r\n\r\n") == b""


async def test_request_hears_that_its_client_has_left(server: Server) -> None:
    """What the application cannot see, its counters can."""
    server.may_answer.clear()
    async with crowd(server.port, 1, begun=GET + b"\r\n"):

        async def at_work() -> bool:
            return server.asked == 1

        assert await eventually(at_work, 5)

    async def told() -> bool:
        server.may_answer.set()
        return server.left == 1

    await asyncio.sleep(0.05)
    assert await eventually(told, 5)


def test_clients_leave_files_to_the_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a process may open few files, it takes fewer clients, and at least one."""
    taken = []
    for files in (1_000_000, 1024, 10):
        monkeypatch.setattr("resource.getrlimit", lambda _kind, files=files: (files, files))
        taken.append(ConnectionLimits.of(Settings(_env_file=None, primary=URL, analytics=URL), Metrics()).max_clients)

    assert taken == [12_000, 1024 - OTHER_FILES, 1]


async def test_serve_keeps_the_limits(database: Database, tmp_path: Path) -> None:
    """The settings reach the connections of a served process, and what it refuses is among its figures."""
    environment = {"DATABASE_URL": database.url(), "REQUEST_HEAD_SECONDS": "1", "REQUEST_HEAD_BYTES": "2048"}
    async with served(tmp_path, environment, *MODULE) as server:
        port = int(server.url.rpartition(":")[2])
        created = await server.client.post("/patients", json=ADA)
        large = await server.client.get("/patients", headers={"X": "x" * 4000})
        async with crowd(port, 100, begun=GET, drip=b"x") as held:
            assert await held.cut_off(15)
        figures = (await server.client.get("/metrics")).text

    assert (created.status_code, large.status_code) == (201, 431)
    assert 'http_connections_refused_total{reason="head_too_slow"} 100.0' in figures
