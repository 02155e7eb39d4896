"""The schema goes up and down by Alembic, as the models say, one runner at a time."""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from app.models import Base, load_models
from migrations.__main__ import INI, reconnect, wait_replayed
from migrations.settings import MigrationSettings, load_migration_settings
from migrations.turn import ADVISORY_LOCK
from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi import IDEMPOTENCY_TABLE
from tests.conftest import Database
from tests.interpreter import ROOT, python

load_models()
TABLES = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
# A table with names that are long enough for lines to be too long.
MORE = """
from sqlalchemy import ForeignKey


class Ward(Base):
    __tablename__ = "wards"

    id: Mapped[int] = mapped_column(primary_key=True)
    patient_who_has_been_there_for_longest: Mapped[int | None] = mapped_column(ForeignKey("patients.id"))
"""
TABLES_OF_MODELS = len(Base.metadata.tables) + len(IDEMPOTENCY_TABLE.metadata.tables)


@pytest.fixture
async def owner(database: Database) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """Give a superuser's connection to the database that is migrated."""
    connection = await asyncpg.connect(database.url("postgres"))
    yield connection
    await connection.close()


async def alembic(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run Alembic and return its status and what it said."""
    return await python("-m", "alembic", *arguments, environment=environment)


async def test_down_and_up_again(database: Database, owner: "asyncpg.Connection[Any]") -> None:
    """The models match the newest version; down leaves nothing, and up makes it all again."""
    url = {"MIGRATIONS_URL": database.url("app_owner")}

    checked = await alembic("check", **url)
    down = await alembic("downgrade", "base", **url)
    left = await owner.fetchval(TABLES)
    up = await alembic("upgrade", "head", **url)
    again = await alembic("check", **url)

    for status, output in (checked, down, up, again):
        assert status == 0, output
    assert left == 0
    assert await owner.fetchval(TABLES) == TABLES_OF_MODELS


async def test_nobody_else_writes_which_versions_are_there(
    database: Database, owner: "asyncpg.Connection[Any]"
) -> None:
    """Each run takes what default privileges gave the service on Alembic's table; reading it stays."""
    await owner.execute("GRANT INSERT, UPDATE, DELETE ON alembic_version TO app_rw")

    status, output = await alembic("upgrade", "head", MIGRATIONS_URL=database.url("app_owner"))

    assert status == 0, output
    writer = await asyncpg.connect(database.url("app_rw"))
    assert await writer.fetchval("SELECT count(*) FROM alembic_version") == 1
    for statement in (
        "INSERT INTO alembic_version VALUES ('9999')",
        "UPDATE alembic_version SET version_num = '0001'",
        "DELETE FROM alembic_version",
        "TRUNCATE alembic_version",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await writer.execute(statement)
    await writer.close()


async def test_check_notices_a_difference(database: Database, owner: "asyncpg.Connection[Any]") -> None:
    """A table that is not as the models say is found: the check above can fail."""
    await owner.execute("ALTER TABLE patients ALTER COLUMN full_name DROP NOT NULL")

    status, output = await alembic("check", MIGRATIONS_URL=database.url("app_owner"))

    assert status != 0
    assert "full_name" in output


async def test_autogenerate_writes_the_next_migration_in_style(database: Database, tmp_path: Path) -> None:
    """It has the next number, the words that were said, and nothing that `make check` would refuse."""
    left_out = shutil.ignore_patterns("__pycache__")
    for name in ("app", "migrations", "pglifeguard"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    for name in ("alembic.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    with (tmp_path / "app/patients/models.py").open("a", encoding="utf-8") as models:
        models.write(MORE)
    numbers = [int(path.name[:4]) for path in (tmp_path / "migrations/versions").glob("[0-9]*.py")]

    status, output = await python(
        *("-m", "alembic", "-c", str(tmp_path / "alembic.ini"), "revision", "--autogenerate", "-m", "Add wards"),
        environment={"MIGRATIONS_URL": database.url("app_owner"), "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )

    assert status == 0, output
    made = tmp_path / f"migrations/versions/{max(numbers) + 1:04}_add_wards.py"
    text = made.read_text(encoding="utf-8")
    assert text.startswith(f'"""Add wards.\n\nRevision: {max(numbers) + 1:04}, after {max(numbers):04}.\n"""\n')
    assert 'op.create_table(\n        "wards",\n' in text
    for command in (["check"], ["format", "--check"]):
        judged = await python("-m", "ruff", *command, str(made), environment={}, cwd=tmp_path)
        assert judged[0] == 0, judged[1]


def test_there_is_one_head() -> None:
    """Two branches of migrations never lie side by side."""
    assert len(ScriptDirectory.from_config(Config(INI)).get_heads()) == 1


async def test_every_constraint_has_its_name(owner: "asyncpg.Connection[Any]") -> None:
    """A migration can drop any constraint and index by a name that the convention gives."""
    names = await owner.fetch("""
        SELECT c.conname AS name, c.conrelid::regclass::text AS table FROM pg_constraint c
        WHERE c.connamespace = 'public'::regnamespace AND c.contype <> 'n'
        UNION SELECT indexname, tablename FROM pg_indexes WHERE schemaname = 'public'
    """)

    found = {row["name"]: row["table"] for row in names if row["table"] != "alembic_version"}
    assert len(found) >= 6
    for name, table in found.items():
        assert re.fullmatch(rf"(pk|uq|ix|fk|ck|ex)_{table}(_\w+)?", name), name


async def test_times_have_a_zone_and_text_no_length(owner: "asyncpg.Connection[Any]") -> None:
    """Every time is a timestamptz, every text is a text."""
    types = await owner.fetch("""
        SELECT table_name || '.' || column_name AS name, data_type AS type FROM information_schema.columns
        WHERE table_schema = 'public' AND table_name <> 'alembic_version'
    """)

    assert types
    assert not [row["name"] for row in types if row["type"] in {"timestamp without time zone", "character varying"}]


@pytest.mark.parametrize("variable", ["MIGRATIONS_URL", "DATABASE_URL"])
async def test_either_url_will_do(database: Database, variable: str) -> None:
    """A plain postgresql:// URL in either variable is enough; MIGRATIONS_URL comes first."""
    url = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nowhere"} | {variable: database.url("app_owner")}

    status, output = await alembic("check", **url)

    assert status == 0, output


async def test_without_a_url_there_is_a_sentence() -> None:
    """Nothing is guessed."""
    status, output = await alembic("upgrade", "head")

    assert status != 0
    assert "Neither MIGRATIONS_URL nor DATABASE_URL is set" in output


@pytest.mark.parametrize("command", [("-m", "alembic", "upgrade", "head"), ("-m", "migrations")])
async def test_primary_is_found_among_several_hosts(database: Database, command: tuple[str, ...]) -> None:
    """A standby that is named first and a host that is gone are passed over, with the parameters of libpq."""
    cluster = database.cluster
    credentials = database.url("app_owner").removeprefix("postgresql://").partition("@")[0]
    hosts = f"127.0.0.1:{free_port()},127.0.0.1:{cluster.replica.port},127.0.0.1:{cluster.primary.port}"
    url = f"postgresql://{credentials}@{hosts}/{database.name}?sslmode=prefer&connect_timeout=5&channel_binding=prefer"

    status, output = await python(*command, environment={"MIGRATIONS_URL": url})

    assert status == 0, output


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ("sslmode=require", "The database cannot be reached: TLS with"),
        ("require_auth=none", "MIGRATIONS_URL: has the parameter require_auth, which is not taken"),
    ],
)
@pytest.mark.parametrize("command", [("-m", "alembic", "upgrade", "head"), ("-m", "migrations")])
async def test_url_that_will_not_do_is_a_sentence(
    database: Database, command: tuple[str, ...], parameters: str, sentence: str
) -> None:
    """Neither a TypeError nor a traceback: the reason, and no password."""
    url = f"{database.url('app_owner')}?{parameters}"

    status, output = await python(*command, environment={"MIGRATIONS_URL": url})

    assert status != 0
    assert sentence in output
    assert "Traceback" not in output
    assert database.cluster.passwords["app_owner"] not in output


async def test_standby_takes_no_migrations(database: Database) -> None:
    """A standby that is the only host is refused, also where there would be nothing to change."""
    status, output = await alembic("upgrade", "head", MIGRATIONS_URL=database.replica_url("app_owner"))

    assert status != 0
    assert "is a standby, which takes no migrations" in output


async def test_runners_take_turns(database: Database, owner: "asyncpg.Connection[Any]") -> None:
    """Three runs at once on an empty database: all succeed, and the tables are made once."""
    url = {"MIGRATIONS_URL": database.url("app_owner")}
    await alembic("downgrade", "base", **url)

    results = await asyncio.gather(*(alembic("upgrade", "head", **url) for _ in range(3)))

    assert [status for status, _ in results] == [0, 0, 0], results
    assert await owner.fetchval(TABLES) == TABLES_OF_MODELS


WAITING = (
    "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = $1 AND waitstart < clock_timestamp() - interval '0.4 s')"
)
# A runner that waits for its turn asks again and again and is idle in between: it waits for no lock of the server.
ASKING = """
SELECT count(*) FROM pg_stat_activity
WHERE application_name = 'lifeguard-migrations' AND datname = current_database()
  AND state = 'idle' AND query ~ 'pg_try_advisory_lock' AND backend_start < clock_timestamp() - interval '0.6 s'
"""


async def test_runner_waits_for_the_one_before_it(database: Database, owner: "asyncpg.Connection[Any]") -> None:
    """While somebody holds the lock a run changes nothing, longer than its role waits for locks; then it goes on."""
    await owner.execute(f'ALTER ROLE app_owner IN DATABASE "{database.name}" SET lock_timeout = 200')
    await owner.execute(f'ALTER ROLE app_owner IN DATABASE "{database.name}" SET idle_session_timeout = 200')
    await owner.execute("SELECT pg_advisory_lock($1)", ADVISORY_LOCK)
    run = asyncio.create_task(alembic("downgrade", "base", MIGRATIONS_URL=database.url("app_owner")))

    async def waits() -> bool:
        return bool(await owner.fetchval(ASKING))

    assert await eventually(waits, 20)
    meanwhile = await owner.fetchval(TABLES)
    await owner.execute("SELECT pg_advisory_unlock($1)", ADVISORY_LOCK)

    assert (await run)[0] == 0, await run
    assert meanwhile == TABLES_OF_MODELS
    assert await owner.fetchval(TABLES) == 0


@pytest.mark.parametrize("command", [("-m", "alembic", "upgrade", "head"), ("-m", "migrations")])
async def test_waiting_ends_with_a_sentence(
    database: Database, owner: "asyncpg.Connection[Any]", command: tuple[str, ...]
) -> None:
    """A runner whose turn does not come says who is at work, changes nothing, and shows no traceback."""
    await owner.execute("SELECT pg_advisory_lock($1)", ADVISORY_LOCK)

    status, output = await python(
        *command, environment={"MIGRATIONS_URL": database.url("app_owner"), "MIGRATIONS_WAIT_SECONDS": "0.3"}
    )

    assert status != 0
    assert f"waiting for the runner before this one: process {owner.get_server_pid()}" in output
    assert "Another runner still migrates this database after 0.3 s" in output
    assert "Traceback" not in output


async def test_lock_is_held_for_as_long_as_it_takes(database: Database, owner: "asyncpg.Connection[Any]") -> None:
    """The connection that holds the lock idles meanwhile, and no timeout of its role ends it."""
    limit = f'ALTER ROLE app_owner IN DATABASE "{database.name}" SET idle_in_transaction_session_timeout = 200'
    await owner.execute(limit)
    async with owner.transaction():
        await owner.execute("LOCK TABLE patients IN ACCESS SHARE MODE")
        run = asyncio.create_task(alembic("downgrade", "base", MIGRATIONS_URL=database.url("app_owner")))

        async def waits() -> bool:
            return bool(await owner.fetchval(WAITING, "relation"))

        assert await eventually(waits, 20)
        held = await owner.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted")

    assert held == 1
    assert (await run)[0] == 0, await run


async def test_migration_does_not_wait_long_for_a_table(database: Database, owner: "asyncpg.Connection[Any]") -> None:
    """A table that is in use makes the migration fail after lock_timeout, whole, instead of a queue behind it."""
    url = {"MIGRATIONS_URL": database.url("app_owner")}
    async with owner.transaction():
        await owner.execute("LOCK TABLE patients IN ACCESS SHARE MODE")

        status, output = await alembic("downgrade", "base", **url)

    assert status != 0
    assert "lock timeout" in output
    assert await owner.fetchval("SELECT count(*) FROM patients") == 0


async def test_without_a_pooler_there_is_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where PgBouncer's console is named does anybody connect after the migration."""
    monkeypatch.setenv("MIGRATIONS_URL", f"postgresql://nobody@127.0.0.1:{free_port()}/nowhere")

    await reconnect(load_migration_settings())


async def test_console_that_is_none_is_said(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL that ends in the service's database leads through PgBouncer to a server, which knows no RECONNECT."""
    monkeypatch.setenv("MIGRATIONS_URL", database.url("app_owner"))
    monkeypatch.setenv("PGBOUNCER_ADMIN_URL", database.url("app_owner"))

    with pytest.raises(CommandError, match=r"does not take RECONNECT .* PgBouncer's own database, pgbouncer"):
        await reconnect(load_migration_settings())


async def test_job_goes_on_where_the_position_is_not_told(
    database: Database,
    owner: "asyncpg.Connection[Any]",
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A server that forbids the function is like one that has none: the replicas are not waited for, and it is said."""
    monkeypatch.setenv("MIGRATIONS_URL", database.url("app_owner"))
    monkeypatch.setenv("PGBOUNCER_ADMIN_URL", database.url("app_owner"))
    await owner.execute("REVOKE EXECUTE ON FUNCTION pg_current_wal_insert_lsn() FROM PUBLIC")

    with pytest.raises(CommandError, match="RECONNECT"):
        await reconnect(load_migration_settings())

    assert "the replicas are not waited for: permission denied" in caplog.text


def replicas(monkeypatch: pytest.MonkeyPatch, url: str) -> MigrationSettings:
    """Return the settings of a job that has a replica to wait for."""
    monkeypatch.setenv("MIGRATIONS_URL", url)
    monkeypatch.setenv("DATABASE_REPLICA_URL", url)
    return load_migration_settings()


async def test_job_waits_until_the_replica_has_the_schema(
    database: Database,
    owner: "asyncpg.Connection[Any]",
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the replica at hand the wait ends, silently, only when it has replayed what was written last."""
    (to,) = replicas(monkeypatch, database.replica_url()).replicas
    replica = await asyncpg.connect(database.replica_url())
    await owner.execute("CREATE TABLE seen (n int)")
    written = await owner.fetchval("SELECT pg_current_wal_insert_lsn()::text")

    await wait_replayed(to, written)

    assert await replica.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'seen'") == 1
    assert caplog.text == ""
    await replica.close()


@pytest.mark.parametrize("far", ["FFFFFFFF/0", None])
async def test_replica_that_does_not_get_there_is_told(
    database: Database, far: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A replica that is far behind, or gone, holds no deployment up; a warning names it, without its password."""
    monkeypatch.setattr("migrations.__main__.REPLAY_SECONDS", 0.2)
    url = database.replica_url() if far else f"postgresql://app_ro:secret@127.0.0.1:{free_port()}/gone"
    (to,) = replicas(monkeypatch, url).replicas

    await wait_replayed(to, far or "0/0")

    assert f"{to.location} has not replayed the migration" in caplog.text
    assert str(to.parameters.password) not in caplog.text


@pytest.mark.parametrize("suffix", ["", "_FILE"])
def test_settings_of_migrations_come_from_variables_or_files(
    suffix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each of the job's URLs may be a file; two replicas are two to wait for."""
    given = {
        "MIGRATIONS_URL": "postgresql://o:p@primary/x",
        "DATABASE_REPLICA_URL": "postgresql://r:p@one/x,postgresql://r:p@two/x",
        "PGBOUNCER_ADMIN_URL": "postgresql://b:p@pooler:6432/pgbouncer",
    }
    for name, value in given.items():
        (tmp_path / name).write_text(value, encoding="utf-8")
        monkeypatch.setenv(name + suffix, str(tmp_path / name) if suffix else value)

    settings = load_migration_settings()

    assert settings.primary.location == "primary:5432/x"
    assert [replica.location for replica in settings.replicas] == ["one:5432/x", "two:5432/x"]
    assert settings.console is not None
    assert settings.console.location == "pooler:6432/pgbouncer"
