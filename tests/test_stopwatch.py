"""The clock of the tests counts what this process did and waited for, and not what others took from it."""

import asyncio
import time

import pytest

from tests.stopwatch import Stopwatch


async def test_waiting_counts() -> None:
    """A wait counts nearly whole, and never for more than it was."""
    started = time.monotonic()
    async with Stopwatch() as watch:
        await asyncio.sleep(0.2)
        seconds = watch.seconds
    passed = time.monotonic() - started

    assert 0.05 < seconds <= passed


async def test_blocking_work_counts() -> None:
    """What keeps the loop busy in this process counts in full, as it would keep every request waiting."""
    async with Stopwatch() as watch:
        started = time.process_time()
        while time.process_time() - started < 0.1:
            pass

    assert watch.seconds >= 0.1


async def test_being_kept_waiting_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that others delayed counts as little as one that was in time."""
    async with Stopwatch() as watch:
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 10)
        seconds = watch.seconds
        monkeypatch.undo()

    assert seconds < 0.1
