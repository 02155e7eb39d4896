"""Run the migrations: direct to the primary, one runner at a time, never waiting long for a lock.

The URL is MIGRATIONS_URL, else DATABASE_URL. It must not go through a pooler in transaction mode, which would spread
a session over connections.
"""

import asyncio
import logging
from typing import Any

from alembic import context
from sqlalchemy import Connection, pool, text
from sqlalchemy.ext.asyncio import create_async_engine

import app.idempotency
import app.patients.models
import app.users.models
from app.db.base import Base
from app.settings import MigrationSettings

# A migration that waits for a lock makes every statement behind it wait too: better to fail and be run again.
LOCK_TIMEOUT = "4s"
GUARD_TIMEOUTS = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
# Any number will do, if nobody else uses it.
ADVISORY_LOCK = 7_253_094


# PostgreSQL does not tell the collation of an index's expression (pg_get_indexdef of one column leaves it out), so
# `alembic check` would find a difference for ever. That the index is as the queries need it, the tests of plans show.
NOT_COMPARABLE = {"ix_patients_name"}


def is_comparable(_thing: Any, name: str | None, *_rest: Any) -> bool:
    """Tell Alembic what to compare with the models."""
    return name not in NOT_COMPARABLE


def run(connection: Connection) -> None:
    """Migrate on an open connection, in one transaction for each version."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_server_default=True,
        include_object=is_comparable,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


async def run_online() -> None:
    """Connect, wait for a runner that came first, and migrate."""
    engine = create_async_engine(MigrationSettings().url, poolclass=pool.NullPool)
    logging.getLogger(__name__).info("migrating")
    async with engine.connect() as guard, engine.connect() as connection:
        # The lock belongs to a transaction of its own, so that it holds over all the versions' transactions, and
        # ends with the connection whatever happens.
        for timeout in GUARD_TIMEOUTS:
            # The role's own limits are for the migration: the guard may wait for as long as another runner takes, and
            # stands idle for as long as this one does.
            await guard.execute(text(f"SET LOCAL {timeout} = 0"))
        await guard.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        await connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
        await connection.commit()
        await connection.run_sync(run)
        await connection.commit()
    await engine.dispose()


if context.is_offline_mode():
    context.configure(url="postgresql://", target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(run_online())
