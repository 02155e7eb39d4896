"""Opening one connection to PostgreSQL: several hosts, a deadline, keepalive. No pool in here.

asyncpg's own list of hosts tries the next one when a connect is *refused*, but a black hole eats the whole timeout.
Here each host has a timeout of its own, and the one that worked last is tried first.
"""

import asyncio
import logging
import socket
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, cast

import asyncpg
from sqlalchemy.exc import DBAPIError, EmulatedDBAPIException

from app.database_url import Host, KeepAlive
from app.db.watched import ASYNCPG_FAILURES, WatchedConnection
from app.errors import DatabaseUnreachable
from app.settings import DatabaseSettings

logger = logging.getLogger(__name__)

# What opening or checking a connection raises: asyncpg's own, and SQLAlchemy's rendering of it. A TimeoutError is an
# OSError.
DRIVER_FAILURES = (*ASYNCPG_FAILURES, DBAPIError, EmulatedDBAPIException)

KEEPALIVE_IDLE_SECONDS = 30
KEEPALIVE_INTERVAL_SECONDS = 5
KEEPALIVE_PROBES = 3
# Data that the peer's kernel does not acknowledge for this long ends the connection: 30 s, as a statement may take.
UNACKNOWLEDGED_MILLISECONDS = 30_000
# Two servers that took turns behind one address were not started in the same microsecond.
WHO = """
SELECT extract(epoch FROM pg_postmaster_start_time())::float8 AS server,
       current_setting('transaction_read_only')::boolean AS read_only
"""


class Opening:
    """One attempt to open a connection, which must be over at `deadline` (the event loop's time)."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._guard: asyncio.TimerHandle | None = None

    def guard(self, connection: "KeptAliveConnection") -> None:
        """Cut the connection if what SQLAlchemy still has to ask of it is not done by the deadline."""
        self._guard = asyncio.get_running_loop().call_at(self.deadline, connection.cut)

    def done(self) -> None:
        """Keep the connection."""
        if self._guard is not None:
            self._guard.cancel()


opening: ContextVar[Opening] = ContextVar("opening")


class KeptAliveConnection(WatchedConnection):
    """A connection whose kernel notices a peer that is gone; asyncpg sets neither option.

    `server` says when the server behind it was started, which tells it from the one that takes its place; it is
    asked of primaries only.
    """

    __slots__ = ("server", "transport")

    def __init__(self, protocol: Any, transport: asyncio.Transport, *rest: Any) -> None:
        super().__init__(protocol, transport, *rest)
        self.server: float | None = None
        self.transport = transport

    def keep_alive(self, wanted: KeepAlive) -> None:
        """Set the socket's options: what the URL says, else what suits a service."""
        sock: socket.socket = self.transport.get_extra_info("socket")
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, wanted.enabled)
        for name, value in (
            ("TCP_KEEPIDLE", wanted.idle_seconds or KEEPALIVE_IDLE_SECONDS),
            ("TCP_KEEPINTVL", wanted.interval_seconds or KEEPALIVE_INTERVAL_SECONDS),
            ("TCP_KEEPCNT", wanted.probes or KEEPALIVE_PROBES),
            ("TCP_USER_TIMEOUT", wanted.unacknowledged_milliseconds or UNACKNOWLEDGED_MILLISECONDS),
        ):
            if hasattr(socket, name):  # Linux has them all, macOS some.
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def cut(self) -> None:
        """Close the socket under whoever is at work with it and now waits in vain.

        `terminate` takes the protocol away as well: a statement between two of its steps then meets None, an
        AttributeError that nobody takes for weather.
        """
        self.transport.abort()


class AnyRow(asyncpg.Record):
    """A row whose columns are attributes too, whatever query it is of.

    When a migration has made a statement's plan stale, asyncpg runs it once more, and forgets of which class its rows
    were to be (0.32, `Connection._do_execute`).
    """

    __slots__ = ()

    def __getattr__(self, column: str) -> Any:
        try:
            return self[column]
        except KeyError:
            raise AttributeError(column) from None


class Connector:
    """Opens connections to the first of several hosts that will do."""

    def __init__(self, settings: DatabaseSettings, *, writable: bool) -> None:
        self.settings = settings
        self.parameters = settings.parameters
        self.hosts = self.parameters.hosts
        self.writable = writable
        self._first = 0
        self._last_good = 0

    async def open_for_pool(self) -> KeptAliveConnection:
        """Open a connection by the deadline of the pool's attempt, and guard what follows."""
        attempt = opening.get()
        connection = await self.open(attempt.deadline)
        attempt.guard(connection)
        return connection

    async def open(self, deadline: float) -> KeptAliveConnection:
        """Open a connection by `deadline` (the event loop's time), trying the last good host first.

        Raises: DatabaseUnreachable, caused by the last host's failure.
        """
        loop = asyncio.get_running_loop()
        failure: BaseException | None = None
        for index in self._order():
            seconds = min(self.settings.connect_timeout_seconds, deadline - loop.time())
            if seconds <= 0:
                break
            try:
                connection = await self._open_host(self.hosts[index], seconds)
            except DRIVER_FAILURES as error:
                failure = error
            else:
                self._remember(index)
                return connection
            if index == self._first:
                # The next request starts with the next host, and does not wait for this one again.
                self._first = (index + 1) % len(self.hosts)
        message = str(failure) or type(failure).__name__ if failure else "no time was left"
        raise DatabaseUnreachable(f"The database cannot be reached: {message}.") from failure

    def _order(self) -> Sequence[int]:
        count = len(self.hosts)
        return [(self._first + offset) % count for offset in range(count)]

    def _remember(self, index: int) -> None:
        if index != self._last_good:
            logger.warning("database host changed", extra={"host": str(self.hosts[index])})
        self._first = self._last_good = index

    async def _open_host(self, host: Host, seconds: float) -> KeptAliveConnection:
        settings, parameters = self.settings, self.parameters
        deadline = asyncio.get_running_loop().time() + seconds
        connection: KeptAliveConnection = await asyncpg.connect(
            **parameters.arguments(),
            host=host.name,
            port=host.port,
            timeout=seconds,
            command_timeout=settings.command_timeout_seconds,
            statement_cache_size=settings.statement_cache_size,
            server_settings={**parameters.server_settings, "application_name": settings.application_name},
            connection_class=KeptAliveConnection,
            record_class=AnyRow,
        )
        connection.keep_alive(parameters.keepalive)
        if self.writable and await _takes_no_writes(connection, deadline) and len(self.hosts) > 1:
            connection.terminate()
            raise ConnectionRefusedError(f"{host} takes no writes")
        return connection


async def _takes_no_writes(connection: KeptAliveConnection, deadline: float) -> bool:
    """Learn which server answers, and whether it is a standby or demoted."""
    timer = asyncio.get_running_loop().call_at(deadline, connection.cut)
    try:
        who = cast("asyncpg.Record", await connection.fetchrow(WHO))
    except BaseException:
        connection.terminate()
        raise
    finally:
        timer.cancel()
    connection.server = who["server"]
    return bool(who["read_only"])
