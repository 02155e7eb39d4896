"""Sessions: the only way to the databases, and the only place that commits.

    one request = one session = one connection = one transaction

The session's type says what may be done: `ReadSession` or `WriteSession`. Routes name `ReadDB`, `WriteDB` or
`AnalyticsDB`; code outside a request says `async with databases.reading()` (or `.writing()`). A session is lazy: until
its first statement it holds nothing. It keeps its one connection until it is closed, so what was read is read at one
place, and what the commit left behind (its LSN) can be asked where it happened.

The dependencies have `scope="function"`: they end before the response starts, so a COMMIT that fails is never a 2xx.
"""

import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Never, cast

import asyncpg
from fastapi import Depends, Request
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from app.db.connector import DRIVER_FAILURES
from app.db.pool import Tenure, holder
from app.errors import CommandTimeout, ConnectionLost, OutcomeUnknown, TransactionAborted

if TYPE_CHECKING:
    from app.db.engines import Database, Databases
    from app.db.replica import Reason

logger = logging.getLogger(__name__)

WRITTEN_LSN = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
UNKNOWN = (
    "The connection was lost while the change was being committed, so it may or may not have been made. "
    "Read before you try again, or send the request with an Idempotency-Key."
)


@dataclass(slots=True)
class Consistency:
    """What the middleware and the sessions of one request tell each other; it lives in the request's scope."""

    wanted_lsn: int | None = None
    primary_only: bool = False
    read_from: "Database | None" = None
    reason: "Reason | None" = None
    written_lsn: int | None = None


class _OneConnection(Session):
    """A session that opens its connection at the first statement and keeps it until it is closed."""

    held: Connection | None = None

    def get_bind(self, *_args: Any, **_kwargs: Any) -> Connection:
        if self.held is None:
            self.held = cast("Engine", self.bind).connect()
        return self.held

    def close(self) -> None:
        try:
            super().close()
        finally:
            held, self.held = self.held, None
            if held is not None:
                held.close()


class ReadSession(AsyncSession):
    """A session that reads. The database refuses its writes; mypy refuses them before."""

    sync_session_class = _OneConnection

    @property
    def connection_held(self) -> Connection | None:
        """The connection, once a statement was sent."""
        return cast("_OneConnection", self.sync_session).held

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
    """A session that reads and writes on the primary. Nobody but this module commits it."""

    def add(self, instance: object, *, _warn: bool = True) -> None:
        """Put an object into the session; `flush()` when the database must answer now."""
        self.sync_session.add(instance, _warn=_warn)

    def add_all(self, instances: Any) -> None:
        """Put objects into the session."""
        self.sync_session.add_all(instances)

    async def delete(self, instance: object) -> None:
        """Mark an object to be deleted with the next flush."""
        await AsyncSession.delete(self, instance)


@asynccontextmanager
async def reading(
    databases: "Databases", consistency: Consistency | None = None, *, label: str = "background"
) -> AsyncIterator[ReadSession]:
    """Open a session that reads from a replica that is near enough, else from the primary.

    Each statement sees what is committed when it starts; for one snapshot over several, see `reporting`.
    """
    wish = Consistency() if consistency is None else consistency
    database, wish.reason = databases.router.route(at_least=wish.wanted_lsn, primary=wish.primary_only)
    wish.read_from = database
    holder.set(label)
    async with ReadSession(database.read_engine, expire_on_commit=False) as session:
        yield session


@asynccontextmanager
async def reporting(databases: "Databases", *, label: str = "background") -> AsyncIterator[ReadSession]:
    """Open a session on the analytics pool: REPEATABLE READ, READ ONLY, one snapshot for all its statements."""
    holder.set(label)
    async with ReadSession(databases.analytics.report_engine, expire_on_commit=False) as session:
        yield session


@asynccontextmanager
async def writing(
    databases: "Databases", consistency: Consistency | None = None, *, label: str = "background"
) -> AsyncIterator[WriteSession]:
    """Open a session on the primary; commit when the block ends, roll back when it raises.

    Raises: OutcomeUnknown when the connection dies during COMMIT; ConnectionLost when it died before.
    """
    holder.set(label)
    async with WriteSession(databases.primary.engine, expire_on_commit=False) as session:
        yield session
        if session.new or session.dirty or session.deleted:
            # What the objects still owe fails here, and not inside COMMIT, where it would look like a lost outcome.
            await session.flush()
        connection = session.connection_held
        if connection is not None:
            await _commit(session, connection)
            if databases.replicas and consistency is not None:
                consistency.written_lsn = await _written_lsn(connection)


async def _commit(session: WriteSession, connection: Connection) -> None:
    tenure: Tenure = connection.info["tenure"]
    if tenure.aborted:
        # PostgreSQL answers COMMIT of a failed transaction with a silent ROLLBACK; the client would read 2xx.
        raise TransactionAborted("A statement failed, its error was swallowed, and nothing can be committed.")
    driver = connection.connection.driver_connection
    if driver is None or driver.is_closed():
        raise ConnectionLost("The connection to the database was lost; nothing was committed.")
    started = time.perf_counter()
    try:
        await session.commit()
    except (ConnectionLost, CommandTimeout) as error:
        raise OutcomeUnknown(UNKNOWN) from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise OutcomeUnknown(UNKNOWN) from error
        raise
    tenure.queried += time.perf_counter() - started


async def _written_lsn(connection: Connection) -> int | None:
    """Ask how far the WAL reaches after COMMIT; before it, the answer would be older than the commit itself."""
    tenure: Tenure = connection.info["tenure"]
    driver = cast("asyncpg.Connection[Any]", connection.connection.driver_connection)
    started = time.perf_counter()
    try:
        return int(await driver.fetchval(WRITTEN_LSN))
    except DRIVER_FAILURES as error:
        # The write is committed and must be answered so; only the promise to read it back at once is lost.
        logger.warning("no consistency token", extra={"reason": str(error) or type(error).__name__})
        return None
    finally:
        tenure.queried += time.perf_counter() - started


def route_of(scope: Mapping[str, Any]) -> str:
    """Return the template of the route that serves a request, "/patients/{patient_id}"; "unmatched" without one."""
    # FastAPI keeps the path with the prefixes of include_router apart from the route's own.
    context = scope.get("fastapi", {}).get("effective_route_context")
    path = getattr(context or scope.get("route"), "path", None)
    return path if isinstance(path, str) else "unmatched"


def consistency_of(scope: Mapping[str, Any]) -> Consistency:
    """Return what the middleware left for the sessions of this request."""
    found = scope.get("state", {}).get("consistency")
    return found if isinstance(found, Consistency) else Consistency()


def databases_of(request: Request) -> "Databases":
    """Return the databases of the application that serves this request."""
    return cast("Databases", request.app.state.databases)


async def _read(request: Request) -> AsyncIterator[ReadSession]:
    scope = request.scope
    async with reading(databases_of(request), consistency_of(scope), label=route_of(scope)) as session:
        yield session


def share_write_session(request: Request, session: WriteSession) -> None:
    """Make `WriteDB` of this request this session; whoever opened it commits it."""
    request.scope["state"]["write_session"] = session


async def _write(request: Request) -> AsyncIterator[WriteSession]:
    scope = request.scope
    shared: WriteSession | None = scope.get("state", {}).get("write_session")
    if shared is not None:
        yield shared
        return
    async with writing(databases_of(request), consistency_of(scope), label=route_of(scope)) as session:
        yield session


async def _report(request: Request) -> AsyncIterator[ReadSession]:
    async with reporting(databases_of(request), label=route_of(request.scope)) as session:
        yield session


ReadDB = Annotated[ReadSession, Depends(_read, scope="function")]
WriteDB = Annotated[WriteSession, Depends(_write, scope="function")]
AnalyticsDB = Annotated[ReadSession, Depends(_report, scope="function")]
