"""`/metrics`, as Prometheus reads it, written without blocking the event loop."""

import asyncio
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest

from pglifeguard.databases import Databases
from pglifeguard.fastapi.problems import documented
from pglifeguard.fastapi.sessions import RequestDatabases
from pglifeguard.fastapi.shared import shared
from pglifeguard.registry import Registry
from pglifeguard.serving.workers import exposition

# Samples collected and written before other requests get the event loop.
SLICE_SAMPLES = 100
router = APIRouter(tags=["operations"], responses=documented(401, 403))


@router.get("/metrics", response_class=PlainTextResponse)
async def get_metrics(databases: RequestDatabases, request: Request) -> Response:
    """Expose the metrics to Prometheus; with several workers, those of all of them."""
    content = await shared(request.app, "metrics", lambda: _expose(databases)).get()
    return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _expose(databases: Databases) -> bytes:
    databases.publish()
    folder = databases.settings.prometheus_multiproc_dir
    if folder is not None:
        return await exposition(folder)
    return await in_slices(databases.metrics.registry)


async def in_slices(registry: Registry) -> bytes:
    """Write the exposition in slices of about a millisecond; other requests get the event loop between two slices.

    A thread would not help: it would hold the interpreter's lock for 5 ms at a time.
    """
    parts, name = [], ""
    for family in registry.in_slices(SLICE_SAMPLES):
        text = generate_latest(_One(family))
        # HELP and TYPE are in the first slice of a family.
        parts.append(text if family.name != name else text.split(b"\n", 2)[2])
        name = family.name
        await asyncio.sleep(0)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class _One:
    """A registry of one family."""

    family: Metric

    def collect(self) -> list[Metric]:
        """Return the family."""
        return [self.family]
