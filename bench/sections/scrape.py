"""What it costs to be watched: how long a scrape holds the event loop, and the CPU of a scrape and of the live page."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import httpx
from prometheus_client import generate_latest

from bench.load import closed_loop
from bench.measure import Plan, Series
from bench.report import Section
from bench.stage import Stage
from pglifeguard.metrics import Metrics
from pglifeguard.registry import Registry, write
from pglifeguard.serving.merging import File, add_up
from pglifeguard.serving.workers import VARIABLE, shared_figures, write_figures

SERIES = 10_000
MOST_MILLISECONDS = 5.0
WORKERS = 4
# What a busy instance was asked for before its scrape.
PATHS = ("/patients/7", "/patients?limit=50", "/users?limit=50", "/reports/summary", "/health/db", "/debug/pool-stats")
# No more than connections for reports: a slow report would keep others waiting until they are refused.
CLIENTS = 4
SCRAPES = 20
MOST_OF_BUSY = 10.0
# What the live page asks for while somebody sees it, and how often: `page.js` has both.
FIGURES, FIGURES_SECONDS = "/debug/pools/figures", 2
SESSIONS, SESSIONS_SECONDS = "/debug/pools/sessions", 6
LOOKS = 100
MOST_OF_A_LOOK = 1.0


async def run(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> Section:
    """Write the exposition beside a task that wants every turn of the event loop, and at once."""
    section = Section("Scrape")
    registry = _crowded()
    longest, in_all, at_once = Series(), Series(), Series()
    longest_of_several, all_of_several = Series(), Series()
    with shared_figures():
        files = _files_of_workers(Path(os.environ[VARIABLE]))
        for number in range(plan.rounds + 1):
            tell(f"scrape · round {number} of {plan.rounds}")
            turns = await _turns(lambda: write(registry.in_slices()))
            of_several = await _turns(lambda: _write(files))
            started = time.thread_time()
            generate_latest(registry)
            if number:
                longest.values.append(max(turns) * 1e3)
                in_all.values.append(sum(turns) * 1e3)
                at_once.values.append((time.thread_time() - started) * 1e3)
                longest_of_several.values.append(max(of_several) * 1e3)
                all_of_several.values.append(sum(of_several) * 1e3)
    most = max(longest.median, longest_of_several.median)
    claim = f"`/metrics` with {SERIES:,} series: {most:.1f} ms of the event loop at a time"
    held = section.verdict(f"{claim}, ≤ {MOST_MILLISECONDS:g} wanted", held=most <= MOST_MILLISECONDS)
    section.table(
        [f"`/metrics` with {SERIES:,} series", "one worker, ms of CPU", f"{WORKERS} workers", "bar", ""],
        [
            [
                "the longest turn of the event loop",
                longest.text(1),
                longest_of_several.text(1),
                f"≤ {MOST_MILLISECONDS:g}",
                held,
            ],
            ["all turns together", in_all.text(), all_of_several.text(), "-", ""],
            ["by prometheus-client's `generate_latest`, in one turn", at_once.text(), "", "-", ""],
        ],
    )
    series, cost, figures, sessions = await _of_a_busy_one(stage, plan, tell)
    claim = f"a scrape of a busy instance, {series:,} series, takes {cost.median:.1f} ms of CPU"
    held = section.verdict(f"{claim}, < {MOST_OF_BUSY:g} wanted", held=cost.median < MOST_OF_BUSY)
    section.say(
        f"A scrape of an instance that was busy with all kinds of reads, {series:,} series, takes {cost.text(1)} ms of "
        f"CPU, the request itself included; less than {MOST_OF_BUSY:g} wanted: {held}."
    )
    page = figures.median / FIGURES_SECONDS + sessions.median / SESSIONS_SECONDS
    claim = f"the live page costs its instance {page:.2f} ms of CPU a second"
    held = section.verdict(f"{claim}, < {MOST_OF_A_LOOK:g} wanted", held=page < MOST_OF_A_LOOK)
    section.say(
        f"An open [live page](live-page.md) asks for figures every {FIGURES_SECONDS} s, {figures.text(2)} ms of CPU, "
        f"and for sessions every {SESSIONS_SECONDS} s, {sessions.text(2)} ms: {page:.2f} ms a second, less than "
        f"{MOST_OF_A_LOOK:g} wanted: {held}."
    )
    return section


async def _of_a_busy_one(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> tuple[int, Series, Series, Series]:
    """Return the number of series, and the milliseconds of CPU for a scrape, and for each question of the live page."""
    cost, figures, sessions, series = Series(), Series(), Series(), 0
    async with stage.serving("ours") as server, httpx.AsyncClient(trust_env=False) as client:
        for path in PATHS:
            tell(f"scrape · {path}")
            await closed_loop(server.url + path, clients=CLIENTS, seconds=1)
        for number in range(plan.rounds):
            tell(f"scrape of a busy instance · round {number + 1} of {plan.rounds}")
            before = server.cpu_seconds()
            for _ in range(SCRAPES):
                text = (await client.get(f"{server.url}/metrics")).text
            cost.values.append((server.cpu_seconds() - before) / SCRAPES * 1e3)
            series = sum(not line.startswith("#") for line in text.splitlines())
            newest = (await client.get(f"{server.url}{FIGURES}")).json()
            # As the page asks after its first look: it has all samples but the last two.
            known = f"known={newest['now']['key']}.{newest['samples'][-1][0] - FIGURES_SECONDS}"
            for path, found in ((f"{FIGURES}?{known}", figures), (SESSIONS, sessions)):
                before = server.cpu_seconds()
                for _ in range(LOOKS):
                    (await client.get(f"{server.url}{path}")).raise_for_status()
                found.values.append((server.cpu_seconds() - before) / LOOKS * 1e3)
    return series, cost, figures, sessions


def make_figures() -> None:
    """Write the figures of one worker to the folder that the environment names."""
    _crowded()
    write_figures()


def _files_of_workers(folder: Path) -> list[Path]:
    """Let as many processes as there are workers write their figures; give their files.

    They end at once, so each would continue the files of the one before: they are set aside.
    """
    for number in range(WORKERS):
        script = "from bench.sections.scrape import make_figures\nmake_figures()"
        subprocess.run([sys.executable, "-c", script], check=True)
        for file in folder.glob("*_worker1.db"):
            file.rename(file.with_stem(file.stem.replace("worker1", f"set{number}")))
    return sorted(folder.glob("*_set*.db"))


async def _write(files: list[Path]) -> bytes:
    return await write(await add_up(map(File, files)))


def _crowded() -> Registry:
    """Return a service's figures, most of them the time of requests by their routes."""
    metrics = Metrics()
    samples = route = 0
    while samples < SERIES:
        for _ in range(10):
            route += 1
            metrics.http_seconds.labels("GET", f"/things/{route}/of/{{owner_id}}").observe(0.003)
        samples = sum(len(family.samples) for family in metrics.registry.collect())
    return metrics.registry


async def _turns(expose: Callable[[], Awaitable[bytes]]) -> list[float]:
    """Return the seconds of CPU of each turn; what else the machine does does not lengthen them."""
    ends = [time.thread_time()]

    async def take_turns() -> None:
        while True:
            ends.append(time.thread_time())
            await asyncio.sleep(0)

    others = asyncio.create_task(take_turns())
    await expose()
    others.cancel()
    ends.append(time.thread_time())
    return [end - start for start, end in pairwise(ends)]
