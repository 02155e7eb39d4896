"""What a server took is the kernel's account of all its processes; what it asked is counted on the wire."""

import subprocess
import sys

import asyncpg
import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.
import pytest
from sqlalchemy.engine import make_url

from bench.served import Served, cpu_seconds, stop
from bench.wire import counting
from pglifeguard.embedded.waiting import processes_end
from tests.conftest import Database

# A server whose worker does the work: it burns so much CPU, says so, and waits until it is told to end.
BURNT_SECONDS = 0.3
WORKER = f"""
import sys, time
while time.process_time() < {BURNT_SECONDS}: pass
print("burnt", flush=True)
time.sleep(60)
"""
SERVER = f"""
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", {WORKER!r}]).returncode)
"""


async def test_workers_count_too() -> None:
    """CPU and memory are of the whole tree, and stopping ends the whole tree."""
    process = subprocess.Popen(  # noqa: ASYNC220  # It returns at once.
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    served = Served("busy", process, 0, 0.0)
    try:
        assert process.stdout.readline() == b"burnt\n"
        workers = psutil.Process(process.pid).children()
        alone = psutil.Process(process.pid).memory_info().rss

        # The kernel counts in hundredths of a second.
        assert served.cpu_seconds() >= BURNT_SECONDS - 0.02
        assert served.memory_bytes() > alone
        assert len(workers) == 1
    finally:
        await stop(process)
        process.stdout.close()
    assert await processes_end(workers, 5)


def test_time_of_an_ended_child_counts() -> None:
    """PostgreSQL's backends end with their connections: what they took stays in the account of the server."""
    forget = "subprocess.run([sys.executable, '-c', 'import time\\nwhile time.process_time() < 0.3: pass'])"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; {forget}; print('ended', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ended\n"

        # The kernel counts in hundredths of a second.
        assert cpu_seconds(process.pid) >= BURNT_SECONDS - 0.02
        assert psutil.Process(process.pid).children() == []
        process.communicate(b"go\n")
    with pytest.raises(psutil.NoSuchProcess):
        cpu_seconds(process.pid)


async def test_nobody_else_counts() -> None:
    """What a process beside the server burns, started by the same parent, is not the server's."""
    process, beside = (
        subprocess.Popen(  # noqa: ASYNC220  # It returns at once.
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        for code in ("print('ready', flush=True); input()", "input()\n" + WORKER)
    )
    served = Served("idle", process, 0, 0.0)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        before = served.cpu_seconds()
        assert beside.stdin is not None
        beside.stdin.write(b"go\n")
        beside.stdin.flush()
        assert beside.stdout is not None
        assert beside.stdout.readline() == b"burnt\n"

        # The kernel counts in hundredths of a second.
        assert served.cpu_seconds() - before <= 0.02
    finally:
        for one in (beside, process):
            await stop(one)
            for pipe in (one.stdin, one.stdout):
                if pipe is not None:
                    pipe.close()


async def test_round_trips_are_counted_on_the_wire(database: Database) -> None:
    """A statement that is prepared is one trip; in a transaction it is three."""
    url = make_url(database.url())
    async with counting(int(url.port or 0)) as (trips, port):
        connection = await asyncpg.connect(url.set(port=port).render_as_string(hide_password=False))
        await connection.fetchval("SELECT 1")
        counts = [trips.count]
        await connection.fetchval("SELECT 1")
        counts.append(trips.count)
        async with connection.transaction():
            await connection.fetchval("SELECT 1")
        counts.append(trips.count)
        await connection.close()

    assert [counts[1] - counts[0], counts[2] - counts[1]] == [1, 3]
