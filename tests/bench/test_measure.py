"""Rounds take turns, the first is not counted, and a wrong answer in any of them ends the run."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from bench.load import BenchError
from bench.measure import Plan, alternate
from bench.served import Served, stop, until_ready
from bench.stage import Stage
from local.cluster import Cluster
from local.setup import PROJECT
from pglifeguard.embedded.postgres import free_port
from tests.bench.generators import needs_wrk

# What an answer to the first client costs, and far more than one to a later client does.
BURNT_SECONDS = 0.02
# A round is a client of its own, as wrk opens its connections anew: each writes the server's name down.
SERVER = f"""
import sys, time, uvicorn

name, port, journal = sys.argv[1:]
clients = []

async def answer(scope, receive, send):
    client = scope["client"]
    if scope["path"] == "/figure" and client not in clients:
        clients.append(client)
        with open(journal, "a") as file:
            print(name, file=file)
    if clients and client == clients[0]:
        end = time.process_time() + {BURNT_SECONDS}
        while time.process_time() < end: pass
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]}})
    await send({{"type": "http.response.body"}})

uvicorn.run(answer, port=int(port), lifespan="off", log_config=None)
"""


@pytest.fixture
async def stage(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Stage]:
    """Give a stage over the cluster of the tests, and the cores back afterwards."""
    cores = os.sched_getaffinity(0)
    try:
        stage = Stage(cluster, tmp_path)
        async with stage.looks:
            yield stage
    finally:
        os.sched_setaffinity(0, cores)


@asynccontextmanager
async def served(name: str, journal: Path) -> AsyncIterator[Served]:
    """Run the server in a process of its own."""
    port = free_port()
    process = subprocess.Popen(  # noqa: ASYNC220  # It returns at once.
        [sys.executable, "-c", SERVER, name, str(port), str(journal)], cwd=PROJECT, start_new_session=True
    )
    try:
        assert await until_ready(process, port, name) is not None
        yield Served(name, process, port, 0.0)
    finally:
        await stop(process)


@needs_wrk
async def test_servers_take_turns_and_the_first_round_is_not_counted(stage: Stage, tmp_path: Path) -> None:
    """Each server is loaded once a round, and what only the warm-up cost is in no figure."""
    journal = tmp_path / "journal"
    told: list[str] = []
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(served(name, journal)) for name in ("first", "second")]

        rows = await alternate(stage, servers, "/figure", clients=1, plan=Plan(1, 1), tell=told.append)

    assert journal.read_text(encoding="utf-8").split() == ["first", "second", "first", "second"]
    assert [line.rpartition(" · ")[2] for line in told] == ["warm-up", "warm-up", "round 1 of 1", "round 1 of 1"]
    assert list(rows) == ["first", "second"]
    for row in rows.values():
        assert [len(series.values) for series in (row.rate, row.cpu, row.opened)] == [1, 1, 1]
        # CPU and not time: it does not depend on what else the machine does.
        assert 0 < row.cpu.median < BURNT_SECONDS * 1e6 / 2
        assert row.rate.median > 0


@needs_wrk
async def test_wrong_answer_in_the_warm_up_ends_the_run(stage: Stage, tmp_path: Path) -> None:
    """A round that is not counted must be right all the same, and no other server is loaded after it."""
    journal = tmp_path / "journal"
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(served(name, journal)) for name in ("first", "second")]

        with pytest.raises(BenchError, match="were answered wrongly"):
            await alternate(stage, servers, "/figure", clients=1, plan=Plan(1, 1), tell=lambda _: None, expected=201)

    assert journal.read_text(encoding="utf-8").split() == ["first"]
