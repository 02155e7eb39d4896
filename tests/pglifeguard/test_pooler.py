"""Behind a pooler that does not keep prepared statements the service says so, at its start and in its answers."""

import asyncio
import logging
import time
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy.engine import make_url

from local.waiting import eventually
from pglifeguard.database import MUTE_SECONDS
from pglifeguard.pooler import WARNING
from tests.chaos.pooler import pooling, program, statement_cache_size
from tests.conftest import Database, Execute
from tests.service import ADA, serving

needs_pgbouncer = pytest.mark.skipif(program() is None, reason="PgBouncer is not installed: apt-get install pgbouncer")


def through(database: Database, port: int) -> str:
    """Return the URL of the database behind the pooler."""
    return make_url(database.url()).set(port=port).render_as_string(hide_password=False)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """List the databases that were said to be behind a pooler that forgets."""
    return [vars(record)["database"] for record in caplog.records if record.msg == WARNING]


@needs_pgbouncer
async def test_pooler_that_forgets_statements_is_named(
    database: Database, open_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names each database behind it once, and a request that meets it is told what is to be set."""
    async with pooling(database.cluster, open_directory, size=2, keeps_statements=False) as port:
        url = through(database, port)
        one = {"url": url, "pool_size": 1, "max_overflow": 0}
        settings = database.settings(replica=False, primary=one, analytics=one, monitor_interval_seconds=60)
        async with serving(settings) as service:
            assert (await service.client.get("/patients")).status_code == 200
            # Another client keeps the server connection on which the statement was prepared.
            other = await asyncpg.connect(url, statement_cache_size=0)
            await other.execute("BEGIN; SELECT 1")

            answer = await service.client.get("/patients")

            await other.close()
            for database_of_service in service.databases.all():
                await database_of_service.monitor.probe()

    assert (answer.status_code, answer.json()["code"]) == (500, "statements_not_kept")
    assert "DATABASE_STATEMENT_CACHE_SIZE=0" in answer.json()["detail"]
    assert sorted(warnings(caplog)) == ["analytics", "primary"]


@needs_pgbouncer
async def test_pooler_that_is_told_of_needs_no_word(
    database: Database, open_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a cache of statements, or behind a pooler that keeps them, nothing is said and requests are answered."""
    caplog.set_level(logging.WARNING)
    async with pooling(database.cluster, open_directory, size=2) as port:
        one = {"url": through(database, port), "statement_cache_size": statement_cache_size()}
        async with serving(database.settings(replica=False, primary=one, analytics=one)) as service:
            answers = [(await service.client.get("/patients")).status_code for _ in range(5)]

    assert answers == [200] * 5
    assert not warnings(caplog)


@needs_pgbouncer
async def test_queue_of_a_pooler_is_no_mute_server(database: Database, open_directory: Path, execute: Execute) -> None:
    """When statements that wait for a lock hold all of PgBouncer's connections, no look is answered; nothing is cut."""
    async with pooling(database.cluster, open_directory, size=2) as port:
        url = through(database, port)
        one = {"url": url, "statement_cache_size": statement_cache_size(), "pool_min_size": 0}
        async with serving(database.settings(replica=False, primary=one, analytics=one)) as service:
            path = (await service.client.post("/patients", json=ADA)).headers["location"]
            await execute("BEGIN")
            await execute("SELECT 1 FROM patients FOR UPDATE")
            changes = [asyncio.create_task(service.client.patch(path, json={"full_name": "Ada"})) for _ in range(2)]

            async def mute() -> bool:
                return time.monotonic() - service.databases.primary._answered_at > 1.5 * MUTE_SECONDS

            assert await eventually(mute, 30)
            await execute("COMMIT")

            assert [(await change).status_code for change in changes] == [200, 200]


async def test_server_itself_needs_no_word(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Straight to the server, names are kept."""
    async with serving(database.settings()) as service:
        assert await eventually(lambda: examined(service.databases.primary.monitor), 5)

    assert not warnings(caplog)


async def test_server_that_does_not_tell_is_healthy(
    database: Database, execute: Execute, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the question fails, as where there is no such view, the service is as ready as elsewhere."""
    await execute("CREATE SCHEMA without")
    await execute("GRANT USAGE ON SCHEMA without TO PUBLIC")
    await execute("CREATE VIEW without.pg_prepared_statements AS SELECT (1 / (random()::int * 0))::text AS name")
    await execute("GRANT SELECT ON without.pg_prepared_statements TO PUBLIC")
    await execute(f"ALTER DATABASE {database.name} SET search_path = without, pg_catalog, public")
    caplog.set_level(logging.WARNING)

    async with serving(database.settings(replica=False)) as service:
        assert await eventually(lambda: examined(service.databases.primary.monitor), 5)
        assert (await service.client.get("/patients")).status_code == 200
        assert (await service.client.get("/health/ready")).status_code == 200

    assert not warnings(caplog)


async def examined(monitor: object) -> bool:
    """Tell whether the question was asked."""
    return bool(vars(monitor)["_pooler_examined"])
