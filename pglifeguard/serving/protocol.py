"""What a connection may take before there is a request, for `python -m app serve`: bytes, time and number.

uvicorn bounds none of these. A balancer in front should do the same earlier (haproxy/haproxy.cfg), and this holds where
there is none. A request's body is bounded in pglifeguard/fastapi/middleware.py, which works under every server.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from pglifeguard.errors import HEAD_TOO_LARGE, HEAD_TOO_SLOW, MALFORMED, MEDIA_TYPE, Failure, document
from pglifeguard.serving.limits import LIMITS, ConnectionLimits

# As many as HAProxy lets through (tune.http.maxhdr).
MAX_HEADERS = 100
# Requests that wait on one connection for the one before them.
MAX_PIPELINED = 100


class _TooLarge(Exception):  # Raised into the parser, which turns it into an error of its own.
    """The head of a request is over its limit."""


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with a limit to whatever a client can do before and after a request is at work.

    One timer is enough: while a request is awaited it bounds that; while one is answered, a client that does not read.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits: ConnectionLimits = app_state[LIMITS]
        self._timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        # Bytes since the parser last reported anything: it keeps a header's name and value until they are whole.
        self._unreported = 0
        self._failure = MALFORMED

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # As uvicorn has it.
        """Let the client in, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_clients:
            self._refuse("too_many")
        else:
            self._start(self._limits.head_seconds, self._give_up_head)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client, and tell the request, if one is at work, that it has left."""
        self._stop()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.scope["state"]["client_left"] = True
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and bound the time for what is still missing of a head."""
        self._unreported += len(data)
        super().data_received(data)
        if self._unreported > self._limits.head_bytes:
            self._failure = HEAD_TOO_LARGE
            self.send_400_response("")
        elif self._timer is None and self in self.connections and self._awaits_request():
            # Also for the rest of a body that was answered before it was there, and is read past. A WebSocket has left
            # `connections`, and has a protocol of its own.
            self._start(self._limits.head_seconds, self._give_up_head)

    def on_message_begin(self) -> None:
        """Count from the start."""
        super().on_message_begin()
        self._head_bytes = self._unreported = 0

    def on_url(self, url: bytes) -> None:
        """Take a piece of the URL."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, of the head or after the last chunk of a body."""
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Begin with the request; what bounds it from now on is its body's limit, and its answer's."""
        self._head_bytes = self._unreported = 0
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _TooLarge
        self._stop()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._unreported = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """Go on with the next request, or bound the time in which a client reads the last answer."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_reader()

    def pause_writing(self) -> None:
        """Wait for a client that does not read, and not for ever."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Go on: it reads."""
        self._stop()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that idles; one that has not even read its answer gets a little more time."""
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, or too large a one, and close."""
        del msg
        if not self.transport.is_closing():
            self._limits.refused.labels(self._failure.code).inc()
            self._answer(self._failure)

    def _count(self, length: int) -> None:
        self._unreported = 0
        self._head_bytes += length
        if self._head_bytes > self._limits.head_bytes or len(self.headers) > MAX_HEADERS:
            self._failure = HEAD_TOO_LARGE
            raise _TooLarge

    def _awaits_request(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _give_up_head(self) -> None:
        if self._head_bytes + self._unreported == 0:
            self._refuse("idle")
            return
        self._limits.refused.labels(HEAD_TOO_SLOW.code).inc()
        self._answer(HEAD_TOO_SLOW)

    def _refuse(self, reason: str) -> None:
        self._limits.refused.labels(reason).inc()
        self.transport.abort()

    def _watch_reader(self, before: int | None = None) -> None:
        """Wait for what was written to be read, as long as there is less of it each time."""
        unread = self.transport.get_write_buffer_size()
        if before is not None and unread >= before:
            self._refuse("stalled")
        else:
            self._start(self._limits.stall_seconds, partial(self._watch_reader, unread))

    def _answer(self, failure: Failure) -> None:
        """Say why the connection ends, unless that would end up in the middle of another answer."""
        if self._awaits_request():
            body = document(failure)
            headers = f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[failure.status] + headers.encode() + body)
        self.transport.close()
        self._watch_reader()

    def _start(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop()
        self._timer = self.loop.call_later(seconds, then)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
