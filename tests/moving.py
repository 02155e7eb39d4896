"""A line that moves while a test takes long: a pytest plugin, silent where nobody looks at a terminal.

It stands behind what pytest has written of the line, and is gone before pytest writes on. Whoever waits for a test of
minutes sees that it runs, and for how long. Programs of our own have `rich`'s `Console.status` for that.
"""

import os
import sys
import time
from collections.abc import Generator
from threading import Event, Lock, Thread
from typing import Any

import pytest

# What takes less is over before anybody wonders.
SHOWN_AFTER_SECONDS = 2.0
PAUSE_SECONDS = 0.5
# What is written goes from the cursor to the end of the line, and the cursor stays; no longer line is broken.
SHOW = "\x1b7\x1b[?7l{}\x1b[K\x1b[?7h\x1b8"
CLEAR = "\x1b[K"


class MovingLine:
    """Shows the test that has run for the longest; with several processes, several run."""

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        capture: Any = reporter.config.pluginmanager.get_plugin("capturemanager")
        # While a test runs, pytest's own way to the terminal leads to what is captured.
        with capture.global_and_fixture_disabled():
            self._terminal = os.dup(sys.stdout.fileno())
        # With -v the name stands in the line already.
        self._names = reporter.verbosity <= 0
        self._begun: dict[str, float] = {}
        # pytest and the thread write in turns.
        self._turn = Lock()
        self._over = Event()
        self._thread = Thread(target=self._move, daemon=True)
        self._thread.start()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> Generator[None]:
        """Note when a test begins."""
        with self._turn:
            self._write(CLEAR)
            yield
            self._begun[nodeid] = time.monotonic()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self) -> Generator[None]:
        """Make room for what pytest writes of a test."""
        with self._turn:
            self._write(CLEAR)
            yield

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> Generator[None]:
        """Forget a test that is over."""
        with self._turn:
            self._write(CLEAR)
            self._begun.pop(nodeid, None)
            yield

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Stop moving."""
        self._over.set()
        self._thread.join()
        os.close(self._terminal)

    def _write(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def _move(self) -> None:
        while not self._over.wait(PAUSE_SECONDS):
            with self._turn:
                if self._begun:
                    nodeid, begun = next(iter(self._begun.items()))
                    seconds = time.monotonic() - begun
                    if seconds > SHOWN_AFTER_SECONDS:
                        name = f" {nodeid.rpartition('::')[2]}" if self._names else ""
                        self._write(SHOW.format(f"{name} {seconds:.0f} s"))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Begin, where somebody looks."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.isatty and os.environ.get("TERM") != "dumb":
        session.config.pluginmanager.register(MovingLine(reporter))
