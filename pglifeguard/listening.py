"""LISTEN for as many as want to hear, on one connection of the process, beside the pools.

LISTEN belongs to the server's session. In a pooled connection it would end when that is given back, and a pooler in
transaction mode gives the session to somebody else. So a process has one connection for this, to `LISTEN_URL`: opened
for the first listener, shared by all of them, closed after the last one, and counted by the budget.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from pglifeguard.connector import Connector, KeptAliveConnection
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.driver_failures import DRIVER_FAILURES
from pglifeguard.errors import ConnectionLost, DatabaseUnavailable, DatabaseUnreachable
from pglifeguard.monitor import Probe

logger = logging.getLogger(__name__)

# Listeners wait for so long until a lost connection is back: longer than a failover takes.
RECONNECT_SECONDS = 60.0
# Between two attempts; each pause is twice as long as the one before, and random by half: all processes of a service
# lose their connections at the same moment.
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 2.0
# Notifications that one listener may leave unread. A client that reads slowly must not fill the memory.
MAX_UNREAD = 1000
# PostgreSQL cuts a longer name off at LISTEN, and refuses it at NOTIFY.
CHANNEL_BYTES = 63

NO_URL = (
    "listen() needs a connection of its own, which the budget has to count: set LISTEN_URL to the primary's URL, past "
    "any pooler"
)
POOLED = (
    "LISTEN_URL leads to a pooler, which would give LISTEN to whoever comes next: let it name the primary itself, past "
    "the pooler"
)
CHANNEL = f"a channel has a name of 1 to {CHANNEL_BYTES} bytes without NUL: {{channel!r}}"
GIVEN_UP = f"The connection that listens was lost, and not back after {RECONNECT_SECONDS:.0f} s."
CLOSING = "The database cannot be reached: the service is shutting down."


class Notifications(AsyncIterator[str | None]):
    """What one listener hears: the payloads of its channel, in the order of their commits.

    None comes first, and again wherever notifications were missed: after the connection was lost and came back, and
    when more than `MAX_UNREAD` were left unread. It says: read the tables now, and wait for the next one after that.
    """

    def __init__(self, channel: str) -> None:
        self.channel = channel
        # Done when the server listens; fails when it cannot be reached.
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # The connection by which it hears; another one has missed something.
        self.source: KeptAliveConnection | None = None
        self._unread: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    async def __anext__(self) -> str | None:
        """Wait for the next one; for ever, if nothing comes.

        Raises: ConnectionLost when the connection is not back after `RECONNECT_SECONDS`. It ends when the databases
        are closed.
        """
        said = await self._unread.get()
        if isinstance(said, Exception):
            self._unread.put_nowait(said)
            raise said
        return said

    def hear(self, payload: str) -> None:
        """Keep a payload until it is read."""
        if self._unread.qsize() < MAX_UNREAD:
            self._unread.put_nowait(payload)
        else:
            self._miss()

    def begin(self, source: KeptAliveConnection) -> None:
        """Take part in what this connection hears from now on."""
        if self.source is not source:
            self.source = source
            self._miss()
        if not self.ready.done():
            self.ready.set_result(None)

    def end(self, error: Exception | None) -> None:
        """Let the listener end: by the error, or without one."""
        if self.ready.done():
            self._unread.put_nowait(StopAsyncIteration() if error is None else error)
        else:
            self.ready.set_exception(DatabaseUnreachable(CLOSING) if error is None else error)

    def _miss(self) -> None:
        # What is unread tells less than the tables, which are to be read now.
        while not self._unread.empty():
            self._unread.get_nowait()
        self._unread.put_nowait(None)


class Listener:
    """The connection of a process that listens, and those who share it. All of it runs on one event loop."""

    def __init__(self, settings: DatabaseSettings | None, *, warns: bool = False) -> None:
        self._settings = settings
        warn_as = "listener" if warns else None
        self._connector = None if settings is None else Connector(settings, writable=True, warn_as=warn_as)
        self._listening: set[Notifications] = set()
        self._connection: KeptAliveConnection | None = None
        # Something is to be done: a listener came or went, or the connection was lost.
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._server: float | None = None
        # When it stopped to listen, by the event loop's time; None while it does.
        self._lost_at: float | None = None
        self._attempts = 0
        self._ended = False

    def listen(self, channel: str) -> AbstractAsyncContextManager[Notifications]:
        """Hear what is notified on a channel, from the moment when the block is entered: see `Databases.listen`."""
        if self._connector is None or self._settings is None:
            raise RuntimeError(NO_URL)
        if not 0 < len(channel.encode()) <= CHANNEL_BYTES or "\0" in channel:
            raise ValueError(CHANNEL.format(channel=channel))
        return self._listen(self._connector, self._settings.pool_timeout, channel)

    @asynccontextmanager
    async def _listen(self, connector: Connector, seconds: float, channel: str) -> AsyncIterator[Notifications]:
        if self._ended:
            raise DatabaseUnreachable(CLOSING)
        notifications = Notifications(channel)
        self._listening.add(notifications)
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(connector, seconds))
        try:
            await notifications.ready
            yield notifications
        finally:
            # Nothing is waited for: whoever leaves may have been cancelled.
            self._listening.discard(notifications)
            self._changed.set()

    def follow(self, probe: Probe) -> None:
        """Leave a server that another one replaced as the primary: on a frozen one nobody notifies any more."""
        if probe.server is None:
            return
        if self._server not in {None, probe.server} and self._connection is not None:
            self._connection.terminate()
        self._server = probe.server

    def renew(self) -> None:
        """Replace the connection; the listeners hear that they may have missed something."""
        if self._connection is not None:
            self._connection.terminate()

    def end(self) -> None:
        """Let all listeners end, and refuse new ones: a stream that waits for news would hold up the shutdown."""
        self._ended = True
        self._end(self._listening, None)
        self._changed.set()

    async def close(self) -> None:
        """Let all listeners end, and close the connection."""
        self.end()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._connector is not None:
            await self._connector.close()

    async def _run(self, connector: Connector, seconds: float) -> None:
        """Keep the connection for as long as somebody listens; an attempt to open it takes so many seconds."""
        loop = asyncio.get_running_loop()
        self._lost_at, self._attempts = None, 0
        try:
            while self._listening:
                try:
                    self._connection = await connector.open(loop.time() + seconds)
                    await self._serve(self._connection)
                except (DatabaseUnavailable, *DRIVER_FAILURES) as error:
                    self._fail(error)
                finally:
                    self._hang_up()
                if self._listening:
                    await asyncio.sleep(self._pause())
        finally:
            # At the shutdown, or by a mistake in here: nobody is to wait for what never comes.
            self._end(self._listening, None)

    async def _serve(self, connection: KeptAliveConnection) -> None:
        """Listen on this connection to what is wanted, until nothing is.

        Raises: what the driver raises when the connection is lost, or the server takes no LISTEN, as no standby does.
        """
        if connection.pooled:
            self._end(self._listening, RuntimeError(POOLED))
            return
        connection.add_termination_listener(lambda _: self._changed.set())
        channels: set[str] = set()
        while self._listening:
            self._changed.clear()
            wanted = {notifications.channel for notifications in self._listening}
            for channel in channels - wanted:
                await connection.remove_listener(channel, self._hear)
            for channel in wanted - channels:
                await connection.add_listener(channel, self._hear)
            channels = wanted
            for notifications in self._listening:
                # One that came meanwhile has its turn in the next round, which it has asked for.
                if notifications.channel in channels:
                    notifications.begin(connection)
            if self._lost_at is not None:
                logger.info("listening again")
            self._lost_at, self._attempts = None, 0
            await self._changed.wait()
            if connection.is_closed():
                raise ConnectionLost("The connection that listens was lost.")

    def _hear(self, _connection: Any, _process: int, channel: str, payload: object) -> None:
        for notifications in self._listening:
            if notifications.channel == channel:
                notifications.hear(str(payload))

    def _fail(self, error: Exception) -> None:
        """Tell those who have just come that it does not work, and the others when it has not for long."""
        now = asyncio.get_running_loop().time()
        if self._lost_at is None:
            self._lost_at = now
            logger.warning("not listening", extra={"reason": str(error) or type(error).__name__})
        if not isinstance(error, DatabaseUnavailable):
            error = DatabaseUnreachable(f"The database cannot be reached: {error or type(error).__name__}.")
        self._end([waiting for waiting in self._listening if not waiting.ready.done()], error)
        if now - self._lost_at >= RECONNECT_SECONDS:
            self._end(self._listening, ConnectionLost(GIVEN_UP))

    def _end(self, listeners: Iterable[Notifications], error: Exception | None) -> None:
        for notifications in list(listeners):
            notifications.end(error)
            self._listening.discard(notifications)

    def _pause(self) -> float:
        """Say how many seconds to wait before the next attempt."""
        self._attempts += 1
        longest: float = min(FIRST_PAUSE_SECONDS * 2 ** (self._attempts - 1), LONGEST_PAUSE_SECONDS)
        return longest * random.uniform(0.5, 1.0)  # noqa: S311  # It spreads attempts, and keeps no secret.

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()
