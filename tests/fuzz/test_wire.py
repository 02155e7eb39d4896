"""Bytes out, and answers told apart, against a server that answers what the test says."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fuzz.wire import Case, End, exchange, parse

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n"


@asynccontextmanager
async def answering(
    answer: bytes, *, after: int = 1
) -> AsyncIterator[tuple[int, asyncio.Future[BaseException | None]]]:
    """Answer once so many bytes came, and close; give the port, and how the client left."""
    left: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readexactly(after)
            writer.write(answer)
            if answer:
                writer.close()
            while await reader.read(1000):
                pass
            left.set_result(None)
        except (OSError, asyncio.IncompleteReadError) as error:
            left.set_result(error)
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], left
    finally:
        server.close()


@pytest.mark.parametrize(
    ("received", "method", "statuses", "rest"),
    [
        (OK, "GET", [200], b""),
        (OK + OK, "GET", [200, 200], b""),
        (CHUNKED + OK, "GET", [200, 200], b""),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, "POST", [200], b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n" + OK, "DELETE", [204, 200], b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", "HEAD", [200], b""),
        (b"HTTP/1.0 200 OK\r\n\r\nto the end", "GET", [200], b""),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n\x81\x00", "GET", [101], b""),
        (OK + b"garbage", "GET", [200], b"garbage"),
        (OK[:-1], "GET", [], OK[:-1]),
        (CHUNKED[:-9], "GET", [], CHUNKED[:-9]),
        (b"", "GET", [], b""),
    ],
)
def test_answers_are_told_apart(received: bytes, method: str, statuses: list[int], rest: bytes) -> None:
    """By length, by chunks, to the end, and without a body; what is no whole answer is left."""
    answers, left = parse(received, method)

    assert [answer.status for answer in answers] == statuses
    assert left == rest


def test_headers_and_code_are_read() -> None:
    """A header is found in any case, and the code of a problem document; other bodies have none."""
    body = b'{"code": "not_found"}'
    (problem, plain), _ = parse(
        b"HTTP/1.1 404 x\r\nALLOW: GET\r\ncontent-length: %d\r\n\r\n" % len(body) + body + OK, "GET"
    )

    assert (problem.header("allow"), problem.header("x"), problem.code()) == ("GET", None, "not_found")
    assert plain.code() is None


async def test_answer_is_read_to_the_end_of_the_connection() -> None:
    """All pieces are sent, and all answers that come are there."""
    async with answering(OK + OK, after=6) as (port, _):
        came = await exchange(Case("x", (b"abc", b"def")), port)

    assert [answer.body for answer in came.answers] == [b"ok", b"ok"]
    assert (came.rest, came.late) == (b"", False)


@pytest.mark.parametrize(
    ("end", "kind"), [("close", type(None)), ("reset", ConnectionResetError), ("half", type(None))]
)
async def test_client_leaves_as_the_case_says(end: End, kind: type) -> None:
    """By FIN, by RST, or by saying that nothing more comes."""
    async with answering(b"", after=3) as (port, left):
        came = await exchange(Case("x", (b"abc",), end=end), port)
        how = await left

    assert isinstance(how, kind)
    assert came.answers == ()


async def test_service_that_never_answers_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is neither answered nor closed is noticed."""
    monkeypatch.setattr("fuzz.wire.ANSWER_SECONDS", 0.05)
    async with answering(b"", after=3) as (port, _):
        came = await exchange(Case("x", (b"abc",)), port)

    assert came.late
