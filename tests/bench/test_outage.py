"""The outage is played on a real server, and what its table says is what happened."""

import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.
import pytest
from rich.console import Console

from bench.outage import OWN, Script, Story, perform, show
from tests.local.test_main import until

# Full after 97 / 45 = 2.2 seconds; the operator comes well after that, whatever else the machine does.
SHORT = Script(calm=1, operator_comes=5, operator_gives_up=7, afterwards=1)


@pytest.mark.slow
async def test_operator_gets_in_where_the_pools_are_bounded() -> None:
    """The textbook's pools take every connection that the server has; ours leave room, answer, and refuse the sum."""
    textbook, ours, refusal = await perform(SHORT, lambda _: None)

    assert "3 instances x (20 + 30 + 1)" in refusal
    assert (textbook.let_in, textbook.logins_refused > 0) == (None, True)
    assert (ours.let_in is not None, ours.logins_refused) == (True, 0)
    assert {status for _, status, _ in textbook.locked} <= {201, 500}
    assert {status for _, status, _ in ours.locked} == {201, 503}
    # Beside its own: who looks, who forgot the transaction, and the operator.
    assert ours.connections <= OWN + 5 < 97 <= textbook.connections
    assert all(found for _, found in ours.looks)
    assert not all(found for _, found in textbook.looks)
    assert ours.outage_seconds < textbook.outage_seconds


def test_outage_is_from_the_first_to_the_last_bad_answer() -> None:
    """A late answer is as bad as none; hold time is that of the calm before."""
    story = Story(
        answers=[(-1.5, 201, 0.02), (-1, 201, 0.04), (-0.5, 201, 0.03), (0.5, 201, 3.5), (2, 503, 0.5), (5, 201, 0.1)],
        looks=[(1.0, True), (2.0, False)],
        logins_refused=2,
        ended=4.0,
    )
    console = Console(record=True, width=120, file=io.StringIO())

    show(console, Script(rate=100), story, story, "no")
    text = console.export_text()

    assert (story.hold_seconds, story.outage_seconds, story.first(500)) == (0.03, 1.5, None)
    assert "100/s x 0.030 s = 3.0" in text
    assert "1 x 503, 1 too late or never" in text
    assert "refused 2 times, not in by 14 s" in text
    assert "1 of 2" in text


def command(process: psutil.Process) -> list[str]:
    """Return what a process was started as; nothing once it has ended."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_ends_all_that_it_started(number: signal.Signals) -> None:
    """Ctrl-C, or a terminal that closes: no process, and no databases in memory, are left. It has said its steps."""
    with subprocess.Popen([sys.executable, "-m", "bench.outage"], stdout=subprocess.PIPE, text=True) as process:
        started: dict[psutil.Process, list[str]] = {}

        def serves() -> bool:
            started.update((one, command(one)) for one in psutil.Process(process.pid).children(recursive=True))
            return any("bench.serve" in words for words in started.values())

        until(serves, 60)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)

    directories = {Path(words[words.index("-D") + 1]) for words in started.values() if "-D" in words}
    assert len(directories) == 2
    assert process.returncode == 130
    assert re.match(r" +\d\.\d s  starting the databases\n +\d+\.\d s  ours with 3 x 50 connections\n", said), said
    assert "everything that was started is stopped too" in said
    assert psutil.wait_procs(list(started), timeout=10)[1] == []
    assert not any(directory.exists() for directory in directories)
