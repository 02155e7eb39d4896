"""Noticing that the client of a request has left, while the request waits for a connection.

An ASGI server says so to whoever receives the next message. While a request waits nobody does, so the request would be
served for nobody: `ClientWatch` receives meanwhile. Only a request that waits has one; see `BodyLimit`.
"""

import asyncio
from contextlib import suppress

from starlette.types import Message, Receive, Scope

from pglifeguard.consistency import current_consistency


class ClientWatch:
    """Receives the messages of one request until its client leaves, and keeps them for the application.

    From its start on the application receives by `receive`. One of the two asks the server at a time. A message that
    the watch has taken is not lost, and no wait for a message is cancelled before `end`: a BaseHTTPMiddleware around
    this would take that for the end of the body.
    """

    def __init__(self, receive: Receive) -> None:
        loop = asyncio.get_running_loop()
        # Done when the client has left.
        self.left: asyncio.Future[None] = loop.create_future()
        self._receive = receive
        # After the last one stands None: the application asks the server itself from then on.
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._task = loop.create_task(self._watch())

    async def receive(self) -> Message:
        """Receive the next message for the application."""
        message = await self._messages.get()
        if message is not None:
            return message
        self._messages.put_nowait(None)
        return {"type": "http.disconnect"} if self.left.done() else await self._receive()

    def end(self) -> None:
        """Stop receiving, once: the request is over."""
        # A cancelled task leads to its watch by its error's traceback. If the watch led back, each request that waited
        # would be left to the garbage collector, which stopped a flooded service for 250 ms at a time.
        self._task.cancel()
        del self._task

    async def _watch(self) -> None:
        try:
            # The application gets the error from the server when it asks.
            with suppress(Exception):
                message = await self._receive()
                if message["type"] == "http.request" and not message.get("more_body"):
                    # The body, empty or in one piece. Only the end of the connection can follow.
                    self._messages.put_nowait(message)
                    message = await self._receive()
                if message["type"] == "http.disconnect":
                    self.left.set_result(None)
                else:
                    self._messages.put_nowait(message)
        finally:
            self._messages.put_nowait(None)


def announces_body(scope: Scope) -> bool:
    """Say whether the headers of a request announce a body."""
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return any(value != b"0" for value in lengths) or any(n == b"transfer-encoding" for n, _ in scope["headers"])


def note_broken_off(scope: Scope) -> None:
    """Note that the client left in the middle of its body, so that the request counts so whatever answers it.

    An application that is mounted beneath this one may make a 400 or a 500 of it. Once an answer has begun, a server
    says the same of a body that was not read to its end.
    """
    record = current_consistency()
    if record is not None and not record.answered:
        scope.setdefault("state", {})["client_left"] = True


def may_be_given_up() -> bool:
    """Say whether this request is served for nobody once its client has left.

    It is not when it has committed something, since the rest of it may belong to that; nor when its answer has begun,
    as for a background task; nor in another task that its endpoint has started.
    """
    record = current_consistency()
    if record is None or record.committed or record.answered:
        return False
    return record.task is asyncio.current_task()
