"""What operators look at when it is slow: pool figures, who holds connections, metrics. Never behind a request pool."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.db.activity import BY_STATE
from app.db.engines import Database
from app.errors import DatabaseUnavailable, documented
from app.ops.health import DatabasesOfApp
from app.ops.workers import exposition
from app.routing import Route

router = APIRouter(tags=["operations"], route_class=Route, responses=documented(401, 403))


@router.get("/debug/pool-stats")
async def get_pool_stats(databases: DatabasesOfApp) -> dict[str, dict[str, int]]:
    """Count the connections of each pool of this process, now."""
    return {database.name: asdict(database.pool.figures()) for database in databases.all()}


@router.get("/debug/connections")
async def get_connections(databases: DatabasesOfApp) -> dict[str, Any]:
    """List each server's connections by application and state, and what this process holds and for how long."""
    return {database.name: await _connections(database) for database in databases.all()}


async def _connections(database: Database) -> dict[str, Any]:
    holdings = [asdict(holding) for holding in database.pool.holdings()]
    try:
        rows = await database.sentinel.ask(BY_STATE, timeout_seconds=2)
    except DatabaseUnavailable as error:
        return {"held": holdings, "server": None, "error": str(error)}
    return {"held": holdings, "server": [dict(row) for row in rows]}


@router.get("/metrics", response_class=PlainTextResponse)
async def get_metrics(databases: DatabasesOfApp, request: Request) -> Response:
    """Expose the metrics to Prometheus; with several workers, those of all of them."""
    databases.publish()
    shared = databases.settings.prometheus_multiproc_dir
    content = generate_latest(request.app.state.metrics.registry) if shared is None else exposition(shared)
    return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})
