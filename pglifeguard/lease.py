"""One connection of the pool, asked by the driver and not through SQLAlchemy: taken, asked, given back.

Around a short statement SQLAlchemy's execution costs several times the statement (`docs/performance.md`), so a session
asks its constant queries here: with a transaction around them, or on a replica without one. When SQLAlchemy's own
session is needed after all, it takes connection and transaction over (`adopt`). Failures leave by the same names as
those that went through SQLAlchemy: see `EngineWatch`.
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
from pglifeguard.server import WRITTEN, lacks, token_text
from pglifeguard.watched import Transaction

# Seconds for telling the server to stop what a cancelled request asked.
CLOSE_SECONDS = 2.0
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class DriverLane:
    """Asks one connection by the driver, counts the time, and names the failures."""

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
        # PostgreSQL says "COPY 12".
        return int(status.rpartition(" ")[2])

    async def ask(self, answer: Awaitable[T], statement: str | None = None) -> T:
        """Wait for an answer, count its time, and name its failure; BEGIN and COMMIT are no statements to count."""
        self.checkout.begin_query()
        try:
            return await answer
        except DRIVER_FAILURES as error:
            self._translate(error, statement)
            raise
        except asyncio.CancelledError:
            # The statement may still run: closing waits until the server has been told to stop it.
            await asyncio.shield(_close(self.connection))
            raise
        finally:
            seconds = self.checkout.end_query()
            if statement is not None:
                self._database.watch.answered(self.checkout, statement, seconds)

    async def written_token(self) -> str | None:
        """Ask how far the WAL reaches after a commit, as a consistency token; None where the server cannot tell."""
        if self._database.monitor.lacks_lsn:
            return None
        # The question belongs to the request and to no transaction.
        bound, self.connection.bound = self.connection.bound, False
        self.checkout.begin_query()
        try:
            written = cast("asyncpg.Record", await self.connection.fetchrow(WRITTEN))
        except asyncio.CancelledError:
            self.connection.terminate()
            raise
        except DRIVER_FAILURES as error:
            if not lacks(error):
                # Whoever took the connection next would wait for what this one left behind.
                self.connection.terminate()
            # The write is committed and must be answered so; only the promise to read it back at once is lost.
            reason = str(error) or type(error).__name__
            self._database.watch.log("no consistency token", route=holder.get(), reason=reason)
            return None
        finally:
            self.checkout.end_query()
            self.connection.bound = bound
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
            raise IntegrityError(statement, None, error, hide_parameters=True) from error


class Lease(DriverLane):
    """A connection that one session has to itself until `end` or `adopt`; it does one thing at a time."""

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
        """Begin a transaction with these words, or give the connection back; raises as `rows` does."""
        transaction = Transaction(self.connection, words)
        try:
            await self.ask(transaction.start())
        except BaseException:
            # Nobody can tell what a statement would be part of.
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
        transaction, self._transaction = cast("Transaction", self._transaction), None
        await self.ask(transaction.commit())

    async def end(self) -> None:
        """Take back what is not committed and give the connection back."""
        transaction, self._transaction = self._transaction, None
        try:
            if transaction is not None and not self.connection.is_closed():
                await self.ask(transaction.rollback())
            if self.connection.needs_reset:
                await self.connection.reset()
        except (*DRIVER_FAILURES, DatabaseUnavailable):
            # The answer does not depend on it: a server that lost the connection has rolled back.
            self.connection.terminate()
        finally:
            self.give_back()

    def give_back(self) -> None:
        """Return the connection to the pool; one that is closed meanwhile is replaced there."""
        entry, self.entry = cast("ConnectionPoolEntry", self.entry), None
        self._database.pool.release(entry)

    def adopt(self, engine: Engine) -> HeldConnection:
        """Let SQLAlchemy go on where this lease stands: its connection, its transaction. Closing it gives it back.

        Called in SQLAlchemy's greenlet.
        """
        entry, self.entry = self.entry, None
        connection = self._database.adapter.adopt(cast("ConnectionPoolEntry", entry), lambda: HeldConnection(engine))
        # The dialect begins at the first statement, unless it knows of a transaction.
        cast("Any", connection.connection.dbapi_connection)._transaction = self._transaction  # noqa: SLF001
        self._transaction = None
        return connection

    def __del__(self) -> None:
        if self.entry is not None:
            # Whoever left the session without closing it; the permit would be lost with it.
            self._database.watch.log(
                "session dropped without being closed", level=logging.ERROR, route=self.checkout.holder
            )
            self.connection.terminate()
            self.give_back()


async def fetch_alone(database: Database, query: Query[*Ts], parameters: Mapping[str, Any]) -> Sequence[Row[*Ts]]:
    """Run one query on a connection taken for it alone, outside any transaction.

    Raises: PoolExhausted, DatabaseUnreachable; and as `Lease.rows` does.
    """
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
