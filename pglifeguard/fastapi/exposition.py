"""`/metrics`, as Prometheus reads it, written without blocking the event loop."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_CONTENT_TYPE

from pglifeguard.databases import Databases
from pglifeguard.fastapi.problems import documented
from pglifeguard.fastapi.sessions import RequestDatabases
from pglifeguard.fastapi.shared import shared
from pglifeguard.registry import write
from pglifeguard.serving.workers import exposition

OPENMETRICS = "application/openmetrics-text"

router = APIRouter(tags=["operations"], responses=documented(401, 403))


@router.get("/metrics", response_class=PlainTextResponse)
async def get_metrics(databases: RequestDatabases, request: Request) -> Response:
    """Expose the metrics to Prometheus; with several workers, those of all of them."""
    # Only exemplars need the other format. Only traces make them, and the files of several workers have no room.
    one_process = databases.settings.prometheus_multiproc_dir is None
    if databases.telemetry is not None and one_process and OPENMETRICS in request.headers.get("accept", ""):
        content = await shared(request.app, "openmetrics", lambda: _expose(databases, openmetrics=True)).get()
        return Response(content, headers={"Content-Type": OPENMETRICS_CONTENT_TYPE})
    content = await shared(request.app, "metrics", lambda: _expose(databases)).get()
    return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _expose(databases: Databases, *, openmetrics: bool = False) -> bytes:
    databases.publish()
    folder = databases.settings.prometheus_multiproc_dir
    if folder is not None:
        return await exposition(folder)
    return await write(databases.metrics.registry.in_slices(), openmetrics=openmetrics)
