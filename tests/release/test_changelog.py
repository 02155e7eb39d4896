"""CHANGELOG.md follows the rules of Keep a Changelog, and each rule is seen when it is broken."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pglifeguard import __version__
from release.changelog import UNRELEASED, complaints, entries, notes

CHANGELOG = (Path(__file__).parent.parent.parent / "CHANGELOG.md").read_text(encoding="utf-8")
GOOD = """# Changelog

## [Unreleased]

## [0.3.0] - 2026-02-01

### Added

- A line
  of two.

### Fixed

- Another.

## [0.2.0] - 2026-01-01

### Removed

- The last.
"""


def test_changelog_of_this_project_follows_the_rules() -> None:
    """It can be released from, and its newest release is the version of the library."""
    assert complaints(CHANGELOG) == []
    assert [entry.version for entry in entries(CHANGELOG)][:2] == [UNRELEASED, __version__]


def test_notes_are_what_stands_below_the_version() -> None:
    """They begin with the first section, and end before the next version."""
    assert complaints(GOOD) == []
    assert notes(GOOD, "0.3.0") == "### Added\n\n- A line\n  of two.\n\n### Fixed\n\n- Another.\n"
    assert notes(GOOD, "0.2.0") == "### Removed\n\n- The last.\n"


def test_version_without_notes_is_an_error() -> None:
    """Nobody publishes an empty page by a slip of the number."""
    with pytest.raises(KeyError):
        notes(GOOD, "0.4.0")


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("## [Unreleased]\n\n", "", "The first heading is not"),
        ("## [0.3.0] - 2026-02-01", "## 0.3.0", "is neither"),
        (" - 2026-02-01", "", "## [0.3.0] - … has no version"),
        ("2026-02-01", "1 February", "has no version like 0.2.0, or no date"),
        ("2026-02-01", "2026-02-30", "has no version like 0.2.0, or no date"),
        ("[0.3.0]", "[0.3]", "## [0.3] - 2026-02-01 has no version"),
        ("2026-02-01", f"{datetime.now(UTC) + timedelta(days=3):%Y-%m-%d}", "has not come yet"),
        ("[0.3.0]", "[0.1.0]", "from the newest to the oldest"),
        ("[0.3.0]", "[0.2.0]", "from the newest to the oldest"),
        ("### Added", "### New", "[0.3.0] has New: the sections are Added, Changed"),
        ("### Fixed", "### Added", "[0.3.0] has a section twice"),
        ("- Another.", "", "[0.3.0] has no line with a dash under Fixed"),
        ("### Removed\n\n- The last.\n", "", "## [0.2.0] says nothing"),
    ],
)
def test_broken_rule_is_told(right: str, wrong: str, complaint: str) -> None:
    """Each is a slip that somebody has made in a changelog."""
    assert right in GOOD

    told = complaints(GOOD.replace(right, wrong, 1))

    assert [sentence for sentence in told if complaint in sentence], told
