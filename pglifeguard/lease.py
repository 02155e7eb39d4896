"""One connection of the pool on which asyncpg runs statements, and not SQLAlchemy.

Around a short statement SQLAlchemy's execution costs several times the statement (`docs/performance.md`). So a session
runs its constant queries here: in a transaction, or on a replica without one. When the session needs SQLAlchemy after
all, SQLAlchemy takes over the connection and the transaction (`adopt`). Failures have the same names in both lanes: see
`driver_failures.py`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, TypeVarTuple, cast

import asyncpg
from sqlalchemy import Engine, Row
from sqlalchemy.exc import IntegrityError
from sqlalchemy.pool import ConnectionPoolEntry

from pglifeguard.checkout import Checkout, holder
from pglifeguard.database import Database
from pglifeguard.driver_failures import DRIVER_FAILURES, Fate, examine
from pglifeguard.errors import DatabaseUnavailable
from pglifeguard.orm import HeldConnection
from pglifeguard.query import Query
from pglifeguard.server_position import WRITTEN, is_missing_feature, token_text
from pglifeguard.telemetry import failure_name
from pglifeguard.tracked_connection import Transaction

# Seconds for telling the server to stop the statement of a cancelled request. After them the connection is dropped, and
# the server ends its session when it notices.
CLOSE_SECONDS = 2.0
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class DriverLane:
    """Runs statements on one connection by the driver, counts their time, and names their failures."""

    __slots__ = ("_database", "_readonly", "checkout", "connection")

    def __init__(self, database: Database, checkout: Checkout, *, readonly: bool) -> None:
        self._database = database
        self._readonly = readonly
        self.checkout = checkout
        self.connection = checkout.connection

    async def copy(
        self, table: str, records: Iterable[Sequence[Any]], columns: Sequence[str], *, schema: str | None
    ) -> int:
        """Copy records into a table; return how many. Raises as `rows` does."""
        copying = self.connection.copy_records_to_table(table, records=records, columns=columns, schema_name=schema)
        status = await self.ask(copying, f"COPY {table}")
        # PostgreSQL answers "COPY 12".
        return int(status.rpartition(" ")[2])

    async def ask(self, answer: Awaitable[T], statement: str | None = None, *, look: str | None = None) -> T:
        """Wait for an answer, count its time, and name its failure.

        `statement` is the text for the metrics; None for BEGIN, COMMIT and ROLLBACK, which are no statements there. Nor
        is a `look`, the text by which the library asks the replica how far it is.
        """
        # There is no timeout around the statement. Each cancel in mid-query throws a connection away, so a deadline
        # that cancels turns one stall of a second into hundreds of logins (decision 0005).
        self.checkout.begin_query()
        failure: str | None = None
        try:
            return await answer
        except DRIVER_FAILURES as error:
            failure = failure_name(error)
            self._translate(error, statement)
            raise
        except asyncio.CancelledError:
            failure = "CancelledError"
            # The server runs the statement on, and holds its locks, until it is told to stop. asyncpg's close() waits
            # until it was told; terminate() does not wait. The shield lets a second cancel, as anyio sends them, end
            # the request and not the closing.
            await asyncio.shield(_close(self.connection))
            raise
        finally:
            seconds = self.checkout.end_query()
            if statement is not None:
                self._database.watch.answered(self.checkout, statement, seconds, failure)
            elif look is not None and self._database.watch.telemetry is not None:
                self._database.watch.telemetry.asked(self.connection, look, seconds, failure, name="replayed LSN")

    async def written_token(self) -> str | None:
        """Ask how far the WAL reaches after a commit, as a consistency token; None where the server cannot tell."""
        # Before COMMIT the answer would be older than the commit record, and the client could miss its own write.
        if self._database.monitor.lacks_lsn:
            return None
        # While `bound` is set the connection refuses statements outside the session's transaction; this one belongs to
        # none.
        bound, self.connection.bound = self.connection.bound, False
        self.checkout.begin_query()
        failure: str | None = None
        try:
            written = cast("asyncpg.Record", await self.connection.fetchrow(WRITTEN))
        except asyncio.CancelledError:
            # The answer is still on its way. Nothing is left to roll back, so nothing is waited for.
            failure = "CancelledError"
            self.connection.terminate()
            raise
        except DRIVER_FAILURES as error:
            failure = failure_name(error)
            if not is_missing_feature(error):
                # The next holder would wait for the answer that this statement left behind.
                self.connection.terminate()
            # The write is committed, so the client must not get an error: it may write again. It loses the promise to
            # read its write on a replica at once, and nothing else.
            reason = str(error) or type(error).__name__
            self._database.watch.log("no consistency token", route=holder.get(), reason=reason)
            return None
        finally:
            seconds = self.checkout.end_query()
            self.connection.bound = bound
            if self._database.watch.telemetry is not None:
                self._database.watch.telemetry.asked(self.connection, WRITTEN, seconds, failure, name="written LSN")
        return token_text(self._database.monitor.position.system, written["timeline"], written["lsn"])

    def _translate(self, error: Exception, statement: str | None) -> None:
        """Do with the connection what the failure demands, and raise the failure's own name if it has one."""
        meaning = examine(error, self.connection, database=self._database.name, reads_only=self._readonly)
        if meaning.fate is Fate.CLOSED:
            self.connection.terminate()
        elif meaning.fate is Fate.DEMOTED:
            self._database.pool.leave_demoted()
        if meaning.error is not None:
            raise meaning.error from error
        if isinstance(error, asyncpg.IntegrityConstraintViolationError):
            # Queries do not know which lane they run in, so a conflict has SQLAlchemy's name in both. The parameters
            # are left out: they are health data, and SQLAlchemy writes them into the message.
            raise IntegrityError(statement, None, error, hide_parameters=True) from error


class Lease(DriverLane):
    """A connection that one session has for itself until `end` or `adopt`; it does one thing at a time."""

    __slots__ = ("_transaction", "entry")

    def __init__(self, database: Database, entry: ConnectionPoolEntry, *, readonly: bool) -> None:
        super().__init__(database, entry.info["checkout"], readonly=readonly)
        self._transaction: Transaction | None = None
        self.entry: ConnectionPoolEntry | None = entry

    @property
    def begun(self) -> bool:
        """Whether a transaction is open; after a commit there is none until the next statement."""
        return self._transaction is not None

    async def begin(self, words: str) -> None:
        """Begin a transaction with these words; on a failure give the connection back. Raises as `rows` does."""
        transaction = Transaction(self.connection, words)
        try:
            await self.ask(transaction.start())
        except BaseException:
            # BEGIN may have reached the server or not. A statement sent now would be part of a transaction that nobody
            # commits, or would be stored at once.
            self.connection.terminate()
            self.give_back()
            raise
        self._transaction = transaction
        self.connection.bound = True

    def rows(self, query: Query[*Ts], parameters: Mapping[str, Any]) -> Awaitable[Sequence[Row[*Ts]]]:
        """Run one query.

        Raises, when awaited: ConnectionLost, CommandTimeout, WriteInReadSession, sqlalchemy.exc.IntegrityError; any
        other asyncpg.PostgresError as it comes.
        """
        return self.ask(query.fetch(self.connection, parameters), query.sql)

    async def commit(self) -> None:
        """Commit the transaction; raises as `rows` does, and as `Transaction.commit`."""
        # The transaction is over once COMMIT was sent, whatever the answer is. A ROLLBACK after a COMMIT without an
        # answer would tell nothing about its outcome.
        transaction, self._transaction = cast("Transaction", self._transaction), None
        await self.ask(transaction.commit())

    async def end(self) -> None:
        """Roll back what is not committed, and give the connection back."""
        transaction, self._transaction = self._transaction, None
        try:
            if transaction is not None and not self.connection.is_closed():
                await self.ask(transaction.rollback())
            if self.connection.needs_reset:
                await self.connection.reset()
        except (*DRIVER_FAILURES, DatabaseUnavailable):
            # A failed ROLLBACK does not change the request's answer: a server that lost the connection has rolled back.
            self.connection.terminate()
        finally:
            # Also after a cancel: a connection that is not given back is missing in the pool until the next restart.
            self.give_back()

    def give_back(self) -> None:
        """Release the connection to the pool, which replaces it when it is closed."""
        # The entry is forgotten first, so that `__del__` does not release it again when this fails.
        entry, self.entry = cast("ConnectionPoolEntry", self.entry), None
        self._database.pool.release(entry)

    def adopt(self, engine: Engine) -> HeldConnection:
        """Give the connection and its transaction to SQLAlchemy, which releases the connection when it closes it.

        Called in SQLAlchemy's greenlet.
        """
        entry, self.entry = self.entry, None
        connection = self._database.adapter.adopt(cast("ConnectionPoolEntry", entry), lambda: HeldConnection(engine))
        # SQLAlchemy's adapter begins a transaction unless this private attribute holds one (2.1). It would begin a
        # savepoint in the lease's transaction, and its COMMIT would release the savepoint and store nothing.
        cast("Any", connection.connection.dbapi_connection)._transaction = self._transaction  # noqa: SLF001
        self._transaction = None
        return connection

    def __del__(self) -> None:
        if self.entry is not None:
            # A session was dropped without being closed, and its place in the pool would be lost with it. A destructor
            # cannot wait for a ROLLBACK, so the connection is closed.
            self._database.watch.log_kept("session dropped without being closed", self.checkout, level=logging.ERROR)
            self.connection.terminate()
            self.give_back()


async def fetch_once(database: Database, query: Query[*Ts], parameters: Mapping[str, Any]) -> Sequence[Row[*Ts]]:
    """Run one query on a connection taken for it alone, outside any transaction.

    Raises: PoolExhausted, DatabaseUnreachable; and as `Lease.rows` does.
    """
    # A transaction would cost two more round trips, BEGIN and COMMIT. A single statement at READ COMMITTED has a
    # snapshot of its own in either case.
    lease = Lease(database, await database.pool.acquire(), readonly=True)
    try:
        return await lease.rows(query, parameters)
    finally:
        lease.give_back()


async def _close(connection: "asyncpg.Connection[Any]") -> None:
    try:
        await connection.close(timeout=CLOSE_SECONDS)
    except DRIVER_FAILURES:
        connection.terminate()
