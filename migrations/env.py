"""Run the migrations: direct to the primary, one runner at a time, never waiting long for a lock.

The URL is MIGRATIONS_URL, else DATABASE_URL. It must not go through a pooler in transaction mode, which would spread
a session over connections. One connection does it all: it holds the runners' lock and migrates.
"""

import asyncio
import logging
from typing import Any

import asyncpg
from alembic import context
from alembic.operations.ops import MigrationScript
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import Connection, Index, pool
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.sql.elements import CollationClause
from sqlalchemy.sql.visitors import iterate

from app.models import Base, load_models
from migrations.concurrently import LOCK_TIMEOUT, invalid_indexes, watch
from migrations.connection import check_server, connected
from migrations.settings import load_migration_settings
from migrations.turn import take_turn
from migrations.version_table import close_version_table
from pglifeguard import SettingsError
from pglifeguard.connector import KeptAliveConnection
from pglifeguard.errors import DatabaseUnreachable
from pglifeguard.fastapi import IDEMPOTENCY_TABLE

logger = logging.getLogger("migrations")

load_models()
# The tables of the domains, and the library's for Idempotency-Key: what is in neither would be dropped.
TABLES = [Base.metadata, IDEMPOTENCY_TABLE.metadata]

# The role's limits are for requests: an index takes as long as its table is large, and a runner may wait for another.
SESSION = """
SELECT set_config(name, CASE name WHEN 'lock_timeout' THEN $1 ELSE '0' END, false) FROM pg_settings
WHERE name IN ('lock_timeout', 'statement_timeout', 'transaction_timeout', 'idle_session_timeout')
"""


def is_comparable(thing: Any, _name: str | None, _kind: str, _reflected: bool, counterpart: Any) -> bool:  # noqa: FBT001  # Alembic's signature.
    """Leave out of a comparison an index on an expression with a collation, where the database has it already.

    PostgreSQL reports the expression of such an index without its collation (`pg_get_indexdef` of one column), so
    `alembic check` would report a difference for ever. The tests of query plans show that the index fits the queries.
    """
    if counterpart is None or not isinstance(thing, Index):
        return True
    expressions = [each for each in thing.expressions if not isinstance(each, str)]
    return not any(isinstance(part, CollationClause) for each in expressions for part in iterate(each))


def number(_context: MigrationContext, _revision: object, directives: list[MigrationScript]) -> None:
    """Give the migration that autogenerate writes the next number, as all others have one."""
    heads = context.script.get_heads()
    if directives and len(heads) == 1 and heads[0].isdigit():
        directives[0].rev_id = f"{int(heads[0]) + 1:04}"


def run(connection: Connection) -> None:
    """Migrate on an open connection, in one transaction for each version."""
    watch(connection)
    context.configure(
        connection=connection,
        target_metadata=TABLES,
        compare_server_default=True,
        include_object=is_comparable,
        transaction_per_migration=True,
        process_revision_directives=number,
    )
    with context.begin_transaction():
        context.run_migrations()


async def run_online() -> None:
    """Connect, wait for a runner that came first, migrate, and tell of indexes that are left invalid."""
    try:
        settings = load_migration_settings()
        async with connected(settings.primary, writable=True) as connection:
            await check_server(connection, settings.primary)
            await connection.execute(SESSION, LOCK_TIMEOUT)
            await take_turn(connection, wait_seconds=settings.migrations_wait_seconds)
            logger.info("migrating %s", settings.primary.location)
            try:
                await migrate(connection)
                await close_version_table(connection)
            finally:
                await tell_invalid_indexes(connection)
    except (SettingsError, DatabaseUnreachable) as error:
        raise CommandError(str(error)) from error


async def migrate(connection: KeptAliveConnection) -> None:
    """Run Alembic on the connection that holds the lock."""

    async def the_one() -> KeptAliveConnection:
        return connection

    engine = create_async_engine("postgresql+asyncpg://", poolclass=pool.StaticPool, async_creator=the_one)
    async with engine.connect() as migrating:
        await migrating.run_sync(run)
        await migrating.commit()


async def tell_invalid_indexes(connection: KeptAliveConnection) -> None:
    """Warn of indexes that no query uses and every write pays for."""
    try:
        left = await invalid_indexes(connection)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):  # It is gone: so the migration has failed, loudly.
        return
    for index in left:
        logger.warning(
            "index %s is invalid: a statement CONCURRENTLY failed. A migration that creates it again replaces it; "
            "else: DROP INDEX CONCURRENTLY %s",
            index,
            index,
        )


# `alembic upgrade head` brings no handlers, and a runner that waits would say nothing; one that has some keeps them.
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
if context.is_offline_mode():
    context.configure(url="postgresql://", target_metadata=TABLES, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(run_online())
