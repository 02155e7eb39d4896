"""`python -m bench.scale`: what comes first with more instances, for your figures, and what a failover does to them."""

import argparse
import dataclasses
import logging
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from math import ceil

from rich.console import Console
from rich.markdown import Markdown

from bench.scale.clock import simulate
from bench.scale.limits import MOST_INSTANCES, Figures, limits
from bench.scale.storm import Situation, play
from local.progress import progress
from local.setup import PROJECT

PAGE = PROJECT / "docs" / "scale-out.md"
COUNTS = (20, 200, 2000)
# What the page shows of a failover.
SITUATIONS = (
    Situation(20),
    Situation(20, hosts=2, silent=True),
    Situation(200),
    Situation(200, hosts=2),
    Situation(200, hosts=2, silent=True),
    Situation(500),
    Situation(500, hosts=2),
    Situation(500, hosts=2, silent=True, figures=replace(Figures(), connect_timeout=2)),
)
STORM = (
    "instances", "hosts in the URL", "connect timeout", "logins before, most in a second", "logins after, of needed",
    "first connection: half, all", "last refusal", "all connections",
)  # fmt: skip


def rounded(value: float) -> str:
    """Write a figure down with the digits that say something."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"  # noqa: PLR2004  # Two digits.


def table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table down."""
    head = list(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def table_of_limits(figures: Figures, counts: Sequence[int] = COUNTS) -> str:
    """Write down what grows, the limit that comes first at the top."""
    rows = []
    for limit in limits(figures):
        most = reached = "–"  # noqa: RUF001  # A dash, as people write one.
        if limit.most is not None:
            most = rounded(limit.most)
            reached = f"> {MOST_INSTANCES:,}" if limit.reached is None else f"{limit.reached:,}"
        rows.append([limit.name, *(rounded(limit.grows(n)) for n in counts), most, reached, limit.remedy])
    return table(["what grows", *(f"{n:,}" for n in counts), "at most", "instances", "what moves it"], rows)


def storm_row(situation: Situation) -> list[str]:
    """Play an outage, and write down what became of it."""
    story = simulate(play(situation))
    seconds = [int(at // 1) for at in story.before]
    most = max((seconds.count(second) for second in set(seconds)), default=0)
    never = f"not in {situation.watched_seconds:g} s"

    def after(times: Collection[float], share: float = 1) -> str:
        rank = ceil(share * situation.instances)
        return never if len(times) < rank else f"{sorted(times)[rank - 1]:.1f} s"

    return [
        f"{situation.instances:,}",
        f"{situation.hosts}, the first one {'silent' if situation.silent else 'refuses'}",
        f"{situation.figures.connect_timeout:g} s",
        f"{len(story.before):,}, {most:,}",
        f"{len(story.logins) - len(story.before):,} of {situation.needed:,}",
        f"{after(story.first.values(), 0.5)}, {after(story.first.values())}",
        f"{max(0.0, *story.refused):.1f} s",
        after(story.whole.values()),
    ]


def table_of_storms(situations: Sequence[Situation]) -> str:
    """Play each outage, and say which one it is."""
    rows = []
    # The tables alone go into a pipe.
    with progress(Console(stderr=True)) as say:
        for number, situation in enumerate(situations, 1):
            say(f"A failover of {situation.instances:,} instances, {number} of {len(situations)}")
            rows.append(storm_row(situation))
    return table(STORM, rows)


def put(text: str, name: str, content: str) -> str:
    """Put a table between its two marks in a page."""
    return re.sub(rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)", rf"\g<1>{content}\g<2>", text, flags=re.DOTALL)


def main() -> None:
    """Print the tables for the figures of the command line, or write the page's own."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--instances", type=int, nargs="+", default=COUNTS, help="the numbers to compare")
    parser.add_argument(
        "--storm", action="store_true", help="simulate a failover too, minutes for thousands of instances"
    )
    parser.add_argument("--write", action="store_true", help=f"write both tables into {PAGE.relative_to(PROJECT)}")
    for each in dataclasses.fields(Figures):
        name = f"--{each.name.replace('_', '-')}"
        parser.add_argument(name, type=float, default=each.default, help=f"{each.metadata['help']} ({each.default:g})")
    given = vars(parser.parse_args())
    counts, storm, write = given.pop("instances"), given.pop("storm"), given.pop("write")
    figures = Figures(**given)
    # Of the thousand logins that are refused, nobody wants a line.
    logging.disable(logging.CRITICAL)
    console = Console()
    if write:
        text = put(PAGE.read_text(encoding="utf-8"), "limits", table_of_limits(Figures()))
        text = put(text, "storm", table_of_storms(SITUATIONS))
        PAGE.write_text(text, encoding="utf-8")
        return
    console.print(Markdown(table_of_limits(figures, counts)))
    if storm:
        situations = [Situation(n, hosts=hosts, figures=figures) for n in counts for hosts in (1, 2)]
        console.print(Markdown(table_of_storms(situations)))


if __name__ == "__main__":
    main()
