"""What operators look at when it is slow: pool figures, who holds connections, metrics. Never behind a request pool."""

import asyncio
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest

from app.db.activity import BLOCKED, BY_STATE
from app.db.engines import Database, Databases
from app.errors import DatabaseUnavailable, documented
from app.ops.health import DatabasesOfApp
from app.ops.shared import shared
from app.ops.workers import exposition
from app.security import OPEN, needs

# For an answer while somebody waits for it, and for a server that is in trouble already.
ASK_SECONDS = 2.0
# Sessions that wait for a lock, told at most: a crowd behind one lock is told by its first.
MAX_BLOCKED = 50
# Lines written in one go.
SLICE_SAMPLES = 200
router = APIRouter(tags=["operations"], responses=documented(401, 403))


@router.get("/debug/pool-stats", dependencies=[needs("ops")])
async def get_pool_stats(databases: DatabasesOfApp) -> dict[str, dict[str, int]]:
    """Count the connections of each pool of this process, now."""
    return {database.name: asdict(database.pool.figures()) for database in databases.all()}


@router.get("/debug/connections", dependencies=[needs("ops")])
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
        rows = await database.sentinel.ask(BY_STATE, timeout_seconds=ASK_SECONDS)
        pairs = await database.sentinel.ask(BLOCKED, MAX_BLOCKED, timeout_seconds=ASK_SECONDS)
    except DatabaseUnavailable as error:
        return {"held": holdings, "server": None, "blocked": None, "error": str(error)}
    return {"held": holdings, "server": [dict(row) for row in rows], "blocked": [dict(row) for row in pairs]}


@router.get("/metrics", response_class=PlainTextResponse, dependencies=[OPEN])
async def get_metrics(databases: DatabasesOfApp, request: Request) -> Response:
    """Expose the metrics to Prometheus; with several workers, those of all of them."""
    content = await shared(request.app, "metrics", lambda: _expose(databases)).get()
    return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _expose(databases: Databases) -> bytes:
    databases.publish()
    folder = databases.settings.prometheus_multiproc_dir
    if folder is not None:
        # It reads the files of all workers, and waits for their lock.
        return await asyncio.to_thread(exposition, folder)
    return await in_slices(databases.metrics.registry)


async def in_slices(registry: CollectorRegistry) -> bytes:
    """Write the exposition down in slices of a millisecond or two, and let others have the event loop in between.

    In a thread it would take the interpreter's lock for 5 ms at a time, as often as another request wanted it.
    """
    parts = []
    for family in registry.collect():
        # An empty family has a help text too.
        for start in range(0, max(1, len(family.samples)), SLICE_SAMPLES):
            part = copy(family)
            part.samples = family.samples[start : start + SLICE_SAMPLES]
            text = generate_latest(_One(part))
            parts.append(text if start == 0 else text.split(b"\n", 2)[2])  # Without HELP and TYPE once more.
            await asyncio.sleep(0)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class _One:
    """A single family in the place of a registry."""

    family: Metric

    def collect(self) -> list[Metric]:
        """Return the family."""
        return [self.family]
