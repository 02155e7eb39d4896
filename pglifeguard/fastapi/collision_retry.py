"""A request whose transaction collided with another one is run again, before anything of its answer is sent."""

import asyncio
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pglifeguard.collisions import ATTEMPTS, collision, pause_seconds
from pglifeguard.database import Isolation
from pglifeguard.databases import Databases
from pglifeguard.fastapi.scope import WRITE, consistency_of
from pglifeguard.sessions import WriteSession


class Isolated:
    """A dependency that gives the request's session that writes, at an isolation level."""

    def __init__(self, isolation: Isolation) -> None:
        self.isolation = isolation


def isolation_of(scope: Mapping[str, Any]) -> Isolation | None:
    """Return the isolation level that something in this request's route asks for, the strictest; None for the server's.

    Whoever opens the session first, a guard or an Idempotency-Key, opens it at this level.
    """
    context = scope.get("fastapi", {}).get("effective_route_context")
    asked = {
        call.isolation
        for route in (context, scope.get("route"))
        for call in _calls(getattr(route, "dependant", None))
        if isinstance(call, Isolated)
    }
    strictest: tuple[Isolation, ...] = ("SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED")
    return next((level for level in strictest if level in asked), None)


def _calls(dependant: Dependant | None) -> Iterator[Any]:
    if dependant is not None:
        yield dependant.call
        for inner in dependant.dependencies:
            yield from _calls(inner)


class RunAgain:
    """Run a request again whose transaction collided, before anything of its answer is sent.

    Only where the route asks for an isolation level (`SerializableDB`), and so says that it may run several times; not
    when it has committed a part. It stands around the router, so each attempt is routed, has its own dependencies
    and session, and reads the body again. The last attempt's answer is sent, whatever it is.
    """

    def __init__(self, app: ASGIApp, databases: Databases) -> None:
        self._app = app
        self._databases = databases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; WebSockets pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        before = dict(scope)
        received: list[Message] = []

        async def receive_kept() -> Message:
            message = await receive()
            # What comes in one piece is small; of an upload nothing is kept but where it may be asked for again.
            if not (message.get("more_body") and _runs_once(scope)):
                received.append(message)
            return message

        def send_unless_collided(message: Message) -> Coroutine[Any, Any, None]:
            return _dropped() if WRITE in scope and _may_run_again(scope) else send(message)  # type: ignore[return-value]  # It is a coroutine.

        body: Receive = receive_kept
        for attempt in range(ATTEMPTS - 1):
            try:
                await self._app(scope, body, send_unless_collided)
            except Exception:
                if not _may_run_again(scope):
                    raise
            session = _may_run_again(scope) if WRITE in scope else None
            if session is None:
                return
            self._databases.count_collision(session.failure)
            await asyncio.sleep(pause_seconds(attempt))
            scope.clear()
            scope.update(before)
            body = _replaying(list(received), receive_kept)
        await self._app(scope, body, send)


def _runs_once(scope: Scope) -> bool:
    """Tell that the request has reached a route that asks for no isolation level: nobody needs its body again."""
    return isinstance(scope.get("route"), APIRoute) and isolation_of(scope) is None


def _may_run_again(scope: Scope) -> WriteSession | None:
    session: WriteSession | None = scope.get(WRITE)
    if session is None or session.isolation is None or session.committed or not collision(session.failure):
        return None
    if consistency_of(scope).committed:
        return None
    return session


def _replaying(kept: list[Message], receive: Receive) -> Receive:
    async def replay() -> Message:
        return kept.pop(0) if kept else await receive()

    return replay


async def _dropped() -> None:
    """Take a message that nobody is to have."""
