"""One answer for all requests that ask at the same time: an expensive answer is computed once."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from fastapi import FastAPI

T = TypeVar("T")

# After each answer comes a pause this many times as long, so answers take a tenth of the time at most.
PAUSE_FACTOR = 9
# A database that does not answer makes an answer slow, but not expensive.
MAX_PAUSE_SECONDS = 0.5


class Shared(Generic[T]):
    """Makes one answer at a time, with a pause after each. A request that comes meanwhile waits for the next answer.

    No answer is older than its question: one that has been started is for the requests that came before it started.
    """

    def __init__(self, make: Callable[[], Awaitable[T]], *, min_pause_seconds: float = 0.0) -> None:
        self._make = make
        self._min_pause_seconds = min_pause_seconds
        self._free_at = 0.0
        self._running: asyncio.Task[T] | None = None
        self._next: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """Return the next answer, or raise what kept it from being made."""
        if self._next is None or self._next.done():
            self._next = asyncio.create_task(self._make_next())
        # Shielded: a request that is cancelled does not cancel the answer of the others.
        return await asyncio.shield(self._next)

    async def _make_next(self) -> T:
        loop = asyncio.get_running_loop()
        if self._running is not None and not self._running.done():
            await asyncio.wait([self._running])
        await asyncio.sleep(min(self._free_at - loop.time(), MAX_PAUSE_SECONDS))
        self._running, self._next = self._next, None
        begun = loop.time()
        try:
            return await self._make()
        finally:
            ended = loop.time()
            pause = max(self._min_pause_seconds, min(PAUSE_FACTOR * (ended - begun), MAX_PAUSE_SECONDS))
            self._free_at = ended + pause


def shared(app: FastAPI, name: str, make: Callable[[], Awaitable[T]], *, min_pause_seconds: float = 0.0) -> Shared[T]:
    """Return the `Shared` of an application under this name; the first call makes it."""
    everything: dict[str, Shared[Any]] = app.state.shared
    found = everything.get(name)
    if found is None:
        found = everything[name] = Shared(make, min_pause_seconds=min_pause_seconds)
    return found
