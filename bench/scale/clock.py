"""An event loop whose clock jumps to the next timer: a minute of waiting takes no time.

Nothing in it may wait for a socket, a thread or a process.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _JumpingSelector(selectors.SelectSelector):
    """Skips the wait for the next timer. The clock starts at 0."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits, and no timer will end it")
        self.now += max(0.0, timeout)
        return []


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop on simulated time, in seconds from its start."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Return the simulated time."""
        return self._jumping.now


def simulate(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on simulated time."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(work)
