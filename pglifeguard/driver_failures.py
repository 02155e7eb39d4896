"""One translation of the driver's failures: what a failure means, and what must become of its connection.

Two callers run statements: `DriverLane` runs them by asyncpg, and SQLAlchemy's events (`EngineWatch`) see those that
SQLAlchemy runs. Both give the failure of asyncpg to `examine` and do what it says, so a failure has one name whichever
way the statement took. Nothing here waits, closes a connection or knows SQLAlchemy.
"""

import re
from enum import Enum, auto
from typing import Any, NamedTuple

import asyncpg

from pglifeguard.errors import (
    CommandTimeout,
    ConnectionLost,
    ServiceError,
    TransactionAborted,
    WriteInReadSession,
    name_database,
    sqlstate,
)

# What opening or asking a connection raises, asyncpg's own. A TimeoutError is an OSError.
DRIVER_FAILURES = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
READ_ONLY = "25006"
# A statement after one that failed: PostgreSQL refuses all but ROLLBACK.
ABORTED = "25P02"
# The server ended the session: an administrator, a crash or a shutdown.
ENDED_BY_SERVER = "57P"
# asyncpg's words for a connection that is not ready for a statement.
_BUSY = "another operation"
WROTE = "A read session was asked to write: WriteDB, `databases.writing()` and `databases.write_once()` may."
ONE_AT_A_TIME = (
    "A session does one thing at a time: tasks that run together, as by asyncio.gather, need a session each, of "
    "`databases.reading()` or `databases.writing()`."
)

LOST = "The connection to the database was lost; nothing was committed."
SWALLOWED = (
    "A statement failed, its error was swallowed, and nothing can be committed. To go on after a failure, run the "
    "statement that may fail in a savepoint, `async with session.begin_nested():`, and catch the error outside of it."
)


class Fate(Enum):
    """What must become of the connection that a failure happened on."""

    KEPT = auto()
    """It works on; PostgreSQL refused a statement, no more."""
    CLOSED = auto()
    """It must not be used again."""
    DEMOTED = auto()
    """Its server takes no writes any more, and so does every connection to that address: `leave_demoted`."""


class Meaning(NamedTuple):
    """What a failure means: the error to raise in place of the driver's, if there is one, and the connection's fate."""

    error: ServiceError | None = None
    fate: Fate = Fate.KEPT


def examine(
    error: BaseException, connection: "asyncpg.Connection[Any] | None", *, database: str, reads_only: bool
) -> Meaning:
    """Say what a failure means for the caller and for the connection; None is a connection that is lost already.

    `database` is remembered with the error, and the row data that the error quotes is dropped from it.
    `reads_only` says that the caller may not write, so that a refused write is a bug and no failover.
    """
    forget_row_data(error)
    name_database(error, database)
    if isinstance(error, TimeoutError):
        return Meaning(CommandTimeout("The database did not answer in time.", database=database), Fate.CLOSED)
    closed = connection is not None and connection.is_closed()
    if isinstance(error, OSError) or ended_unnoticed(error) or (isinstance(error, asyncpg.InterfaceError) and closed):
        return Meaning(ConnectionLost(LOST, database=database), Fate.CLOSED)
    if isinstance(error, asyncpg.DataError) and connection is not None and not connection.is_in_transaction():
        # asyncpg refused a value when it had sent half of the statement: the server waits for the other half, in a
        # transaction that no ROLLBACK of ours ends.
        return Meaning(fate=Fate.CLOSED)
    if isinstance(error, asyncpg.InterfaceError) and _BUSY in str(error):
        error.add_note(ONE_AT_A_TIME)
    state = sqlstate(error) or ""
    if state == ABORTED:
        return Meaning(TransactionAborted(SWALLOWED))
    if state == READ_ONLY:
        wrong = WriteInReadSession(WROTE)
        return Meaning(wrong) if reads_only else Meaning(fate=Fate.DEMOTED)
    return Meaning(fate=Fate.CLOSED if state.startswith(ENDED_BY_SERVER) else Fate.KEPT)


def ended_unnoticed(error: BaseException) -> bool:
    """Tell a statement that asyncpg did not send because the server had ended the connection.

    asyncpg 0.32 calls such a connection busy with another operation until the event loop sees its socket close. By an
    InterfaceError it says the same of a bug: two tasks use one connection at the same time.
    """
    return isinstance(error, asyncpg.InternalClientError) and _BUSY in str(error)


def forget_row_data(error: BaseException) -> None:
    """Drop the data that a failure quotes, which is health data: PostgreSQL quotes rows, and asyncpg values."""
    if isinstance(error, asyncpg.PostgresError):
        error.detail = None
    if isinstance(error, asyncpg.DataError):
        # "invalid input for query argument $3: '1915'", 'value "1915" is out of range': what precedes it says enough.
        error.args = (re.split(r"""[:"']""", str(error), maxsplit=1)[0].strip(),)
