"""The report: sections with tables, verdicts and pictures, as text for a terminal and as docs/benchmarks.md."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.
from matplotlib.figure import Figure

from bench.stage import Stage
from local.setup import PROJECT

PAGE = PROJECT / "docs" / "benchmarks.md"
PACKAGES = ("fastapi", "starlette", "uvicorn", "sqlalchemy", "asyncpg", "pydantic", "psycopg", "uvloop")
# What is measured: the library and the service.
MEASURED = ("pglifeguard/", "app/")
# More than this before the run, and something else wants the cores too. (A load average would tell of the last minute.)
QUIET_PERCENT = 10
PROBE_SECONDS = 1.0
HEAD = """# Benchmarks
Written by `make bench`; do not edit. What the figures mean for the code is in [performance.md](performance.md).

{machine}

How to read it: CPU is user and system time of the server's processes by the kernel's account, divided by the answers
of the round. Figures are the median of the rounds, with the lowest and the highest beside it; variants take turns
within a round. Rates come from a closed loop (wrk), whose first round is not counted, latencies from an open one
(h2load, one arrival per connection at a fixed rate, so a stall is not hidden). The server has a core to itself;
PostgreSQL, the generators and the harness share the others. A wrong answer ends the run, but where errors are what is
compared. Trust the ratios; rates depend on the machine and on what else it does.
"""


@dataclass
class Section:
    """One part of the report."""

    title: str
    parts: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Add a paragraph."""
        self.parts.append(text)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
        self.parts.append("\n".join(lines))

    def picture(self, name: str, text: str, figure: Figure) -> None:
        """Add a picture; `write` saves it as docs/benchmarks/<name>.png."""
        self.figures[name] = figure
        self.parts.append(f"![{text}](benchmarks/{name}.png)")

    def verdict(self, claim: str, *, held: bool) -> str:
        """Say whether a bar held, and remember it when not."""
        if not held:
            self.missed.append(claim)
        return "met" if held else "**missed**"

    def text(self) -> str:
        """Return the section as Markdown."""
        return "\n\n".join([f"## {self.title}", *self.parts])


def others() -> float:
    """Return the percentage of the processors that other work takes; ask before anything is started."""
    return float(psutil.cpu_percent(interval=PROBE_SECONDS))


def describe(stage: Stage, busy: float, *, quick: bool) -> str:
    """Describe machine, versions, commit and date."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    commit = _output("git", "-C", str(PROJECT), "rev-parse", "--short", "HEAD")
    # A figure belongs to a commit; of a changed tree nobody can say what was measured.
    differs = _output("git", "-C", str(PROJECT), "diff", "--name-only", "HEAD", "--", *MEASURED)
    changed = f" **with uncommitted changes in {' or '.join(MEASURED)}**" if differs else ""
    packages = " · ".join(f"{name} {version(name)}" for name in PACKAGES)
    pinned = f"server on core {stage.server_core}" if stage.pinned else "one core for everything"
    rows = [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC · commit {commit}{changed}"
        + (" · **quick run: rough figures**" if quick else ""),
        f"{cpu} · {os.cpu_count()} cores, {pinned} · {busy:.0f} % busy with other work before",
        f"{platform.system()} {platform.release()} · Python {sys.version.split()[0]} · {packages}",
        f"PostgreSQL {stage.looks.version} on loopback, without fsync · {_output('h2load', '--version')}",
    ]
    text = "\n".join(f"- {row}" for row in rows)
    if busy > QUIET_PERCENT:
        text += (
            "\n\n**The machine was busy with other work.** Rates, latencies, times and the verdicts that rest on them "
            "are not to be trusted, in either direction; CPU for each request and its ratios suffer less."
        )
    return text


def write(machine: str, sections: Sequence[Section], page: Path = PAGE) -> None:
    """Write docs/benchmarks.md, and its pictures into the folder of that name."""
    pictures = page.with_suffix("")
    pictures.mkdir(exist_ok=True)
    for section in sections:
        for name, figure in section.figures.items():
            figure.savefig(pictures / f"{name}.png", dpi=130)
    missed = [claim for section in sections for claim in section.missed]
    summary = (
        "**Bars missed in this run:**\n" + "\n".join(f"- {claim}" for claim in missed) if missed else "All bars met."
    )
    parts = [HEAD.format(machine=machine).strip(), summary, *(section.text() for section in sections)]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _read(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT)
    return done.stdout.strip()
