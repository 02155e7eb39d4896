"""Sessions: the only way to the databases, and the only place that commits.

    one request = one session = one connection = one transaction

The session's type says what may be done: `ReadSession` or `WriteSession`. Routes name those of their request
(`pglifeguard.fastapi`); code outside a request writes `async with databases.reading()` (or `.writing()`). A session is
lazy: it holds no connection until its first statement. It keeps one connection until it is closed. So all its reads
see one server, and the LSN of its commit is asked on the server that committed. Only `rows` on a replica without a
transaction acquires a connection for each call.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Never, TypeVarTuple, cast

from sqlalchemy import Engine, Row
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, AsyncSessionTransaction
from sqlalchemy.util.concurrency import await_, greenlet_spawn

from pglifeguard.checkout import Checkout, holder
from pglifeguard.consistency import Consistency
from pglifeguard.database import Database, Isolation, TransactionMode
from pglifeguard.driver_failures import LOST, ONE_AT_A_TIME, SWALLOWED
from pglifeguard.effects import effect_of
from pglifeguard.errors import ConnectionLost, TransactionAborted
from pglifeguard.lease import DriverLane, Lease, fetch_once
from pglifeguard.orm import (
    ENDED,
    ENDED_READER,
    ENDED_WRITER,
    PINNED,
    EndedOwner,
    HeldConnection,
    OneConnection,
    refuse_transaction_options,
)
from pglifeguard.query import Query
from pglifeguard.router import ServerCheck

Ts = TypeVarTuple("Ts")

NO_QUERY = (
    'rows() takes a Query, a constant of the module: `BY_ID = Query(select(…).where(… == bindparam("id")))`; a '
    "statement that is made for the call is run by `await session.execute(…)`"
)


class ReadSession(AsyncSession):
    """A session that reads. The database refuses its writes; mypy refuses them before.

    `rows` runs in the driver's lane until SQLAlchemy's own session is needed, which then goes on with the same
    connection in the same transaction.
    """

    sync_session_class = OneConnection
    reads = True

    def __init__(
        self, database: Database, mode: TransactionMode, *, label: str, server_check: ServerCheck | None = None
    ) -> None:
        self._database = database
        self._mode = mode
        self._server_check = server_check
        self._label = label
        self._lease: Lease | None = None
        self._beginning = False
        self.ended = False
        # Whether the layer of the Idempotency-Key ends the transaction: then all methods here that would end it refuse.
        self.pinned = False

    @cached_property
    def sync_session(self) -> OneConnection:  # type: ignore[override]  # SQLAlchemy sets it in its constructor.
        """SQLAlchemy's session, made when it is first needed. `rows` alone needs none, and making it is dear."""
        super().__init__(self._mode.engine, expire_on_commit=False)
        made: OneConnection = vars(self)["sync_session"]
        made.owner = self._ended_owner if self.ended else self
        return made

    @cached_property
    def _proxied(self) -> OneConnection:  # type: ignore[override]  # By this name SQLAlchemy's own methods ask for it.
        return self.sync_session

    @property
    def _made(self) -> bool:
        """Whether SQLAlchemy's session was needed so far."""
        return "sync_session" in vars(self)

    @property
    def _in_use(self) -> bool:
        """Whether SQLAlchemy's session has the connection, or a transaction."""
        return self._made and self.sync_session.in_use

    @property
    def _ended_owner(self) -> EndedOwner:
        return ENDED_READER if self.reads else ENDED_WRITER

    @property
    def connection_held(self) -> HeldConnection | None:
        """The connection that SQLAlchemy's session has, if it has one."""
        return self.sync_session.held

    def hand_over(self, engine: Engine) -> HeldConnection:
        """Give SQLAlchemy's session the connection of this one, or one of the pool. Called in SQLAlchemy's greenlet."""
        holder.set(self._label)
        lease, self._lease = self._lease, None
        if lease is None and self._server_check is not None:
            lease, engine = await_(self._begin()), self._mode.engine.sync_engine
        if lease is not None:
            return lease.adopt(engine)
        self._start()
        try:
            connection = HeldConnection(engine)
        finally:
            self._beginning = False
        if self.ended:
            connection.release()
            raise RuntimeError(ENDED)
        return connection

    def _start(self) -> None:
        """Note that a connection is being acquired.

        Raises: RuntimeError after the session's end, or beside another acquire: that connection would never be
        released.
        """
        if self.ended:
            raise RuntimeError(ENDED)
        if self._beginning:
            raise RuntimeError(ONE_AT_A_TIME)
        self._beginning = True

    async def rows(self, query: Query[*Ts], **parameters: Any) -> Sequence[Row[*Ts]]:
        """Return all rows of a query, past the unit of work: flush before, if objects were changed.

        It runs in the session's transaction. On a replica without a transaction each call acquires a connection for one
        round trip and releases it; a query with an effect on its transaction begins one.
        """
        given: object = query
        if not isinstance(given, Query):
            raise TypeError(NO_QUERY)
        if self._in_use:
            return await greenlet_spawn(self.sync_session.read_rows, query.statement, parameters)
        if self.ended:
            raise RuntimeError(ENDED)
        holder.set(self._label)
        if self._lease is None:
            if self._mode.skips_transaction and not effect_of(query.sql):
                return await self._fetch_once(query, parameters)
            self._lease = await self._begin()
        elif not self._lease.begun:
            await self._begin_again(self._lease)
        return await self._lease.rows(query, parameters)

    async def _begin(self) -> Lease:
        self._start()
        try:
            await self._leave_early()
            lease = await self._acquire_lease()
            # The check is done once: the session keeps this connection, or goes to the primary.
            check, self._server_check = self._server_check, None
            if check is not None and not await self._may_serve(check, lease):
                lease = await self._acquire_lease()
        finally:
            self._beginning = False
        if self.ended:
            await lease.end()
            raise RuntimeError(ENDED)
        return lease

    async def _fetch_once(self, query: Query[*Ts], parameters: dict[str, Any]) -> Sequence[Row[*Ts]]:
        if self._server_check is None:
            return await fetch_once(self._database, query, parameters)
        if await self._leave_early():
            return await self.rows(query, **parameters)
        lease = Lease(self._database, await self._database.pool.acquire(), readonly=True)
        if lease.connection.pooled:
            # Behind a pooler only a transaction keeps the check and the query on one server.
            lease.give_back()
            self._lease = await self._begin()
            return await self._lease.rows(query, parameters)
        if await self._may_serve(self._server_check, lease):
            try:
                return await lease.rows(query, parameters)
            finally:
                lease.give_back()
        self._server_check = None
        return await self.rows(query, **parameters)

    async def _leave_early(self) -> bool:
        """Switch to the primary before a connection is acquired, where no server of the replica may serve the read."""
        other = None if self._server_check is None else await self._server_check.leave_early()
        if other is None:
            return False
        self._database, self._mode, self._server_check = other, other.reads, None
        return True

    async def _may_serve(self, check: ServerCheck, lease: Lease) -> bool:
        """Return whether the server of a lease may serve; if not, end the lease and switch to the primary."""
        try:
            other = await check.redirect(lease)
        except BaseException:
            await lease.end()
            raise
        if other is None:
            return True
        await lease.end()
        self._database, self._mode = other, other.reads
        return False

    async def _acquire_lease(self) -> Lease:
        lease = Lease(self._database, await self._database.pool.acquire(), readonly=self.reads)
        await lease.begin(self._mode.begin)
        return lease

    async def _begin_again(self, lease: Lease) -> None:
        try:
            await lease.begin(self._mode.begin)
        except BaseException:
            self._lease = None  # It has released its connection.
            raise

    # Transactions. SQLAlchemy's session does not know the transaction of the driver's lane until it takes that over.

    def begin(self) -> AsyncSessionTransaction:
        """Begin a transaction that is committed when its block ends: `async with session.begin():`.

        Raises, when entered: sqlalchemy.exc.InvalidRequestError when one has begun, as the first statement does. With
        an Idempotency-Key, RuntimeError with what to write instead.
        """
        self._refuse_if_pinned("begin")
        self._join()
        return super().begin()

    def in_transaction(self) -> bool:
        """Whether a transaction has begun."""
        return self._lease is not None or self.sync_session.in_transaction()

    def get_transaction(self) -> AsyncSessionTransaction | None:
        """Return the transaction, None before the first statement."""
        self._join()
        return super().get_transaction()

    def _join(self) -> None:
        """Let SQLAlchemy's session take over the transaction that `rows` has begun; nothing is sent for that."""
        if self._lease is not None:
            self.sync_session.join()

    async def connection(self, *arguments: Any, **options: Any) -> AsyncConnection:
        """Return the connection, in the session's transaction: for what SQLAlchemy's session has no method for.

        The driver's own is `(await connection.get_raw_connection()).driver_connection`; what it sends is part of the
        transaction too.
        """
        refuse_transaction_options(options.get("execution_options") or {})
        return await super().connection(*arguments, **options)

    def get_bind(self, *_arguments: Any, **_options: Any) -> Engine:
        """Return the engine of the session's database."""
        return self._mode.engine.sync_engine

    def get_async_bind(self, *_arguments: Any, **_options: Any) -> AsyncEngine:
        """Return the engine of the session's database."""
        return self._mode.engine

    async def commit(self) -> None:
        """Commit; the next statement begins another transaction on the same connection.

        A session commits by itself when its block ends, so this is for jobs that store their work in steps.

        Raises: OutcomeUnknown when the connection dies during COMMIT, ConnectionLost when before; TransactionAborted
        when a statement failed and its error was swallowed.
        """
        if self.ended:
            # What was changed since is nobody's to store, and no error would say so.
            raise RuntimeError(ENDED)
        if self._made and (self.sync_session.in_transaction() or self._owes()):
            await self._commit_objects()
        if self._lease is not None and self._lease.begun:
            self._refuse_if_pinned("commit")
            await self._lease.commit()

    def _owes(self) -> bool:
        return bool(self.new or self.deleted or self.dirty)

    async def _commit_objects(self) -> None:
        held = self.sync_session.held
        try:
            await super().commit()
        except PendingRollbackError as error:
            _raise_for_swallowed(error, lost=held is not None and held.invalidated)

    async def rollback(self) -> None:
        """Roll back to the last commit; the next statement begins another transaction."""
        await self._end_lease("rollback")
        if self._in_use:
            await super().rollback()

    async def close(self) -> None:
        """Roll back what is not committed, and release the connection."""
        await self._end_lease("close")
        if self._in_use:
            await super().close()

    async def reset(self) -> None:
        """Roll back what is not committed, and release the connection."""
        await self._end_lease("reset")
        if self._in_use:
            await super().reset()

    async def invalidate(self) -> None:
        """Roll back what is not committed, and close the connection."""
        if self._lease is not None:
            self._refuse_if_pinned("invalidate")
            self._lease.connection.terminate()
        await self._end_lease("invalidate")
        if self._in_use:
            await super().invalidate()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Roll back what is not committed, and release the connection.

        Raises: TypeError when objects were changed, which this session cannot store. TransactionAborted when a flush
        failed, and the block went on as if it had not.
        """
        self.ended, self.pinned = True, False
        try:
            if self._lease is not None:
                await self._end_lease("close")
            if self._in_use:
                await self._end_objects(kind, error, trace)
        finally:
            # Two sessions that know each other are freed by the garbage collector alone. Beside 200 requests in flight
            # it ran four times a second, and stopped them all for 8 to 46 ms.
            if self._made:
                self.sync_session.owner = self._ended_owner

    async def _end_objects(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held = self.sync_session.held
        lost = held is not None and held.invalidated
        try:
            if error is None and self.reads:
                self.sync_session.flush()
        finally:
            if held is None or (not self.sync_session.in_transaction() and not held.checkout.connection.needs_reset):
                # Nothing has to be undone on the server, so this does not wait.
                self.sync_session.close()
            else:
                await super().__aexit__(kind, error, trace)
        if isinstance(error, PendingRollbackError):
            _raise_for_swallowed(error, lost=lost)

    async def _end_lease(self, name: str) -> None:
        if self._lease is not None:
            self._refuse_if_pinned(name)
            lease, self._lease = self._lease, None
            await lease.end()

    def _refuse_if_pinned(self, name: str) -> None:
        if self.pinned:
            raise RuntimeError(PINNED.format(name=name))

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

    reads = False

    def __init__(
        self,
        database: Database,
        *,
        label: str,
        consistency: Consistency | None,
        asks_token: bool = True,
        isolation: Isolation | None = None,
    ) -> None:
        super().__init__(database, database.writes[isolation], label=label)
        self.isolation = isolation
        # Whether something was stored that a repetition would store again.
        self.committed = False
        # What ended it, if that was not its end: the block's error, or the commit's.
        self.failure: BaseException | None = None
        self._consistency = consistency
        self._asks_token = asks_token

    def add(self, instance: object, *, _warn: bool = True) -> None:
        """Put an object into the session; `flush()` when the database must answer now."""
        self.sync_session.add(instance, _warn=_warn)

    def add_all(self, instances: Any) -> None:
        """Put objects into the session."""
        self.sync_session.add_all(instances)

    async def delete(self, instance: object) -> None:
        """Mark an object to be deleted with the next flush."""
        await AsyncSession.delete(self, instance)

    async def copy_records(
        self, table: str, records: Iterable[Sequence[Any]], *, columns: Sequence[str], schema: str | None = None
    ) -> int:
        """Store many rows by COPY, in the session's transaction; return how many.

        A record is a sequence of values in the order of `columns`, as asyncpg takes them: no type of SQLAlchemy
        converts them. An `AsyncIterable` of records is taken too.

        Raises: sqlalchemy.exc.IntegrityError, for all of them together; else as `rows`.
        """
        if self._in_use:
            held = cast("HeldConnection", (await self.connection()).sync_connection)
            lane = DriverLane(self._database, held.checkout, readonly=False)
            return await lane.copy(table, records, columns, schema=schema)
        if self._lease is None:
            self._lease = await self._begin()
        elif not self._lease.begun:
            await self._begin_again(self._lease)
        return await self._lease.copy(table, records, columns, schema=schema)

    async def commit(self) -> None:
        """Commit; the next statement begins another transaction on the same connection.

        A session commits by itself when its block ends, so this is for jobs that store their work in steps.

        Raises: OutcomeUnknown when the connection dies during COMMIT, ConnectionLost when before; TransactionAborted
        when a statement failed and its error was swallowed.
        """
        await super().commit()
        await self._note_commits()

    async def close(self) -> None:
        """Roll back what is not committed, and release the connection."""
        await self._note_commits()
        await super().close()

    async def reset(self) -> None:
        """Roll back what is not committed, and release the connection."""
        await self._note_commits()
        await super().reset()

    async def invalidate(self) -> None:
        """Roll back what is not committed, and close the connection."""
        await self._note_commits()
        await super().invalidate()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit, or roll back after an error, and give the connection back."""
        self.pinned, self.failure = False, error
        try:
            if self._lease is None and not self._in_use:
                return
            if error is None:
                await self.commit()
            else:
                # The earlier commits of the block stand, and the client may read them with a token.
                await self._note_commits()
        except BaseException as late:
            self.failure = late
            raise
        finally:
            await super().__aexit__(kind, error, trace)

    async def _note_commits(self) -> None:
        """Note a commit for the layers around the request, and ask for its token where there are replicas."""
        checkout = self._checkout()
        if checkout is None or not checkout.connection.committed:
            return
        checkout.connection.committed, self.committed = False, True
        if self._consistency is not None:
            self._consistency.committed = True
            if self._asks_token:
                lane = DriverLane(self._database, checkout, readonly=False)
                self._consistency.token = await lane.written_token()

    def _checkout(self) -> Checkout | None:
        if self._lease is not None:
            return self._lease.checkout
        held = self.connection_held
        return None if held is None else held.checkout


def _raise_for_swallowed(error: PendingRollbackError, *, lost: bool) -> Never:
    """Name the failure of a block that went on after a flush or the connection had failed."""
    if lost:
        raise ConnectionLost(LOST) from error
    raise TransactionAborted(SWALLOWED) from error
