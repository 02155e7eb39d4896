"""`python -m migrations`: the newest schema, and a pooler that has forgotten the old one.

A server connection of PgBouncer keeps the statements that were prepared on it. After a change of a result's type each
of them fails, for every client, until its connection is replaced: that is what RECONNECT does, once the replicas have
the new schema too.
"""

import argparse
import asyncio
import logging
import sys
from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from migrations.connection import connected
from migrations.settings import MigrationSettings, load_migration_settings
from pglifeguard import DatabaseSettings, SettingsError
from pglifeguard.errors import DatabaseUnavailable
from pglifeguard.server_position import is_missing_feature

logger = logging.getLogger("migrations")

INI = Path(__file__).parent.parent / "alembic.ini"
# A replica that is further behind than this serves no reads of the service; it must not hold up a deployment either.
REPLAY_SECONDS = 30.0


async def reconnect(settings: MigrationSettings) -> None:
    """Have PgBouncer replace its server connections, each after its transaction; do nothing without a PgBouncer.

    Raises: DatabaseUnavailable when the primary or the console cannot be reached; CommandError when it is no console.
    """
    console = settings.console
    if console is None:
        return
    async with connected(settings.primary, writable=True) as primary:
        try:
            written = await primary.fetchval("SELECT pg_current_wal_insert_lsn()::text")
        except asyncpg.PostgresError as error:  # Aurora's replicas read the primary's own storage.
            if not is_missing_feature(error):
                raise
            logger.warning("the replicas are not waited for: %s", error)
            written = None
    for replica in settings.replicas if written is not None else []:
        await wait_replayed(replica, written)
    try:
        async with connected(console, writable=False, console=True) as connection:
            await connection.execute("RECONNECT")
    except asyncpg.PostgresError as error:
        raise CommandError(
            f"The schema is migrated, but {console.location} does not take RECONNECT ({error}): PGBOUNCER_ADMIN_URL "
            "has to name PgBouncer's own database, pgbouncer, and a user of its admin_users."
        ) from error
    logger.info("PgBouncer replaces its server connections")


async def wait_replayed(to: DatabaseSettings, written: str) -> None:
    """Wait until the replica has the new schema: prepared anew before that, a statement would be stale again."""
    try:
        async with asyncio.timeout(REPLAY_SECONDS), connected(to, writable=False) as replica:
            asked = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn"
            while not await replica.fetchval(asked, written):  # noqa: ASYNC110  # A server calls nobody back.
                await asyncio.sleep(0.05)
    except (DatabaseUnavailable, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        reason = str(error) or f"not there after {REPLAY_SECONDS:g} s"
        logger.warning(
            "%s has not replayed the migration (%s); when it has, run this again, or its prepared statements may fail",
            to.location,
            reason,
        )


def main() -> None:
    """Migrate, then renew the pooler's connections. Ends with status 1 and a sentence when that cannot be done."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        settings = load_migration_settings()
        command.upgrade(Config(INI), "head")
        asyncio.run(reconnect(settings))
    except (SettingsError, CommandError, DatabaseUnavailable) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    # Whoever asks for help has migrated nothing yet.
    argparse.ArgumentParser(
        prog="python -m migrations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
