"""The service is told to end while it works, as a process, by real signals."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import asyncpg
import pytest

from pglifeguard.embedded.waiting import eventually
from tests.app.test_cli import MODULE, NAME, Process, served, sessions
from tests.chaos import FULL, in_time
from tests.chaos.load import Answer, offer, tell
from tests.chaos.wire import Client
from tests.conftest import Database

REQUESTS_PER_SECOND = 100 if FULL else 50
DRAIN_SECONDS = 1.0
ADA = {"full_name": "Ada Example", "birth_date": "1980-05-17"}
WAITS_FOR_LOCK = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND wait_event_type = 'Lock'"


async def test_sigterm_under_load_fails_nothing(
    database: Database, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """A balancer that heeds readiness sees no failure, every write that was asked for is whole, no session is left."""
    environment = database.environment() | {"DRAIN_DELAY_SECONDS": str(DRAIN_SECONDS)}
    async with served(tmp_path, environment, *MODULE) as server:
        client, probe = Client(server.url, keep=False), Client(server.url, keep=False)
        told_to_stop = asyncio.Event()

        async def heed_readiness() -> None:
            async def says_no() -> bool:
                return (await probe.ask("GET", "/health/ready")).status == 503

            assert await eventually(says_no, 10)
            told_to_stop.set()

        heeding = asyncio.create_task(heed_readiness())
        load = asyncio.create_task(
            offer(
                lambda number: client.ask("POST", "/patients", ADA | {"mrn": f"S-{number}"}),
                per_second=REQUESTS_PER_SECOND,
                until=told_to_stop.is_set,
            )
        )
        await asyncio.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        await heeding
        answers = await load
        await asyncio.wait_for(server.process.wait(), 20)
        ended = time.monotonic() - signalled
        left = await sessions(database)

    statuses = Counter(answer.status for answer in answers)
    stored = await count_patients(database)
    measured(f"{tell(statuses)}, ended {ended:.2f} s after SIGTERM (drain {DRAIN_SECONDS} s), {left} sessions left")
    assert set(statuses) == {201}
    assert stored == statuses[201]
    assert left == 0
    assert ended >= DRAIN_SECONDS
    in_time(ended < DRAIN_SECONDS + 5, ended)


@asynccontextmanager
async def stuck(database: Database, server: Process, client: Client) -> AsyncIterator[asyncio.Task[Answer]]:
    """Give a PATCH that waits for a lock for as long as the block lasts."""
    created = await client.ask("POST", "/patients", ADA | {"mrn": "S-1"})
    blocker = await asyncpg.connect(database.url("postgres"), timeout=5)
    try:
        async with blocker.transaction():
            await blocker.execute("SELECT FROM patients FOR UPDATE")
            change = asyncio.create_task(
                client.ask("PATCH", created.headers["location"], {"full_name": "Changed Halfway"})
            )

            async def waits() -> bool:
                return bool(await blocker.fetchval(WAITS_FOR_LOCK, NAME))

            assert await eventually(waits, 10)
            assert server.process.returncode is None
            yield change
    finally:
        await blocker.close()
        client.close()


@pytest.mark.parametrize("signals", [1, 2])
async def test_statement_that_does_not_end_is_ended(
    database: Database, tmp_path: Path, measured: Callable[[str], None], signals: int
) -> None:
    """A statement that outlasts the grace, or a second signal, is ended and rolled back; its session goes too."""
    grace = 2
    environment = {
        "DATABASE_URL": database.url(),
        "STATEMENT_TIMEOUT_SECONDS": "1",
        "GRACEFUL_TIMEOUT_SECONDS": str(grace),
    }
    async with served(tmp_path, environment, *MODULE) as server, stuck(database, server, Client(server.url)) as change:
        signalled = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        if signals > 1:

            async def drains() -> bool:
                return "draining" in server.log.read_text(encoding="utf-8")

            assert await eventually(drains, 5)
            server.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(server.process.wait(), 20)
        ended = time.monotonic() - signalled

        async def none_left() -> bool:
            return await sessions(database) == 0

        gone = await eventually(none_left, 8)
        left = time.monotonic() - signalled
        (outcome,) = await asyncio.gather(change, return_exceptions=True)

    measured(f"{signals} signal(s): ended after {ended:.2f} s, session gone after {left:.2f} s")
    assert gone
    assert isinstance(outcome, BaseException) or (outcome.status, outcome.code) == (503, "outcome_unknown")
    assert await names(database) == ["Ada Example"]
    in_time(ended < (grace + 5 if signals == 1 else 2), ended)


async def test_rolling_restart_of_workers_fails_nothing(
    database: Database, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """SIGHUP replaces the workers one by one; a client that retries refused connects sees no error."""
    retries: Counter[str] = Counter()
    numbers = count()
    async with served(tmp_path, {"DATABASE_URL": database.url()}, *MODULE, "--workers", "2") as server:
        client = Client(server.url, keep=False)

        async def create(_: int) -> Answer:
            mrn = f"S-{next(numbers)}"
            while True:
                try:
                    return await client.ask("POST", "/patients", ADA | {"mrn": mrn})
                except ConnectionRefusedError:
                    retries["refused"] += 1

        def restarted() -> int:
            return server.log.read_text(encoding="utf-8").count("Application startup complete")

        load = asyncio.create_task(offer(create, per_second=REQUESTS_PER_SECOND, until=lambda: restarted() >= 4))
        await asyncio.sleep(0.5)
        server.process.send_signal(signal.SIGHUP)
        answers = await asyncio.wait_for(load, 60)
        await server.stop()

    statuses = Counter(answer.status for answer in answers)
    measured(f"{tell(statuses)}, {retries['refused']} connects retried")
    assert set(statuses) == {201}
    assert await count_patients(database) == statuses[201]


async def count_patients(database: Database) -> int:
    """Count what is stored."""
    return len(await names(database))


async def names(database: Database) -> list[str]:
    """List the names of all patients."""
    connection = await asyncpg.connect(database.url("postgres"), timeout=5)
    try:
        return [row["full_name"] for row in await connection.fetch("SELECT full_name FROM patients")]
    finally:
        await connection.close()
