"""`python -m bench`: measure, print the tables, write docs/benchmarks.md and its pictures."""

import asyncio
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from bench import report
from bench.load import BenchError, require_generators
from bench.measure import Plan
from bench.sections import at_once, bar, growth, memory, overload, pool_size, scrape, start, total, ways
from bench.setup import set_up
from local.setup import PROJECT
from local.stopping import stop_on_signals
from pglifeguard.embedded.account import EmbeddedError

console = Console(highlight=False)
SECTIONS = {
    "bar": bar.run,
    "total": total.run,
    "ways": ways.run,
    "pool-size": pool_size.run,
    "overload": overload.run,
    "at-once": at_once.run,
    "start": start.run,
    "scrape": scrape.run,
    "memory": memory.run,
    "growth": growth.run,
}
FULL = Plan(rounds=3, seconds=1)
QUICK_SECTIONS = ["bar", "total"]
QUICK = Plan(rounds=3, seconds=1, quick=True)
HELP = """Measure the service side by side with its floor and with the textbook's ways to connect.

Starts a primary, a replica and every server that is measured, loads them on 127.0.0.1 and stops them again. Tables
are printed as they are done; after all parts, in about 20 minutes, docs/benchmarks.md and its pictures are
written. With --quick or --only nothing is written. A missed bar is reported; a wrong answer ends the run.

\b
The parts:
  bar        what a request costs, in floors and in textbooks
  total      what it costs the service, the pooler and PostgreSQL together
  ways       what each way to connect costs, and does to the server with 2 and 10 instances
  pool-size  how many connections are enough
  overload   what becomes of more requests than can be served
  at-once    what becomes of ten thousand requests at the same moment
  start      how long it takes until it serves
  scrape     what /metrics and the live page cost
  memory     what a process and its idle clients take
  growth     whether a request costs more with more clients, rows and workers
"""
UNTOUCHED = f"{report.PAGE.relative_to(PROJECT)} is as it was."

# Plain help: its paragraphs are filled to the terminal's width, and the list of parts stays a list.
cli = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)


def _known(names: list[str] | None) -> list[str] | None:
    for name in names or []:
        if name not in SECTIONS:
            raise typer.BadParameter(f"{name} is none of {', '.join(SECTIONS)}.")
    return names


@cli.command(help=HELP)
def main(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="The first routes of bar and total, in two minutes.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(callback=_known, help="This part alone, by its name; repeat it for several.")
    ] = None,
) -> None:
    """Measure what `--only` names, or everything, and write the report."""
    try:
        require_generators()
        missed = asyncio.run(_run(quick=quick, only=only or (QUICK_SECTIONS if quick else list(SECTIONS))))
    except (BenchError, EmbeddedError) as error:
        console.print(f"[red]{escape(str(error))}[/red]\n{UNTOUCHED}")
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print(f"Stopped, and everything that was started is stopped too. {UNTOUCHED}")
        raise typer.Exit(130) from None
    for claim in missed:
        console.print(f"[yellow]missed:[/yellow] {claim}")


async def _run(*, quick: bool, only: list[str]) -> list[str]:
    plan, started, sections = QUICK if quick else FULL, time.monotonic(), []
    busy = report.others()
    with console.status("Starting the databases") as status:
        stop_on_signals()
        async with set_up() as stage:
            machine = report.describe(stage, busy, quick=quick)
            console.print(Markdown(machine))
            for number, name in enumerate(only, 1):
                console.rule(f"{number} of {len(only)}: {name}, at {time.monotonic() - started:.0f} s", align="left")
                step = ""

                def tell(now: str, name: str = name) -> None:
                    nonlocal step
                    step = now
                    status.update(f"{time.monotonic() - started:4.0f} s  {name} · {now}")

                try:
                    section = await SECTIONS[name](stage, plan, tell)
                except (BenchError, EmbeddedError) as error:
                    raise BenchError(f"{name} failed at “{step}”: {error}") from error
                except Exception as error:
                    # A fault of the harness or of a driver: whoever reads the traceback wants to know this much.
                    error.add_note(f"{name} failed at “{step}”. {UNTOUCHED}")
                    raise
                sections.append(section)
                console.print(Markdown(section.text()))
    console.print(f"{time.monotonic() - started:.0f} s in all.")
    # A partial or rough run does not replace the published figures.
    if not quick and set(only) == set(SECTIONS):
        report.write(machine, sections)
        console.print(f"Written: {report.PAGE}")
    return [claim for section in sections for claim in section.missed]


if __name__ == "__main__":
    cli()
