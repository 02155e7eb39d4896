"""A connection that tracks the state which its holder leaves in the server's session, so that a reset can undo it.

Every statement passes here: SQLAlchemy's, those of `rows`, and those sent by the driver's own connection. Each text is
judged once (`effects.py`). A connection in whose session nothing was left costs no reset. asyncpg and SQLAlchemy begin
and end transactions by `Transaction`, which raises an error where PostgreSQL answers COMMIT by a silent ROLLBACK.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import asyncpg

from pglifeguard.driver_failures import DRIVER_FAILURES, LOST, SWALLOWED, ended_unnoticed
from pglifeguard.effects import Effect, effect_of
from pglifeguard.errors import ConnectionLost, OutcomeUnknown, TransactionAborted
from pglifeguard.telemetry import PoolTelemetry

if TYPE_CHECKING:

    class _Connection(asyncpg.Connection[asyncpg.Record]):
        """What asyncpg's stubs leave out of a connection."""

        _protocol: Any
        _transport: asyncio.Transport
        _listeners: dict[str, Any]

        async def _get_statement(self, query: str, *rest: Any, **options: Any) -> Any: ...
        async def _copy_in(self, copy_stmt: str, source: Any, timeout: float | None) -> str: ...  # noqa: ASYNC109
        async def _copy_out(self, copy_stmt: str, output: Any, timeout: float | None) -> str: ...  # noqa: ASYNC109

else:
    _Connection = asyncpg.Connection

# Seconds for a reset; the connection is closed when it takes longer.
RESET_SECONDS = 2.0
# DISCARD ALL without DEALLOCATE ALL: prepared statements are the driver's, and stay.
RESET = """
    SET SESSION AUTHORIZATION DEFAULT; RESET ALL; CLOSE ALL; SELECT pg_advisory_unlock_all(); DISCARD TEMP
"""
UNLISTEN = "; UNLISTEN *"
# PostgreSQL reports these settings to the driver at every change; search_path since version 18.
REPORTED = (
    "search_path",
    "TimeZone",
    "DateStyle",
    "IntervalStyle",
    "application_name",
    "session_authorization",
)

UNKNOWN = (
    "The connection was lost while the change was being committed, so it may or may not have been made. "
    "Read before you try again, or send the request with an Idempotency-Key."
)
CONTROL = (
    "a session begins and ends its transaction itself: write `await session.commit()` or `await session.rollback()` in "
    "place of COMMIT or ROLLBACK, and `session.begin_nested()` for a savepoint"
)
OUTSIDE = (
    "the session has ended its transaction, and this would be stored at once: ask the session for its connection "
    "again, which begins the next transaction"
)
POOLED = (
    "behind a pooler the server's session goes to another client next, so nothing may be left in it: write SET LOCAL "
    "or set_config(…, true) in place of SET, pg_advisory_xact_lock in place of pg_advisory_lock, and "
    "databases.listen(channel) in place of LISTEN; temporary tables and cursors WITH HOLD need a connection past the "
    "pooler"
)


class TrackedConnection(_Connection):
    """asyncpg's connection, which tracks the state that its users leave in the server's session.

    `left` is the furthest-reaching effect since the last reset. While `bound` is set, a session has begun a transaction
    here, and statements outside of one are refused. `committed` says that a COMMIT was answered during this checkout.
    """

    __slots__ = ("_reported_settings", "bound", "committed", "customized", "left", "pooled", "reported", "telemetry")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.bound = False
        self.committed = False
        # Whether a pooler stands in between; the connector finds out when it opens the connection.
        self.pooled = False
        # Whether the application has set it up: RESET ALL would take that back too.
        self.customized = False
        # What its transactions are told to; None where nothing is traced.
        self.telemetry: PoolTelemetry | None = None
        self.mark_clean()

    def mark_clean(self) -> None:
        """Take the present state of the session for the one that a reset returns to."""
        settings = self._protocol.get_settings()
        self.left = Effect.ROWS
        # The server reports changes of these settings, also those that a function or a trigger made.
        names = (name for name in REPORTED if getattr(settings, name, None))
        self._reported_settings = attrgetter("client_encoding", *names)
        self.reported = self._reported_settings(settings)

    @property
    def needs_reset(self) -> bool:
        """Whether something was left in the session that the next holder must not find."""
        protocol = self._protocol
        if self.left >= Effect.DOUBT or protocol is None or protocol.is_in_transaction():
            return True
        return bool(self._reported_settings(protocol.get_settings()) != self.reported)

    def settle(self) -> str | None:
        """End a checkout; return the reason why the connection must be closed, None when it may be used again."""
        self.bound = self.committed = False
        return "session_state" if self.needs_reset else None

    async def reset(self, *, timeout: float | None = RESET_SECONDS) -> None:  # noqa: ASYNC109  # asyncpg's signature.
        """Undo what was left in the session; close the connection when that takes longer than `timeout` seconds."""
        if self.customized or self.is_closed() or self.left >= Effect.CONNECTION or self.is_in_transaction():
            self.terminate()
            return
        seconds = RESET_SECONDS if timeout is None else timeout
        cut = asyncio.get_running_loop().call_later(seconds, self._transport.abort)
        try:
            # A standby has no LISTEN, and refuses UNLISTEN.
            standby = getattr(self.get_settings(), "in_hot_standby", "off") == "on"
            await super().execute(RESET if standby else RESET + UNLISTEN)
            self._listeners.clear()
        except BaseException as error:
            self.terminate()
            if not isinstance(error, DRIVER_FAILURES):
                raise
        finally:
            cut.cancel()
        self.left = Effect.ROWS

    # Transactions.

    def transaction(  # type: ignore[override]  # SQLAlchemy and `async with` need no more of one than this.
        self,
        *,
        isolation: str | None = None,
        readonly: bool = False,
        deferrable: bool = False,
    ) -> "Transaction":
        """Return a transaction, or a savepoint inside of one; use it by `async with`, or start and end it."""
        words = f" ISOLATION LEVEL {isolation.replace('_', ' ').upper()}" if isolation else ""
        words += " READ ONLY" if readonly else ""
        return Transaction(self, f"BEGIN{words}{' DEFERRABLE' if deferrable else ''};")

    def control(self, words: str) -> Coroutine[Any, Any, str]:
        """Send a statement that begins or ends a transaction; return, when awaited, PostgreSQL's command tag."""
        if self.telemetry is not None:
            return self.telemetry.controls(self, words, super().execute(words))
        return super().execute(words)

    # The ways of a statement to the server: asyncpg sends a text as it is, prepares it, or copies by it.

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:  # noqa: ASYNC109  # asyncpg's.
        """Run one or more statements as asyncpg does.

        Raises: RuntimeError for a statement that must not be sent from here, with what to do instead.
        """
        if not args:
            self.track(query)
        return await super().execute(query, *args, timeout=timeout)

    def _get_statement(self, query: str, *rest: Any, **options: Any) -> Coroutine[Any, Any, Any]:
        # A statement that reads or writes rows in its transaction needs no tracking, and no further coroutine.
        if effect_of(query) or (self.bound and not self.is_closed() and not self._protocol.is_in_transaction()):
            return self._get_tracked_statement(query, *rest, **options)
        return super()._get_statement(query, *rest, **options)

    async def _get_tracked_statement(self, query: str, *rest: Any, **options: Any) -> Any:
        self.track(query)
        return await super()._get_statement(query, *rest, **options)

    async def _copy_in(self, copy_stmt: str, source: Any, timeout: float | None) -> str:  # noqa: ASYNC109  # asyncpg's.
        self.track(copy_stmt)
        return await super()._copy_in(copy_stmt, source, timeout)

    async def _copy_out(self, copy_stmt: str, output: Any, timeout: float | None) -> str:  # noqa: ASYNC109  # asyncpg's.
        self.track(copy_stmt)
        return await super()._copy_out(copy_stmt, output, timeout)

    def track(self, query: str) -> None:
        """Track a text that is about to be sent.

        Raises: RuntimeError when it must not be sent: it ends the session's transaction, would run outside of it, or
        leaves something in a server's session that the pooler gives to another client.
        """
        effect = effect_of(query)
        if effect is Effect.CONTROL:
            raise RuntimeError(CONTROL)
        if self.bound and not self.is_closed() and not self.is_in_transaction():
            raise RuntimeError(OUTSIDE)
        if effect >= Effect.SESSION and self.pooled:
            raise RuntimeError(POOLED)
        self.left = max(self.left, effect)

    # asyncpg keeps these on the client's side and has no way to list them (0.32), so only closing undoes them.

    def add_log_listener(self, callback: Callable[..., Any]) -> None:
        """Call back for the server's notices, for as long as this connection is held."""
        self.left = Effect.CONNECTION
        super().add_log_listener(callback)

    def add_termination_listener(self, callback: Callable[..., Any]) -> None:
        """Call back when the connection ends, which it does at its release."""
        self.left = Effect.CONNECTION
        super().add_termination_listener(callback)

    def add_query_logger(self, callback: Callable[..., Any]) -> None:
        """Call back for each statement, for as long as this connection is held."""
        self.left = Effect.CONNECTION
        super().add_query_logger(callback)

    async def set_type_codec(self, *arguments: Any, **options: Any) -> None:
        """Read and write a type differently, for as long as this connection is held."""
        self.left = Effect.CONNECTION
        await super().set_type_codec(*arguments, **options)

    async def reset_type_codec(self, *arguments: Any, **options: Any) -> None:
        """Read and write a type as asyncpg does, for as long as this connection is held."""
        self.left = Effect.CONNECTION
        await super().reset_type_codec(*arguments, **options)

    async def set_builtin_type_codec(self, *arguments: Any, **options: Any) -> None:
        """Read and write a type as another one, for as long as this connection is held."""
        self.left = Effect.CONNECTION
        await super().set_builtin_type_codec(*arguments, **options)


class Transaction:
    """A transaction, or a savepoint in one, with the methods that asyncpg's users and SQLAlchemy's adapter call."""

    __slots__ = ("_connection", "_savepoint", "_words")

    def __init__(self, connection: TrackedConnection, words: str) -> None:
        self._connection = connection
        self._words = words
        self._savepoint: str | None = None

    def start(self) -> Awaitable[str]:
        """Begin."""
        if self._connection.is_in_transaction():
            self._savepoint = f"lifeguard_{id(self):x}"
            return self._connection.control(f"SAVEPOINT {self._savepoint}")
        return self._connection.control(self._words)

    async def commit(self) -> None:
        """Commit, or release the savepoint.

        Raises: TransactionAborted when a statement had failed: PostgreSQL answers COMMIT with a silent ROLLBACK then.
        ConnectionLost when COMMIT was not sent, OutcomeUnknown when it was sent and not answered.
        """
        connection = self._connection
        if self._savepoint is not None:
            await connection.control(f"RELEASE SAVEPOINT {self._savepoint}")
            return
        if connection.is_closed():
            raise ConnectionLost(LOST)
        try:
            answer = await connection.control("COMMIT;")
        except DRIVER_FAILURES as error:
            if ended_unnoticed(error):
                connection.terminate()
                raise ConnectionLost(LOST) from error
            if isinstance(error, OSError) or connection.is_closed():
                connection.terminate()
                raise OutcomeUnknown(UNKNOWN) from error
            raise
        if answer != "COMMIT":
            raise TransactionAborted(SWALLOWED)
        connection.committed = True

    def rollback(self) -> Awaitable[str]:
        """Roll back the transaction, or to the savepoint."""
        words = "ROLLBACK;" if self._savepoint is None else f"ROLLBACK TO SAVEPOINT {self._savepoint}"
        return self._connection.control(words)

    async def __aenter__(self) -> Self:
        """Begin."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit, or roll back after an error."""
        if error is None:
            await self.commit()
        else:
            await self.rollback()
