"""SQLAlchemy's session and connection inside a session of this library, which gives it the connection.

Three things differ from SQLAlchemy's own: there is one connection, acquired at the first statement and kept until the
session is closed; only the session ends the transaction, and no other handle of it; a session that reads refuses
objects that it would have to write.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Never, Protocol, TypeVarTuple, cast

from sqlalchemy import Connection, Engine, Row
from sqlalchemy.engine.cursor import CursorResult, ResultFetchStrategy
from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin
from sqlalchemy.sql.selectable import TypedReturnsRows
from sqlalchemy.util.concurrency import await_, in_greenlet

from pglifeguard.checkout import Checkout

Ts = TypeVarTuple("Ts")

# Options of an execution that would begin another kind of transaction than the session's.
TRANSACTION_OPTIONS = frozenset({"isolation_level", "postgresql_readonly", "postgresql_deferrable"})
ISOLATION = (
    "a session has its isolation level from the start: `databases.writing(isolation=…)`, or `SerializableDB` in an "
    "endpoint; what runs outside transactions, as VACUUM does, takes a connection of its own"
)
NOT_THE_CONNECTION = (
    "the transaction is the session's and not its connection's: write `await session.commit()`, `.rollback()` or "
    "`.close()`"
)
ENDED = (
    "this session ended with its request or its block; what comes after it, a stream or a background task, opens its "
    "own: `async with databases.reading()` or `.writing()`"
)
NOT_LOADED = (
    "an attribute was read that is not loaded, and reading it cannot wait for the database: load it with its query, "
    '`.options(selectinload(Parent.children))`, or by `await session.refresh(instance, ["children"])`'
)
PINNED = (
    "with an Idempotency-Key the request is one transaction, the answer included, and it ends with the endpoint: leave "
    "`{name}()` out, and undo a part by `session.begin_nested()`"
)
ONE_DATABASE = "a session of this service has one database: open a second session for another one"


class Owner(Protocol):
    """The session that SQLAlchemy's session is part of, as far as that needs to know it."""

    pinned: bool
    reads: bool
    ended: bool

    def hand_over(self, engine: Engine) -> "HeldConnection":
        """Return the connection for the session to work on."""


class EndedOwner:
    """Stands in for a session that has ended, so that what outlives it refuses as the session would."""

    pinned = False
    ended = True

    def __init__(self, *, reads: bool) -> None:
        self.reads = reads

    def hand_over(self, _engine: Engine) -> Never:
        """Refuse: no connection that is acquired now would ever be released."""
        raise RuntimeError(ENDED)


ENDED_READER, ENDED_WRITER = EndedOwner(reads=True), EndedOwner(reads=False)


class EndedStream(ResultFetchStrategy):
    """The source of a streamed result whose session has released the connection.

    Without this the result would ask for its cursor in the transaction of the connection's next holder, and abort it.
    """

    __slots__ = ()

    def fetchone(self, *_arguments: Any, **_options: Any) -> Never:
        """Refuse: the cursor ended with the transaction."""
        raise RuntimeError(ENDED)

    fetchmany = fetchall = fetchone


class HeldConnection(Connection):
    """The connection of a session, which alone may end its transaction."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.checkout: Checkout = self.info["checkout"]
        self.checkout.connection.bound = True
        # Results that still have a cursor.
        self._streams: list[CursorResult[Any]] = []

    def release(self) -> None:
        """Reset the connection and release it to the pool."""
        for stream in self._streams:
            stream.cursor_strategy = EndedStream()
        driver = self.checkout.connection
        driver.bound = False
        if driver.needs_reset and not driver.is_closed():
            await_(driver.reset())
        super().close()

    def execution_options(self, **opt: Any) -> Connection:
        """Set options that concern statements; those of transactions are the session's."""
        refuse_transaction_options(opt)
        return super().execution_options(**opt)

    def execute(self, statement: Any, parameters: Any = None, *, execution_options: Any = None) -> Any:
        """Execute a statement in the session's transaction."""
        if execution_options:
            refuse_transaction_options(execution_options)
        result = super().execute(statement, parameters, execution_options=execution_options)
        if execution_options and execution_options.get("stream_results"):
            self._streams = [*(stream for stream in self._streams if stream.cursor is not None), result]
        return result

    def commit(self) -> Never:
        """Refuse: the session would go on with a transaction that is over."""
        raise RuntimeError(NOT_THE_CONNECTION)

    rollback = close = detach = get_transaction = commit


class OneTransaction(SessionTransaction):
    """The transaction of a session; it refuses to end while the session is pinned."""

    session: "OneConnection"

    def commit(self, _to_root: bool = False) -> None:  # noqa: FBT001, FBT002  # SQLAlchemy's signature.
        """Commit."""
        self.session.refuse_if_pinned("commit")
        super().commit(_to_root)

    def rollback(self, _capture_exception: bool = False, _to_root: bool = False) -> None:  # noqa: FBT001, FBT002  # As above.
        """Roll back."""
        self.session.refuse_if_pinned("rollback")
        super().rollback(_capture_exception, _to_root)

    def close(self, invalidate: bool = False) -> None:  # noqa: FBT001, FBT002  # As above.
        """Roll back what is not committed, and end."""
        self.session.refuse_if_pinned("close")
        super().close(invalidate)


class OneConnection(Session):
    """A session that gets its connection from its owner at the first statement, and keeps it until it is closed."""

    owner: Owner
    held: HeldConnection | None = None
    _joining = False

    @property
    def in_use(self) -> bool:
        """Whether it has a connection, or a transaction, which SQLAlchemy begins at the first object too."""
        return self.held is not None or self._transaction is not None

    def get_bind(self, *_arguments: Any, bind: Any = None, **_options: Any) -> Connection:
        """Return the one connection, taken at the first call."""
        if bind is not None and bind is not self.held:
            raise RuntimeError(ONE_DATABASE)
        if not in_greenlet() and not self._joining:
            raise MissingGreenlet(NOT_LOADED)
        if self.held is None:
            self.held = self.owner.hand_over(cast("Engine", self.bind))
        return self.held

    def begin(self, nested: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002  # SQLAlchemy's signature.
        """Begin a transaction that ends with its block, or with `nested` a savepoint."""
        if not nested:
            self.refuse_if_pinned("begin")
        return super().begin(nested)

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002  # As above.
        # SQLAlchemy 2.1 has no public way to choose the class of a session's transaction.
        if self._transaction is None:
            OneTransaction(self, SessionTransactionOrigin.BEGIN if begin else SessionTransactionOrigin.AUTOBEGIN)
        return super()._autobegin_t(begin)

    def read_rows(self, statement: TypedReturnsRows[*Ts], parameters: Mapping[str, Any]) -> Sequence[Row[*Ts]]:
        """Run a query of `rows` in the session's transaction, and in its savepoint where there is one."""
        return list(self.connection().execute(statement, parameters).all())

    def join(self) -> None:
        """Take over the transaction that the owner has begun; nothing is sent for that."""
        self._joining = True
        try:
            self.connection()
        finally:
            self._joining = False

    def connection(self, bind_arguments: Any = None, execution_options: Any = None) -> Connection:
        """Return the connection, in the session's transaction."""
        refuse_transaction_options(execution_options or {})
        return super().connection(bind_arguments, execution_options)

    def commit(self) -> None:
        """Commit; the next statement begins another transaction on the same connection."""
        self.refuse_if_pinned("commit")
        super().commit()

    def rollback(self) -> None:
        """Roll back to the last commit."""
        self.refuse_if_pinned("rollback")
        super().rollback()

    def close(self) -> None:
        """Roll back what is not committed, and release the connection."""
        self._end("close", super().close)

    def reset(self) -> None:
        """Roll back what is not committed, and release the connection."""
        self._end("reset", super().reset)

    def invalidate(self) -> None:
        """Close the connection, so that it is not used again."""
        self.refuse_if_pinned("invalidate")
        if self.held is not None:
            self.held.checkout.connection.terminate()
        self._end("invalidate", super().invalidate)

    def bind_mapper(self, *_arguments: Any) -> Never:
        """Refuse: there is one database."""
        raise RuntimeError(ONE_DATABASE)

    def bind_table(self, *_arguments: Any) -> Never:
        """Refuse: there is one database."""
        raise RuntimeError(ONE_DATABASE)

    # A session that reads refuses these at once. It finds objects that come by cascades at the flush.

    def add(self, instance: object, *, _warn: bool = True) -> None:
        """Put an object into the session."""
        self._refuse_to_write(instance)
        super().add(instance, _warn=_warn)

    def delete(self, instance: object) -> None:
        """Mark an object to be deleted with the next flush."""
        self._refuse_to_write(instance)
        super().delete(instance)

    def delete_all(self, instances: Iterable[object]) -> None:
        """Mark objects to be deleted with the next flush."""
        self._refuse_to_write(instances)
        super().delete_all(instances)

    def merge(self, instance: Any, **options: Any) -> Any:
        """Copy the state of an object into the session's own."""
        self._refuse_to_write(instance)
        return super().merge(instance, **options)

    def merge_all(self, instances: Iterable[Any], **options: Any) -> Sequence[Any]:
        """Copy the state of objects into the session's own."""
        self._refuse_to_write(instances)
        return super().merge_all(instances, **options)

    def bulk_save_objects(self, objects: Iterable[object], *rest: Any, **options: Any) -> None:
        """Store objects past the unit of work."""
        self._refuse_to_write(objects)
        super().bulk_save_objects(objects, *rest, **options)

    def bulk_insert_mappings(self, mapper: Any, *rest: Any, **options: Any) -> None:
        """Insert rows past the unit of work."""
        self._refuse_to_write(mapper)
        super().bulk_insert_mappings(mapper, *rest, **options)

    def bulk_update_mappings(self, mapper: Any, mappings: Iterable[dict[str, Any]]) -> None:
        """Update rows past the unit of work."""
        self._refuse_to_write(mapper)
        super().bulk_update_mappings(mapper, mappings)

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Send the changes of the objects."""
        if self.owner.reads:
            for instance in (*self.new, *self.deleted, *self.dirty):
                self._refuse_to_write(instance)
        super().flush(objects)

    def _refuse_to_write(self, instance: object) -> None:
        if self.owner.reads:
            name = instance.__name__ if isinstance(instance, type) else type(instance).__name__
            raise TypeError(f"a ReadSession does not write: {name}")
        if self.owner.ended:
            # The object would never be stored, and no error would say so.
            raise RuntimeError(ENDED)

    def refuse_if_pinned(self, name: str) -> None:
        """Refuse to end the transaction of a request with an Idempotency-Key.

        Raises: RuntimeError.
        """
        if self.owner.pinned:
            raise RuntimeError(PINNED.format(name=name))

    def _end(self, name: str, end: Callable[[], None]) -> None:
        self.refuse_if_pinned(name)
        try:
            end()
        finally:
            held, self.held = self.held, None
            if held is not None:
                held.release()


def refuse_transaction_options(options: Mapping[str, Any]) -> None:
    """Refuse options that change a transaction which has begun.

    Raises: RuntimeError.
    """
    if not TRANSACTION_OPTIONS.isdisjoint(options):
        raise RuntimeError(ISOLATION)
