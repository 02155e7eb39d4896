"""What operators look at when it is slow: pool figures, who holds connections. Never behind a request pool."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from pglifeguard.activity import BLOCKED, BY_STATE
from pglifeguard.database import Database
from pglifeguard.databases import Databases
from pglifeguard.errors import DatabaseUnavailable
from pglifeguard.fastapi.health import DatabasesOfApp
from pglifeguard.fastapi.problems import documented
from pglifeguard.fastapi.shared import shared

# For an answer while somebody waits for it, and for a server that is in trouble already.
ASK_SECONDS = 2.0
# Sessions that wait for a lock, told at most: a crowd behind one lock is told by its first.
MAX_BLOCKED = 50
router = APIRouter(tags=["operations"], responses=documented(401, 403))


@router.get("/debug/pool-stats")
async def get_pool_stats(databases: DatabasesOfApp) -> dict[str, dict[str, int]]:
    """Count the connections of each pool of this process, now."""
    return {database.name: asdict(database.pool.figures()) for database in databases.all()}


@router.get("/debug/connections")
async def get_connections(databases: DatabasesOfApp, request: Request) -> dict[str, Any]:
    """List what this process holds and for how long, each server's connections, and who blocks whom there.

    `server` counts by application and state.
    `blocked` has a row for each session that waits for a lock and each that it waits for, those who have waited longest
    first.
    """
    asked = shared(request.app, "connections", lambda: _all_connections(databases), min_pause_seconds=0.05)
    return await asked.get()


async def _all_connections(databases: Databases) -> dict[str, Any]:
    return {database.name: await _connections(database) for database in databases.all()}


async def _connections(database: Database) -> dict[str, Any]:
    holdings = [asdict(holding) for holding in database.pool.holdings()]
    try:
        rows = await database.monitor.ask(BY_STATE, timeout_seconds=ASK_SECONDS)
        pairs = await database.monitor.ask(BLOCKED, MAX_BLOCKED, timeout_seconds=ASK_SECONDS)
    except DatabaseUnavailable as error:
        return {"held": holdings, "server": None, "blocked": None, "error": str(error)}
    return {"held": holdings, "server": [dict(row) for row in rows], "blocked": [dict(row) for row in pairs]}
