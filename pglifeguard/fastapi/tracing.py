"""The span of each request, outside of all other layers; only where something is exported."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pglifeguard.fastapi.middleware import request_id
from pglifeguard.fastapi.sessions import consistency_of, route_of
from pglifeguard.telemetry import Telemetry, exemplar_source


class TraceRequests:
    """Trace each request, unless something around it does: FastAPI's own tracing, or an instrumentation."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            exemplar_source.set(self._telemetry.exemplar)
            served = self._telemetry.serving(scope)
        else:
            served = None
        if served is None:
            await self._app(scope, receive, send)
            return
        status: int | None = None
        complete = False
        failure: str | None = None

        async def send_noted(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body"):
                complete = True
            await send(message)

        with served:
            try:
                await self._app(scope, receive, send_noted)
            except BaseException as error:
                failure = type(error).__qualname__
                raise
            finally:
                route, reason = route_of(scope), consistency_of(scope).reason
                served.answered(
                    status=status,
                    route=None if route == "unmatched" else route,
                    # As `ObserveRequests` sees it.
                    left=(failure is None and not complete) or scope.get("state", {}).get("client_left", False),
                    failure=failure,
                    **{"request_id": request_id.get() or "", **({} if reason is None else {"read_reason": reason})},
                )
