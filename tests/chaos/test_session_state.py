"""Behind PgBouncer in transaction mode the server's session is everybody's: nothing may be left in it."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.chaos import pooler
from tests.conftest import Database
from tests.service import Service, serving

REFUSED = ["SET app.tenant = 'a'", "SELECT pg_advisory_lock(7)", "LISTEN channel", "PREPARE mine AS SELECT 1"]
ALLOWED = [
    "SET LOCAL app.tenant = 'a'",
    "SELECT set_config('app.tenant', 'a', true)",
    "SELECT pg_advisory_xact_lock(7)",
]


@pytest.fixture
async def pooled(database: Database, open_directory: Path) -> AsyncIterator[Service]:
    """Give a service whose primary is behind a pooler with one connection."""
    if pooler.program() is None:
        pytest.skip("PgBouncer is not installed")
    async with pooler.pooling(database.cluster, open_directory, size=1) as port:
        url = database.url().replace(f":{database.cluster.primary.port}/", f":{port}/")
        primary: dict[str, Any] = {"url": url, "statement_cache_size": pooler.statement_cache_size()}
        async with serving(database.settings(replica=False, primary=primary)) as service:
            yield service


@pytest.mark.parametrize("sql", REFUSED)
async def test_session_state_is_refused_behind_a_pooler(
    pooled: Service, sql: str, measured: Callable[[str], None]
) -> None:
    """What would reach another client's request raises before it is sent, with the way that works."""
    for _ in range(2):
        async with pooled.databases.writing() as session:
            await session.execute(text("SELECT 1"))
            with pytest.raises(RuntimeError, match="behind a pooler"):
                await session.execute(text(sql))

    async with pooled.databases.reading() as session:
        assert (await session.execute(text("SELECT current_setting('app.tenant', true)"))).scalar_one() is None
        assert (await session.execute(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"))).scalar() == 0
    measured(f"`{sql}` refused")


@pytest.mark.parametrize("sql", ALLOWED)
async def test_transaction_state_works_behind_a_pooler(
    pooled: Service, sql: str, measured: Callable[[str], None]
) -> None:
    """What ends with the transaction is nobody else's."""
    async with pooled.databases.writing() as session:
        await session.execute(text(sql))

    async with pooled.databases.writing() as session:
        found = (await session.execute(text("SELECT current_setting('app.tenant', true)"))).scalar_one()
        assert found in {None, ""}
    measured(f"`{sql}` worked, and nothing was left")
