"""Seconds as the process of the tests had them: a claim about time then holds on a machine that is busy with others."""

import asyncio
import time
from types import TracebackType
from typing import Self

STEP_SECONDS = 0.005
# A turn of the event loop that comes later than this was kept waiting by other processes.
LONGEST_SECONDS = 0.02


class Stopwatch:
    """Counts in `seconds` the time since it was entered in which this process was let run.

    The event loop is asked every few milliseconds. A turn that comes late counts as 20 ms at most, or as the processor
    time that this process used meanwhile, if that is more: work that blocks the loop counts, other people's does not.
    """

    def __init__(self) -> None:
        self._counted = self._at = self._used = 0.0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._at, self._used = time.monotonic(), time.process_time()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turn()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def seconds(self) -> float:
        """What was counted so far, or in all once the block is left."""
        if self._task is not None and not self._task.done():
            self._turn()
        return self._counted

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(STEP_SECONDS)
            self._turn()

    def _turn(self) -> None:
        now, used = time.monotonic(), time.process_time()
        self._counted += max(min(now - self._at, LONGEST_SECONDS), used - self._used)
        self._at, self._used = now, used
