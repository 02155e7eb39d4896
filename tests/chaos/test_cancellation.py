"""A unit of work is cancelled at every moment of its life: no permit, no connection, no server session is lost.

A storm of random cancels passes on drivers that leak; a sweep does not: it hits each await at least once.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from pglifeguard.databases import Databases
from pglifeguard.embedded.waiting import eventually
from tests.chaos import FULL
from tests.chaos.pooler import pooling, program, statement_cache_size
from tests.conftest import Database
from tests.service import serving

WORK_SECONDS = 0.06
STEP_SECONDS = 0.001 if FULL else 0.008
# The work, its BEGIN, COMMIT and connecting; beyond it the cancel comes too late.
SWEEP_SECONDS = 0.09
# PgBouncer keeps its own connections to the server; none of them may be at work or in a transaction.
SESSIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = $1 AND usename = 'app_rw' AND NOT ($2 AND state = 'idle')
"""


async def work(databases: Databases) -> None:
    """Hold the only connection for 60 ms, in a transaction."""
    async with databases.writing() as session:
        await session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": WORK_SECONDS})


async def single(databases: Databases, seconds: float) -> None:
    """Cancel once."""
    task = asyncio.create_task(work(databases))
    await asyncio.wait([task], timeout=seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def double(databases: Databases, seconds: float) -> None:
    """Cancel, and again while the first one is cleaned up after."""
    task = asyncio.create_task(work(databases))
    await asyncio.wait([task], timeout=seconds)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def scoped(databases: Databases, seconds: float) -> None:
    """Cancel as anyio does: again at every await until the scope is left."""
    with anyio.move_on_after(seconds):
        await work(databases)


@pytest.mark.parametrize("way", ["direct", "pgbouncer"])
@pytest.mark.parametrize("cancel", [single, double, scoped])
async def test_nothing_is_lost_by_cancelling(
    database: Database,
    open_directory: Path,
    measured: Callable[[str], None],
    cancel: Callable[[Databases, float], Awaitable[None]],
    way: str,
) -> None:
    """After each cancel the pool of one serves the next, and in the end the server has no session left."""
    if way == "direct":
        lost = await sweep(database, database.url(), cancel)
    elif program() is None:
        pytest.skip("PgBouncer is not installed: apt-get install pgbouncer")
    else:
        async with pooling(database.cluster, open_directory, size=2) as port:
            url = make_url(database.url()).set(port=port).render_as_string(hide_password=False)
            lost = await sweep(database, url, cancel, statement_cache_size=statement_cache_size())
    measured(f"{cancel.__name__}, {way}: {math.ceil(SWEEP_SECONDS / STEP_SECONDS)} moments, {lost} sessions left")
    assert lost == 0


async def sweep(
    database: Database, url: str, cancel: Callable[[Databases, float], Awaitable[None]], **pool: Any
) -> int:
    """Cancel at every moment, probing the pool after each; return how many sessions of it the server still has."""
    primary = {"url": url, "pool_size": 1, "max_overflow": 0, "pool_min_size": 0, "pool_timeout": 5, **pool}
    async with serving(database.settings(replica=False, primary=primary, analytics={"url": url, **pool})) as service:
        databases = service.databases
        for step in range(math.ceil(SWEEP_SECONDS / STEP_SECONDS)):
            await cancel(databases, step * STEP_SECONDS)

            async def at_rest() -> bool:
                figures = databases.primary.pool.figures()
                return (figures.checked_out, figures.connecting, figures.available) == (0, 0, 1)

            assert await eventually(at_rest, 2), (step, databases.primary.pool.figures())
            async with databases.reading() as session:
                assert (await session.execute(text("SELECT 1"))).scalar_one() == 1
    return await sessions_left(database, pooled=bool(pool))


async def sessions_left(database: Database, *, pooled: bool) -> int:
    """Count the service's sessions on the server, giving it two seconds to see that they are gone."""
    watcher = await asyncpg.connect(database.url("postgres"), timeout=5)
    try:

        async def none_left() -> bool:
            return bool(await watcher.fetchval(SESSIONS, database.name, pooled) == 0)

        await eventually(none_left, 2)
        return int(await watcher.fetchval(SESSIONS, database.name, pooled))
    finally:
        await watcher.close()
