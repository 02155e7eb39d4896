"""One runner at a time: an advisory lock that is held by the very connection that migrates.

It is a session's lock and no transaction's: CREATE INDEX CONCURRENTLY waits for the end of every older transaction, and
would wait in vain for one that stands open beside it. Whoever waits for its turn asks again and again, and is idle in
between. The lock goes with its connection: when a runner is killed, it stays until the server has ended its statement.
"""

import asyncio
import logging

import asyncpg
from alembic.util import CommandError

from pglifeguard.connector import KeptAliveConnection

logger = logging.getLogger("migrations")

# Any number will do, if nobody else uses it.
ADVISORY_LOCK = 7_253_094
POLL_SECONDS = 0.25
TELL_SECONDS = 10.0
# What the session of another role does, PostgreSQL does not tell.
HOLDER = """
SELECT a.pid, coalesce(p.phase, a.state, 'of another role') AS doing,
       left(regexp_replace(a.query, '\\s+', ' ', 'g'), 80) AS query
FROM pg_locks l JOIN pg_stat_activity a USING (pid) LEFT JOIN pg_stat_progress_create_index p USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.classid = 0 AND l.objid = $1::bigint::oid
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


async def take_turn(connection: KeptAliveConnection, *, wait_seconds: float) -> None:
    """Wait until no other runner migrates this database, and keep others out until the connection closes.

    Raises: CommandError when that takes longer than `wait_seconds`.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    tell_at = started
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", ADVISORY_LOCK):
        now = loop.time()
        if now - started >= wait_seconds:
            raise CommandError(
                f"Another runner still migrates this database after {wait_seconds:g} s{await _holder(connection)}. "
                "Nothing was changed. Run this again when it is done, or raise MIGRATIONS_WAIT_SECONDS."
            )
        if now >= tell_at:
            tell_at = now + TELL_SECONDS
            logger.info("waiting for the runner before this one%s", await _holder(connection))
        await asyncio.sleep(POLL_SECONDS)


async def _holder(connection: "asyncpg.Connection[asyncpg.Record]") -> str:
    row = await connection.fetchrow(HOLDER, ADVISORY_LOCK)
    if row is None:  # It went in this moment.
        return ""
    return f": process {row['pid']}, {row['doing']}: {row['query']}"
