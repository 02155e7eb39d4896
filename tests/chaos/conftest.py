"""How large the tests are, and the table of what they measured."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from local.cluster import Cluster
from tests.chaos import FULL

TABLE = Path(__file__).parents[2] / "docs" / "failures.md"
# The columns of the table, by position.
MEASURED, NAME = 3, 4

_measured: dict[str, str] = {}


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Give a function that keeps the figures of this test for the table; later ones are added to earlier ones."""
    name = request.node.name.partition("[")[0]

    def note(figures: str) -> None:
        _measured[name] = f"{_measured[name]}; {figures}" if name in _measured else figures

    return note


@pytest.fixture
async def synchronous_cluster(breakable_cluster: Cluster) -> AsyncIterator[Cluster]:
    """Give the cluster with a primary that answers COMMIT when its replica has the change on disk.

    Without it a failover loses what was acknowledged and not yet streamed, whatever the service does.
    """
    primary = breakable_cluster.primary
    primary.settings["synchronous_standby_names"] = "replica"
    await primary.restart()
    await breakable_cluster.start()
    yield breakable_cluster
    # The next start of the primary must not wait for a replica that is still to be cloned.
    del primary.settings["synchronous_standby_names"]
    if primary.running:
        await primary.kill()


def rows() -> list[list[str]]:
    """Return the cells of docs/failures.md, a list for each row, without the head."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table with what this run measured."""
    if not FULL or not _measured:
        return
    terminalreporter.section("docs/failures.md, as measured by this run")
    known = {row[NAME].strip("`").partition("::")[2]: row for row in (rows() if TABLE.exists() else [])}
    for name, found in _measured.items():
        row = known.get(name, [name, "", "", "", name])
        terminalreporter.write_line(f"{row[0]}\n    promised: {row[2]}\n    measured: {found}\n    by {row[NAME]}")
