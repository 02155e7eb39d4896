"""A server that nobody stopped is found, and ended."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

import psutil  # type: ignore[import-untyped]  # See waiting.py.
import pytest

from pglifeguard.embedded import leftovers
from pglifeguard.embedded.leftovers import end_server, postmaster, remove_what_is_left
from pglifeguard.embedded.waiting import eventually, processes_end

# Says that it runs, and takes SIGINT, by which a server is stopped, for nothing.
STUBBORN = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); signal.pause()"

# What a run of tests does, up to its end.
RUN = """
import asyncio
from pglifeguard.embedded.cluster import Cluster
from pglifeguard.embedded.directories import open_directory

async def run():
    with open_directory() as directory:
        async with Cluster(directory) as cluster:
            print(directory, cluster.primary.pid, cluster.replica.pid, flush=True)
            await asyncio.Event().wait()

asyncio.run(run())
"""

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


def directory_exists(name: str) -> bool:
    """Look for it."""
    return Path(name).exists()


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_run_leaves_nothing(number: signal.Signals) -> None:
    """Neither its servers nor their directory, which is in memory: the guard outlives it."""
    with subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        directory, *pids = run.stdout.readline().split()
        servers = [psutil.Process(int(pid)) for pid in pids]
        left = [directory_exists(directory), *(server.is_running() for server in servers)]
        run.send_signal(number)

    async def gone() -> bool:
        return not directory_exists(directory)

    assert left == [True, True, True]
    assert asyncio.run(processes_end(servers, 15))
    assert asyncio.run(eventually(gone, 15))


def test_servers_of_a_directory_are_ended_with_it(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its data is elsewhere and a link leads there; what is not there any more is nobody's."""
    monkeypatch.setattr(leftovers, "END_SECONDS", 0.1)
    elsewhere, directory = tmp_path / "elsewhere", tmp_path / "run"
    (elsewhere / "primary").mkdir(parents=True)
    directory.mkdir()
    (directory / "data").symlink_to(elsewhere)
    process = start(elsewhere / "primary")
    (tmp_path / "postmaster.pid").rename(elsewhere / "primary" / "postmaster.pid")
    process.send_signal(signal.SIGSTOP)

    remove_what_is_left([str(directory), str(tmp_path / "gone")])

    assert process.wait() == -signal.SIGKILL
    assert not directory.exists()
