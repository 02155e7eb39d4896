"""A bad network between the service and PostgreSQL: it counts round trips, and it cuts, hangs, delays and refuses.

It is a server that sleeps too: see `fall_asleep`.

A round trip is one turn of the conversation: the client sent something, and the server answered. However many messages
a turn holds, and however many packets, it is the number of times that somebody waited for the wire.
"""

import asyncio
import socket
import struct
from collections.abc import Collection
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self, cast

from sqlalchemy.engine import make_url

from pglifeguard.embedded.postgres import HOST, free_port

Fate = Literal["lose_request", "lose_answer", "hang"]

# How a server that sleeps treats who connects: it lets them wait and serves them when it is awake, refuses them, says
# 57P03, or lets them wait and forgets them.
Sleep = Literal["holds", "refuses", "says_starting", "forgets"]

_STARTUP = 196_608  # Version 3.0 of the protocol; what a client says before it has no type byte.
_STARTING = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"


class Proxy:
    """Stands in front of one server, from `async with` to its end; it listens on this machine."""

    def __init__(self, upstream: int, *, host: str = HOST) -> None:
        self.port = free_port()
        self.upstream = upstream
        self.host = host
        self.round_trips = 0
        self.connections = 0
        # The text of every statement that was sent or prepared.
        self.statements: list[str] = []
        # Seconds that each answer of the server takes longer.
        self.delay_seconds = 0.0
        # What becomes of the turn in which the client has a statement with this text run.
        self.fates: dict[str, Fate] = {}
        self.hanging = self.starting = False
        self.links: set[_Link] = set()
        self._listener: socket.socket | None = None
        # Connections that are accepted and have no link yet.
        self._coming: set[asyncio.Task[object]] = set()
        self._ended = False

    @property
    def accepts(self) -> bool:
        """Whether new connections are accepted."""
        return self._listener is not None

    @property
    def ended(self) -> bool:
        """Whether its block was left."""
        return self._ended

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        self.refuse()
        self.cut()

    @property
    def open(self) -> int:
        """How many connections go through it now."""
        return len(self.links)

    def url(self, url: str) -> str:
        """Return where the database of `url` is, through this proxy."""
        return make_url(url).set(host=HOST, port=self.port).render_as_string(hide_password=False)

    def round_trips_from(self, clients: Collection[object]) -> int:
        """Count the round trips of the open connections that come from one of these addresses."""
        return sum(link.round_trips for link in self.links if link.client in clients)

    def hang(self) -> None:
        """Be a black hole: accept connections and requests, and pass nothing on."""
        self.hanging = True
        self.freeze()

    def freeze(self) -> None:
        """Be a black hole for the connections that are open; new ones work."""
        for link in self.links:
            link.frozen = True

    def resume(self) -> None:
        """Pass on again, also what was held back."""
        self.hanging = False
        for link in list(self.links):  # One whose server has left ends here.
            link.frozen = False
            link.pass_on()

    def fall_asleep(self, how: Sleep = "holds") -> None:
        """Close every connection, and be as a server that sleeps, until `wake_up`."""
        self.cut()
        self.hanging, self.starting = how in {"holds", "forgets"}, how == "says_starting"
        if how == "refuses":
            self.refuse()

    async def wake_up(self, how: Sleep = "holds") -> None:
        """Serve again, and with "holds" those too who have waited for it."""
        self.hanging = self.starting = False
        if how == "holds":
            self.resume()
        await self.accept()

    def cut(self) -> None:
        """Close every connection, on both sides."""
        for link in list(self.links):
            link.end()

    def say(self, message: bytes) -> None:
        """Tell every client this, as if the server had said it."""
        for link in self.links:
            link.say(message)

    def reset(self) -> None:
        """Close every connection with RST, as a firewall does."""
        for link in list(self.links):
            link.reset()

    def refuse(self) -> None:
        """Refuse new connections; what is open stays open."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def accept(self) -> None:
        """Accept connections."""
        if self._listener is None:
            self._listener = socket.create_server((HOST, self.port), backlog=100)
            self._listener.setblocking(False)
            asyncio.get_running_loop().add_reader(self._listener, self._accept_one, self._listener)

    def _accept_one(self, listener: socket.socket) -> None:
        """Let a client in. When asyncio's own server is closed, it forgets whom it just accepted (Python 3.11)."""
        with suppress(BlockingIOError, ConnectionAbortedError):  # It has left.
            client, _ = listener.accept()
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            coming = asyncio.create_task(
                asyncio.get_running_loop().connect_accepted_socket(lambda: _Link(self), client)
            )
            self._coming.add(coming)
            coming.add_done_callback(self._coming.discard)


class _Link(asyncio.Protocol):
    """One client's connection, and through `_Upstream` its counterpart at the server."""

    def __init__(self, proxy: Proxy) -> None:
        self.frozen = False
        self.round_trips = 0
        # The address of the other end.
        self.client: object = None
        self._proxy = proxy
        self._server: asyncio.Transport | None = None
        self._held: list[bytes] = []
        self._held_answers: list[bytes] = []
        self._asked = self._lost = self._started = False
        self._unread = b""
        self._prepared: dict[bytes, str] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._client: asyncio.Transport = cast("asyncio.Transport", transport)
        self.client = transport.get_extra_info("peername")
        # Not earlier: a link that is not listed yet would miss `resume`.
        self.frozen = self._proxy.hanging
        self._proxy.links.add(self)
        self._proxy.connections += 1
        self._connecting: asyncio.Task[None] = asyncio.create_task(self._connect())
        if self._proxy.ended:
            # It was accepted just before, and nobody else would close it.
            self.end()

    def data_received(self, data: bytes) -> None:
        if self._proxy.starting:
            self._say_starting(data)
            return
        run = self._run_by(data)
        fate = next((fate for text, fate in self._proxy.fates.items() if any(text in s for s in run)), None)
        if fate == "lose_request":
            self.end()
            return
        self.frozen = self.frozen or fate == "hang"
        self._lost = fate == "lose_answer"
        self._held.append(data)
        self.pass_on()

    def answer_received(self, data: bytes) -> None:
        """Pass on what the server said."""
        if self._lost:
            self.end()
            return
        self._held_answers.append(data)
        asyncio.get_running_loop().call_later(self._proxy.delay_seconds, self.pass_on)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.end()

    def server_left(self) -> None:
        """Close the client's side too, unless nothing gets through."""
        if not self.frozen:
            self.end()

    def pass_on(self) -> None:
        """Send on what was held back, unless it is to be held."""
        if self.frozen or self._server is None:
            return
        if self._server.is_closing():
            self.end()
            return
        requests, answers, self._held, self._held_answers = self._held, self._held_answers, [], []
        if answers:
            self._proxy.round_trips += self._asked
            self.round_trips += self._asked
            self._asked = False
            self._client.write(b"".join(answers))
        if requests:
            self._asked = True
            self._server.write(b"".join(requests))

    def _say_starting(self, data: bytes) -> None:
        if int.from_bytes(data[4:8], "big") != _STARTUP:
            self._client.write(b"N")  # The question was whether the server speaks TLS.
            return
        self._client.write(b"E" + (len(_STARTING) + 4).to_bytes(4, "big") + _STARTING)
        self._client.close()

    def say(self, message: bytes) -> None:
        """Tell the client this, as if the server had said it."""
        self._client.write(message)

    def reset(self) -> None:
        """Close both sides, the client's with RST."""
        sock: socket.socket = self._client.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.end()

    def end(self) -> None:
        """Close both sides now, whatever was still to be sent."""
        self._proxy.links.discard(self)
        self._connecting.cancel()
        self._client.abort()
        if self._server is not None:
            self._server.abort()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._server, _ = await loop.create_connection(
                lambda: _Upstream(self), self._proxy.host, self._proxy.upstream
            )
        except OSError:
            self.end()
        self.pass_on()

    def _run_by(self, data: bytes) -> list[str]:
        """Return the SQL that the messages which are complete now have run: by Query, or prepared before by Bind."""
        self._unread += data
        run = []
        while message := self._next_message():
            kind, body = message
            if kind == b"Q":
                run.append(body.rstrip(b"\0").decode())
                self._proxy.statements.append(run[-1])
            elif kind == b"P":
                name, sql, _ = body.split(b"\0", 2)
                self._prepared[name] = sql.decode()
                self._proxy.statements.append(self._prepared[name])
            elif kind == b"B":
                _portal, name, _ = body.split(b"\0", 2)
                run.append(self._prepared[name])
        return run

    def _next_message(self) -> tuple[bytes, bytes] | None:
        """Take a message off the front: a type byte and a length, which counts itself; the first ones lack the type."""
        head = 1 if self._started else 0
        if len(self._unread) < head + 4:
            return None
        end = head + int.from_bytes(self._unread[head : head + 4], "big")
        if len(self._unread) < end:
            return None
        kind, body, self._unread = self._unread[:head], self._unread[head + 4 : end], self._unread[end:]
        if not self._started:
            # What came may also have been the question whether the server speaks TLS.
            self._started = int.from_bytes(body[:4], "big") == _STARTUP
        return kind, body


class _Upstream(asyncio.Protocol):
    """The server's side of a link."""

    def __init__(self, link: _Link) -> None:
        self._link = link

    def data_received(self, data: bytes) -> None:
        self._link.answer_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._link.server_left()
