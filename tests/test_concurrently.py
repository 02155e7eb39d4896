"""An index is built CONCURRENTLY as Alembic writes it, alone and beside others, and no half of it stays unseen."""

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import pytest

from migrations.__main__ import INI
from pglifeguard.embedded.waiting import eventually
from tests.conftest import Database
from tests.interpreter import python
from tests.test_migrations import ASKING

Connection: TypeAlias = "asyncpg.Connection[Any]"
COMMANDS = [("-m", "alembic", "upgrade", "head"), ("-m", "migrations")]
VERSION = '''"""Made by a test."""

from alembic import op

revision = "{revision}"
down_revision = "{before}"
branch_labels = depends_on = None


def upgrade() -> None:
    """Apply."""
{upgrade}


def downgrade() -> None:
    """Take back."""
'''
INDEX = """
    with op.get_context().autocommit_block():
        op.create_index(
            "ix_patients_birth", "patients", ["birth_date"], postgresql_concurrently=True, if_not_exists=True
        )
"""
UNIQUE = """
    with op.get_context().autocommit_block():
        op.create_index(
            "uq_patients_birth", "patients", ["birth_date"],
            unique=True, postgresql_concurrently=True, if_not_exists=True,
        )
"""
VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass($1)"
# A statement CONCURRENTLY waits for the end of older transactions, which is no lock of a table.
BEHIND_A_TRANSACTION = """
SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'virtualxid'
AND query ~ 'CONCURRENTLY' AND query_start < clock_timestamp() - interval '0.4 s' AND pid <> $1
"""


class Copy:
    """A copy of the project's migrations with versions of its own."""

    def __init__(self, directory: Path, database: Database) -> None:
        self.directory = directory
        self.environment = {"MIGRATIONS_URL": database.url("app_owner"), "PYTHONPATH": str(INI.parent)}
        shutil.copy(INI, directory)
        shutil.copytree(INI.parent / "migrations", directory / "migrations")
        # What a test waits for is to be longer than this, and a test is not to wait for 4 s.
        patience = directory / "migrations" / "concurrently.py"
        text = patience.read_text(encoding="utf-8")
        assert 'LOCK_TIMEOUT = "4s"' in text
        patience.write_text(text.replace('LOCK_TIMEOUT = "4s"', 'LOCK_TIMEOUT = "200ms"'), encoding="utf-8")
        self.last = self._head = max(file.name for file in (directory / "migrations" / "versions").glob("0*.py"))[:4]

    def add(self, upgrade: str) -> None:
        """Add a version after the last one."""
        before, self._head = self._head, f"{int(self._head) + 1:04}"
        text = VERSION.format(revision=self._head, before=before, upgrade=upgrade)
        (self.directory / "migrations" / "versions" / f"{self._head}_test.py").write_text(text, encoding="utf-8")

    async def run(self, *command: str) -> tuple[int, str]:
        """Run a command of Python here, and return its status and what it said."""
        return await python(*(command or COMMANDS[0]), cwd=self.directory, environment=self.environment)


@pytest.fixture
def copy(database: Database, tmp_path: Path) -> Copy:
    """Give migrations that a test may add to."""
    return Copy(tmp_path, database)


@pytest.fixture
async def owner(database: Database) -> AsyncIterator[Connection]:
    """Give a superuser's connection to the database that is migrated."""
    connection = await asyncpg.connect(database.url("postgres"))
    yield connection
    await connection.close()


async def behind_a_transaction(owner: Connection, *, not_process: int = 0) -> int:
    """Wait for the process whose statement CONCURRENTLY waits for an older transaction, longer than lock_timeout."""
    found: list[int] = []

    async def waits() -> bool:
        found[:] = [row["pid"] for row in await owner.fetch(BEHIND_A_TRANSACTION, not_process)]
        return bool(found)

    assert await eventually(waits, 20)
    return found[0]


@pytest.mark.parametrize("command", COMMANDS)
async def test_index_is_built_alone(copy: Copy, owner: Connection, command: tuple[str, ...]) -> None:
    """The way that Alembic's manual shows works, by either command, and the index is valid."""
    copy.add(INDEX)

    status, output = await copy.run(*command)

    assert status == 0, output
    assert await owner.fetchval(VALID, "ix_patients_birth") is True


async def test_index_is_built_with_others_waiting(database: Database, copy: Copy, owner: Connection) -> None:
    """Runners that wait their turn, and a transaction that is older and outlasts lock_timeout, do not end it."""
    copy.add(INDEX)
    old = await asyncpg.connect(database.url("app_rw"))
    await old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await old.execute("SELECT count(*) FROM patients")
    first = asyncio.create_task(copy.run())
    await behind_a_transaction(owner)
    others = [asyncio.create_task(copy.run()) for _ in range(2)]

    async def both_ask() -> bool:
        return bool(await owner.fetchval(ASKING) == len(others))

    assert await eventually(both_ask, 30)
    await old.close()
    results = await asyncio.gather(first, *others)

    assert [status for status, _ in results] == [0, 0, 0], results
    assert await owner.fetchval(VALID, "ix_patients_birth") is True
    assert "waiting for the runner before this one: process" in results[1][1]
    assert "CREATE INDEX CONCURRENTLY" in results[1][1]


async def test_role_does_not_end_a_long_statement(database: Database, copy: Copy, owner: Connection) -> None:
    """The limits of a role that is made for requests are not those of a migration."""
    for name in ("statement_timeout", "transaction_timeout"):
        await owner.execute(f'ALTER ROLE app_owner IN DATABASE "{database.name}" SET {name} = 150')
    copy.add('    op.execute("SELECT pg_sleep(0.5)")')

    status, output = await copy.run()

    assert status == 0, output


async def test_siblings_work_too(copy: Copy, owner: Connection) -> None:
    """REINDEX and DROP INDEX CONCURRENTLY and a constraint that is validated later, after a statement of their own."""
    copy.add(INDEX)
    copy.add("""
    op.execute("ALTER TABLE patients ADD CONSTRAINT ck_patients_birth CHECK (birth_date > '1800-01-01') NOT VALID")
    op.execute("CREATE TABLE parts (n int) PARTITION BY LIST (n)")
    op.execute("CREATE TABLE part PARTITION OF parts FOR VALUES IN (1)")
    with op.get_context().autocommit_block():
        op.execute("ALTER TABLE patients VALIDATE CONSTRAINT ck_patients_birth")
        op.execute("REINDEX INDEX CONCURRENTLY ix_patients_birth")
        op.execute("REINDEX (CONCURRENTLY) TABLE patients")
        op.execute("ALTER TABLE parts DETACH PARTITION part CONCURRENTLY")
        op.drop_index("ix_patients_birth", postgresql_concurrently=True, if_exists=True)
    op.execute("CREATE TABLE patience AS SELECT current_setting('lock_timeout') AS now")
""")

    status, output = await copy.run()

    assert status == 0, output
    assert await owner.fetchval("SELECT to_regclass('ix_patients_birth')") is None
    assert await owner.fetchval("SELECT convalidated FROM pg_constraint WHERE conname = 'ck_patients_birth'") is True
    assert await owner.fetchval("SELECT now FROM patience") == "200ms", "for other locks it is impatient again"


async def test_lock_timeout_of_ones_own_is_kept(copy: Copy, owner: Connection) -> None:
    """A migration that has chosen how long to wait waits so long."""
    copy.add("""
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = '7s'")
        op.execute("CREATE INDEX CONCURRENTLY ix_patients_birth ON patients (birth_date)")
    op.execute("CREATE TABLE patience AS SELECT current_setting('lock_timeout') AS now")
""")

    status, output = await copy.run()

    assert status == 0, output
    assert await owner.fetchval("SELECT now FROM patience") == "7s"


async def test_inside_a_transaction_it_says_what_to_write(copy: Copy) -> None:
    """Without the block there is a sentence and no traceback."""
    copy.add('    op.create_index("ix_patients_birth", "patients", ["birth_date"], postgresql_concurrently=True)')

    status, output = await copy.run()

    assert status != 0
    assert "with op.get_context().autocommit_block():" in output
    assert "Traceback" not in output


async def test_what_only_mentions_it_is_left_alone(copy: Copy, owner: Connection) -> None:
    """A function that refreshes a view CONCURRENTLY is made in a transaction, as every other."""
    copy.add("""
    op.execute("CREATE MATERIALIZED VIEW names AS SELECT id, full_name FROM patients")
    op.execute("CREATE UNIQUE INDEX uq_names ON names (id)")
    op.execute("REFRESH MATERIALIZED VIEW CONCURRENTLY names")
    op.execute(
        "CREATE FUNCTION refresh() RETURNS void LANGUAGE sql AS $$ REFRESH MATERIALIZED VIEW CONCURRENTLY names $$"
    )
    op.execute("ALTER TABLE patients ADD COLUMN detach_partition text DEFAULT 'CONCURRENTLY'")
""")

    status, output = await copy.run()

    assert status == 0, output
    assert await owner.fetchval("SELECT to_regproc('refresh') IS NOT NULL")


async def test_script_for_a_database_administrator_is_plain_sql(copy: Copy) -> None:
    """`--sql` connects nowhere and writes the statements, each that is CONCURRENTLY outside a transaction."""
    copy.add(INDEX)
    copy.environment["MIGRATIONS_URL"] = ""

    status, output = await copy.run("-m", "alembic", "upgrade", f"{copy.last}:head", "--sql")

    assert status == 0, output
    before, _, after = output.partition("CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_patients_birth")
    assert before.rstrip().endswith("COMMIT;")
    assert "BEGIN;" in after


@pytest.mark.parametrize("name", ["uq_patients_birth", '"Uq patients"'])
async def test_failed_build_is_told_and_mended(copy: Copy, owner: Connection, name: str) -> None:
    """A unique index over rows that are not leaves an invalid one: it is named, and the next run replaces it."""
    add = "INSERT INTO patients (mrn, full_name, birth_date) VALUES ($1, 'Name', '2000-01-01')"
    for number in range(2):
        await owner.execute(add, f"mrn-{number}")
    copy.add(UNIQUE.replace('"uq_patients_birth"', f"'{name.strip(chr(34))}'"))

    failed = await copy.run()
    left = await owner.fetchval(VALID, name)
    await owner.execute("DELETE FROM patients WHERE mrn = 'mrn-1'")
    mended = await copy.run()

    assert failed[0] != 0
    assert f"index {name} is invalid: a statement CONCURRENTLY failed" in failed[1]
    assert left is False
    assert mended[0] == 0, mended[1]
    assert f"index {name} is the invalid rest of a build that failed: it is dropped and built anew" in mended[1]
    assert await owner.fetchval(VALID, name) is True


async def test_killed_runner_holds_nobody_up(database: Database, copy: Copy, owner: Connection) -> None:
    """The next one waits until the server has ended the dead one's statement, and builds the index anew."""
    limit = f'ALTER ROLE app_owner IN DATABASE "{database.name}" SET client_connection_check_interval = 100'
    await owner.execute(limit)
    copy.add(INDEX)
    old = await asyncpg.connect(database.url("app_rw"))
    await old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await old.execute("SELECT count(*) FROM patients")
    killed = await asyncio.create_subprocess_exec(
        sys.executable, *COMMANDS[0],
        cwd=copy.directory, env=os.environ | copy.environment,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        process = await behind_a_transaction(owner)
    finally:
        killed.kill()
        await killed.wait()

    next_one = asyncio.create_task(copy.run())
    await behind_a_transaction(owner, not_process=process)
    await old.close()
    status, output = await next_one

    assert status == 0, output
    assert "ix_patients_birth is the invalid rest of a build that failed" in output
    assert await owner.fetchval(VALID, "ix_patients_birth") is True
