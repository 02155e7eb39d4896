"""How long until it serves: the import, and `app serve` and `make run` up to their first "ready"."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from bench.load import BenchError
from bench.measure import Plan, Series
from bench.report import Section
from bench.served import stop, until_ready
from bench.stage import COMPILED, Stage
from local.setup import PROJECT
from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.programs import explain

# What the service is built on, and so has to import: the bar for its own import is a multiple of theirs.
LIBRARIES = "import fastapi, sqlalchemy.ext.asyncio, asyncpg, prometheus_client"
TIMES_LIBRARIES = 1.25
IMPORT_SECONDS = 1.0
# In each round: from one to the next the CPU of an import differs by a tenth, and more.
IMPORTS = 10
READY_SECONDS = 2.0
# `make run` makes a primary, clones a replica, migrates and seeds before it serves.
RUN_SECONDS = 10.0


async def run(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> Section:
    """Time each of them in each round, the imports several times."""
    section = Section("Import and start")
    imports, spent, ratios, starts, runs = Series(), Series(), Series(), Series(), Series()
    for number in range(plan.rounds + 1):
        tell(f"start · round {number} of {plan.rounds}")
        measured = [(_time("pass"), _time(LIBRARIES), _time("import app.main")) for _ in range(IMPORTS)]
        ran = await _run_local()
        async with stage.serving("ours") as server:
            if number:
                for bare, libraries, imported in measured:
                    imports.values.append(imported[0] - bare[0])
                    spent.values.append(imported[1] - bare[1])
                    ratios.values.append((imported[1] - bare[1]) / (libraries[1] - bare[1]))
                starts.values.append(server.ready_seconds)
                runs.values.append(ran)
    section.table(
        ["", "found", "bar", ""],
        [
            [what, series.text(2) + unit, f"{sign} {most:g}{unit}", section.verdict(claim, held=held)]
            for what, series, sign, most, unit in (
                ("`import app.main`, the interpreter's own start taken off", imports, "<", IMPORT_SECONDS, " s"),
                (f"CPU of `import app.main`, in times that of `{LIBRARIES}`", ratios, "≤", TIMES_LIBRARIES, ""),
                ("`python -m app serve` until ready", starts, "<", READY_SECONDS, " s"),
                ("`make run` after installation, from nothing until it answers", runs, "<", RUN_SECONDS, " s"),
            )
            for held in [series.median < most or (sign == "≤" and series.median == most)]
            for claim in [f"{what}: {series.median:.2f}{unit}, {sign} {most:g} wanted"]
        ],
    )
    section.say(f"Of the import {spent.text(2)} s are CPU; where that is less, the machine was busy with other things.")
    return section


async def _run_local() -> float:
    """Run `python -m local` in an empty directory; return the seconds until it answers."""
    port = free_port()
    # On disk, where `make run` keeps its databases.
    with tempfile.TemporaryDirectory(prefix="lifeguard-bench-") as directory, tempfile.TemporaryFile() as log:
        os.chmod(directory, 0o711)  # noqa: PTH101, S103  # PostgreSQL's account must get into it.
        started = time.perf_counter()
        process = subprocess.Popen(  # noqa: ASYNC220  # It returns at once.
            [sys.executable, "-m", "local", "--directory", directory, "--port", str(port)],
            cwd=PROJECT,
            env=os.environ | COMPILED,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            ready = await until_ready(process, port, "local")
        finally:
            await stop(process)
        if ready is None:
            log.seek(0)
            raise BenchError(
                explain(log.read().decode(errors="replace"), "`python -m local`, which did not get ready,")
            )
        return ready - started


def _time(code: str) -> tuple[float, float]:
    """Return seconds, and seconds of CPU, which other work on the machine does not lengthen."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    # As installed: with compiled modules kept, whatever this shell says.
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT, env=os.environ | COMPILED)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
