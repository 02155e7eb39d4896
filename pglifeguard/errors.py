"""The errors of the service, and the answers to the client: RFC 9457 problem documents with a stable `code`.

    ServiceError                      code                   status
    ├── NotFound                      not_found              404    (each domain names its own)
    ├── Conflict                      conflict               409    (each domain names its own)
    │   └── BudgetExceeded            budget_exceeded        409    a pool would be too large for its server
    ├── BodyTooSlow                   body_too_slow          408
    ├── BodyTooLarge                  body_too_large         413
    ├── ClientLeft                    client_left            499    nobody reads this answer
    ├── WriteInReadSession            internal_error         500    a bug: a read session was asked to write
    ├── TransactionAborted            internal_error         500    a bug: a statement's failure was swallowed
    └── DatabaseUnavailable           database_unavailable   503    a transient failure: the same request may work soon
        ├── PoolExhausted             pool_exhausted
        ├── DatabaseUnreachable       database_unreachable
        ├── ConnectionLost            connection_lost
        ├── CommandTimeout            database_timeout
        ├── ReplicaUnavailable        replica_unavailable
        └── OutcomeUnknown            outcome_unknown        the connection died during COMMIT or a lone write

Failures that the server reports stay SQLAlchemy's exceptions; `classify` is the one table that turns their SQLSTATE
into an answer. An OSError or a TimeoutError becomes one of ours where it leaves the driver, so that a bug
elsewhere that raises one is not mistaken for a transient failure.
"""

import json
from http import HTTPStatus
from typing import Any, NamedTuple

import asyncpg

# JSONResponse makes itself an encoder for each answer, which takes as long as encoding.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# By the names of RFC 9110, which some versions of Python have and others not.
PHRASES = {status.value: status.phrase for status in HTTPStatus} | {
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}
MEDIA_TYPE = "application/problem+json"


class ServiceError(Exception):
    """Root of the tree. `str(error)` is the sentence that the client reads: no health data, no secrets."""

    status = 500
    code = "internal_error"
    # Of a 429 or a 503: after how many seconds the same request may be served, 0 where nobody knows.
    retry_after_seconds = 0.0


class NotFound(ServiceError):
    """The resource of the path does not exist."""

    status = 404
    code = "not_found"


class Conflict(ServiceError):
    """The request contradicts what is stored."""

    status = 409
    code = "conflict"


class BudgetExceeded(Conflict):
    """A pool of the wanted size, in all workers and instances, would take more connections than its server grants."""

    code = "budget_exceeded"


class BodyTooSlow(ServiceError):
    """The body was not there in time."""

    status = 408
    code = "body_too_slow"


class BodyTooLarge(ServiceError):
    """The body has too many bytes or values, or nests too deep."""

    status = 413
    code = "body_too_large"


class ClientLeft(ServiceError):
    """The client left while its request waited for a connection. The status is nginx's; nobody gets the answer."""

    status = 499
    code = "client_left"


class WriteInReadSession(ServiceError):
    """A statement that writes was sent through a read session: a bug of ours, never a transient failure."""


class TransactionAborted(ServiceError):
    """A statement failed, its error was swallowed, and COMMIT would be a silent ROLLBACK: a bug of ours."""


class DatabaseUnavailable(ServiceError):
    """The database cannot serve this request now; a retry may help."""

    status = 503
    code = "database_unavailable"

    def __init__(self, detail: str, *, database: str | None = None, reason: str | None = None) -> None:
        super().__init__(detail)
        # The database that failed, where that is known: a request may use several.
        self.database = database
        # The reason by the label of the metrics, where the code says less.
        self.reason = reason


class PoolExhausted(DatabaseUnavailable):
    """Every connection is at work, and the queue is full or the wait was too long."""

    code = "pool_exhausted"

    def __init__(self, detail: str, *, retry_after_seconds: float = 0.0, **of: str | None) -> None:
        super().__init__(detail, **of)
        # How long the requests that waited then take to be served, as far as the pool can tell.
        self.retry_after_seconds = retry_after_seconds


class DatabaseUnreachable(DatabaseUnavailable):
    """No connection could be opened."""

    code = "database_unreachable"


class ConnectionLost(DatabaseUnavailable):
    """The connection went away, and nothing of the request was committed."""

    code = "connection_lost"


class CommandTimeout(DatabaseUnavailable):
    """The server did not answer within command_timeout_seconds; the connection was dropped."""

    code = "database_timeout"


class ReplicaUnavailable(DatabaseUnavailable):
    """The replica cannot serve this read, and the primary may not or is too busy to step in."""

    code = "replica_unavailable"


class OutcomeUnknown(DatabaseUnavailable):
    """The connection died or gave no answer during COMMIT or a write of one query, which may or may not be stored."""

    code = "outcome_unknown"


class Failure(NamedTuple):
    """The answer to a client for a failure that the database reported."""

    status: int
    code: str
    # A sentence; the detail of an HTTPException is left as it is.
    detail: Any


# The answers to connections that did not send a whole request.
MALFORMED = Failure(400, "malformed_request", "This is no HTTP request.")
HEAD_TOO_SLOW = Failure(408, "head_too_slow", "The headers of the request were not there in time.")
HEAD_TOO_LARGE = Failure(431, "head_too_large", "The URL and headers of the request are too long, or too many.")
URL_TOO_LONG = Failure(414, "url_too_long", "The URL of the request is too long, or has too many parameters.")
_LOST = Failure(503, "connection_lost", "The connection to the database was lost; nothing was committed.")
_UNSTORABLE = Failure(
    422, "unstorable_value", "A value is too long or too large for the database, or holds a character it cannot store."
)
_BUSY = Failure(503, "database_overloaded", "The database is out of a resource.")
_NOT_KEPT = Failure(
    500,
    "statements_not_kept",
    "The pooler in front of the database does not keep prepared statements: set max_prepared_statements there "
    "(PgBouncer 1.21 or later), or DATABASE_STATEMENT_CACHE_SIZE=0 here.",
)
# The first five, three or two characters of an SQLSTATE; the longest match wins.
_FAILURES = {
    "08": _LOST,
    "22001": _UNSTORABLE,
    "22003": _UNSTORABLE,
    "22021": _UNSTORABLE,
    "22P05": _UNSTORABLE,
    # PostgreSQL 18 says this where RESTRICT keeps a row; older ones say 23503.
    "23001": Failure(409, "conflict", "The request refers to something that does not exist or is still in use."),
    "23503": Failure(409, "conflict", "The request refers to something that does not exist or is still in use."),
    "23505": Failure(409, "conflict", "Something with the same unique value exists already."),
    "23P01": Failure(409, "conflict", "The request overlaps something that exists already."),
    "25006": Failure(503, "database_read_only", "The database takes no writes at the moment."),
    "25P03": _LOST,
    "25P04": Failure(504, "statement_timeout", "The transaction took longer than the database allows."),
    "26000": _NOT_KEPT,
    "28": Failure(503, "database_unreachable", "The database did not let the service in."),
    "3D000": Failure(503, "database_unreachable", "The database does not exist."),
    "40001": Failure(503, "serialization_failure", "The transaction collided with another one."),
    "40P01": Failure(503, "deadlock", "The transaction ran into a deadlock and was rolled back."),
    "42P05": _NOT_KEPT,
    "53": _BUSY,
    "53300": Failure(503, "too_many_connections", "The database has no connection left."),
    "55P03": Failure(503, "lock_timeout", "The rows are locked by another transaction."),
    "57014": Failure(504, "statement_timeout", "The statement took longer than the database allows."),
    "57P": _LOST,
    "58": Failure(503, "database_failed", "The database has trouble with its own system."),
}


# Its SQLSTATE, 0A000, is that of bugs as well: only asyncpg's class tells them apart.
_STALE = Failure(503, "schema_changed", "The schema has just changed, and prepared statements are being renewed.")


# The driver cannot send these values of the right type: half a surrogate pair, a number that is too large.
_UNSENDABLE = (OverflowError, UnicodeEncodeError)


def sqlstate(error: BaseException | None) -> str | None:
    """Return the five characters with which PostgreSQL names a failure, of SQLAlchemy's or asyncpg's exception."""
    state = None
    cause = _unwrapped(error)
    while cause is not None:
        # The innermost is the server's own: asyncpg wraps the server's last message into "connection was closed", a
        # 08003.
        state = getattr(cause, "sqlstate", None) or state
        cause = cause.__cause__
    return state


def constraint(error: BaseException) -> str | None:
    """Return the name of the constraint or unique index that a change broke, of SQLAlchemy's or asyncpg's exception."""
    cause = _unwrapped(error)
    while cause is not None and getattr(cause, "constraint_name", None) is None:
        cause = cause.__cause__
    name: str | None = getattr(cause, "constraint_name", None)
    return name


def name_database(error: BaseException, database: str) -> None:
    """Note on a failure of the driver the database that it came from."""
    vars(error).setdefault("database", database)


def database_of(error: BaseException) -> str | None:
    """Return the name of the database that a failure came from, None where that is unknown."""
    cause = _unwrapped(error)
    while cause is not None:
        if (name := vars(cause).get("database")) is not None:
            return str(name)
        cause = cause.__cause__
    return None


def retry_after_seconds(error: BaseException) -> float:
    """Return the seconds after which a retry may be served; 0 where nobody knows."""
    cause = _unwrapped(error)
    return cause.retry_after_seconds if isinstance(cause, ServiceError) else 0.0


def classify(error: BaseException) -> Failure | None:
    """Return the answer for a failure of the database; None for a bug, which is answered 500."""
    if isinstance(error, (WriteInReadSession, TransactionAborted)):
        return None
    if isinstance(error, ServiceError):
        by_server = _by_sqlstate(error) if isinstance(error, DatabaseUnreachable) else None
        return by_server or Failure(error.status, error.code, str(error))
    inner = _unwrapped(error)
    # SQLAlchemy has two layers: its own exception, and that of its adapter, which asyncpg's caused.
    driver_failure = inner if inner is error or inner is None else inner.__cause__
    # PgBouncer closes the connection on which it had to prepare the statement anew; the reason is then the cause.
    reason = driver_failure.__cause__ if isinstance(driver_failure, asyncpg.ConnectionDoesNotExistError) else None
    if isinstance(reason or driver_failure, asyncpg.InvalidCachedStatementError):
        return _STALE
    if isinstance(driver_failure, asyncpg.DataError) and isinstance(driver_failure.__cause__, _UNSENDABLE):
        return _UNSTORABLE
    if (inner is not error or isinstance(error, asyncpg.PostgresError)) and (known := _by_sqlstate(error)):
        return known
    # Also where a pooler said something else before it closed the connection.
    lost = isinstance(driver_failure, asyncpg.PostgresConnectionError)
    return _LOST if lost or getattr(error, "connection_invalidated", False) else None


def _by_sqlstate(error: BaseException) -> Failure | None:
    state = sqlstate(error) or ""
    # PgBouncer refuses a login by a state of the class of lost connections.
    known = {} if isinstance(error, DatabaseUnreachable) and state.startswith("08") else _FAILURES
    return next((known[state[:length]] for length in (5, 3, 2) if state[:length] in known), None)


def _unwrapped(error: BaseException | None) -> BaseException | None:
    """Return what SQLAlchemy's DBAPIError wraps, else the error itself.

    A DBAPIError is told by its attributes: the pool, which needs this module, knows no SQLAlchemy.
    """
    return getattr(error, "orig", error) if hasattr(error, "connection_invalidated") else error


def document(failure: Failure, **more: Any) -> bytes:
    """Write a problem document."""
    body = {
        "type": "about:blank",
        "title": PHRASES.get(failure.status, f"Status {failure.status}"),
        "status": failure.status,
        "detail": failure.detail,
        "code": failure.code,
        **more,
    }
    return _encode(body).encode()
