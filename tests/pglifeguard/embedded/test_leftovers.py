"""A server that nobody stopped is found, and ended."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

import pytest

from pglifeguard.embedded import leftovers
from pglifeguard.embedded.leftovers import end_server, postmaster

# Says that it runs, and takes SIGINT, by which a server is stopped, for nothing.
STUBBORN = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); signal.pause()"


Start: TypeAlias = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Give a way to start a process that has left its number in the directory."""
    with ExitStack() as stack:

        def run(*arguments: Path) -> "subprocess.Popen[bytes]":
            command = [sys.executable, "-c", STUBBORN, *map(str, arguments)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
            (tmp_path / "postmaster.pid").write_text(f"{process.pid}\n", encoding="utf-8")
            return process

        yield run


async def test_server_that_does_not_end_is_killed(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After five seconds; the process is the one whose arguments name the directory."""
    monkeypatch.setattr(leftovers, "END_SECONDS", 0.1)
    process = start(tmp_path)

    await end_server(tmp_path)

    assert process.wait() == -signal.SIGKILL


async def test_stranger_with_the_number_is_left_alone(start: Start, tmp_path: Path) -> None:
    """A stale file names a process that may be anybody's by now."""
    stranger = start()

    await end_server(tmp_path)

    assert postmaster(tmp_path) is None
    assert stranger.poll() is None
