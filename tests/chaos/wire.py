"""A small HTTP/1.1 client for load: one write and one read for each request, on connections that it keeps.

A full client costs more processor time than the service under test, on the same two cores.
"""

import asyncio
import json
import time
from typing import Any
from urllib.parse import urlsplit

from tests.chaos.load import Answer

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
# The server closes what has idled for five seconds, perhaps while a request is on its way.
KEPT_SECONDS = 4.0


class Client:
    """Sends requests to one server. Raises OSError or EOFError when a connection fails before the answer is whole."""

    def __init__(self, url: str, *, keep: bool = True, token: str | None = None) -> None:
        self.url = url
        parts = urlsplit(url)
        self._authorization = "" if token is None else f"Authorization: Bearer {token}\r\n"
        self._address = (parts.hostname or "", parts.port or 80)
        self._keep = keep
        self._idle: list[tuple[Streams, float]] = []
        self._opened: set[asyncio.StreamWriter] = set()

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send one request and read its answer; headers are written with underscores."""
        asked_at = time.monotonic()
        reader, writer = self._kept() or await self.connect()
        kept = False
        try:
            writer.write(self.request(method, path, body, **headers))
            status, headers, content = await _read(reader)
            kept = self._keep and headers.get("connection") != "close"
        finally:
            if kept:
                self._idle.append(((reader, writer), time.monotonic()))
            else:
                self._drop(writer)
        return Answer(status, headers, content, asked_at, time.monotonic())

    async def connect(self) -> Streams:
        """Open a connection and send nothing."""
        reader, writer = await asyncio.open_connection(*self._address)
        self._opened.add(writer)
        return reader, writer

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> bytes:
        """Write a request down."""
        more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        content = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: {'keep-alive' if self._keep else 'close'}\r\n"
            f"{self._authorization}{more}\r\n"
        )
        return head.encode() + content

    def close(self) -> None:
        """Close every connection."""
        self._idle.clear()
        for writer in list(self._opened):
            self._drop(writer)

    def _kept(self) -> Streams | None:
        while self._idle:
            (reader, writer), since = self._idle.pop()
            lately = time.monotonic() - since < KEPT_SECONDS
            if lately and not reader.at_eof() and not writer.is_closing():
                return reader, writer
            self._drop(writer)
        return None

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        self._opened.discard(writer)
        writer.transport.abort()


async def _read(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    return int(head[0].split(" ")[1]), headers, await reader.readexactly(int(headers.get("content-length", 0)))
