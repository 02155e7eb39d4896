"""CHANGELOG.md by the rules of Keep a Changelog: what it breaks of them, and what it says of a version."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

UNRELEASED = "Unreleased"
SECTIONS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


@dataclass(frozen=True)
class Entry:
    """What stands below one heading of the second level; `day` is as it is written, and "" where there is none."""

    version: str
    day: str
    text: str

    @property
    def sections(self) -> list[str]:
        """The headings of the third level, in their order."""
        return re.findall(r"^### (.*)$", self.text, re.MULTILINE)


def entries(text: str) -> list[Entry]:
    """Read the versions of a changelog, the newest first, as they stand there."""
    found = re.findall(r"^## \[([^]\n]*)\](?: - ([^\n]*))?\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return [Entry(version, day, body.strip()) for version, day, body in found]


def numbers(version: str) -> tuple[int, ...]:
    """Read "0.2.0". Raises: ValueError when it is written in another way."""
    if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version):
        raise ValueError(f"{version!r} is no version: it is three numbers, as in 0.2.0.")
    return tuple(int(part) for part in version.split("."))


def complaints(text: str) -> list[str]:
    """Say what does not follow the rules; an empty list is a changelog to release from."""
    found = entries(text)
    wrong = []
    if len(found) != len(re.findall(r"^## ", text, re.MULTILINE)):
        wrong.append("A heading of the second level is neither ## [Unreleased] nor ## [0.2.0] - 2026-12-01.")
    if [entry.version for entry in found[:1]] != [UNRELEASED]:
        wrong.append("The first heading is not ## [Unreleased].")
    for entry in found:
        wrong += _wrong_sections(entry)
    releases = [entry for entry in found if entry.version != UNRELEASED]
    wrong += [sentence for entry in releases for sentence in _wrong_release(entry)]
    if not wrong:
        order = [numbers(entry.version) for entry in releases]
        if order != sorted(set(order), reverse=True):
            wrong.append("The versions do not go from the newest to the oldest, each once.")
    return wrong


def notes(text: str, version: str) -> str:
    """Cut out what is said of a version, without its heading. Raises: KeyError when there is nothing."""
    return {entry.version: entry.text for entry in entries(text)}[version] + "\n"


def _wrong_release(entry: Entry) -> Iterator[str]:
    try:
        numbers(entry.version)
        day = date.fromisoformat(entry.day)
    except ValueError:
        yield f"## [{entry.version}] - {entry.day or '…'} has no version like 0.2.0, or no date like 2026-12-01."
        return
    # Where the day begins first it is tomorrow for half a day.
    if day > (datetime.now(UTC) + timedelta(hours=14)).date():
        yield f"## [{entry.version}] - {entry.day}: that day has not come yet."
    if not entry.text:
        yield f"## [{entry.version}] says nothing."


def _wrong_sections(entry: Entry) -> Iterator[str]:
    if unknown := [section for section in entry.sections if section not in SECTIONS]:
        yield f"[{entry.version}] has {', '.join(unknown)}: the sections are {', '.join(SECTIONS)}."
    if len(set(entry.sections)) != len(entry.sections):
        yield f"[{entry.version}] has a section twice."
    for part in re.split(r"^### ", entry.text, flags=re.MULTILINE):
        if part and not re.search(r"^- ", part, re.MULTILINE):
            yield f"[{entry.version}] has no line with a dash under {part.splitlines()[0]}."
