"""Who is named when the event loop stands still; that it is noticed at all is shown in tests/chaos/test_loop.py."""

import asyncio
import sys
import threading
from types import FrameType

import pytest
from prometheus_client import CollectorRegistry, Histogram

from pglifeguard.embedded.waiting import eventually
from pglifeguard.serving.loop import LoopWatch, blocking_line


def test_innermost_line_of_ours_is_named() -> None:
    """A line of the project's is named, though a library's may be deeper."""
    assert blocking_line(sys._getframe()).endswith("in test_innermost_line_of_ours_is_named")


async def test_library_is_named_when_nothing_else_is_there() -> None:
    """A stack without a line of ours names its innermost line."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()

    def stack() -> FrameType | None:
        return sys._current_frames().get(thread.ident or 0)

    async def waits() -> bool:
        frame = stack()
        return frame is not None and frame.f_code.co_name == "wait"

    try:
        assert await eventually(waits, 5)
        assert "threading.py" in blocking_line(stack())
        assert blocking_line(None) == ""
    finally:
        done.set()
        thread.join()


async def test_figures_that_cannot_be_written_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """The loop is measured all the same, and the next time they are written again."""
    fates = iter([OSError("No folder."), OSError("No folder."), None, OSError("Again no folder."), None])
    done = asyncio.Event()

    def write() -> None:
        fate = next(fates, "over")
        if isinstance(fate, OSError):
            raise fate
        if fate == "over":
            done.set()

    lag = Histogram("lag_seconds", "How late.", registry=CollectorRegistry())
    watching = asyncio.create_task(LoopWatch(lag, blocked_seconds=60, locate=False, also=write).run())
    async with asyncio.timeout(10):
        await done.wait()
    watching.cancel()
    await watching

    assert caplog.messages == [
        "metrics of this worker are not written: No folder.",
        "metrics of this worker are not written: Again no folder.",
    ]


async def test_watch_that_fails_leaves_no_thread() -> None:
    """Without a beat it would report a loop that nothing blocks."""

    def fail() -> None:
        raise LookupError("A bug.")

    lag = Histogram("lag_seconds", "How late.", registry=CollectorRegistry())
    with pytest.raises(LookupError, match="A bug"):
        await LoopWatch(lag, blocked_seconds=60, locate=True, also=fail).run()

    async def has_ended() -> bool:
        return "loop-watch" not in {thread.name for thread in threading.enumerate()}

    assert await eventually(has_ended, 10)
