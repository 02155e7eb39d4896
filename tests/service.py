"""The service in the test's own process: its lifespan open, its databases at hand, requests without a socket.

`serving(settings)` is for most tests; `listening(app)` gives any ASGI application a real socket.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from app.main import create_app
from app.settings import Settings
from local.waiting import eventually
from pglifeguard.database import Database
from pglifeguard.databases import Databases

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
    databases: Databases = app.state.databases
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):

        async def all_usable() -> bool:
            replicas = all(replica.state == "usable" for replica in databases.router.replicas)
            warm = all(each.pool.figures().checked_in >= each.settings.warm_size for each in databases.all())
            return replicas and warm and databases.primary.monitor.healthy

        if settled and not await eventually(all_usable, 10):
            raise TimeoutError("the service does not find its databases usable")
        yield Service(app, client, databases)


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


@asynccontextmanager
async def exhausted(database: Database) -> AsyncIterator[None]:
    """Hold every connection of a pool."""
    async with AsyncExitStack() as stack:
        for _ in range(database.settings.capacity):
            await stack.enter_async_context(database.engine.connect())
        yield


@asynccontextmanager
async def listening(
    app: Any, *, access_log: bool = False, running: bool = False, http: Any = "auto"
) -> AsyncIterator[str]:
    """Serve an ASGI application on a free port of this machine and give its URL.

    One that is `running`, by `serving`, has its lifespan open: opened twice, it would leave its tasks behind.
    """
    # With the protocol named, asyncio turns off the delay of small packets, which costs each request 40 ms here.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=access_log,
                timeout_graceful_shutdown=1,
                lifespan="off" if running else "auto",
                http=http,
            )
        )
        task = asyncio.create_task(_serve(server, listener))

        async def started_or_ended() -> bool:
            return server.started or task.done()

        await eventually(started_or_ended, 10)
        try:
            if server.started:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    try:
        # Not serve(), which would take this process's signals.
        await server._serve([listener])
    except SystemExit as error:
        # Out of a task it would end pytest's event loop, and the fixtures of this test would stay for the next ones.
        raise RuntimeError("the application does not start") from error
