"""Measure how late the event loop is, and name the line that blocks it.

One blocking call in one route stops every request of the process, and no database metric shows it. The lateness of a
timer is a metric. In development a thread also logs the line that the loop is in.
"""

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from sysconfig import get_path
from types import FrameType

from prometheus_client import Histogram

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 0.1
# Where Python and the installed packages live; frozen modules of Python have no file.
NOT_OURS = (*{get_path(name) for name in ("stdlib", "purelib", "platlib")}, "<frozen")


class LoopWatch:
    """Measures how late the loop is, every `INTERVAL_SECONDS`; with `locate`, logs a line that blocks it for long.

    `also` is called each time: waking a process that sleeps takes longer than what is to be done. Its OSErrors are
    logged, the first of those that follow each other, and the next time it is called again.
    """

    def __init__(
        self, lag: Histogram, *, blocked_seconds: float, locate: bool, also: Callable[[], None] = lambda: None
    ) -> None:
        self._lag = lag
        self._also = also
        self._blocked_seconds = blocked_seconds
        self._locate = locate
        self._failed = False
        self._beat = time.monotonic()
        self._stop = threading.Event()

    async def run(self) -> None:
        """Measure until cancelled."""
        loop_thread = threading.get_ident()
        if self._locate:
            threading.Thread(target=self._watch, args=(loop_thread,), name="loop-watch", daemon=True).start()
        try:
            with suppress(asyncio.CancelledError):
                while True:
                    self._write()
                    due = self._beat = time.monotonic()
                    await asyncio.sleep(INTERVAL_SECONDS)
                    self._lag.observe(max(0.0, time.monotonic() - due - INTERVAL_SECONDS))
        finally:
            # Also when `also` fails in another way: without a beat the thread would report a loop that nothing blocks.
            self._stop.set()

    def _write(self) -> None:
        try:
            self._also()
        except OSError as error:
            if not self._failed:
                logger.error("metrics of this worker are not written: %s", error)  # noqa: TRY400  # It is no bug, so no traceback.
            self._failed = True
        else:
            self._failed = False

    def _watch(self, loop_thread: int) -> None:
        reported = 0.0
        while not self._stop.wait(INTERVAL_SECONDS):
            beat = self._beat
            late = time.monotonic() - beat - INTERVAL_SECONDS
            if late >= self._blocked_seconds and beat != reported:
                reported = beat
                frame = sys._current_frames().get(loop_thread)  # noqa: SLF001  # The only way to see another thread.
                logger.warning("event loop blocked", extra={"seconds": round(late, 2), "where": blocking_line(frame)})


def blocking_line(frame: FrameType | None) -> str:
    """Return the innermost line of a stack outside Python and the installed packages, else the innermost line."""
    innermost = "" if frame is None else _line(frame)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(NOT_OURS):
            return _line(frame)
        frame = frame.f_back
    return innermost


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
