"""`Lifeguard`: what a FastAPI application adds to have all of this, in two lines."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, params
from fastapi.routing import iter_route_contexts

from pglifeguard.budget import check_budget
from pglifeguard.credentials import PasswordSource
from pglifeguard.databases import Databases
from pglifeguard.fastapi import problems
from pglifeguard.fastapi.answer_headers import AnswerHeaders
from pglifeguard.fastapi.idempotency import IdempotentRoute, purge_expired_keys
from pglifeguard.fastapi.middleware import BodyLimit, ObserveRequests, ReadYourWrites, RetryOnCollision, RetryOnPrimary
from pglifeguard.fastapi.sessions import refuse_plain_functions
from pglifeguard.fastapi.tracing import TraceRequests
from pglifeguard.history import History
from pglifeguard.metrics import Metrics
from pglifeguard.pool import OnConnect
from pglifeguard.serving.limits import LIMITS, ConnectionLimits
from pglifeguard.serving.loop import LoopWatch
from pglifeguard.serving.shutdown import draining_first, ending_with_parent
from pglifeguard.serving.siblings import Siblings
from pglifeguard.serving.workers import write_figures
from pglifeguard.settings import DatabasesSettings


class Lifeguard:
    """The databases of one FastAPI application, with the middleware, the error answers and the routes around them.

        lifeguard = Lifeguard()
        app = FastAPI(lifespan=lifeguard.lifespan)
        lifeguard.install(app)

    `settings` are read from the environment when they are not given: DATABASE_URL and the others.

    `on_connect` is awaited with each new connection of a pool (asyncpg's), before anybody has it: for codecs and
    session settings. What it sets stays; it counts into the time of a login. When it fails, the login has failed.

    `password` is called with a `Login` at each connect, and returns the password or an awaitable of it: for tokens that
    expire. The URLs then hold no password. docs/credentials.md has examples.

    Raises: SettingsError when a setting is missing or wrong, or when the settings ask for more connections than
    CONNECTION_LIMIT grants.
    """

    def __init__(
        self,
        settings: DatabasesSettings | None = None,
        *,
        on_connect: OnConnect | None = None,
        password: PasswordSource | None = None,
    ) -> None:
        settings = DatabasesSettings() if settings is None else settings
        check_budget(settings)
        self.metrics = Metrics()
        self.databases = Databases(settings, self.metrics, on_connect=on_connect, password=password)
        self.settings = self.databases.settings
        self.siblings = Siblings(self.databases)
        self.history = History(self.databases)

    def install(
        self,
        app: FastAPI,
        *,
        open_dependencies: Sequence[params.Depends] = (),
        debug_dependencies: Sequence[params.Depends] = (),
        answer_headers: AnswerHeaders | None = None,
    ) -> None:
        """Add sessions, error answers, middleware, and the routes `/health/*`, `/debug/*` and `/metrics`. Call it once.

        Routes and exception handlers of the application may be added before or after; its handlers win. Middleware
        that is added afterwards is outside of this. `open_dependencies` go to `/health/*` and `/metrics`, which probes
        and Prometheus call without a token, and to `/debug/pools`, a page without a figure in it, which a browser opens
        without one; `debug_dependencies` to the rest of `/debug/*`, which tells who holds connections: give it a guard
        where strangers can reach it. Without them there is no `/debug/pause`, `/resume`, `/drain`, `/resize` and
        `/end`. `answer_headers` are added to every answer that does not have them (docs/edge.md).
        """
        # Their routes are made when they are imported, and FastAPI loads pydantic.v1 to make its first one: 25 ms.
        from pglifeguard.fastapi import debug, exposition, health, pools  # noqa: PLC0415

        app.state.databases = self.databases
        app.state.siblings = self.siblings
        app.state.history = self.history
        app.state.takes_orders = bool(debug_dependencies)
        app.state.shared = {}
        problems.install(app)
        # Innermost, inside the exception handlers: a retried request passes the dependencies of inclusions again.
        app.router.middleware_stack = RetryOnPrimary(
            RetryOnCollision(app.router.middleware_stack, self.databases), self.databases
        )
        for router in (health.router, exposition.router, pools.page_router):
            app.include_router(router, dependencies=list(open_dependencies))
        for router in (debug.router, pools.router, *([debug.guarded_router] if debug_dependencies else [])):
            app.include_router(router, dependencies=list(debug_dependencies))
        # The last one added is the outermost.
        app.add_middleware(BodyLimit, settings=self.settings)
        app.add_middleware(ReadYourWrites, metrics=self.metrics, settings=self.settings)
        telemetry = self.databases.telemetry
        app.add_middleware(
            ObserveRequests,
            metrics=self.metrics,
            sampler=self.databases.sampler,
            telemetry=telemetry,
            headers=answer_headers,
        )
        if telemetry is not None:
            app.add_middleware(TraceRequests, telemetry=telemetry)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        """Open the databases, and close them at the end; one that is down keeps nobody from starting or stopping.

        An application that has a lifespan of its own enters this one in it, and yields what it gives:
        `async with lifeguard.lifespan(app) as state: yield state`.

        Raises: RuntimeError, with a sentence, when an endpoint takes a session and cannot use it.
        """
        settings, databases = self.settings, self.databases
        refuse_plain_functions(app)
        await databases.open()
        loop_watch = LoopWatch(
            self.metrics.event_loop_lag_seconds,
            blocked_seconds=settings.blocked_after_seconds,
            locate=settings.trace_checkouts,
            also=write_figures,
        )
        tasks = [asyncio.create_task(loop_watch.run()), asyncio.create_task(self.history.keep())]
        if _keeps_keys(app):
            tasks.append(asyncio.create_task(purge_expired_keys(databases, hours=settings.idempotency_hours)))
        try:
            async with self.siblings.reachable():
                with draining_first(databases, delay_seconds=settings.drain_delay_seconds), ending_with_parent():
                    yield {LIMITS: ConnectionLimits.of(settings, self.metrics)}
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await databases.close()
            write_figures()


def _keeps_keys(app: FastAPI) -> bool:
    return any(isinstance(context.original_route, IdempotentRoute) for context in iter_route_contexts(app.routes))
