"""The committed dashboards as Grafana reads them: panels, and queries with their variables filled in."""

import json
import math
import re
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx

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


async def values(prometheus: httpx.AsyncClient, query: str, interval: str, started: float, step: float) -> list[float]:
    """Return the values that Grafana would draw since a point in time, those that are no number left out.

    Raises: AssertionError when Prometheus does not understand the query.
    """
    asked = {"query": filled(query, interval), "start": started, "end": time.time(), "step": step}
    answer = await prometheus.post("/api/v1/query_range", data=asked)
    assert answer.status_code == 200, (query, answer.text)
    found = [float(value) for series in answer.json()["data"]["result"] for _, value in series["values"]]
    return [value for value in found if math.isfinite(value)]


def is_served(query: str) -> bool:
    """Tell whether a query is about the service, and not about what an exporter says."""
    return not re.search(r"\b(?:pg|pgbouncer|backup|haproxy)_", query)


def is_optional(query: str) -> bool:
    """Tell whether a query is about what runs with a profile of the stack alone."""
    return re.search(r"\bbackup_", query) is not None


def wrong(panel: Panel, drawn: list[float]) -> list[float]:
    """List the values that something in the panel's unit cannot have on a machine of tests."""
    bounds = {"percentunit": (0, 1), "s": (0, 600), "none": (0, 1), "bytes": (0, 2**40), "binBps": (0, 2**40)}
    least, most = bounds.get(panel.unit, (0, 100_000))
    if panel.title == "Budget left":
        least = -1_000
    return [value for value in drawn if not least <= value <= most]


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
