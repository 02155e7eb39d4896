"""Waiting for what cannot call back, always with a deadline."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

import psutil  # type: ignore[import-untyped]  # Its stubs would be one more package.

POLL_SECONDS = 0.005
# To ask a program that starts two hundred times a second takes from it the processor that it starts on.
MAX_POLL_SECONDS = 0.05


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float) -> bool:
    """Ask until the answer is yes, less often as time passes; tell whether it was in time.

    An answer is noticed a few milliseconds late, or late by a tenth of what it took, 50 ms at most.
    """
    started = time.monotonic()
    while not await condition():
        waited = time.monotonic() - started
        if waited > seconds:
            return False
        await asyncio.sleep(min(max(POLL_SECONDS, waited / 10), MAX_POLL_SECONDS))
    return True


async def processes_end(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """Wait until none of them works any more; tell whether it was in time.

    A zombie has ended: whose child it is collects it at leisure, and the first process of some containers never does.
    """

    async def ended() -> bool:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    return False
        return True

    return await eventually(ended, seconds)
