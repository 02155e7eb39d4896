"""What a request's body may take: bytes, values and time.

The head of a request is bounded before there is a request, in pglifeguard/serving/protocol.py, and earlier by a
balancer.
"""

import asyncio

from starlette.middleware.body_limit import MAX_BODY_SIZE_SCOPE_KEY
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pglifeguard.errors import BodyTooLarge, BodyTooSlow
from pglifeguard.settings import DatabasesSettings


class BodyLimit:
    """Bound each request's body, while it is read: what nobody reads is not waited for.

    FastAPI's `max_body_size=` of a route or a router goes before the setting. What is over a limit is raised where the
    body is read, before the rest of it has come.
    """

    def __init__(self, app: ASGIApp, settings: DatabasesSettings) -> None:
        self._app = app
        self._max_bytes = settings.request_body_bytes
        self._max_values = settings.request_body_values
        self._seconds = settings.request_body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body: _Body | None = None

        async def receive_some() -> Message:
            nonlocal body
            if body is None:
                max_bytes = scope.get(MAX_BODY_SIZE_SCOPE_KEY, self._max_bytes)
                body = _Body(scope, max_bytes=max_bytes, max_values=self._max_values, seconds=self._seconds)
            return await body.receive(receive)

        await self._app(scope, receive_some, send)


class _Body:
    """One request's body as far as it has come."""

    def __init__(self, scope: Scope, *, max_bytes: int, max_values: int, seconds: float) -> None:
        headers = dict(scope["headers"])
        self._max_bytes = max_bytes
        self._max_values = max_values
        self._seconds = seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        # Of several such headers FastAPI reads the first one, and upper case is lower case to it.
        self._is_json = any(name == b"content-type" and b"json" in value.lower() for name, value in scope["headers"])
        self._bytes = 0
        self._commas = 0
        self._complete = False
        announced = headers.get(b"content-length", b"")
        if announced.isdigit() and (len(announced) > len(str(max_bytes)) or int(announced) > max_bytes):
            raise BodyTooLarge(self._too_many_bytes())

    async def receive(self, receive: Receive) -> Message:
        """Receive what comes next. Once the body is there, nothing but the client's leaving can come: that may take."""
        if self._complete:
            return await receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await receive()
        except TimeoutError:
            raise BodyTooSlow(f"The body was not there within {self._seconds:g} seconds.") from None
        if message["type"] != "http.request":
            return message
        chunk = message.get("body", b"")
        self._complete = not message.get("more_body", False)
        self._bytes += len(chunk)
        if self._bytes > self._max_bytes:
            raise BodyTooLarge(self._too_many_bytes())
        if self._is_json:
            # Each value but the first follows a comma. Checked before it is parsed: an error for each of many values
            # costs a hundred times what the values do.
            self._commas += chunk.count(b",")
            if self._commas >= self._max_values:
                raise BodyTooLarge(f"The body has more than {self._max_values} values.")
        return message

    def _too_many_bytes(self) -> str:
        return f"The body has more than {self._max_bytes} bytes."
