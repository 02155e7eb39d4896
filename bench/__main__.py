"""`python -m bench`: measure, print the tables, write docs/benchmarks.md and its pictures."""

import asyncio
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from bench import report
from bench.load import BenchError, require_generators
from bench.measure import Plan
from bench.sections import bar, growth, overload, pool_size, start, ways
from bench.stage import set_up

console = Console(highlight=False)
SECTIONS = {
    "bar": bar.run,
    "ways": ways.run,
    "pool-size": pool_size.run,
    "overload": overload.run,
    "start": start.run,
    "growth": growth.run,
}
FULL = Plan(rounds=3, seconds=1)
QUICK = Plan(rounds=3, seconds=1, quick=True)


def main(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="The bar alone, under a minute; writes nothing.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SECTIONS)}; repeat for several.")] = None,
) -> None:
    """Measure the service side by side with its floor and the textbook's ways."""
    try:
        require_generators()
        missed = asyncio.run(_run(quick=quick, only=list(only or (["bar"] if quick else SECTIONS))))
    except BenchError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from None
    for claim in missed:
        console.print(f"[yellow]missed:[/yellow] {claim}")


async def _run(*, quick: bool, only: list[str]) -> list[str]:
    plan, started, sections = QUICK if quick else FULL, time.monotonic(), []
    with console.status("Starting the databases") as status:

        def tell(step: str) -> None:
            status.update(f"{time.monotonic() - started:4.0f} s  {step}")

        async with set_up() as stage:
            machine = report.describe(stage, report.now(), quick=quick)
            console.print(Markdown(machine))
            for name in only:
                section = await SECTIONS[name](stage, plan, tell)
                sections.append(section)
                console.print(Markdown(section.text()))
                console.print(f"[dim]{time.monotonic() - started:.0f} s[/dim]")
    # A partial or rough run does not replace the published figures.
    if not quick and set(only) == set(SECTIONS):
        report.write(machine, sections)
        console.print(f"Written: {report.PAGE}")
    return [claim for section in sections for claim in section.missed]


if __name__ == "__main__":
    typer.run(main)
