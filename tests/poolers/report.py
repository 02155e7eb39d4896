"""The table of docs/poolers.md: what was played behind which pooler, and what came of it."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

from tests.poolers.programs import COMMANDS, IMAGES, Mode, Program, images, installed
from tests.poolers.situations import SITUATIONS, Situation

Case: TypeAlias = tuple[Program, Mode]

PAGE = Path(__file__).parents[2] / "docs" / "poolers.md"
BEGIN, END = "<!-- Written by `make poolers`. -->", "<!-- The end of what `make poolers` writes. -->"
WORKS = "works"

_outcomes: dict[Case, dict[str, str]] = {}
# Set-ups that are refused at the start, with the versions that were.
_refused: dict[str, list[str]] = {}
_servers: set[str] = set()


def note(case: Case, situation: Situation, outcome: str) -> None:
    """Keep the outcome of a situation; a later one replaces it."""
    _outcomes.setdefault(case, {})[situation.__name__] = outcome


def note_refusal(program: Program, setup: str) -> None:
    """Keep that a set-up was refused at the start."""
    _refused.setdefault(f"{program.kind}, {setup}", []).append(program.version)


def note_server(version: str) -> None:
    """Keep PostgreSQL's version."""
    _servers.add(version)


def lines() -> list[str]:
    """Write the table; neighbours with the same outcomes share a column."""
    order = sorted(_outcomes, key=lambda case: (list(COMMANDS).index(case[0].kind), case[1] == "session"))
    columns = [list(group) for _, group in groupby(order, key=_alike)]
    heads = [f"{cases[0][0].kind} {', '.join(p.version for p, _ in cases)}, {cases[0][1]} mode" for cases in columns]
    rows = [
        [title, *(_outcomes[cases[0]].get(situation.__name__, "") for cases in columns)]
        for situation, title in SITUATIONS.items()
    ]
    refused = [f"{setup} ({', '.join(versions)})" for setup, versions in _refused.items()]
    return [
        f"Played on {datetime.now(UTC):%d %B %Y} in front of PostgreSQL {', '.join(_servers)}. {_missing()}",
        "",
        _row(["situation", *heads]),
        _row(["---"] * (len(heads) + 1)),
        *(_row(row) for row in rows),
        "",
        f"**Refused at the start**, with a sentence: {'; '.join(refused)}.",
    ]


def complete(cases: Sequence[Case]) -> bool:
    """Say whether every situation was played behind every pooler."""
    return bool(cases) and all(len(_outcomes.get(case, ())) == len(SITUATIONS) for case in cases)


def write() -> None:
    """Put the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    table = "\n".join([BEGIN, "", *lines(), "", END])
    PAGE.write_text(
        re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: table, text, flags=re.DOTALL), encoding="utf-8"
    )


def _alike(case: Case) -> tuple[str, Mode, tuple[str, ...]]:
    program, mode = case
    return program.kind, mode, tuple(_outcomes[case].values())


def _missing() -> str:
    missing = [f"{kind} on the machine itself" for kind in COMMANDS if installed(kind) is None and kind != "Odyssey"]
    built = images()
    missing += [f"the packages of Debian {suite}" for suite in IMAGES if f"lifeguard-poolers-{suite}" not in built]
    return f"Not there: {', '.join(missing)}." if missing else "Nothing of what the suite knows was missing."


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
