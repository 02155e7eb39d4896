"""How long until it serves: the import, and `python -m app serve` up to its first "ready"."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

from bench.measure import Plan, Series
from bench.report import Section
from bench.stage import COMPILED, Stage
from local.setup import PROJECT

# What the service is built on, and so has to import: the bar for its own import is a multiple of theirs.
LIBRARIES = "import fastapi, sqlalchemy.ext.asyncio, asyncpg, prometheus_client"
TIMES_LIBRARIES = 1.25
IMPORT_SECONDS = 1.0
READY_SECONDS = 2.0


async def run(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> Section:
    """Time both, once a round."""
    section = Section("Import and start")
    imports, spent, starts, ratios = Series(), Series(), Series(), Series()
    for number in range(plan.rounds + 1):
        tell(f"start · round {number} of {plan.rounds}")
        bare, libraries, imported = _time("pass"), _time(LIBRARIES), _time("import app.main")
        async with stage.serving("ours") as server:
            if number:
                imports.values.append(imported[0] - bare[0])
                spent.values.append(imported[1] - bare[1])
                ratios.values.append((imported[1] - bare[1]) / (libraries[1] - bare[1]))
                starts.values.append(server.ready_seconds)
    section.table(
        ["", "seconds", "bar", ""],
        [
            [what, series.text(2), f"< {most:g}", section.verdict(f"{what}: {series.median:.2f} s", held=fast)]
            for what, series, most in (
                ("`import app.main`, the interpreter's own start taken off", imports, IMPORT_SECONDS),
                ("`python -m app serve` until ready", starts, READY_SECONDS),
            )
            for fast in [series.median < most]
        ],
    )
    claim = (
        f"`import app.main` takes {ratios.median:.2f} times the CPU of `{LIBRARIES}`, "
        f"at most {TIMES_LIBRARIES:g} wanted"
    )
    section.say(f"{claim}: {section.verdict(claim, held=ratios.median <= TIMES_LIBRARIES)}.")
    section.say(f"Of the import {spent.text(2)} s are CPU; where that is less, the machine was busy with other things.")
    return section


def _time(code: str) -> tuple[float, float]:
    """Return seconds, and seconds of CPU, which other work on the machine does not lengthen."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    # As installed: with compiled modules kept, whatever this shell says.
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT, env=os.environ | COMPILED)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
