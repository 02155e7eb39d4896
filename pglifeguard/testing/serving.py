"""An application that runs in the test's own event loop: its lifespan is open, and its databases are usable."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pglifeguard.databases import Databases
from pglifeguard.embedded.waiting import eventually
from pglifeguard.extras import not_installed

SETTLE_SECONDS = 10.0
START_SECONDS = 10.0


@dataclass(frozen=True)
class Running:
    """An ASGI application whose lifespan is open: requests to it find what the lifespan gave in `request.state`."""

    app: Any
    state: dict[str, Any] = field(default_factory=dict)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        await self.app({**scope, "state": dict(self.state)}, receive, send)


@asynccontextmanager
async def running(app: Any, *, settled: bool = True) -> AsyncIterator[Running]:
    """Open the lifespan of a FastAPI application, and close it at the end.

    Returns when its databases are usable and its pools warm, unless told not to wait. The lifespan has a task of its
    own, because pytest begins and ends a fixture in different ones, which a task group in it would not bear.

    Raises: TimeoutError when the databases are not usable within ten seconds.
    """
    state: dict[str, Any] = {}
    begun, leave = asyncio.Event(), asyncio.Event()

    async def live() -> None:
        async with app.router.lifespan_context(app) as given:
            state.update(given or {})
            begun.set()
            await leave.wait()

    life = asyncio.create_task(live())
    beginning = asyncio.create_task(begun.wait())
    await asyncio.wait({beginning, life}, return_when=asyncio.FIRST_COMPLETED)
    if life.done():
        beginning.cancel()
        life.result()
    try:
        databases = getattr(app.state, "databases", None)
        if settled and databases is not None:
            await settle(databases)
        yield Running(app, state)
    finally:
        leave.set()
        await life


async def settle(databases: Databases) -> None:
    """Wait until the databases are usable and their pools warm. Raises: TimeoutError."""

    async def all_usable() -> bool:
        replicas = all(replica.state == "usable" for replica in databases.router.replicas)
        warm = all(each.pool.figures().checked_in >= each.settings.warm_size for each in databases.all())
        return replicas and warm and databases.primary.monitor.healthy

    if not await eventually(all_usable, SETTLE_SECONDS):
        raise TimeoutError("the service does not find its databases usable")


@asynccontextmanager
async def listening(app: Any, **options: Any) -> AsyncIterator[str]:
    """Serve an ASGI application on a free port of this machine and give its URL, with uvicorn.

    The lifespan of what `running` gives is open, and is not opened again. `options` are uvicorn's.
    """
    try:
        import uvicorn  # noqa: PLC0415  # Of the extra `serving`, and half a tenth of a second.
    except ModuleNotFoundError as error:
        raise not_installed(error, "serving", "A test that asks for live_url") from None

    lifespan = "off" if isinstance(app, Running) else "auto"
    chosen = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": 1, "lifespan": lifespan} | options
    # With the protocol named, asyncio turns off the delay of small packets, which costs each request 40 ms here.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, **chosen))

        async def serve() -> None:
            # Not serve(), which would take this process's signals. An application that does not start ends by
            # SystemExit, which would end pytest's event loop, and leave the fixtures of this test to the next ones.
            with suppress(SystemExit):
                await server._serve([listener])  # noqa: SLF001

        task = asyncio.create_task(serve())

        async def started_or_ended() -> bool:
            return server.started or task.done()

        await eventually(started_or_ended, START_SECONDS)
        try:
            if not server.started:
                raise RuntimeError("the application does not start")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task
