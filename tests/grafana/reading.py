"""The committed dashboards as Grafana reads them: panels, and queries with their variables filled in."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent.parent / "grafana/image/dashboards"
# What each variable is when nothing is chosen.
CHOSEN = {
    "job": "app",
    "instance": ".*",
    "route": ".*",
    "pool": ".*",
    "server": ".*",
    "database": ".*",
    "objective": "0.999",
}


@dataclass(frozen=True)
class Panel:
    """One panel that asks something."""

    board: str
    number: int
    kind: str
    title: str
    text: str
    unit: str
    # Where its colours change.
    limits: tuple[float, ...]
    queries: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.board.removeprefix('lifeguard-')}-{self.number}"

    @property
    def alerts(self) -> set[str]:
        """The alerts that lead to it, by its text."""
        return {name for names in re.findall(r"Runbook: ([\w, ]+)\.$", self.text) for name in names.split(", ")}


@cache
def boards() -> dict[str, dict[str, Any]]:
    """Return each dashboard, by the name of its file."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def boxes() -> list[tuple[str, dict[str, Any]]]:
    """Return all that has a place on a dashboard, headings too."""
    return [(name, box) for name, board in boards().items() for box in board["panels"]]


@cache
def panels() -> tuple[Panel, ...]:
    """Return every panel."""
    return tuple(_panel(name, box) for name, box in boxes() if box["type"] != "row")


def filled(query: str, interval: str) -> str:
    """Put values into the place of the variables; `interval` stands for those that depend on the time shown."""
    values = CHOSEN | {"__rate_interval": interval, "__range": interval}
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], query)


def _panel(board: str, box: dict[str, Any]) -> Panel:
    field = box["fieldConfig"]["defaults"]
    steps = field.get("thresholds", {}).get("steps", [])
    return Panel(
        board=board,
        number=box["id"],
        kind=box["type"],
        title=box["title"],
        text=box["description"],
        unit=box["options"]["yAxis"]["unit"] if box["type"] == "heatmap" else field["unit"],
        limits=tuple(step["value"] for step in steps if step.get("value") is not None),
        queries=tuple(target["expr"] for target in box["targets"]),
    )
