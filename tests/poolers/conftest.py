"""The table at the end of a run of `make poolers`."""

import pytest

from tests.poolers import FULL, report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, and write it down when everything was played."""
    if not FULL:
        return
    from tests.poolers.test_situations import CASES  # noqa: PLC0415  # It asks the programs for their versions.

    terminalreporter.section("docs/poolers.md")
    for line in report.lines():
        terminalreporter.write_line(line)
    if report.complete(CASES):
        report.write()
