"""Opening one connection to PostgreSQL: several hosts, a deadline, keepalive. No pool in here.

asyncpg's own list of hosts tries the next host when a connect is *refused*, but one host that swallows packets uses up
the whole timeout. `host_search` decides which host is tried when; this module does one login.
"""

import asyncio
import logging
import socket
from typing import Any, Literal, cast

import asyncpg

from pglifeguard import tls
from pglifeguard.credentials import Login, Passwords, PasswordUnavailable
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.database_url import Host, KeepAlive
from pglifeguard.discovery import Dialling
from pglifeguard.driver_failures import DRIVER_FAILURES
from pglifeguard.errors import DatabaseUnreachable, sqlstate
from pglifeguard.fence import Fence
from pglifeguard.host_search import HostSearch
from pglifeguard.lookup import Lookups
from pglifeguard.pooler import PoolerRefused, refused_parameter
from pglifeguard.pooler_look import PoolerLook
from pglifeguard.server_position import WRITTEN_TIMELINE, is_missing_feature
from pglifeguard.tracked_connection import TrackedConnection

logger = logging.getLogger(__name__)

KEEPALIVE_IDLE_SECONDS = 30
KEEPALIVE_INTERVAL_SECONDS = 5
KEEPALIVE_PROBES = 3
# Data that the peer's kernel does not acknowledge for this long ends the connection: 30 s, as a statement may take.
UNACKNOWLEDGED_MILLISECONDS = 30_000
# SQLSTATEs of a login that was refused: PostgreSQL's class, and what PgBouncer says to a wrong password.
LOGIN_REFUSED = ("28", "08P01")
# Seconds between two questions for a password that is late.
RETRY_SECONDS = 0.1
SERVER_IDENTITY_MINIMAL = (
    "SELECT current_setting('transaction_read_only')::boolean AS read_only, pg_backend_pid() AS process"
)
# The start time tells two servers behind one address apart: they were not started in the same microsecond.
SERVER_IDENTITY = (
    f"{SERVER_IDENTITY_MINIMAL}, extract(epoch FROM pg_postmaster_start_time())::float8 AS server,"
    " inet_client_port() AS port"
)
# What a fence needs to know, asked by itself: a read/write splitter sends a query with these functions to the primary.
TIMELINE = (
    "SELECT (SELECT system_identifier FROM pg_control_system()) AS system,"  # noqa: S608  # Constants.
    f" CASE WHEN NOT pg_is_in_recovery() THEN {WRITTEN_TIMELINE} END AS timeline"
)


class KeptAliveConnection(TrackedConnection):
    """A connection whose kernel notices a peer that is gone; asyncpg sets neither option.

    `server` says when the server behind it was started, which tells it from the one that takes its place and from
    others behind the same address; None where it does not say.
    """

    __slots__ = ("direct", "encryption", "host", "server", "transport")

    def __init__(self, protocol: Any, transport: asyncio.Transport, *rest: Any) -> None:
        super().__init__(protocol, transport, *rest)
        self.server: float | None = None
        # The address that it was opened to.
        self.host: Host | None = None
        # Whether the server itself answered the login, as far as the login tells; see pooler_look.py.
        self.direct = False
        self.transport = transport
        self.encryption = tls.encryption_of(transport)

    @property
    def hop(self) -> Literal["pooler", "server"]:
        """Where it leads: `encryption` is that of the way there, and says nothing about what is behind a pooler."""
        return "pooler" if self.pooled else "server"

    def keep_alive(self, wanted: KeepAlive) -> None:
        """Set the socket's options: those of the URL, else the defaults above."""
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
        """Close the socket while a statement waits on it; the statement fails with a connection error.

        asyncpg's `terminate` also takes the protocol away. A statement between two of its steps then fails with an
        AttributeError, which is answered 500 like a bug, where a lost connection is a transient failure.
        """
        self.transport.abort()


class AnyRow(asyncpg.Record):
    """A row of any query whose columns are attributes too.

    When a migration has made a statement's plan stale, asyncpg 0.32 runs it once more and does not pass the record
    class on (`Connection._do_execute`), so the rows are of the connection's default class.
    """

    __slots__ = ()

    def __getattr__(self, column: str) -> Any:
        try:
            return self[column]
        except KeyError:
            raise AttributeError(column) from None


class Connector:
    """Opens connections to the first of several hosts that works.

    Keep one for each database, and `close` it: logins go on after the calls that asked for them.
    """

    def __init__(  # noqa: PLR0913  # Where to connect, and five things that not every caller wants.
        self,
        settings: DatabaseSettings,
        *,
        writable: bool,
        console: bool = False,
        warn_as: str | None = None,
        look: PoolerLook | None = None,
        fence: Fence | None = None,
    ) -> None:
        """Connect as `settings` say.

        With `warn_as`, the log says once, under that name, that a connection leaves the machine without encryption.
        With `look`, a connection is given out when that has let it pass. With `fence`, a primary that was replaced is
        refused.
        """
        self.settings = settings
        self.look = look
        # PgBouncer's admin console takes its own commands only, and closes the connection on a query.
        self.console = console
        self.parameters = settings.parameters
        self.hosts = settings.hosts_to_try
        # For lines of the log.
        self.where = ", ".join(map(str, self.hosts))
        self.writable = writable
        self._lookups = Lookups()
        source = settings.password_source
        self._passwords = None if source is None else Passwords(source)
        self._search = HostSearch(
            self.hosts,
            self._open_host,
            expected=DRIVER_FAILURES,
            patience_seconds=settings.connect_timeout_seconds,
            waits_for=self.waits_for,
        )
        # Whether the addresses have led to more than one server since the start, as the address of a balancer does.
        self.several = False
        self._closed = False
        self._server: float | None = None
        # The connection that was opened last; it says what the next hop is, and what protects the way to it.
        self.latest: KeptAliveConnection | None = None
        self._warn_as = warn_as
        self._fence = fence

    @property
    def login_seconds(self) -> float:
        """Seconds after which a login is given up, also when a request still waits for it."""
        return self._search.login_seconds

    def waits_for(self) -> str | None:
        """Say what logins wait for before the server is asked; None when they wait for nothing else."""
        waits = self._passwords is not None and self._passwords.waited_for
        return "the source of the password has not answered" if waits else None

    async def open(self, deadline: float, *, waking: bool = False) -> KeptAliveConnection:
        """Open a connection by `deadline` (the event loop's time).

        With `waking` the database may be asleep: a host that refuses is tried again until the deadline.

        Raises: DatabaseUnreachable, caused by what the hosts said; also after `close`.
        """
        if self._closed:
            # Whoever looks at a replica while it goes would leave a connection behind.
            raise DatabaseUnreachable("The database cannot be reached: its connections were closed.")
        waking_seconds = self.settings.waking_login_seconds if waking else None
        return await self._search.connect(deadline, waking_seconds=waking_seconds)

    async def open_patiently(self, deadline: float, *, waking: bool = False) -> KeptAliveConnection:
        """Open a connection as `open` does, and ask again for a password that is refused or cannot be given now.

        Raises: DatabaseUnreachable.
        """
        loop = asyncio.get_running_loop()
        failure: DatabaseUnreachable | None = None
        while True:
            try:
                return await self.open(deadline, waking=waking)
            except DatabaseUnreachable as error:
                # The last attempt may have had no time to hear a reason.
                if password_is_late(error, self.settings):
                    failure = error
                elif failure is None or loop.time() < deadline:
                    raise
            if loop.time() + RETRY_SECONDS >= deadline:
                raise failure
            await asyncio.sleep(RETRY_SECONDS)

    @property
    def statement_cache_size(self) -> int:
        """Prepared statements that a connection keeps: none behind a pooler that would lose them."""
        return 0 if self.look is not None and not self.look.keeps_statements else self.settings.statement_cache_size

    async def close(self) -> None:
        """Give up the logins that have not ended, and open no more."""
        self._closed = True
        await self._search.close()
        if self._passwords is not None:
            self._passwords.close()

    async def _open_host(self, host: Host, seconds: float) -> KeptAliveConnection:
        deadline = asyncio.get_running_loop().time() + seconds
        cache_size = self.statement_cache_size
        connection = await self._log_in(host, deadline, cache_size)
        try:
            if not self.console:
                await self._identify(connection, host, deadline)
            if self.look is not None:
                await self.look.admit(
                    connection,
                    lambda: self._log_in(host, deadline, 0),
                    direct=connection.direct,
                    server=connection.server,
                )
        except BaseException:
            connection.terminate()
            raise
        if cache_size != self.statement_cache_size:
            # The look has found that the statements of this connection would be lost.
            connection.terminate()
            return await self._open_host(host, seconds)
        self.several = self.several or self._server not in {None, connection.server}
        self._server = connection.server
        self.latest = connection
        if self._warn_as is not None and connection.encryption.exposed:
            extra = {"database": self._warn_as, "host": str(host), "hop": connection.hop}
            logger.warning(tls.EXPOSED, extra=extra)
            self._warn_as = None
        return connection

    async def _identify(self, connection: KeptAliveConnection, host: Host, deadline: float) -> None:
        """Ask the server for its identity.

        Raises: ConnectionRefusedError when it takes no writes and another host may, and when it was replaced.
        """
        timer = asyncio.get_running_loop().call_at(deadline, connection.cut)
        try:
            await self._ask_identity(connection, host)
            if self._fence is not None:
                await self._ask_timeline(connection, host, self._fence)
        finally:
            timer.cancel()

    async def _ask_identity(self, connection: KeptAliveConnection, host: Host) -> None:
        try:
            identity = await _fetch_row(connection, SERVER_IDENTITY)
        except asyncpg.PostgresError as error:
            if not is_missing_feature(error):
                raise
            identity = await _fetch_row(connection, SERVER_IDENTITY_MINIMAL)
        connection.server = identity.get("server")
        connection.pooled = identity["process"] != connection.get_server_pid()
        port = connection.transport.get_extra_info("sockname")[1:2]
        connection.direct = not connection.pooled and identity.get("port") == next(iter(port), None)
        if self.writable and identity["read_only"] and len(self.hosts) > 1:
            raise ConnectionRefusedError(f"{host} takes no writes")

    async def _ask_timeline(self, connection: KeptAliveConnection, host: Host, fence: Fence) -> None:
        try:
            seen = await _fetch_row(connection, TIMELINE)
        except asyncpg.PostgresError as error:
            if not is_missing_feature(error):
                raise
            return  # Aurora has no such functions, and no timelines.
        if refusal := fence.refusal(seen["system"], seen["timeline"]):
            raise ConnectionRefusedError(f"{host} {refusal}")
        fence.see(seen["system"], seen["timeline"], connection.server)

    async def _log_in(self, host: Host, deadline: float, statement_cache_size: int) -> KeptAliveConnection:
        settings, parameters = self.settings, self.parameters
        loop = asyncio.get_running_loop()
        secret = {}
        if self._passwords is not None:
            login = Login(host.name, host.port, settings.user, parameters.database)
            secret["password"] = await self._passwords.ask(login, deadline)
        await self._lookups.wait_for(host, deadline)
        try:
            connection: KeptAliveConnection = await asyncpg.connect(
                **(parameters.arguments() | secret),
                host=host.name,
                port=host.port,
                loop=loop if host.address is None else cast("asyncio.AbstractEventLoop", Dialling(loop, host.address)),
                timeout=deadline - loop.time(),
                command_timeout=settings.command_timeout_seconds,
                statement_cache_size=statement_cache_size,
                server_settings={**parameters.server_settings, "application_name": settings.application_name},
                connection_class=KeptAliveConnection,
                record_class=AnyRow,
            )
        except DRIVER_FAILURES as error:
            if (refusal := refused_parameter(error)) is not None:
                if self.look is not None:
                    self.look.refuse(refusal)
                raise PoolerRefused(refusal) from error
            if (failure := tls.explain(error, str(host), host.name, parameters.tls)) is None:
                raise
            raise failure from failure.__cause__
        connection.keep_alive(parameters.keepalive)
        connection.host = host
        return connection


def password_is_late(error: Exception, settings: DatabaseSettings) -> bool:
    """Tell a login with a password that the server does not know yet, or that its source cannot give now."""
    refused = (sqlstate(error) or "").startswith(LOGIN_REFUSED)
    return isinstance(error.__cause__, PasswordUnavailable) or (refused and settings.password_may_change)


async def _fetch_row(connection: KeptAliveConnection, sql: str) -> asyncpg.Record:
    # By a statement without a name: behind a pooler that keeps none, a name may be another client's, and the login
    # would fail.
    prepared = await connection.prepare(sql, name="")
    return cast("asyncpg.Record", await prepared.fetchrow())
