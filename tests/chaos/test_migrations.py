"""Migrations and a pooler: it is renewed afterwards, and no way to the primary where it would spread a session."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy.engine import make_url

from pglifeguard.embedded.waiting import eventually
from tests.chaos.pooler import pooling, program, statement_cache_size
from tests.conftest import Database
from tests.interpreter import python
from tests.poolers.programs import Mode

pytestmark = pytest.mark.skipif(program() is None, reason="PgBouncer is not installed: apt-get install pgbouncer")
COMMAND = ("-m", "migrations")


def through(database: Database, port: int, role: str = "app_owner") -> str:
    """Return the way to the database through the pooler."""
    return make_url(database.url(role)).set(port=port).render_as_string(hide_password=False)


async def test_pooler_renews_its_connections_when_the_schema_is_new(
    database: Database, open_directory: Path, measured: Callable[[str], None]
) -> None:
    """The job reaches the console with the service's own connector, and every server connection is another one."""
    async with pooling(database.cluster, open_directory, size=1) as port:
        console = f"postgresql://app_owner:{database.cluster.passwords['app_owner']}@127.0.0.1:{port}/pgbouncer"
        client = await asyncpg.connect(
            through(database, port, "app_rw"), statement_cache_size=statement_cache_size() and 10
        )
        before = await client.fetchval("SELECT pg_backend_pid()")

        status, output = await python(
            *COMMAND,
            environment=database.environment() | {"PGBOUNCER_ADMIN_URL": f"{console}?sslmode=prefer"},
        )

        async def renewed() -> bool:
            return bool(await client.fetchval("SELECT pg_backend_pid()") != before)

        assert status == 0, output
        assert "PgBouncer replaces its server connections" in output
        assert await eventually(renewed, 5)
        await client.close()
    measured("the job ended with 0, the client's server connection was another one")


async def test_console_that_is_away_is_a_sentence(
    database: Database, open_directory: Path, measured: Callable[[str], None]
) -> None:
    """The schema is new, the pooler is not: the job fails, says so, and shows no password."""
    async with pooling(database.cluster, open_directory, size=1) as port:
        wrong = f"postgresql://app_owner:hunter2@127.0.0.1:{port}/pgbouncer"

        status, output = await python(*COMMAND, environment=database.environment() | {"PGBOUNCER_ADMIN_URL": wrong})

    measured(f"the job ended with {status}")
    assert status == 1
    assert "The database cannot be reached" in output
    assert "Traceback" not in output
    assert "hunter2" not in output


@pytest.mark.parametrize(("mode", "taken"), [("transaction", False), ("session", True)])
async def test_pooler_is_no_way_to_migrate_unless_it_keeps_sessions(
    database: Database, open_directory: Path, mode: Mode, measured: Callable[[str], None], *, taken: bool
) -> None:
    """In transaction mode the runners' lock would stay on a connection that others use; no lock is left there."""
    async with pooling(database.cluster, open_directory, size=5, mode=mode) as port:
        runs = [python(*COMMAND, environment={"MIGRATIONS_URL": through(database, port)}) for _ in range(2)]
        results = await asyncio.gather(*runs)
        owner = await asyncpg.connect(database.url("postgres"))

        async def unlocked() -> bool:
            return not await owner.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")

        assert await eventually(unlocked, 5)
        await owner.close()

    measured(f"{mode} mode: two jobs ended with {' and '.join(str(status) for status, _ in results)}")
    for status, output in results:
        assert (status == 0) == taken, output
        assert ("is a pooler in transaction mode" in output) != taken
        assert "Traceback" not in output
