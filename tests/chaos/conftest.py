"""How large the tests are, and the table of what they measured."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from local.cluster import Cluster
from tests.chaos import FULL
from tests.conftest import Database

TABLE = Path(__file__).parents[2] / "docs" / "failures.md"
# The column of a table, by position; the last one names the test, or the figure.
MEASURED = 3

_measured: dict[str, str] = {}


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Give a function that keeps the figures of this test for the table; later ones are added to earlier ones.

    They are for the row whose last cell names this test, or is `row`.
    """
    test = request.node.name.partition("[")[0]

    def note(figures: str, *, row: str | None = None) -> None:
        name = row or test
        _measured[name] = f"{_measured[name]}; {figures}" if name in _measured else figures

    return note


@pytest.fixture
def database(database: Database) -> Database:
    """Give the database with pools as they are in production: what breaks meets open connections."""
    return replace(database, pool_min_size=None)


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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a whole run write its figures down."""
    parser.addoption("--write-figures", action="store_true", help="Put what was measured into docs/failures.md.")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table with what this run measured."""
    if not FULL or not _measured:
        return
    terminalreporter.section("docs/failures.md, with the figures of this run")
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = _measured.get(cells[-1].strip("`").rpartition("::")[2])
        if found is None:
            continue
        cells[MEASURED] = found
        lines[number] = f"| {' | '.join(cells)} |"
        terminalreporter.write_line(lines[number])
    if config.getoption("--write-figures"):
        TABLE.write_text("\n".join([*lines, ""]), encoding="utf-8")
