"""An answer leaves in one write where it can, in order always, and waits for nothing."""

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.server import ServerState

from pglifeguard.metrics import Metrics
from pglifeguard.serving.joined_writes import LARGEST_JOINED, JoinedWrites
from pglifeguard.serving.limits import LIMITS, ConnectionLimits
from pglifeguard.serving.protocol import LimitedProtocol
from pglifeguard.testing.serving import listening

HOST = b"Host: test\r\n"
SHORT = [(b"content-length", b"4")]


class Network(asyncio.Transport):
    """A client's connection that remembers what was written to it, and when it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        """Remember the data, one entry for each call into the kernel."""
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        """Say whether it was closed."""
        return self.closed

    def close(self) -> None:
        """Close it."""
        self.closed = True

    def get_write_buffer_size(self) -> int:
        """Say that all was taken."""
        return 0


def limits() -> ConnectionLimits:
    """Return limits that nothing here reaches."""
    return ConnectionLimits(4096, 5, 5, 20, Metrics().connections_refused, 4096)


class Server:
    """Answers by the path, and tells when it may go on."""

    def __init__(self) -> None:
        self.may_go_on = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or keep the limits for the connections."""
        if scope["type"] == "lifespan":
            scope["state"][LIMITS] = limits()
            for done in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{done}.complete"})
            return
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.send", "text": "here"})
            await receive()
            return
        start: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": SHORT}
        if scope["path"] == "/stream":
            await send(start)
            await self.may_go_on.wait()
            await send({"type": "http.response.body", "body": b"he", "more_body": True})
            await self.may_go_on.wait()
            await send({"type": "http.response.body", "body": b"re"})
        elif scope["path"] == "/none":
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})
        else:
            while scope["method"] == "POST" and (await receive()).get("more_body"):
                pass
            await send(start)
            await send({"type": "http.response.body", "body": b"here"})


async def served(network: Network, line: bytes) -> LimitedProtocol:
    """Return the protocol of a connection whose first request has run, before the event loop comes round again."""
    config = Config(Server(), lifespan="off")
    config.load()
    protocol = LimitedProtocol(config, ServerState(), {LIMITS: limits()})
    protocol.connection_made(network)
    protocol.data_received(line + HOST + b"\r\n")
    await asyncio.sleep(0)
    return protocol


async def test_two_writes_are_one() -> None:
    """What follows at once goes with what was kept, and nothing is written again when the loop comes round."""
    network = Network()
    writes = JoinedWrites(network, asyncio.get_running_loop())

    writes.write(b"head")
    assert network.written == []
    writes.write(b"body")
    assert network.written == [b"headbody"]
    await asyncio.sleep(0)
    assert network.written == [b"headbody"]


async def test_write_that_nothing_follows_waits_for_one_turn_of_the_loop() -> None:
    """The head of a stream is the client's before its first piece is there."""
    network = Network()
    writes = JoinedWrites(network, asyncio.get_running_loop())

    writes.write(b"head")
    await asyncio.sleep(0)

    assert network.written == [b"head"]


async def test_large_body_is_not_copied() -> None:
    """Its head leaves before it."""
    network, body = Network(), b"x" * (LARGEST_JOINED + 1)
    writes = JoinedWrites(network, asyncio.get_running_loop())

    writes.write(b"head")
    writes.write(body)

    assert network.written == [b"head", body]


async def test_large_piece_waits_for_nothing() -> None:
    """It is the transport's at once, whose buffer tells the application to wait for the client."""
    network, piece = Network(), b"x" * (LARGEST_JOINED + 1)
    writes = JoinedWrites(network, asyncio.get_running_loop())

    for _ in range(3):
        writes.write(piece)

    assert network.written == [piece] * 3


async def test_empty_body_sends_the_head() -> None:
    """The answer is whole with it: nothing else will come."""
    network = Network()
    writes = JoinedWrites(network, asyncio.get_running_loop())

    writes.write(b"head")
    writes.write(b"")
    assert network.written == [b"head"]
    # An empty write alone is none.
    writes.write(b"")
    await asyncio.sleep(0)
    assert network.written == [b"head"]


async def test_close_comes_after_what_was_written() -> None:
    """A transport that was closed takes nothing more."""
    network = Network()
    writes = JoinedWrites(network, asyncio.get_running_loop())

    writes.write(b"head")
    writes.close()
    assert (network.written, network.closed) == ([b"head"], True)
    writes.write(b"late")
    writes.write(b"r")
    assert network.written == [b"head"]


async def test_whatever_else_it_is_asked_the_transport_says() -> None:
    """A later uvicorn may ask more of it than today's."""
    assert JoinedWrites(Network(), asyncio.get_running_loop()).get_write_buffer_size() == 0


async def test_head_of_a_stream_arrives_before_its_body_is_there() -> None:
    """Nothing is kept while the application waits."""
    server = Server()
    async with listening(server, http=LimitedProtocol) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET /stream HTTP/1.1\r\n" + HOST + b"\r\n")
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
            server.may_go_on.set()
            body = await reader.readexactly(4)
        writer.transport.abort()

    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert body == b"here"


async def test_client_that_asks_is_told_to_send_its_body() -> None:
    """It waits for that, and the application waits for it."""
    async with listening(Server(), http=LimitedProtocol) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        async with asyncio.timeout(5):
            told = await reader.readuntil(b"\r\n\r\n")
            writer.write(b"body")
            answer = await reader.readuntil(b"here")
        writer.transport.abort()

    assert told == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_answers_come_in_the_order_of_their_requests() -> None:
    """Also those without a body, and before a refusal that closes the connection."""
    requests = [
        b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /none HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"\r\n",
        b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n",
    ]
    async with listening(Server(), http=LimitedProtocol) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"".join(requests))
        async with asyncio.timeout(5):
            heads = [await reader.readuntil(b"\r\n\r\n") for _ in requests[:2]]
            heads.append(await reader.readuntil(b"\r\n\r\nhere"))
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"nonsense\r\n\r\n")
            refusal = await reader.read()
        writer.transport.abort()

    assert [head.split(b" ")[1] for head in heads] == [b"200", b"204", b"200", b"200"]
    assert refusal.startswith(b"HTTP/1.1 400 ")


async def test_refusal_does_not_overtake_an_answer_without_a_body() -> None:
    """What is no request may come before the event loop has come round to the answer's head."""
    network = Network()
    protocol = await served(network, b"HEAD / HTTP/1.1\r\n")
    assert protocol.cycle is not None
    assert protocol.cycle.response_complete
    protocol.data_received(b"nonsense\r\n\r\n")
    protocol.connection_lost(None)

    assert [piece.split(b" ")[1] for piece in network.written] == [b"200", b"400"]


async def test_connection_that_is_refused_gets_the_head_that_was_written() -> None:
    """What is no request ends the connection in the middle of an answer, as it does where nothing is kept."""
    network = Network()
    protocol = await served(network, b"GET /stream HTTP/1.1\r\n")
    protocol.data_received(b"nonsense\r\n\r\n")
    protocol.connection_lost(None)

    assert [piece.split(b" ")[1] for piece in network.written] == [b"200"]
    assert network.closed


async def test_answer_without_a_body_is_sent_before_a_shutdown() -> None:
    """A server that stops closes the connections that have had their answer."""
    network = Network()
    protocol = await served(network, b"HEAD / HTTP/1.1\r\n")
    protocol.shutdown()
    protocol.connection_lost(None)

    assert [piece.split(b" ")[1] for piece in network.written] == [b"200"]
    assert network.closed


@pytest.mark.parametrize("before", [0, 1])
async def test_websocket_takes_the_connection(before: int) -> None:
    """It is asked for by the first request of a connection, or after others; what it writes is its own."""
    asking = (
        b"GET /socket HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    async with listening(Server(), http=LimitedProtocol) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        async with asyncio.timeout(5):
            for _ in range(before):
                writer.write(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
                await reader.readuntil(b"here")
            writer.write(asking)
            head = await reader.readuntil(b"\r\n\r\n")
            frame = await reader.readexactly(6)
        writer.transport.abort()

    assert head.startswith(b"HTTP/1.1 101 ")
    assert frame == b"\x81\x04here"
