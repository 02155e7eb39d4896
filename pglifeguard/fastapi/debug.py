"""Operators' routes: pool figures, holders of connections, and orders to the pools. They use no request pool."""

import logging
from typing import Annotated, Any

from fastapi import Query, Request
from pydantic import BaseModel, ConfigDict, Field

from pglifeguard.activity import BLOCKED, BY_STATE, END_SESSION
from pglifeguard.database import Database
from pglifeguard.database_settings import MOST
from pglifeguard.databases import Databases
from pglifeguard.errors import Conflict, DatabaseUnavailable, NotFound, ServiceError, sqlstate
from pglifeguard.fastapi.problems import documented
from pglifeguard.fastapi.routing import DebugRouter
from pglifeguard.fastapi.sessions import RequestDatabases
from pglifeguard.fastapi.shared import shared
from pglifeguard.serving.siblings import Siblings, Told
from pglifeguard.wait_queue import client_key

logger = logging.getLogger(__name__)

# An operator waits for the answer, and the server may be overloaded already.
ASK_SECONDS = 2.0
# At most this many sessions that wait for a lock: the first of a crowd show what it waits for.
MAX_BLOCKED = 50
ASLEEP = "The database is asleep, and this question does not wake it."
INSUFFICIENT_PRIVILEGE = "42501"
NOT_ITS_OWN = (
    "The session belongs to another role, and the service's role may end its own alone: end it as that role or as a "
    "superuser, or grant pg_signal_backend to the service's role."
)
WaitSeconds = Annotated[float, Field(ge=0, le=60, description="Seconds to wait until nothing is pending.")]
PoolName = Annotated[
    str, Field(max_length=100, description="primary, replica, analytics; several replicas are numbered: replica-1.")
]
ProcessId = Annotated[int, Query(ge=1, le=2**31 - 1, description="The session's process id on the server.")]
Started = Annotated[
    int | None,
    Query(ge=0, le=2**53, description="When it began, in microseconds since 1970: a process id is used again."),
]
router = DebugRouter(tags=["operations"], responses=documented(401, 403))
# Whoever may ask these decides about every request, so they are there only where something guards them.
guarded_router = DebugRouter(tags=["operations"], responses=documented(401, 403))


class NewSize(BaseModel):
    """The size that a pool gets; what is not given stays as it is, and without any it is that of the settings."""

    model_config = ConfigDict(extra="forbid")

    pool: PoolName
    pool_size: int | None = Field(None, ge=1, le=MOST)
    max_overflow: int | None = Field(None, ge=0, le=MOST)
    wait_seconds: WaitSeconds = 0


@router.get("/debug/pool-stats")
async def get_pool_stats(databases: RequestDatabases) -> dict[str, dict[str, int | str]]:
    """Count the connections of each pool of this process, now; of a replica that DNS has found say which one it is."""
    return {database.name: database.pool.figures()._asdict() | _place_of(database) for database in databases.all()}


def _place_of(database: Database) -> dict[str, str]:
    found, stage = database.found, database.stage
    return {} if found is None or stage is None else {"address": found.key, "stage": stage}


@router.get("/debug/connections")
async def get_connections(databases: RequestDatabases, request: Request) -> dict[str, Any]:
    """List the connections that this process holds, those of each server, and the sessions that block others there.

    `server` counts by application and state. `blocked` has a row for each pair of a session that waits for a lock and a
    session that it waits for; the longest wait comes first.
    """
    asked = shared(request.app, "connections", lambda: _all_connections(databases), min_pause_seconds=0.05)
    return await asked.get()


async def _all_connections(databases: Databases) -> dict[str, Any]:
    return {database.name: await _connections(database) for database in databases.all()}


async def _connections(database: Database) -> dict[str, Any]:
    holdings = [holding._asdict() for holding in database.pool.holdings()]
    if database.monitor.asleep:
        return {"held": holdings, "server": None, "blocked": None, "error": ASLEEP}
    try:
        rows = await database.monitor.ask(BY_STATE, timeout_seconds=ASK_SECONDS)
        pairs = await database.monitor.ask(BLOCKED, MAX_BLOCKED, timeout_seconds=ASK_SECONDS)
    except DatabaseUnavailable as error:
        return {"held": holdings, "server": None, "blocked": None, "error": str(error)}
    return {"held": holdings, "server": [dict(row) for row in rows], "blocked": [dict(row) for row in pairs]}


@guarded_router.post("/debug/pause", status_code=202, responses=documented(422))
async def pause(
    request: Request, seconds: Annotated[float, Query(gt=0, le=120)] = 20, wait_seconds: WaitSeconds = 0
) -> dict[str, Any]:
    """Let requests wait for their connections until /debug/resume, or for `seconds`; those at work go on.

    `pending` counts the connections that are still at work: a planned switchover begins when there are none.
    """
    return (await _tell(request, "pause", wait_seconds, seconds=seconds))._asdict()


@guarded_router.post("/debug/resume", status_code=202)
async def resume(request: Request) -> dict[str, Any]:
    """End a pause: the pools connect anew, and serve those who have waited."""
    return (await _tell(request, "resume"))._asdict()


@guarded_router.post("/debug/drain", status_code=202, responses=documented(404, 422, 503))
async def drain(request: Request, pool: PoolName | None = None, wait_seconds: WaitSeconds = 0) -> dict[str, Any]:
    """Renew the connections of a pool, or of all: idle ones are closed now, those at work at their release.

    `pending` counts the old connections that are still at work. No request fails for it. A database that lets no new
    connection in keeps its old ones, and the answer is 503.
    """
    return (await _tell(request, "drain", wait_seconds, pool=pool))._asdict()


@guarded_router.post("/debug/resize", status_code=202, responses=documented(404, 409, 422))
async def resize(request: Request, databases: RequestDatabases, size: Annotated[NewSize, Query()]) -> dict[str, Any]:
    """Give a pool another size in each worker, up to a restart; without sizes, that of the settings.

    In a smaller pool `pending` counts the connections beyond its size that are still at work; they are closed at their
    release. What would take more connections than the server grants all instances together is refused.
    """
    wanted = size.model_dump(exclude={"wait_seconds"})
    told = await _tell(request, "resize", size.wait_seconds, **wanted)
    now, set_to = databases.sized(size.pool), databases.configured(size.pool)
    return {
        **told._asdict(),
        "pool": size.pool,
        "pool_size": now.pool_size,
        "max_overflow": now.max_overflow,
        "note": f"A restart goes back to the settings: pool_size {set_to.pool_size}, max_overflow "
        f"{set_to.max_overflow}.",
    }


@guarded_router.post("/debug/end", status_code=202, responses=documented(404, 409, 422, 503))
async def end(
    request: Request, databases: RequestDatabases, pool: PoolName, pid: ProcessId, started: Started = None
) -> dict[str, Any]:
    """End one session on the server of a pool: its transaction is rolled back, and its client gets an error.

    `pid` and `started` are those of /debug/pools/sessions. Whether the service's role may do so is the server's to say.
    """
    audit = _audit(request, "end", pool=pool, pid=pid)
    try:
        session = await _end(databases, pool, pid, started)
    except ServiceError as error:
        logger.warning("operator's order refused", extra={**audit, "reason": str(error)})
        raise
    logger.warning("operator's order", extra={**audit, **session})
    return {"pool": pool, "pid": pid, **session}


async def _end(databases: Databases, pool: str, pid: int, started: int | None) -> dict[str, Any]:
    database = next((each for each in databases.all() if each.name == pool), None)
    if database is None:
        # Where DNS finds the replicas, it may have been there a moment ago.
        raise NotFound(f"There is no pool {pool!r} now.")
    if database.monitor.asleep:
        raise Conflict(ASLEEP)
    try:
        ended = await database.monitor.ask(END_SESSION, pid, started, timeout_seconds=ASK_SECONDS)
    except DatabaseUnavailable as error:
        if sqlstate(error.__cause__) == INSUFFICIENT_PRIVILEGE:
            raise Conflict(NOT_ITS_OWN) from error
        raise
    if not ended:
        raise NotFound(f"There is no session {pid} of a client on the server of {pool} any more.")
    return dict(ended[0])


async def _tell(request: Request, operation: str, wait_seconds: float = 0, **arguments: Any) -> Told:
    """Have all workers carry an order out, and write down who gave it."""
    siblings: Siblings = request.app.state.siblings
    audit = _audit(request, operation, **arguments)
    try:
        told = await siblings.tell(operation, arguments, wait_seconds=wait_seconds)
    except ServiceError as error:
        logger.warning("operator's order refused", extra={**audit, "reason": str(error)})
        raise
    logger.warning("operator's order", extra={**audit, "workers": told.workers, "obeyed": told.obeyed})
    return told


def _audit(request: Request, operation: str, **arguments: Any) -> dict[str, Any]:
    """Return the fields of the log line: which order, who gave it, and from where."""
    address = None if request.client is None else request.client.host
    return {"operation": operation, "by": client_key.get(), "address": address, **arguments}
