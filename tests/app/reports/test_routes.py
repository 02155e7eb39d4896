"""The summary counts one snapshot, in a pool of its own."""

from typing import Any

import asyncpg
import pytest
from sqlalchemy import event
from sqlalchemy.util.concurrency import await_

from pglifeguard.testing import ExhaustedPool
from tests.conftest import Database
from tests.service import Service, serving

INSERT = """
INSERT INTO patients (mrn, full_name, birth_date, created_at)
VALUES ($1, 'x', $2::text::date, $3::text::timestamptz)
"""


@pytest.fixture
async def owner(database: Database) -> Any:
    """Give a connection that writes behind the service's back."""
    connection = await asyncpg.connect(database.url("app_owner"))
    yield connection
    await connection.close()


async def test_summary_counts_by_decade_and_day(database: Database, service: Service, owner: Any) -> None:
    """Oldest first, days in UTC, and the parts add up to the whole."""
    for number, (born, created) in enumerate(
        [
            ("1979-12-31", "2026-01-02T23:30:00-01:00"),
            ("1980-01-01", "2026-01-02T00:00:00Z"),
            ("1989-12-31", "2026-01-02T23:59:59Z"),
        ]
    ):
        await owner.execute(INSERT, str(number), born, created)
    await database.cluster.wait_replayed()

    summary = (await service.client.get("/reports/summary")).json()

    assert summary["patients"] == 3
    assert summary["by_decade"] == [{"decade": 1970, "patients": 1}, {"decade": 1980, "patients": 2}]
    assert summary["by_day"] == [{"day": "2026-01-02", "patients": 2}, {"day": "2026-01-03", "patients": 1}]


async def test_summary_of_nothing_is_empty(service: Service) -> None:
    """No patients: no decades, no days."""
    summary = (await service.client.get("/reports/summary")).json()

    assert (summary["patients"], summary["by_decade"], summary["by_day"]) == (0, [], [])


async def test_summary_is_of_one_snapshot(database: Database, owner: Any) -> None:
    """A patient who is stored between two statements of the summary is in none of its parts."""
    async with serving(database.settings(replica=False)) as service:
        written: list[str] = []

        def write_between(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
            if "AS decade" in statement or "AS day" in statement:
                written.append(statement)
                # The listener runs inside SQLAlchemy's greenlet, where awaiting is spelled so.
                await_(owner.execute(INSERT, str(len(written)), "1980-01-01", "2026-01-01"))

        engine = service.databases.analytics.engine.sync_engine
        event.listen(engine, "before_cursor_execute", write_between)
        summary = (await service.client.get("/reports/summary")).json()

    assert len(written) == 2
    assert (summary["patients"], summary["by_decade"], summary["by_day"]) == (0, [], [])
    assert await owner.fetchval("SELECT count(*) FROM patients") == 2


async def test_summary_waits_in_a_pool_of_its_own(service: Service, exhausted_pool: ExhaustedPool) -> None:
    """With the analytics pool exhausted the summary is refused, and the other routes do not notice."""
    async with exhausted_pool("analytics"):
        refused = await service.client.get("/reports/summary")
        others = [await service.client.get(path) for path in ("/patients", "/patients?name=Ada")]

    assert (refused.status_code, refused.json()["code"]) == (503, "pool_exhausted")
    assert [answer.status_code for answer in others] == [200, 200]
