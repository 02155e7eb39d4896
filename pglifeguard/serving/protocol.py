"""Limits of a client's connection before its request is complete: bytes, time and number of clients.

uvicorn has none of these. A balancer in front should enforce them earlier (haproxy/haproxy.cfg); this protocol enforces
them where there is no balancer. `BodyLimit` of pglifeguard/fastapi/middleware.py bounds the body, under every server.
"""

import asyncio
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from pglifeguard.errors import HEAD_TOO_LARGE, HEAD_TOO_SLOW, MALFORMED, MEDIA_TYPE, URL_TOO_LONG, Failure, document
from pglifeguard.serving.joined_writes import JoinedWrites
from pglifeguard.serving.limits import LIMITS, ConnectionLimits

# HAProxy's limit (tune.http.maxhdr).
MAX_HEADERS = 100
# Requests that wait on one connection for the request before them.
MAX_PIPELINED = 100
_END_OF_AUTHORITY = re.compile(rb"[/?#]")


# The application, and whatever it adds to its answers, has not been asked.
_PRIVATE = b"cache-control: no-store\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n"


class _TooLarge(Exception):  # Raised into the parser, which turns it into an error of its own.
    """The head of a request is over its limit."""


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits on what a client may send and on how slowly it may read.

    One timer is enough. Between requests it bounds the time for the next head; during an answer it bounds the time in
    which the client reads nothing.
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
        # The request that is being served. uvicorn's `cycle` is the last one that has come, which may wait for it.
        self._served: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # As uvicorn has it.
        """Accept the client, or close its connection when there are too many."""
        super().connection_made(transport)
        self._answers = JoinedWrites(transport, self.loop)
        if len(self.connections) > self._limits.max_clients:
            self._refuse("too_many")
        else:
            self._start(self._limits.head_seconds, self._give_up_head)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer, and tell a request in progress that its client has left."""
        self._stop()
        served = self._served
        if served is not None and not served.response_complete:
            served.scope["state"]["client_left"] = True
            # uvicorn tells `cycle` alone (0.54): where requests are pipelined, the one that is served would not know.
            served.disconnected = True
            served.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the data, and bound the time for the rest of a head."""
        self._unreported += len(data)
        super().data_received(data)
        if self._unreported > self._limits.head_bytes:
            self._failure = HEAD_TOO_LARGE
            self.send_400_response("")
        elif self._timer is None and self in self.connections and self._awaits_request():
            # This also bounds the rest of a body whose request was answered early. A WebSocket has left `connections`
            # and has its own protocol.
            self._start(self._limits.head_seconds, self._give_up_head)

    def on_message_begin(self) -> None:
        """Start counting the bytes of a head."""
        super().on_message_begin()
        self._head_bytes = self._unreported = 0

    def on_url(self, url: bytes) -> None:
        """Take a piece of the URL."""
        super().on_url(url)
        if len(self.url) > self._limits.url_bytes:
            self._failure = URL_TOO_LONG
            raise _TooLarge
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, of the head or after the last chunk of a body."""
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Start the request. From now on the limits of its body and of its answer apply."""
        scheme, of_proxies, rest = self.url.partition(b"://")
        if of_proxies and b"/" not in scheme:
            # RFC 9112, section 3.2.2: the authority in the request's line counts, and the header does not.
            authority = _END_OF_AUTHORITY.split(rest, 1)[0]
            self.headers[:] = [header for header in self.headers if header[0] != b"host"]
            self.headers.append((b"host", authority))
        self._head_bytes = self._unreported = 0
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _TooLarge
        self._stop()
        super().on_headers_complete()
        if self.cycle is not None:  # Before a WebSocket there is none.
            self.cycle.transport = self._answers  # type: ignore[assignment]  # What a cycle uses of one.
        if not self.pipeline:
            self._served = self.cycle

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._unreported = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """Take the next request, or bound the time in which the client reads the last answer."""
        self._answers.flush()
        if self.pipeline:
            self._served = self.pipeline[-1][0]
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_reader()

    def pause_writing(self) -> None:
        """Bound the time in which the client reads nothing."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Stop the timer: the client reads."""
        self._stop()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; a client that has not read its answer yet gets `stall_seconds` more."""
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that cannot be parsed or is too large, and close the connection."""
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
        """Close the connection when the client has read nothing of the answer since the last call."""
        unread = self.transport.get_write_buffer_size()
        if before is not None and unread >= before:
            self._refuse("stalled")
        else:
            self._start(self._limits.stall_seconds, partial(self._watch_reader, unread))

    def _answer(self, failure: Failure) -> None:
        """Answer with the reason and close. During another answer, only close."""
        self._answers.flush()
        if self._awaits_request():
            body = document(failure)
            headers = f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\n".encode()
            self.transport.write(STATUS_LINE[failure.status] + headers + _PRIVATE + body)
        self.transport.close()
        self._watch_reader()

    def _start(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop()
        self._timer = self.loop.call_later(seconds, then)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
