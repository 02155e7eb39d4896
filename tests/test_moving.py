"""What takes long shows that it goes on: on a terminal, and nowhere else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from local.setup import PROJECT
from tests.terminal import on_a_terminal

# It ends when a file appears, and after the given polls at the latest.
LONG_TEST = """
import time
from pathlib import Path

def test_long():
    for _ in range({polls}):
        if Path({released!r}).exists():
            break
        time.sleep(0.02)

def test_short():
    pass
"""
PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-p",
    "tests.moving",
    "-p",
    "no:cacheprovider",
    "-c",
    PROJECT / "pyproject.toml",
)


def long_test(directory: Path, *, polls: int) -> tuple[Path, Path]:
    """Write a test that takes long, and return its file and the one that ends it."""
    file, released = directory / "test_made.py", directory / "released"
    file.write_text(LONG_TEST.format(polls=polls, released=str(released)), encoding="utf-8")
    return file, released


@pytest.mark.slow
@pytest.mark.parametrize("options", [("-q",), ("-v",)], ids=["quiet", "verbose"])
def test_a_long_test_moves_on_a_terminal(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Its seconds are counted up behind what pytest has written, and pytest's own words are whole."""
    file, released = long_test(tmp_path, polls=1000)
    moved = re.compile(r"\x1b7\x1b\[\?7l(.*?) (\d+) s\x1b\[K")

    def release(written: str, _: object) -> None:
        if len({seconds for _, seconds in moved.findall(written)}) >= 2:
            released.touch()

    status, written = on_a_terminal([*PYTEST, *options, "--rootdir", tmp_path, file], release)

    assert status == 0
    assert len({seconds for _, seconds in moved.findall(written)}) >= 2, written
    assert {name for name, _ in moved.findall(written)} == {" test_long" if options == ("-q",) else ""}
    assert "2 passed" in written


def test_nothing_moves_without_a_terminal(tmp_path: Path) -> None:
    """What is piped or logged holds no line that moves."""
    file, _ = long_test(tmp_path, polls=130)

    done = subprocess.run(
        [*PYTEST, "-v", "--rootdir", tmp_path, file], cwd=PROJECT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0
    assert "2 passed" in done.stdout
    assert "\x1b" not in done.stdout
    assert not re.search(r"\d+ s\b", done.stdout.replace("passed in", ""))


@pytest.mark.slow
def test_simulated_failovers_move_on_a_terminal() -> None:
    """`make scale` says which of them it plays; what is piped are its tables, and the steps stand on stderr."""
    command = [sys.executable, "-m", "bench.scale", "--instances", "3", "--places", "3", "--storm", "--logins", "50"]

    status, written = on_a_terminal(command, lambda *_: None)
    piped = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)

    assert status == 0
    assert "A failover of 3 instances, 2 of 2" in written
    assert "A failover of" not in piped.stdout
    assert "s  A failover of 3 instances, 2 of 2" in piped.stderr
    assert "\x1b" not in piped.stdout + piped.stderr
