"""Bytes to the service and back: a case is sent as it is written, and its answers are told apart.

No client library is between: it would mend, or refuse to send, most of what is sent here.
"""

import asyncio
import json
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

End = Literal["read", "close", "reset", "half"]
HOST = "127.0.0.1"
# For the last byte of an answer. The service is asked for nothing that takes longer.
ANSWER_SECONDS = 10.0
# After so much silence the service waits for more, and "half" says that no more will come.
SILENCE_SECONDS = 0.25
# Between pieces that are sent apart, so that they arrive apart.
PIECE_SECONDS = 0.005
_RESET = struct.pack("ii", 1, 0)
_NO_BODY = frozenset({204, 304})


@dataclass(frozen=True)
class Case:
    """One connection: what is sent on it, how it ends, and what may come back.

    `statuses` are those that the first answer may have; None is every one below 500. `answers` bounds how many come,
    which tells whether the service took one request for two. Where the client ends the connection, none needs to come.
    """

    name: str
    pieces: tuple[bytes, ...]
    end: End = "read"
    statuses: frozenset[int] | None = None
    answers: int = 1


@dataclass(frozen=True)
class Answer:
    """One answer; header names are in lower case, and a header that comes twice is there twice."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        """Return the first header of this name."""
        return next((value for known, value in self.headers if known == name), None)

    def code(self) -> str | None:
        """Return the `code` of a problem document; None where the answer is none."""
        try:
            document = json.loads(self.body)
        except ValueError:
            return None
        code = document.get("code") if isinstance(document, dict) else None
        return code if isinstance(code, str) else None


@dataclass(frozen=True)
class Exchange:
    """What came of a case; `rest` are bytes that are no answer, and `late` says that the end did not come in time."""

    case: Case
    answers: tuple[Answer, ...]
    rest: bytes
    late: bool


async def exchange(case: Case, port: int) -> Exchange:
    """Open a connection, send the case, and read until the service closes, or leave as the case says."""
    reader, writer = await asyncio.open_connection(HOST, port)
    received, late = b"", False
    try:
        try:
            for number, piece in enumerate(case.pieces):
                if number:
                    await asyncio.sleep(PIECE_SECONDS)
                writer.write(piece)
                await writer.drain()
            if case.end == "half":
                # Answers that are due come first: at the end of what a client sends, uvicorn closes at once.
                with suppress(TimeoutError):
                    while chunk := await asyncio.wait_for(reader.read(65_536), SILENCE_SECONDS):
                        received += chunk
                writer.write_eof()
            if case.end in {"read", "half"}:
                async with asyncio.timeout(ANSWER_SECONDS):
                    while chunk := await reader.read(65_536):
                        received += chunk
            else:
                # The service is to have read what was sent before it learns that nobody is there.
                await asyncio.sleep(PIECE_SECONDS)
        except TimeoutError:
            late = True
        except OSError:
            # It refused before everything was sent. What it said may be lost with the connection.
            received += await _left(reader)
    finally:
        if case.end == "reset":
            _reset_at_the_end(writer.get_extra_info("socket"))
        writer.transport.abort()
    answers, rest = parse(received, _methods(case.pieces))
    return Exchange(case, answers, rest, late)


def _reset_at_the_end(connection: socket.socket) -> None:
    # Where the service was first to close, nothing is left to reset.
    if connection.fileno() != -1:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


async def _left(reader: asyncio.StreamReader) -> bytes:
    try:
        async with asyncio.timeout(PIECE_SECONDS):
            return await reader.read(65_536)
    except (ConnectionError, TimeoutError):
        return b""


def _methods(pieces: Sequence[bytes]) -> str:
    return pieces[0][:16].split(b" ")[0].decode("latin-1") if pieces else ""


def parse(received: bytes, method: str) -> tuple[tuple[Answer, ...], bytes]:
    """Tell the answers apart, without interim ones; return them, and what is no whole answer.

    `method` is that of the first request: an answer to HEAD has no body, whatever its headers say.
    """
    answers: list[Answer] = []
    rest = received
    while rest:
        head, separator, after = rest.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        if not separator or not version.startswith("HTTP/1.") or not status[:3].isdigit():
            break
        headers = tuple(
            (name.lower(), value.strip()) for name, colon, value in (line.partition(":") for line in lines) if colon
        )
        answer = Answer(int(status[:3]), headers, b"")
        body: bytes | None = b""
        if answer.status == 101:  # noqa: PLR2004  # Switching Protocols: what follows is no HTTP.
            return (*answers, answer), b""
        if answer.status >= 200 and answer.status not in _NO_BODY and not (method == "HEAD" and not answers):  # noqa: PLR2004
            body, after = _body(answer, after)
        if body is None:
            break
        if answer.status >= 200:  # noqa: PLR2004
            answers.append(Answer(answer.status, headers, body))
        rest = after
    return tuple(answers), rest


def _body(answer: Answer, after: bytes) -> tuple[bytes | None, bytes]:
    if (answer.header("transfer-encoding") or "").lower() == "chunked":
        return _chunks(after)
    length = answer.header("content-length")
    if length is None:
        return after, b""
    return (after[: int(length)], after[int(length) :]) if len(after) >= int(length) else (None, after)


def _chunks(after: bytes) -> tuple[bytes | None, bytes]:
    body = b""
    while True:
        size, separator, after = after.partition(b"\r\n")
        if not separator or len(after) < int(size, 16) + 2:
            return None, after
        body += after[: int(size, 16)]
        after = after[int(size, 16) + 2 :]
        if int(size, 16) == 0:
            return body, after
