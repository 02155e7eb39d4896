"""SQLAlchemy's side of the bounded pool: its Pool interface, called inside its greenlet, and its events.

A slot of the pool is SQLAlchemy's entry, which holds the dialect's adapter around one connection of asyncpg. The
driver's lane acquires the same entries from the pool itself.
"""

import asyncio
import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType
from typing import Any, Self, TypeVar, cast

import asyncpg
from greenlet import getcurrent
from sqlalchemy import event
from sqlalchemy.engine import Connection, ExceptionContext
from sqlalchemy.exc import EmulatedDBAPIException, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection
from sqlalchemy.util.concurrency import await_, greenlet_spawn

from pglifeguard.checkout import Checkout, PoolWatch
from pglifeguard.connector import Connector, KeptAliveConnection
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.driver_failures import Fate, examine
from pglifeguard.effects import effect_of
from pglifeguard.errors import ConnectionLost, DatabaseUnreachable
from pglifeguard.pool import ConnectionPool, OnConnect
from pglifeguard.telemetry import failure_name

logger = logging.getLogger(__name__)

# The entry that SQLAlchemy must take in this context in place of acquiring one.
_adopted: ContextVar[ConnectionPoolEntry | None] = ContextVar("adopted", default=None)
# The connection around which SQLAlchemy makes an entry in this context.
_opened: ContextVar[KeptAliveConnection] = ContextVar("opened")
T = TypeVar("T")
# Seconds after the deadline at which on_connect is cancelled. The socket was cut before, so that asyncpg does not send
# a cancel request to a server that hangs.
GUARDED_SECONDS = 0.1
OPEN_TRANSACTION = "on_connect has left a transaction open: use `async with connection.transaction():`, or no BEGIN"


class PoolAdapter(Pool):
    """The pool of an engine, as SQLAlchemy wants one: it takes every connection from `bounded` and returns it there.

    It is the `Opener` of `bounded` too, since SQLAlchemy's entry around a connection is what that pool lends.
    """

    # What SQLAlchemy logs of a pool is asked for and silenced as of its own pools: by the logger `sqlalchemy.pool`.
    _sqla_logger_namespace = "sqlalchemy.pool.PoolAdapter"

    def __init__(  # noqa: PLR0913, PLR0917  # create_async_engine passes no single thing that holds them all.
        self,
        creator: Callable[..., Any],
        settings: DatabaseSettings,
        watch: PoolWatch,
        connector: Connector,
        trace: bool = False,  # noqa: FBT001, FBT002  # See below.
        on_connect: OnConnect | None = None,
        **for_pool: Any,
    ) -> None:
        # create_async_engine passes the arguments that it finds in this signature, and ignores keyword-only ones (2.1).
        super().__init__(creator, **for_pool)
        self.bounded: ConnectionPool[ConnectionPoolEntry] = ConnectionPool(settings, watch, self, trace=trace)
        self._connector = connector
        self._name = watch.pool
        self._telemetry = watch.telemetry
        self._on_connect = on_connect
        self._customizing = 0
        # The failure of on_connect that the log has told; None since it succeeded.
        self._told: str | None = None

    def keep_statements(self, _dialect: Any, _record: Any, _arguments: Any, options: dict[str, Any]) -> None:
        """Let the dialect keep as many prepared statements as the connector does: a listener of `do_connect`."""
        options["prepared_statement_cache_size"] = self._connector.statement_cache_size

    def adopt(self, entry: ConnectionPoolEntry, connect: Callable[[], T]) -> T:
        """Let SQLAlchemy `connect` to an entry that `acquire` gave; from then on SQLAlchemy releases it."""
        adopting = _adopted.set(entry)
        try:
            return connect()
        finally:
            _adopted.reset(adopting)

    # Opening.

    @property
    def login_seconds(self) -> float:
        """Seconds after which a login is given up, also when a request still waits for it."""
        return self._connector.login_seconds

    def waits_for(self) -> str | None:
        """Say what logins wait for beside the server; None when they wait for nothing else."""
        return "on_connect has not ended" if self._customizing else self._connector.waits_for()

    async def open_slot(
        self, deadline: float, *, waking: bool = False
    ) -> tuple[ConnectionPoolEntry, KeptAliveConnection]:
        """Open a connection and let SQLAlchemy's dialect set it up, all by `deadline`; see `Connector.open`.

        Raises: DatabaseUnreachable, also when `on_connect` fails; or one of DRIVER_FAILURES.
        """
        connection = await self._connector.open(deadline, waking=waking)
        _opened.set(connection)
        # On the first connection of an engine the dialect asks for the server's version and more, without a deadline.
        guard = asyncio.get_running_loop().call_at(deadline, connection.cut)
        try:
            entry = cast("ConnectionPoolEntry", await greenlet_spawn(self._create_connection))
            # After the dialect, whose codecs for JSON it may replace.
            if self._on_connect is not None:
                await self._customize(connection, self._on_connect, deadline)
        except (SQLAlchemyError, EmulatedDBAPIException) as error:
            # A ResourceClosedError, too, where the connection is lost between two questions of the dialect.
            connection.terminate()
            raise DatabaseUnreachable(f"The database cannot be reached: {error}.") from error
        except BaseException:
            connection.terminate()
            raise
        finally:
            guard.cancel()
        # Now, so that what the dialect has asked belongs to no trace.
        connection.telemetry = self._telemetry
        return entry, connection

    async def _customize(self, connection: KeptAliveConnection, on_connect: OnConnect, deadline: float) -> None:
        self._customizing += 1
        try:
            # The guard ends a wait for the server; this ends every other wait, a moment later.
            async with asyncio.timeout_at(deadline + GUARDED_SECONDS):
                await on_connect(connection)
            _check_no_transaction(connection)
        except Exception as error:
            late = asyncio.get_running_loop().time() >= deadline
            reason = "on_connect did not end in time" if late else f"on_connect failed: {type(error).__name__}: {error}"
            if reason != self._told:
                logger.warning("on_connect failed", exc_info=error, extra={"pool": self._name})
            self._told = reason
            raise DatabaseUnreachable(f"The database cannot be reached: {reason}.") from error
        finally:
            self._customizing -= 1
        self._told = None
        connection.customized = True
        connection.mark_clean()

    # SQLAlchemy's side.

    def _do_get(self) -> ConnectionPoolEntry:
        if (adopted := _adopted.get()) is not None:
            return adopted
        warm = self.bounded.take_warm()
        return await_(self.bounded.acquire()) if warm is None else warm

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self.bounded.release(record)

    def _invalidate(
        self,
        connection: PoolProxiedConnection,
        exception: BaseException | None = None,
        _checkin: bool = True,  # noqa: FBT001, FBT002  # SQLAlchemy's signature.
    ) -> None:
        # SQLAlchemy would replace every connection of the pool when one is lost. This pool checks each connection at
        # its checkout; after a failover `abandon` or `dispose` drops all of them.
        if _checkin and connection.is_valid:
            connection.invalidate(exception)

    def dispose(self) -> None:
        """Close the idle connections; the others are closed at their release."""
        self.bounded.dispose()

    def recreate(self) -> Self:
        """Return this pool: it goes on after `dispose`, and its figures include the open checkouts."""
        return self

    def status(self) -> str:
        """Describe the pool in one line, as SQLAlchemy's own pools do."""
        return str(self.bounded.figures())

    def frame(self) -> FrameType:
        """Return a frame that leads to the code that asked, from inside SQLAlchemy's greenlet too."""
        parent = getcurrent().parent
        # Outside a greenlet the code that asked is on this stack.
        return sys._getframe() if parent is None else cast("FrameType", parent.gr_frame)  # noqa: SLF001  # As documented.


def _check_no_transaction(connection: KeptAliveConnection) -> None:
    if connection.is_in_transaction():
        raise RuntimeError(OPEN_TRANSACTION)


async def opened_connection() -> KeptAliveConnection:
    """Give SQLAlchemy the connection that the pool has opened: `connect_args={"async_creator_fn": …}`."""
    return _opened.get()


class EngineWatch:
    """Times the statements that SQLAlchemy runs, logs slow ones, and translates their failures."""

    def __init__(self, engine: AsyncEngine, pool: ConnectionPool[Any], watch: PoolWatch, *, writable: bool) -> None:
        self._pool = pool
        self._writable = writable
        self._watch = watch
        for name, listener in (
            ("before_cursor_execute", self._started),
            ("after_cursor_execute", self._succeeded),
            ("handle_error", self._failed),
        ):
            event.listen(engine.sync_engine, name, listener)

    def _started(self, connection: Connection, *rest: Any) -> None:
        # cursor, statement, parameters, context, executemany
        checkout: Checkout = connection.info["checkout"]
        if effect_of(rest[1]):
            # The dialect keeps prepared statements, so the connection itself sees a text once.
            checkout.connection.track(rest[1])
        checkout.begin_query()

    def _succeeded(self, connection: Connection, *rest: Any) -> None:
        checkout: Checkout = connection.info["checkout"]
        self._watch.answered(checkout, rest[1], checkout.end_query())

    def _failed(self, failure: ExceptionContext) -> None:
        connection, error = failure.connection, failure.original_exception
        checkout = _checkout_of(connection)
        if checkout is not None and checkout.asked_at is not None:
            seconds = checkout.end_query()
            self._watch.answered(checkout, failure.statement or "", seconds, failure_name(error))
        cause = error.__cause__ if isinstance(error, EmulatedDBAPIException) and error.__cause__ else error
        reads_only = not self._writable or connection is None or _reads_only(connection)
        driver_connection = None if checkout is None else checkout.connection
        meaning = examine(cause, driver_connection, database=self._watch.pool, reads_only=reads_only)
        if isinstance(cause, asyncpg.DataError):
            # The adapter and SQLAlchemy have both copied the sentence by now.
            error.args = cast("Exception", failure.sqlalchemy_exception).args = cause.args
        if meaning.fate is Fate.CLOSED:
            failure.is_disconnect = True
        elif meaning.fate is Fate.DEMOTED:
            failure.is_disconnect = self._pool.leave_demoted()
        # SQLAlchemy's own exception says `connection_invalidated`, and its users catch it. It leaves an OSError bare.
        names_loss = failure.sqlalchemy_exception is not None and isinstance(meaning.error, ConnectionLost)
        if meaning.error is not None and not names_loss:
            raise meaning.error from error


def _checkout_of(connection: Connection | None) -> Checkout | None:
    """Return the checkout that SQLAlchemy works on, None when it has none, or none yet, or has given it up already."""
    try:
        return None if connection is None or connection.invalidated else connection.info["checkout"]
    except NotImplementedError:
        # The first connection of an engine, while the dialect asks it for the server's version.
        return None


def _reads_only(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get("postgresql_readonly"))
