"""Operators' routes for a slow service: pool figures, holders of connections. They use no request pool."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from pglifeguard.activity import BLOCKED, BY_STATE
from pglifeguard.database import Database
from pglifeguard.databases import Databases
from pglifeguard.errors import DatabaseUnavailable
from pglifeguard.fastapi.problems import documented
from pglifeguard.fastapi.sessions import RequestDatabases
from pglifeguard.fastapi.shared import shared

# An operator waits for the answer, and the server may be overloaded already.
ASK_SECONDS = 2.0
# At most this many sessions that wait for a lock: the first of a crowd show what it waits for.
MAX_BLOCKED = 50
ASLEEP = "The database is asleep, and this question does not wake it."
router = APIRouter(tags=["operations"], responses=documented(401, 403))
# Whoever may ask these makes every request wait, so they are there only where something guards them.
guarded_router = APIRouter(tags=["operations"], responses=documented(401, 403))


@router.get("/debug/pool-stats")
async def get_pool_stats(databases: RequestDatabases) -> dict[str, dict[str, int]]:
    """Count the connections of each pool of this process, now."""
    return {database.name: asdict(database.pool.figures()) for database in databases.all()}


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
    holdings = [asdict(holding) for holding in database.pool.holdings()]
    if database.monitor.asleep:
        return {"held": holdings, "server": None, "blocked": None, "error": ASLEEP}
    try:
        rows = await database.monitor.ask(BY_STATE, timeout_seconds=ASK_SECONDS)
        pairs = await database.monitor.ask(BLOCKED, MAX_BLOCKED, timeout_seconds=ASK_SECONDS)
    except DatabaseUnavailable as error:
        return {"held": holdings, "server": None, "blocked": None, "error": str(error)}
    return {"held": holdings, "server": [dict(row) for row in rows], "blocked": [dict(row) for row in pairs]}


@guarded_router.post("/debug/pause", status_code=202, responses=documented(422))
async def pause(databases: RequestDatabases, seconds: Annotated[float, Query(gt=0, le=120)] = 20) -> dict[str, Any]:
    """Let requests wait for their connections until /debug/resume, or for `seconds`; those at work go on.

    It holds for the process that answers. A planned switchover begins when `checked_out` is 0 in each pool.
    """
    databases.pause(seconds=seconds)
    return {name: figures["checked_out"] for name, figures in (await get_pool_stats(databases)).items()}


@guarded_router.post("/debug/resume", status_code=202)
async def resume(databases: RequestDatabases) -> dict[str, str]:
    """End a pause: this process connects anew, and serves those who have waited."""
    databases.resume()
    return {"status": "resumed"}
