"""Build the service: the only place where settings, databases, security and routes meet.

`create_app(Settings(...))` may be called more than once in a process; `uvicorn --factory app.main:create_app` calls it
without arguments, and then it reads the environment.
"""

import gc
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI
from prometheus_client import CollectorRegistry, Counter
from sqlalchemy.orm import configure_mappers

from app import audit, docs_page, edge, security
from app.logs import configure_logs
from app.settings import Settings
from pglifeguard import SettingsError, __version__
from pglifeguard.fastapi import Lifeguard, documented

if TYPE_CHECKING:
    from app.tokens import TokenVerifier

# Each domain is a package of app/ with a `router`, and is added and removed by its folder and its name here
# (docs/adding-a-domain.md). Routes that only some settings ask for are given by its `optional_routers(settings)`.
DOMAINS = ("patients", "users", "reports")
_FASTAPI: dict[str, Any] = {
    "title": "Lifeguard",
    "version": __version__,
    "description": "A FastAPI + PostgreSQL reference service whose database pool never drowns.",
    # Without this, Starlette matches every unknown path twice to look for a redirect.
    "redirect_slashes": False,
    "docs_url": "/docs",  # app/docs_page.py, in place of FastAPI's.
    "redoc_url": None,  # /docs shows the same document.
    "swagger_ui_oauth2_redirect_url": None,
    # Of every route: REQUEST_URL_BYTES.
    "responses": documented(414),
    # The metrics are Prometheus's. FastAPI's OpenTelemetry hooks cost each request something even if unused.
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
    guard = Lifeguard(settings)
    verifier = _verifier(settings, guard.metrics.registry)
    inner = options.pop("lifespan", None)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            state = await stack.enter_async_context(guard.lifespan(app))
            if verifier is not None and verifier.keys is not None:
                await stack.enter_async_context(verifier.keys.kept_fresh())
            security.leave_solved(app)
            # All objects of now live until the end, so the garbage collector need not visit them.
            gc.collect()
            gc.freeze()
            # Served requests leave no cycles (tests/test_cost.py), but 200 in flight are 20,000 objects, which the
            # collector looked at ten times a second with its usual threshold of 700, for 8 to 46 ms each.
            gc.set_threshold(20_000)
            more = None if inner is None else await stack.enter_async_context(inner(app))
            yield state | (more or {})

    chosen = _FASTAPI | options
    if chosen["redoc_url"] is not None:
        raise ValueError("redoc_url: FastAPI's page of ReDoc runs what a CDN answers, which the service does not allow")
    docs_url = chosen.pop("docs_url")
    app = FastAPI(**chosen, docs_url=None, lifespan=lifespan)
    app.state.settings = settings
    if docs_url is not None and app.openapi_url is not None:
        docs_page.install(app, docs_url)
    _include_domains(app, settings)
    # A model that cannot work ends the start here, before a request needs it.
    configure_mappers()
    guard.install(
        app,
        open_dependencies=[security.OPEN],
        debug_dependencies=[security.needs("ops")],
        answer_headers=edge.answer_headers(settings),
    )
    # Each of these stands outside of the one before it: how often, who, and for which host.
    edge.limit_rates(app, settings, guard.metrics.requests_refused)
    if verifier is not None:
        security.install(app, verifier, scope_claim=settings.auth_scope_claim)
    edge.guard_hosts(app, settings, guard.metrics.requests_refused)
    return app


def _include_domains(app: FastAPI, settings: Settings) -> None:
    """Include the routers of all domains, and audit them if the settings say so."""
    # Off, it adds nothing to a request.
    marking = [Depends(audit.mark_change)] if settings.audit == "table" else []
    routers: list[APIRouter] = []
    for domain in DOMAINS:
        package = import_module(f"app.{domain}")
        app.include_router(package.router, dependencies=marking)
        optional = getattr(package, "optional_routers", None)
        further = [] if optional is None else list(optional(settings))
        for router in further:
            app.include_router(router)
        routers += [package.router, *further]
    if settings.audit != "off":
        audit.install(app, routers)


def _verifier(settings: Settings, registry: CollectorRegistry) -> "TokenVerifier | None":
    if not settings.guarded:
        return None
    from app.tokens import TokenVerifier  # noqa: PLC0415  # It loads PyJWT and its cryptography.

    fetches = Counter(
        "auth_key_fetches_total",
        "Times that the identity provider's keys were fetched; `outcome` is ok or failed.",
        ["outcome"],
        registry=registry,
    )
    return TokenVerifier(settings, count=lambda outcome: fetches.labels(outcome).inc())


def _from_environment() -> Settings:
    settings = Settings()
    configure_logs(settings.log_level, settings.log_format, access_log=settings.access_log)
    for sentence in settings.ignored_variables:
        logger.warning(sentence)
    if settings.exposure is not None:
        logger.warning(settings.exposure)
    return settings
