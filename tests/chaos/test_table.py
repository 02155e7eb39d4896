"""docs/failures.md and the tests speak of the same failures."""

import re
from pathlib import Path

from tests.chaos.conftest import TABLE


def test_every_failure_is_in_the_table_and_every_row_has_its_test() -> None:
    """Each test of this folder, and of tests/ha, is named in docs/failures.md, and each name there is a test."""
    folder = Path(__file__).parent
    tests = {
        name
        for path in (*folder.glob("test_*.py"), *(folder.parent / "ha").glob("test_*.py"))
        if path != Path(__file__)
        for name in re.findall(r"^async def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }

    assert set(re.findall(r"`(?:[\w/.]+::)?(test_\w+)`", TABLE.read_text(encoding="utf-8"))) == tests
