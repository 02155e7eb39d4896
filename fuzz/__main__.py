"""`python -m fuzz`: the service of `make run` against schemathesis and the hostile corpus; docs/fuzzing.md."""

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import SystemRandom
from typing import Annotated

import typer
from rich.console import Console

from fuzz import properties
from fuzz.corpus import corpus
from fuzz.corpus.requests import Known, dumped
from fuzz.documented import Documented
from fuzz.judging import line_fault, line_time
from fuzz.mutations import mutations
from fuzz.report import Report
from fuzz.resting import rest
from fuzz.sending import send
from fuzz.stage import Stage, free_port, staged
from local.setup import PROJECT
from local.stopping import stop_on_signals
from pglifeguard.embedded.account import EmbeddedError

console = Console(highlight=False, soft_wrap=True)
DIRECTORY = PROJECT / ".local" / "fuzz"
# Of the seconds that are left when a part begins: for the corpus once more, for requests with edited bytes, for each
# run of schemathesis, which asks for sequences last and would not come to them in one. What a part does not need, the
# later ones have.
REPEATING, MUTATING = 0.2, 0.125
PHASES = {"stateful": 0.4, "examples,coverage,fuzzing": 1.0}
# For schemathesis to start and to end, twice, and for rest.
APART_SECONDS = 20.0
# However slow the machine is, the parts after the corpus get so much together,
LEAST_SECONDS = 40.0
# and each run of schemathesis so much, also where the parts before it took longer than their share.
LEAST_PHASE_SECONDS = 12
JSON = {"Content-Type": "application/json"}


def main(  # noqa: PLR0913  # A command line has as many parameters as options.
    *,
    seconds: Annotated[
        float,
        typer.Option(
            help="How long at most, the start of the databases included; a busy machine takes longer.", min=30
        ),
    ] = 105,
    seed: Annotated[int, typer.Option(help="Of edited bytes and made-up questions; equal ones ask alike.")] = 1,
    new_seed: Annotated[bool, typer.Option("--new-seed", help="Take another seed than any run before.")] = False,
    only: Annotated[
        str | None, typer.Option(help="Send the cases of the corpus whose names have this, no more.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of the service. [default: a free one]")] = None,
    directory: Annotated[Path, typer.Option(help="Where the databases live, and what was found.")] = DIRECTORY,
) -> None:
    """Fuzz the service; the exit status is 1 when something was found."""
    seed = SystemRandom().randrange(2**31) if new_seed else seed
    directory = directory.absolute()
    report = Report(directory / "findings", free_port() if port is None else port, console)
    try:
        for name in ("findings", "schemathesis"):
            shutil.rmtree(directory / name, ignore_errors=True)
            (directory / name).mkdir(parents=True)
        found = asyncio.run(_run(directory, report, seconds=seconds, seed=seed, only=only))
    except EmbeddedError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(2) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        report.summarise(["Stopped before the end, and everything that was started is stopped too."])
        raise typer.Exit(130) from None
    raise typer.Exit(1 if found else 0)


async def _run(directory: Path, report: Report, *, seconds: float, seed: int, only: str | None) -> int:
    """Start, fuzz, and tell; return the number of findings."""
    stop_on_signals()
    started = time.monotonic()

    def progress(step: str) -> None:
        console.print(f"{time.monotonic() - started:6.1f} s  {step}", markup=False)

    progress(f"Starting; seed {seed}")
    async with staged(directory, port=report.port) as stage:
        created = await stage.client.post("/patients", content=dumped(Known(stage.token).patient()), headers=JSON)
        promised = stage.promised
        known = Known(stage.token, promised.readable, one=created.headers["Location"])
        cases = [case for case in corpus(known) if only is None or only in case.name]
        begun = await rest(stage)
        progress(f"Sending the {len(cases)} cases of the corpus")
        await send(cases, report, promised)
        before = await rest(stage)
        figures = [f"at rest after the corpus: {before}"]
        if only is None:
            figures += await _go_on(stage, known, report, promised, seed=seed, end=started + seconds, progress=progress)
        after = await rest(stage)
        figures.append(f"at rest at the end: {after}")
        for fault in (*after.leaked(), *(() if only else after.grown_since(before))):
            report.found(fault)
        for figure, count in after.failed.items():
            if count > begun.failed.get(figure, 0):
                report.found(f"{count} answers counted as failures of the service: {figure}")
    # Its last words are said while it stops.
    lines = stage.log.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines:
        report.found(f"the service has written nothing to {stage.log}, and says otherwise when it starts")
    for line in lines:
        if fault_of := line_fault(line):
            report.found(f"{fault_of}\n      sent then: {report.sent_at(line_time(line))}; repeat one by --only")
    report.summarise([*figures, f"{time.monotonic() - started:.0f} s, seed {seed}"])
    return len(report.findings)


async def _go_on(  # noqa: PLR0913  # What the start has made, and what the command line says.
    stage: Stage,
    known: Known,
    report: Report,
    promised: Documented,
    *,
    seed: int,
    end: float,
    progress: Callable[[str], None],
) -> list[str]:
    """Send what takes the rest of the time; return its figures."""
    end = max(end - APART_SECONDS, time.monotonic() + LEAST_SECONDS)

    def after(share: float) -> float:
        now = time.monotonic()
        return now + max(0.0, end - now) * share

    progress("Once more, to see what grows")
    await send(corpus(known), report, promised, until=after(REPEATING))
    progress("Sending requests with edited bytes")
    await send(mutations(known, seed), report, promised, until=after(MUTATING))
    figures = []
    for phases, share in PHASES.items():
        progress(f"Asking what the OpenAPI document promises: {phases}")
        seconds = max(round(after(share) - time.monotonic()), LEAST_PHASE_SECONDS)
        asked = await properties.ask(
            stage, report.directory.parent / "schemathesis", phases=phases, seconds=seconds, seed=seed
        )
        figures.append(f"schemathesis, {phases}: {asked.cases} cases, exit status {asked.status}")
        if asked.status != 0 or asked.cases == 0:
            report.found(f"schemathesis, {phases}, exit status {asked.status}:\n{asked.findings}")
    progress("Waiting for rest")
    return figures


if __name__ == "__main__":
    os.chdir(PROJECT)
    typer.run(main)
