"""What operators look at when it is slow: pool figures, who holds connections, metrics. Never behind a request pool."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.db.activity import BLOCKED, BY_STATE
from app.db.engines import Database
from app.errors import DatabaseUnavailable, documented
from app.ops.health import DatabasesOfApp
from app.ops.workers import exposition
from app.routing import Route

# For an answer while somebody waits for it, and for a server that is in trouble already.
ASK_SECONDS = 2.0
# Sessions that wait for a lock, told at most: a crowd behind one lock is told by its first.
MAX_BLOCKED = 50

router = APIRouter(tags=["operations"], route_class=Route, responses=documented(401, 403))


@router.get("/debug/pool-stats")
async def get_pool_stats(databases: DatabasesOfApp) -> dict[str, dict[str, int]]:
    """Count the connections of each pool of this process, now."""
    return {database.name: asdict(database.pool.figures()) for database in databases.all()}


@router.get("/debug/connections")
async def get_connections(databases: DatabasesOfApp) -> dict[str, Any]:
    """List what this process holds and for how long, each server's connections, and who blocks whom there.

    `server` counts by application and state.
    `blocked` has a row for each session that waits for a lock and each that it waits for, those who have waited longest
    first.
    """
    return {database.name: await _connections(database) for database in databases.all()}


async def _connections(database: Database) -> dict[str, Any]:
    holdings = [asdict(holding) for holding in database.pool.holdings()]
    try:
        rows = await database.sentinel.ask(BY_STATE, timeout_seconds=ASK_SECONDS)
        pairs = await database.sentinel.ask(BLOCKED, MAX_BLOCKED, timeout_seconds=ASK_SECONDS)
    except DatabaseUnavailable as error:
        return {"held": holdings, "server": None, "blocked": None, "error": str(error)}
    return {"held": holdings, "server": [dict(row) for row in rows], "blocked": [dict(row) for row in pairs]}


@router.get("/metrics", response_class=PlainTextResponse)
async def get_metrics(databases: DatabasesOfApp, request: Request) -> Response:
    """Expose the metrics to Prometheus; with several workers, those of all of them."""
    databases.publish()
    shared = databases.settings.prometheus_multiproc_dir
    content = generate_latest(request.app.state.metrics.registry) if shared is None else exposition(shared)
    return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})
