"""Put the service together: the only place where settings, databases, middleware and routes meet.

`create_app(Settings(...))` may be called more than once in a process; `uvicorn --factory app.main:create_app` calls it
without arguments, and then it reads the environment.
"""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

from fastapi import FastAPI
from sqlalchemy.orm import configure_mappers

from app import errors, patients, reports, security, users
from app.db.budget import check_budget
from app.db.collisions import RunAgain
from app.db.dependencies import refuse_plain_functions
from app.db.engines import Databases
from app.failures import report_failure
from app.idempotency import keep_house
from app.limits import LIMITS, BodyLimit, ConnectionLimits
from app.logs import configure_logs
from app.metrics import Metrics
from app.middleware import Edge, ReadAgain, ReadYourWrites
from app.ops import debug, health
from app.ops.loop import LoopWatch
from app.ops.shutdown import draining_first, ending_with_parent
from app.settings import Settings, SettingsError, load_settings

DESCRIPTION = "A FastAPI + PostgreSQL reference service whose database pool never drowns."
_FASTAPI: dict[str, Any] = {
    "title": "Lifeguard",
    "version": "0.1.0",
    "description": DESCRIPTION,
    # One thing has one address; and a path that leads nowhere would be matched twice to find a redirect.
    "redirect_slashes": False,
    "redoc_url": None,  # /docs shows the same document.
    "swagger_ui_oauth2_redirect_url": None,
    # The metrics are Prometheus's. OpenTelemetry that nobody has set up still asks itself so at every request.
    "telemetry": {"tracing": False, "metrics": False, "logs": False},
}

logger = logging.getLogger(__name__)


def create_app(settings: Settings | None = None, **options: Any) -> FastAPI:
    """Build the service. Without settings, read them from the environment, and set the logs up.

    `options` are FastAPI's own (`dependencies=`, `lifespan=`, `exception_handlers=` …) and win over the service's. A
    lifespan runs inside the service's, whose databases are open.

    Raises: SystemExit, with a sentence, when the environment is wrong; SettingsError when the given settings are.
    """
    if settings is None:
        try:
            return create_app(_from_environment(), **options)
        except SettingsError as error:
            raise SystemExit(f"lifeguard cannot start.\n{error}") from None
    check_budget(settings)
    # A model that cannot work ends the start here, and not the first request that needs it.
    configure_mappers()
    metrics = Metrics()
    databases = Databases(settings, metrics)

    app = FastAPI(**(_FASTAPI | options | {"lifespan": _lifespan_around(options.get("lifespan") or _nothing_more)}))
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.shared = {}
    app.state.databases = databases
    errors.install(app, report_failure)
    # Innermost, inside the exception handlers: what is run again meets all that inclusion adds to its route.
    app.router.middleware_stack = ReadAgain(RunAgain(app.router.middleware_stack, databases), databases)
    _add_routes(app, settings)
    if settings.auth_secret is not None:
        security.install(app, settings.auth_secret)

    # The last one added is the outermost.
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(ReadYourWrites, metrics=metrics, settings=settings)
    app.add_middleware(Edge, metrics=metrics, sampler=databases.sampler)
    return app


def _from_environment() -> Settings:
    settings = load_settings()
    configure_logs(settings.log_level, settings.log_format, access_log=settings.access_log)
    for sentence in settings.ignored_variables:
        logger.warning(sentence)
    return settings


def _add_routes(app: FastAPI, settings: Settings) -> None:
    domains = [patients.router, users.router, reports.router]
    if settings.directory_url is not None:
        from app.users import sync  # noqa: PLC0415  # Its HTTP client is an eighth of the service's whole import.

        domains.append(sync.router)
    for router in [*domains, health.router, debug.router]:
        app.include_router(router)


def _directory(settings: Settings) -> AbstractAsyncContextManager[object]:
    if settings.directory_url is None:
        return nullcontext()
    from app.users.directory import open_directory  # noqa: PLC0415  # See above.

    return open_directory(settings)


def _nothing_more(_app: FastAPI) -> AbstractAsyncContextManager[None]:
    return nullcontext()


def _lifespan_around(inner: Callable[[FastAPI], AbstractAsyncContextManager[Any]]) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with _running(app) as state, inner(app) as more:
            yield state | (more or {})

    return lifespan


@asynccontextmanager
async def _running(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Open what the service needs and close it; a database that is down keeps it neither from starting nor stopping."""
    databases: Databases = app.state.databases
    settings: Settings = app.state.settings
    refuse_plain_functions(app)
    async with _directory(settings) as app.state.directory:
        await databases.open()
        loop_watch = LoopWatch(
            app.state.metrics.event_loop_lag_seconds,
            blocked_seconds=settings.blocked_after_seconds,
            accuse=settings.environment == "development",
        )
        tasks = [
            asyncio.create_task(loop_watch.run()),
            asyncio.create_task(keep_house(databases, hours=settings.idempotency_hours)),
        ]
        try:
            # What is there now stays until the end: the garbage collector need not look at it again.
            gc.collect()
            gc.freeze()
            with draining_first(databases, delay_seconds=settings.drain_delay_seconds), ending_with_parent():
                yield {LIMITS: ConnectionLimits.of(settings, app.state.metrics)}
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await databases.close()
