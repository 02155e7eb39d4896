"""The service in the test's own process: its lifespan open, its databases at hand, requests without a socket.

`listening(Running(service.app))` of `pglifeguard.testing.serving` gives it a real socket.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
from fastapi import FastAPI

from app.main import create_app
from app.settings import Settings
from pglifeguard.databases import Databases
from pglifeguard.testing.serving import running

ADA = {"mrn": "A-1", "full_name": "Ada", "birth_date": "1980-01-01"}


@dataclass(frozen=True)
class Service:
    """A running application and a client of it."""

    app: FastAPI
    client: httpx.AsyncClient
    databases: Databases

    def sample(self, name: str, **labels: str) -> float:
        """Return a figure of /metrics, 0.0 when there is no such series yet."""
        value = self.databases.metrics.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value


@asynccontextmanager
async def serving(settings: Settings, *, settled: bool = True) -> AsyncIterator[Service]:
    """Run the service; returns when its databases are usable and its pools warm, unless told not to wait."""
    app = create_app(settings)
    async with (
        running(app, settled=settled) as served,
        httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://test") as client,
    ):
        yield Service(app, client, app.state.databases)


@asynccontextmanager
async def quiet(settings: Settings) -> AsyncIterator[Service]:
    """Run the service with monitors that look once, so that every round trip on the wire is a request's."""
    silent = settings.model_copy(update={"monitor_interval_seconds": 3600.0})
    async with serving(silent, settled=False) as service:
        for database in service.databases.all():
            await database.monitor.probe()
        yield service


async def write(service: Service) -> httpx.Response:
    """Store a patient and forget the cookie; returns the answer."""
    answer = await service.client.post("/patients", json=ADA)
    service.client.cookies.clear()
    assert answer.status_code == 201, answer.text
    return answer
