"""The queue and the script: processes without FastAPI on the same databases."""

import asyncio
import signal
from asyncio.subprocess import Process

import asyncpg
import pytest

from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database, Execute
from tests.examples.conftest import Start, make_tables

ENQUEUE = "INSERT INTO jobs (recipient) SELECT 'r' || number FROM generate_series(1, $1::int) AS number"
WAITING = "SELECT count(*) FROM jobs WHERE done_at IS NULL"
LETTERS = "SELECT count(*) FROM letters"
BLOCKED = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


@pytest.fixture(autouse=True)
async def _tables(database: Database) -> None:
    """Make the queue's tables."""
    await make_tables(database, "worker")


async def becomes(execute: Execute, statement: str, wanted: int) -> bool:
    """Wait until a statement returns a number; tell whether it did in time."""

    async def is_so() -> bool:
        return bool(await execute(statement) == wanted)

    return await eventually(is_so, 30)


async def stopped(worker: Process) -> int:
    """Ask a worker to stop; return how it ended."""
    worker.send_signal(signal.SIGTERM)
    await worker.communicate()
    assert worker.returncode is not None
    return worker.returncode


async def test_workers_share_the_jobs(start: Start, database: Database, execute: Execute) -> None:
    """Each job is done once, by whichever worker; one that cannot be done keeps no other waiting."""
    await execute("INSERT INTO jobs (recipient) VALUES ('')")
    await execute(ENQUEUE, 200)
    workers = [await start("worker", "worker.py", DATABASE_URL=database.url()) for _ in range(2)]

    assert await becomes(execute, WAITING, 0)
    assert [await stopped(worker) for worker in workers] == [0, 0]
    assert await execute(LETTERS) == await execute("SELECT count(DISTINCT recipient) FROM letters") == 200
    assert await execute("SELECT recipient || error FROM jobs WHERE error IS NOT NULL") == "IntegrityError"


async def test_job_of_another_worker_is_skipped(start: Start, database: Database, execute: Execute) -> None:
    """Nobody waits for it."""
    await execute(ENQUEUE, 3)
    other = await asyncpg.connect(database.url("postgres"))
    async with other.transaction():
        await other.execute("SELECT FROM jobs WHERE id = 1 FOR UPDATE")
        worker = await start("worker", "worker.py", DATABASE_URL=database.url())

        assert await becomes(execute, WAITING, 1)
        assert await stopped(worker) == 0
    await other.close()


async def test_worker_stops_after_the_job_at_work(start: Start, database: Database, execute: Execute) -> None:
    """SIGTERM takes nothing back, and begins nothing."""
    await execute(ENQUEUE, 2)
    holder = await asyncpg.connect(database.url("postgres"))
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute("LOCK TABLE letters IN EXCLUSIVE MODE")
    worker = await start("worker", "worker.py", DATABASE_URL=database.url())
    assert await becomes(execute, BLOCKED, 1)

    worker.send_signal(signal.SIGTERM)
    with pytest.raises(TimeoutError):  # It waits for its job, which waits for the lock.
        await asyncio.wait_for(asyncio.shield(worker.wait()), 0.5)
    await transaction.rollback()
    await holder.close()
    await worker.communicate()

    assert worker.returncode == 0
    assert (await execute(LETTERS), await execute(WAITING)) == (1, 1)


async def test_killed_worker_gives_its_job_back(start: Start, database: Database, execute: Execute) -> None:
    """Another one does it, once."""
    await execute(ENQUEUE, 1)
    holder = await asyncpg.connect(database.url("postgres"))
    async with holder.transaction():
        await holder.execute("LOCK TABLE letters IN EXCLUSIVE MODE")
        killed = await start("worker", "worker.py", DATABASE_URL=database.url())
        assert await becomes(execute, BLOCKED, 1)
        killed.kill()
        await killed.wait()
        await execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    await holder.close()
    worker = await start("worker", "worker.py", DATABASE_URL=database.url())

    assert await becomes(execute, WAITING, 0)
    assert await stopped(worker) == 0
    assert await execute(LETTERS) == 1


async def test_worker_outlives_its_database(start: Start, database: Database, proxy: Proxy, execute: Execute) -> None:
    """It works on when it can connect again."""
    worker = await start("worker", "worker.py", DATABASE_URL=proxy.url(database.url()))
    await execute(ENQUEUE, 1)
    assert await becomes(execute, WAITING, 0)

    proxy.refuse()
    proxy.cut()
    await execute(ENQUEUE, 1)
    assert worker.stdout is not None
    while b"the database is away" not in (line := await worker.stdout.readline()):
        assert line
    await proxy.accept()

    assert await becomes(execute, WAITING, 0)
    assert await stopped(worker) == 0


@pytest.mark.parametrize("where", ["primary", "replica"])
async def test_script_reads_once(start: Start, database: Database, execute: Execute, where: str) -> None:
    """On the replica where there is one; without a warm pool, which a script has no use for."""
    await execute(ENQUEUE, 3)
    await execute("UPDATE jobs SET done_at = now() WHERE id = 1")
    await execute("UPDATE jobs SET done_at = now(), error = 'x' WHERE id = 2")
    await database.cluster.wait_replayed()
    replica = {"DATABASE_REPLICA_URL": database.replica_url()} if where == "replica" else {}

    script = await start("worker", "report.py", DATABASE_URL=database.url(), DATABASE_POOL_MIN_SIZE="0", **replica)
    printed, _ = await script.communicate()

    assert (script.returncode, printed.decode()) == (0, f"1 waiting, 1 sent, 1 failed ({where})\n")
