"""docs/architecture.md tells which files a request enters, in order, and their number stays small."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.conftest import Database
from tests.service import quiet
from tests.test_cost import COSTS, WARM_UP, Client, seeded

__all__ = ["seeded"]
ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
# A reader who follows a request opens this many files at most.
MOST = {"read one": 12, "create": 15}
_asking = ContextVar("asking", default=False)
HEADINGS = {"read one": "A read: `GET /patients/{id}`", "create": "A write: `POST /patients`"}


@contextmanager
def noting_files() -> Iterator[list[str]]:
    """Note the files of both packages whose functions this context enters, each once, in order.

    Monitors, upkeep and the watch of the event loop have contexts of their own, whenever they run.
    """
    files: list[str] = []

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        name = frame.f_code.co_filename.removeprefix(f"{ROOT}/")
        if _asking.get() and event == "call" and name.startswith(("app/", "pglifeguard/")) and name not in files:
            files.append(name)

    before, asking = sys.getprofile(), _asking.set(True)
    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(before)
        _asking.reset(asking)


def files_told(heading: str) -> list[str]:
    """Return the files that the page's walk names, each where it comes first."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    steps = re.findall(r"^\d+\. `([a-z_/]+\.py)`", section, re.MULTILINE)
    return list(dict.fromkeys(steps))


@pytest.mark.parametrize("name", MOST)
async def test_request_enters_the_files_that_the_page_names(seeded: Database, name: str) -> None:
    """The walk of the page is that of a warm request, and it is no longer than the bar."""
    async with quiet(seeded.settings(trace_checkouts=False)) as service:
        client = Client(service)
        for _ in range(WARM_UP):
            await client.send(COSTS[name])

        with noting_files() as entered:
            await client.send(COSTS[name])

    assert files_told(HEADINGS[name]) == entered
    assert len(entered) <= MOST[name]


def test_page_names_files_that_exist() -> None:
    """Every path of a Python file on the page leads to one."""
    named = set(re.findall(r"`((?:app|pglifeguard|local|migrations|tests)/[a-z_/]+\.py)`", PAGE))

    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
