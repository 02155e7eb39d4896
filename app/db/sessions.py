"""Sessions: the only way to the databases, and the only place that commits.

    one request = one session = one connection = one transaction

The session's type says what may be done: `ReadSession` or `WriteSession`; `autocommit.py` has one for a write of one
query. Routes name those of their request (`dependencies.py`); code outside a request says `async with
databases.reading()` (or `.writing()`). A session is lazy: until its first statement it holds nothing. It keeps its one
connection until it is closed, so what was read is read at one place, and what the commit left behind (its LSN) can be
asked where it happened. Only `rows` on a replica, where no transaction binds them, take a connection each.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Never, TypeVarTuple, cast

import asyncpg
from sqlalchemy import Connection, Engine, Row
from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.sql.selectable import TypedReturnsRows
from sqlalchemy.util.concurrency import greenlet_spawn, in_greenlet

from app.db.connector import DRIVER_FAILURES
from app.db.lease import SWALLOWED, Lease
from app.db.observe import PoolWatch
from app.db.pool import Tenure, holder
from app.db.query import Query
from app.errors import ConnectionLost, DatabaseUnavailable, OutcomeUnknown, TransactionAborted

if TYPE_CHECKING:
    from app.db.engines import Database
    from app.db.replica import Reason

WRITTEN_LSN = "SELECT pg_current_wal_insert_lsn()::text"
Ts = TypeVarTuple("Ts")

UNKNOWN = (
    "The connection was lost while the change was being committed, so it may or may not have been made. "
    "Read before you try again, or send the request with an Idempotency-Key."
)
ENDED = (
    "this session ended with its request or its block; what comes after it, a stream or a background task, opens its "
    "own: `async with databases.reading()` or `.writing()`"
)
NOT_LOADED = (
    "an attribute was read that is not loaded, and reading it cannot wait for the database: load it with its query, "
    '`.options(selectinload(Parent.children))`, or by `await session.refresh(instance, ["children"])`'
)
NO_QUERY = (
    'rows() takes a Query, a constant of the module: `BY_ID = Query(select(…).where(… == bindparam("id")))`; a '
    "statement that is made for the call is run by `await session.execute(…)`"
)


@dataclass(slots=True)
class Consistency:
    """What the middleware and the sessions of one request tell each other; it lives in the request's scope."""

    wanted_lsn: int | None = None
    primary_only: bool = False
    read_from: "Database | None" = None
    reason: "Reason | None" = None
    token: str | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """A way to use an engine: the engine with its options for SQLAlchemy, and the words that begin the same by hand.

    Without them (None) there is no transaction, and each statement stands for itself.
    """

    engine: AsyncEngine
    begin: str | None


class _OneConnection(Session):
    """A session that has its connection from its owner at the first statement, and keeps it until it is closed."""

    owner: "ReadSession"
    held: Connection | None = None

    def get_bind(self, *_args: Any, **_kwargs: Any) -> Connection:
        if not in_greenlet():
            raise MissingGreenlet(NOT_LOADED)
        if self.held is None:
            self.held = self.owner.hand_over(cast("Engine", self.bind))
            # The transaction is ours: SQLAlchemy's session takes part in it, and does not end it.
            self.held.begin()
        return self.held

    def read_rows(self, statement: TypedReturnsRows[*Ts], parameters: Mapping[str, Any]) -> Sequence[Row[*Ts]]:
        # By the session, and not by `get_bind`: it is the session that sends the SAVEPOINT of a `begin_nested`.
        return list(self.connection().execute(statement, parameters).all())

    def close(self) -> None:
        try:
            super().close()
        finally:
            held, self.held = self.held, None
            if held is not None:
                held.close()


class ReadSession(AsyncSession):
    """A session that reads. The database refuses its writes; mypy refuses them before.

    It asks by the driver (`rows`) until SQLAlchemy's own session is needed, which then goes on with the same connection
    in the same transaction.
    """

    sync_session_class = _OneConnection
    sync_session: _OneConnection
    _readonly = True

    def __init__(self, database: "Database", way: Way, *, label: str) -> None:
        self._database = database
        self._way = way
        self._label = label
        self._lease: Lease | None = None
        self._beginning = False
        self._ended = False
        # Nothing to undo on the server, and so nothing to wait for when the session is closed.
        self._settled = way.begin is None

    if not TYPE_CHECKING:  # pragma: no branch  # To mypy a session has AsyncSession's attributes and no others.

        def __getattr__(self, name: str) -> Any:
            # SQLAlchemy's own session is made when it is first asked for; a session that reads by `rows` never asks.
            if name not in {"sync_session", "_proxied", "bind", "binds"}:
                raise AttributeError(name)
            super().__init__(self._way.engine, expire_on_commit=False)
            self.sync_session.owner = self
            return getattr(self, name)

    @property
    def connection_held(self) -> Connection | None:
        """The connection that SQLAlchemy's session has, if it has one."""
        return self.sync_session.held if "sync_session" in vars(self) else None

    def hand_over(self, engine: Engine) -> Connection:
        """Give SQLAlchemy's session the connection of this one, or one of the pool. Called in SQLAlchemy's greenlet."""
        holder.set(self._label)
        lease, self._lease = self._lease, None
        if lease is not None:
            return lease.adopt(engine)
        self._start()
        try:
            connection = engine.connect()
        finally:
            self._beginning = False
        if self._ended:
            connection.close()
            raise RuntimeError(ENDED)
        return connection

    def _start(self) -> None:
        """Begin to get a connection; nobody would give one back that comes after the end, or beside another."""
        if self._ended:
            raise RuntimeError(ENDED)
        if self._beginning:
            raise RuntimeError("a session does one thing at a time: this one is still getting its connection")
        self._beginning = True

    async def rows(self, query: Query[*Ts], **parameters: Any) -> Sequence[Row[*Ts]]:
        """Return all rows of a query, past the unit of work: flush before, if objects were changed.

        On a replica each call takes a connection for itself, one round trip and gives it back: there is no transaction
        for it to be part of. On the primary it runs in the session's transaction.
        """
        given: object = query
        if not isinstance(given, Query):
            raise TypeError(NO_QUERY)
        if "sync_session" in vars(self) and (self.sync_session.held is not None or self.sync_session.in_transaction()):
            return await greenlet_spawn(self.sync_session.read_rows, query.statement, parameters)
        if self._ended:
            raise RuntimeError(ENDED)
        holder.set(self._label)
        if self._way.begin is None:
            return await self._database.fetch(query, parameters)
        if self._lease is None:
            self._lease = await self._begin(self._way.begin)
        return await self._lease.rows(query, parameters)

    async def _begin(self, words: str) -> Lease:
        self._start()
        try:
            lease = Lease(self._database, await self._database.pool.lease(), readonly=self._readonly)
            await lease.begin(words)
        finally:
            self._beginning = False
        if self._ended:
            await lease.end()
            raise RuntimeError(ENDED)
        return lease

    async def rollback(self) -> None:
        """Take back what the session did so far; what comes next is another transaction."""
        await self._end_lease()
        if "sync_session" in vars(self):
            await super().rollback()

    async def close(self) -> None:
        """Give the connection back; what is not committed is rolled back."""
        await self._end_lease()
        if "sync_session" in vars(self):
            await super().close()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the connection back; what is not committed is rolled back."""
        self._ended = True
        if self._lease is not None:
            await self._end_lease()
        if "sync_session" not in vars(self):
            return
        if self._settled or self.sync_session.held is None:
            self.sync_session.close()
        else:
            await super().__aexit__(kind, error, trace)

    async def _end_lease(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            await lease.end()

    # WriteSession widens these again.
    def add(self, instance: Never, *, _warn: bool = True) -> None:  # type: ignore[override]  # Narrowed on purpose.
        """Refuse: this session reads."""
        raise TypeError(f"a ReadSession does not write: {type(instance).__name__}")

    def add_all(self, instances: Never) -> None:  # type: ignore[override]  # Narrowed on purpose.
        """Refuse: this session reads."""
        raise TypeError(f"a ReadSession does not write: {type(instances).__name__}")

    async def delete(self, instance: Never) -> None:  # type: ignore[override]  # Narrowed on purpose.
        """Refuse: this session reads."""
        raise TypeError(f"a ReadSession does not write: {type(instance).__name__}")


class WriteSession(ReadSession):
    """A session that reads and writes on the primary, and commits when its block ends without an error."""

    _readonly = False

    def __init__(self, database: "Database", *, label: str, consistency: Consistency | None) -> None:
        super().__init__(database, database.writes, label=label)
        self._consistency = consistency

    def add(self, instance: object, *, _warn: bool = True) -> None:
        """Put an object into the session; `flush()` when the database must answer now."""
        self.sync_session.add(instance, _warn=_warn)

    def add_all(self, instances: Any) -> None:
        """Put objects into the session."""
        self.sync_session.add_all(instances)

    async def delete(self, instance: object) -> None:
        """Mark an object to be deleted with the next flush."""
        await AsyncSession.delete(self, instance)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit, or roll back after an error, and give the connection back."""
        try:
            if error is None:
                await self._finish()
        finally:
            await super().__aexit__(kind, error, trace)

    async def _finish(self) -> None:
        if "sync_session" in vars(self):
            if self.new or self.dirty or self.deleted:
                # What the objects still owe fails here, and not inside COMMIT, where it would look like a lost outcome.
                await self.flush()
            held = self.sync_session.held
            if held is not None:
                if not self.is_active:
                    # A flush failed and took everything back, and somebody went on as if it had not.
                    raise TransactionAborted(SWALLOWED)
                driver = held.connection.driver_connection
                await self._commit(driver, held.info["tenure"], lambda: greenlet_spawn(held.commit))
        if self._lease is not None:
            await self._commit(self._lease.connection, self._lease.tenure, self._lease.commit)

    async def _commit(self, driver: Any, tenure: Tenure, commit: Callable[[], Awaitable[None]]) -> None:
        if tenure.aborted:
            # PostgreSQL answers COMMIT of a failed transaction with a silent ROLLBACK; the client would read 2xx.
            raise TransactionAborted(SWALLOWED)
        if driver is None or driver.is_closed():
            raise ConnectionLost("The connection to the database was lost; nothing was committed.")
        before, started = tenure.queried, time.perf_counter()
        tenure.asked_at = started
        try:
            await commit()
        except (*DRIVER_FAILURES, DatabaseUnavailable) as error:
            if driver.is_closed():
                raise OutcomeUnknown(UNKNOWN) from error
            raise
        self._settled = True
        tenure.queried, tenure.asked_at = before + time.perf_counter() - started, None
        await self._keep_token(driver, tenure)

    async def _keep_token(self, driver: Any, tenure: Tenure) -> None:
        """Ask how far the WAL reaches after a commit, where somebody reads from a replica."""
        if self._consistency is not None:
            tenure.asked_at = started = time.perf_counter()
            self._consistency.token = await _written_lsn(driver, self._database.watch)
            tenure.queried, tenure.asked_at = tenure.queried + time.perf_counter() - started, None


async def _written_lsn(driver: "asyncpg.Connection[Any]", watch: PoolWatch) -> str | None:
    """Ask how far the WAL reaches after COMMIT; before it, the answer would be older than the commit itself."""
    try:
        return str(await driver.fetchval(WRITTEN_LSN))
    except asyncio.CancelledError:
        driver.terminate()
        raise
    except DRIVER_FAILURES as error:
        # Whoever took the connection next would wait for what this one left behind.
        driver.terminate()
        # The write is committed and must be answered so; only the promise to read it back at once is lost.
        watch.log("no consistency token", route=holder.get(), reason=str(error) or type(error).__name__)
        return None
