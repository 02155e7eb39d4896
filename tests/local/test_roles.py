"""postgres/roles.sql: who may do what, and for how long."""

from collections.abc import AsyncIterator
from typing import TypeAlias

import asyncpg
import pytest

from local.cluster import Cluster
from local.setup import PROJECT, create_roles
from pglifeguard.embedded.account import EmbeddedError
from pglifeguard.embedded.directories import run
from pglifeguard.embedded.postgres import HOST

# Generic to the type checker alone.
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
NAME = "roles"


@pytest.fixture
async def tables(cluster: Cluster) -> AsyncIterator[str]:
    """Give a database in which app_owner has made a table, as a migration would."""
    await cluster.create_database(NAME)
    owner = await asyncpg.connect(cluster.url("app_owner", database=NAME))
    await owner.execute("CREATE TABLE things (id bigint GENERATED ALWAYS AS IDENTITY, tag serial, name text)")
    await owner.close()
    await cluster.wait_replayed()
    yield NAME
    await cluster.drop_database(NAME)


@pytest.fixture
async def connect(cluster: Cluster, tables: str) -> AsyncIterator[dict[str, Connection]]:
    """Give one connection to the primary for each role that may log in there."""
    roles = ("app_owner", "app_rw", "app_ro", "monitor", "pgbouncer", "postgres")
    connections = {role: await asyncpg.connect(cluster.url(role, database=tables)) for role in roles}
    yield connections
    for connection in connections.values():
        await connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO things (name) VALUES ('new')",
        "UPDATE things SET name = 'changed'",
        "DELETE FROM things",
    ],
)
async def test_reader_cannot_write_even_when_it_leaves_read_only(
    connect: dict[str, Connection], statement: str
) -> None:
    """The default of app_ro is a courtesy that a session can undo; the privileges are the lock."""
    reader = connect["app_ro"]

    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await reader.execute(statement)
    await reader.execute("SET default_transaction_read_only = off")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await reader.execute(statement)


async def test_writer_writes_rows_and_no_tables(connect: dict[str, Connection]) -> None:
    """app_rw has the four verbs on tables made after its privileges were, and no way to change their shape."""
    writer = connect["app_rw"]

    await writer.execute("INSERT INTO things (name) VALUES ('new')")
    await writer.execute("UPDATE things SET name = 'changed'")
    assert await writer.fetchval("SELECT name FROM things") == "changed"
    await writer.execute("DELETE FROM things")

    for statement in (
        "CREATE TABLE more ()",
        "ALTER TABLE things ADD more text",
        "DROP TABLE things",
        "TRUNCATE things",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await writer.execute(statement)


@pytest.mark.parametrize("role", ["monitor", "pgbouncer"])
async def test_those_who_look_on_see_no_rows(connect: dict[str, Connection], role: str) -> None:
    """Neither statistics nor pooling needs a patient's data."""
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connect[role].execute("SELECT * FROM public.things")


@pytest.mark.parametrize("role", ["monitor", "app_rw", "app_ro"])
async def test_sessions_of_others_are_seen(connect: dict[str, Connection], role: str) -> None:
    """Exporters and the service see what other roles' sessions do, to say who blocks whom; app_owner does not."""
    statement = "SELECT state FROM pg_stat_activity WHERE pid = $1"
    watched = connect["postgres"]

    assert await connect[role].fetchval(statement, watched.get_server_pid()) == "idle"
    assert await connect["app_owner"].fetchval(statement, watched.get_server_pid()) is None


async def test_service_does_not_see_settings_with_secrets(connect: dict[str, Connection]) -> None:
    """What pg_monitor would show, the replica's password in primary_conninfo, stays hidden from the service."""
    statement = "SELECT current_setting('primary_conninfo')"

    for role in ("app_rw", "app_ro"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connect[role].fetchval(statement)


async def test_replicator_replicates_and_does_nothing_else(cluster: Cluster) -> None:
    """A role that may copy every byte has no plain login."""
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError, match="rejects connection"):
        await asyncpg.connect(cluster.url("replicator"))


async def test_pooler_learns_the_hash_of_pooled_roles_alone(connect: dict[str, Connection]) -> None:
    """auth_query answers for the roles that may come through PgBouncer, and for pgbouncer only."""
    lookup = "SELECT username, password FROM pgbouncer.get_auth($1)"
    found = {role: await connect["pgbouncer"].fetchrow(lookup, role) for role in ("app_rw", "app_ro", "app_owner")}
    hidden = await connect["pgbouncer"].fetchrow(lookup, "postgres")

    assert found["app_rw"] is not None
    assert found["app_rw"]["password"].startswith("SCRAM-SHA-256$")
    assert found["app_ro"] is not None
    assert (found["app_owner"], hidden) == (None, None)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connect["app_rw"].fetchrow(lookup, "app_rw")


async def test_every_password_is_scram(connect: dict[str, Connection]) -> None:
    """No role has an MD5 hash, and none has none."""
    rows = await connect["postgres"].fetch("SELECT rolpassword FROM pg_authid WHERE rolcanlogin")

    assert len(rows) == 7
    assert all(row["rolpassword"].startswith("SCRAM-SHA-256$") for row in rows)


async def test_wrong_password_is_refused(cluster: Cluster) -> None:
    """Nobody comes in by trust, not even from this machine."""
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(cluster.url("app_ro").replace(cluster.passwords["app_ro"], "guessed"))


@pytest.mark.parametrize("server", ["primary", "replica"])
@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("app_rw", {"statement_timeout": "30s", "idle_in_transaction_session_timeout": "1min"}),
        (
            "app_ro",
            {
                "statement_timeout": "30s",
                "idle_in_transaction_session_timeout": "1min",
                "default_transaction_read_only": "on",
            },
        ),
        ("app_owner", {"lock_timeout": "4s", "idle_in_transaction_session_timeout": "1min"}),
        ("monitor", {"statement_timeout": "10s", "default_transaction_read_only": "on"}),
    ],
)
async def test_timeouts_come_with_the_role(cluster: Cluster, server: str, role: str, expected: dict[str, str]) -> None:
    """A session that sets nothing has them, on either server, because they are the role's."""
    common = {"jit": "off", "TimeZone": "UTC", "client_connection_check_interval": "5s"}
    connection = await asyncpg.connect(cluster.url(role, server="replica" if server == "replica" else "primary"))

    rows = await connection.fetch("SELECT name, current_setting(name) AS value, source FROM pg_settings")

    await connection.close()
    settings = {row["name"]: row["value"] for row in rows if row["source"] == "user"}
    assert settings.items() >= (common | expected).items()


async def test_roles_can_be_run_again(cluster: Cluster, tables: str) -> None:
    """The script changes a password in place and keeps tables and privileges."""
    await create_roles(cluster.primary, tables, cluster.passwords | {"monitor": "changed"})
    changed = cluster.url("monitor").replace(cluster.passwords["monitor"], "changed")

    await (await asyncpg.connect(changed)).close()
    await create_roles(cluster.primary, tables, cluster.passwords)

    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(changed)
    writer = await asyncpg.connect(cluster.url("app_rw", database=tables))
    await writer.execute("INSERT INTO things (name) VALUES ('still')")
    await writer.close()


async def test_what_a_migration_has_closed_stays_closed(cluster: Cluster, tables: str) -> None:
    """A second run opens nothing that was revoked, and grants on a table that it finds without any privileges."""
    owner = await asyncpg.connect(cluster.url("app_owner", database=tables))
    await owner.execute(
        "REVOKE ALL ON things FROM app_ro; CREATE TABLE closed (); REVOKE ALL ON closed FROM app_rw, app_ro"
    )
    admin = await asyncpg.connect(cluster.url("postgres", database=tables))
    await admin.execute("CREATE TABLE public.strange ()")

    await create_roles(cluster.primary, tables, cluster.passwords)

    asked = "SELECT has_table_privilege($1, 'public.' || $2, $3)"
    open_to = {
        (role, table)
        for role, privilege in (("app_rw", "INSERT"), ("app_ro", "SELECT"))
        for table in ("things", "closed", "strange")
        if await admin.fetchval(asked, role, table, privilege)
    }
    assert open_to == {("app_rw", "things"), ("app_rw", "strange"), ("app_ro", "strange")}
    await owner.close()
    await admin.close()


async def test_first_run_opens_what_was_there_before_it(cluster: Cluster, tables: str) -> None:
    """A database that had tables before it had these roles is opened whole; Alembic's table is not."""
    admin = await asyncpg.connect(cluster.url("postgres", database=tables))
    await admin.execute("""
        ALTER DEFAULT PRIVILEGES FOR ROLE app_owner IN SCHEMA public REVOKE ALL ON TABLES FROM app_rw, app_ro;
        ALTER DEFAULT PRIVILEGES FOR ROLE app_owner IN SCHEMA public REVOKE ALL ON SEQUENCES FROM app_rw;
        CREATE TABLE alembic_version (version_num text);
        CREATE TABLE older (id serial);
        GRANT SELECT ON older TO monitor
    """)

    await create_roles(cluster.primary, tables, cluster.passwords)

    writer = await asyncpg.connect(cluster.url("app_rw", database=tables))
    reader = await asyncpg.connect(cluster.url("app_ro", database=tables))
    await writer.execute("INSERT INTO older DEFAULT VALUES")
    assert await reader.fetchval("SELECT count(*) FROM older") == 1
    assert await writer.fetchval("SELECT count(*) FROM alembic_version") == 0
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await writer.execute("DELETE FROM alembic_version")
    for connection in (admin, writer, reader):
        await connection.close()


async def test_server_settings_are_the_shared_file(connect: dict[str, Connection]) -> None:
    """What compose will use is what these tests run on; a value that PostgreSQL refused would be missing here."""
    rows = await connect["postgres"].fetch("SELECT name, error FROM pg_file_settings WHERE error IS NOT NULL")
    settings = await connect["postgres"].fetchrow(
        "SELECT current_setting('max_connections') AS connections, current_setting('wal_level') AS wal_level, "
        "current_setting('log_parameter_max_length') AS parameters"
    )

    assert rows == []
    assert settings is not None
    assert tuple(settings) == ("100", "replica", "0")


async def test_password_that_is_missing_is_named(cluster: Cluster, tables: str) -> None:
    """By the variable that has to be set, and not by an error in the syntax; nothing is changed by then."""
    connection = await asyncpg.connect(cluster.url("postgres"))
    before = await connection.fetch("SELECT oid, rolpassword FROM pg_authid ORDER BY oid")

    async def told(**passwords: str) -> str:
        with pytest.raises(EmbeddedError) as refused:
            await run(
                cluster.primary.account,
                "psql", "--no-psqlrc", "--quiet", "--host", HOST, "--port", str(cluster.primary.port),
                "--username", "postgres", "--dbname", tables, "--file", "-",
                stdin=(PROJECT / "postgres/roles.sql").read_text(encoding="utf-8"),
                PGPASSWORD=cluster.primary.password, **passwords,
            )  # fmt: skip
        return str(refused.value)

    given = {"APP_OWNER_PASSWORD": "o", "APP_RW_PASSWORD": "w", "APP_RO_PASSWORD": "r"}
    some, none = await told(**given), await told()
    # An empty one would take away the one that is there, in silence.
    rest = dict.fromkeys(("MONITOR_PASSWORD", "REPLICATOR_PASSWORD", "PGBOUNCER_PASSWORD"), "x")
    empty = await told(**given | rest | {"APP_RW_PASSWORD": ""})
    after = await connection.fetch("SELECT oid, rolpassword FROM pg_authid ORDER BY oid")
    await connection.close()

    assert "export MONITOR_PASSWORD, REPLICATOR_PASSWORD, PGBOUNCER_PASSWORD: each role gets its password" in some
    assert "export APP_OWNER_PASSWORD, APP_RW_PASSWORD, APP_RO_PASSWORD, MONITOR_PASSWORD" in none
    assert "export APP_RW_PASSWORD: each role gets its password" in empty
    assert "syntax" not in some + none
    assert after == before
