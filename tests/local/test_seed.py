"""Made-up rows are the same everywhere and never mix with anybody's own."""

import asyncpg

from local.seed import patients, seed, users
from tests.conftest import Database


def test_same_rows_on_every_machine() -> None:
    """A row depends on its number alone: a longer list begins with the shorter one."""
    assert patients(10) == patients(300)[:10]
    assert users(10) == users(300)[:10]


def test_what_must_be_unique_is() -> None:
    """However many are made, no record number and no address comes twice."""
    assert len({mrn for mrn, *_ in patients(5000)}) == 5000
    assert len({email for email, *_ in users(5000)}) == 5000


async def test_fills_an_empty_database_once(database: Database) -> None:
    """Seeding as app_rw fills the tables that there are; a second time it leaves them alone and says so."""
    first, second = await seed(database.url(), 50), await seed(database.url(), 60)

    connection = await asyncpg.connect(database.url("app_ro"))
    tables = await connection.fetch("SELECT relname FROM pg_class WHERE relname IN ('patients', 'users')")
    counts = [await connection.fetchval(f"SELECT count(*) FROM {table['relname']}") for table in tables]  # noqa: S608
    await connection.close()
    assert (first, second) == (True, False)
    assert counts in ([50], [50, 50])


async def test_each_test_has_a_database_of_its_own_on_both_servers(database: Database) -> None:
    """The database is migrated and empty, and the replica shows it before the test begins."""
    for url in (database.url(), database.replica_url()):
        connection = await asyncpg.connect(url)

        assert await connection.fetchval("SELECT count(*) FROM patients") == 0

        await connection.close()
