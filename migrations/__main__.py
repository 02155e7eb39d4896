"""`python -m migrations`: the newest schema, and a pooler that has forgotten the old one.

A server connection of PgBouncer keeps the statements that were prepared on it. After a change of a result's type each
of them fails, for every client, until its connection is replaced: that is what RECONNECT does, once the replicas have
the new schema too.
"""

import asyncio
import logging
from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy.engine import make_url

from app.settings import MigrationSettings

logger = logging.getLogger("migrations")

INI = Path(__file__).parent.parent / "alembic.ini"
# A replica that is further behind than this serves no reads of the service; it must not hold up a deployment either.
REPLAY_SECONDS = 30.0
CONNECT_SECONDS = 5.0


async def reconnect(settings: MigrationSettings) -> None:
    """Have PgBouncer replace its server connections, each after its transaction; do nothing without a PgBouncer."""
    if settings.pgbouncer_admin_url is None:
        return
    primary = await _connect(settings.url)
    try:
        written = await primary.fetchval("SELECT pg_current_wal_insert_lsn()::text")
    finally:
        await primary.close()
    for url in settings.replica_urls:
        await wait_replayed(url, written)
    console = await _connect(settings.pgbouncer_admin_url.get_secret_value())
    try:
        await console.execute("RECONNECT")
    finally:
        await console.close()
    logger.info("PgBouncer replaces its server connections")


async def wait_replayed(url: str, written: str) -> None:
    """Wait until the replica has the new schema: prepared anew before that, a statement would be stale again."""
    place = make_url(url).render_as_string(hide_password=True)
    try:
        async with asyncio.timeout(REPLAY_SECONDS):
            replica = await _connect(url)
            try:
                asked = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn"
                while not await replica.fetchval(asked, written):  # noqa: ASYNC110  # A server calls nobody back.
                    await asyncio.sleep(0.05)
            finally:
                replica.terminate()
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        reason = str(error) or f"not there after {REPLAY_SECONDS:g} s"
        logger.warning(
            "%s has not replayed the migration (%s); when it has, run this again, or its prepared statements may fail",
            place,
            reason,
        )


async def _connect(url: str) -> "asyncpg.Connection[asyncpg.Record]":
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return await asyncpg.connect(plain, timeout=CONNECT_SECONDS)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command.upgrade(Config(INI), "head")
    asyncio.run(reconnect(MigrationSettings()))
