"""postgres/roles.sql: what each role may not do, tried as that role, and what no privilege can take from it."""

import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias

import asyncpg
import pytest

from local.cluster import Cluster
from local.setup import PROJECT, VARIABLES, create_roles
from pglifeguard.embedded.postgres import HOST
from pglifeguard.embedded.programs import ENVIRONMENT, programs
from pglifeguard.embedded.waiting import eventually

# Generic to the type checker alone.
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
NAME = "limits"
TABLES = """
CREATE TABLE things (id bigint GENERATED ALWAYS AS IDENTITY, name text);
CREATE FUNCTION whoami() RETURNS text LANGUAGE sql SECURITY DEFINER AS 'SELECT current_user';
CREATE FUNCTION shown() RETURNS text LANGUAGE sql AS 'SELECT current_user';
GRANT EXECUTE ON FUNCTION shown() TO app_ro;
CREATE SCHEMA further;
GRANT USAGE ON SCHEMA further TO app_rw, app_ro
"""
# Neither the service's roles nor the monitor's may do any of this, in whatever transaction.
NOBODYS = [
    "CREATE TABLE public.more ()",
    "CREATE TABLE further.more ()",
    "CREATE TEMPORARY TABLE more ()",
    "SELECT 1 AS one INTO TEMPORARY more",
    "CREATE SCHEMA more",
    "CREATE FUNCTION public.more() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE FUNCTION pg_temp.more() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE ROLE more",
    "TRUNCATE public.things",
    "ALTER TABLE public.things ADD more text",
    "DROP TABLE public.things",
    "CREATE INDEX ON public.things (name)",
    "SELECT setval('public.things_id_seq', 100)",
    "COMMENT ON TABLE public.things IS 'mine'",
    "COMMENT ON ROLE {role} IS 'postgres/roles.sql: {{}}'",
    "ALTER ROLE {role} SUPERUSER",
    "ALTER ROLE {role} VALID UNTIL 'infinity'",
    "ALTER ROLE {role} CONNECTION LIMIT 1",
    "ALTER ROLE app_owner PASSWORD 'known'",
    "ALTER ROLE app_owner SET statement_timeout = 0",
    "ALTER DATABASE limits SET statement_timeout = 0",
    "SET ROLE app_owner",
    "SET SESSION AUTHORIZATION app_owner",
    "SELECT lo_creat(-1)",
    "SELECT lo_create(0)",
    "SELECT lo_from_bytea(0, 'x')",
    "SELECT lo_put(1, 0, 'x')",
    "SELECT lowrite(0, 'x')",
    "SELECT lo_truncate(0, 0)",
    "SELECT lo_truncate64(0, 0)",
    "SELECT lo_unlink(1)",
    "SELECT lo_import('/etc/hostname')",
    "SELECT lo_export(1, '/tmp/written')",
    "SELECT pg_logical_emit_message(false, 'prefix', 'text')",
    "SELECT pg_logical_emit_message(true, 'prefix', 'text'::bytea)",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "COPY (SELECT 1) TO '/tmp/written'",
    "SELECT pg_read_file('PG_VERSION')",
    "SELECT pg_create_physical_replication_slot('more')",
    "SELECT pg_switch_wal()",
    "SELECT pg_reload_conf()",
    "SELECT pg_stat_reset()",
    "SELECT pg_create_restore_point('more')",
    "SELECT rolpassword FROM pg_authid",
    "SHOW primary_conninfo",
    "CHECKPOINT",
]
READERS = [
    "INSERT INTO public.things (name) VALUES ('new')",
    "UPDATE public.things SET name = 'changed'",
    "DELETE FROM public.things",
    "SELECT * FROM public.things FOR UPDATE",
    "LOCK TABLE public.things IN ROW EXCLUSIVE MODE",
    "SELECT nextval('public.things_id_seq')",
    "COPY public.things (name) FROM PROGRAM 'true'",
    "SELECT public.whoami()",
]
# What PostgreSQL lets every role do to itself, and to nobody else's rows, where it may write at all (docs/servers.md).
LEFT = [
    "ALTER ROLE app_ro PASSWORD 'another'",
    "ALTER ROLE app_ro SET default_transaction_read_only = off",
    "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC",
    "DROP OWNED BY app_ro",
]


@pytest.fixture
async def limited(cluster: Cluster) -> AsyncIterator[Cluster]:
    """Give servers with a database in which app_owner has made tables and functions, as migrations would."""
    await create_roles(cluster.primary, NAME, cluster.passwords)
    async with connected(cluster, "app_owner") as owner:
        await owner.execute(TABLES)
    await cluster.wait_replayed()
    yield cluster
    await cluster.drop_database(NAME)


@asynccontextmanager
async def connected(cluster: Cluster, role: str, server: Any = "primary") -> AsyncIterator[Connection]:
    """Connect as a role, for a moment."""
    connection = await asyncpg.connect(cluster.url(role, server=server, database=NAME))
    try:
        yield connection
    finally:
        await connection.close()


@pytest.mark.parametrize("role", ["app_rw", "app_ro", "monitor"])
async def test_what_nobody_may(limited: Cluster, role: str) -> None:
    """Not one of these is let through, though the role has lifted its read-only default."""
    statements = [each.format(role=role) for each in NOBODYS + (READERS if role != "app_rw" else [])]
    async with connected(limited, role) as connection:
        await connection.execute("SET default_transaction_read_only = off")

        answers = {each: await answer(connection, each) for each in statements}

    assert {each: said for each, said in answers.items() if said != "InsufficientPrivilegeError"} == {}


async def test_what_no_privilege_forbids(limited: Cluster) -> None:
    """A reader that lifts its default at the primary may yet change its own login, settings and rights."""
    async with connected(limited, "app_ro") as reader:
        held = [await answer(reader, each) for each in ("NOTIFY somebody", "SELECT pg_advisory_xact_lock(1)")]
        before = {each: await answer(reader, each) for each in LEFT}
        await reader.execute("SET default_transaction_read_only = off")
        lifted = {each: await answer(reader, each) for each in LEFT}

    assert held == ["done", "done"]  # Neither is a write, to PostgreSQL.
    assert set(before.values()) == {"ReadOnlySQLTransactionError"}
    assert set(lifted.values()) == {"done"}


@pytest.mark.parametrize("lift", ["SET default_transaction_read_only = off", "SET transaction_read_only = off"])
async def test_on_a_standby_nothing_is_left(limited: Cluster, lift: str) -> None:
    """Where the service reads, at a standby, the default cannot be lifted: no role writes there, itself included."""
    async with connected(limited, "app_ro", "replica") as reader:
        with suppress(asyncpg.PostgresError):
            await reader.execute(lift)
        answers = {each: await answer(reader, each) for each in [*LEFT, *NOBODYS, "NOTIFY somebody"]}
        with pytest.raises(asyncpg.FeatureNotSupportedError, match="during recovery"):
            await reader.execute("BEGIN READ WRITE")

    assert "done" not in answers.values(), answers


async def test_lines_of_the_hardening_keep_roles_out(limited: Cluster) -> None:
    """With the lines of docs/security.md for pg_hba.conf app_ro has the standby alone, and no role another database."""
    written = (PROJECT / "docs/security.md").read_text("utf-8")
    lines = "".join(f"{line}\n" for line in re.findall(r"^    (host .+ reject)$", written, re.MULTILINE))
    outside = [("app_ro", NAME)]
    outside += [(role, other) for role in ("app_owner", "app_rw", "app_ro") for other in ("postgres", "template1")]
    rules = limited.primary.data / "pg_hba.conf"
    before = rules.read_text(encoding="utf-8")

    async def let_in() -> list[tuple[str, str]]:
        return [(role, name) for role, name in outside if not await is_rejected(limited.url(role, database=name))]

    async with connected(limited, "postgres") as admin:
        at_first = await let_in()
        rules.write_text(lines + before, encoding="utf-8")
        try:
            await admin.execute("SELECT pg_reload_conf()")
            assert await eventually(lambda: is_rejected(limited.url("app_ro", database=NAME)), 5)
            left = await let_in()
            async with connected(limited, "app_ro", "replica") as reader, connected(limited, "app_rw") as writer:
                read = await reader.fetchval("SELECT count(*) FROM things")
                await writer.execute("INSERT INTO things (name) VALUES ('new')")
        finally:
            rules.write_text(before, encoding="utf-8")
            await admin.execute("SELECT pg_reload_conf()")

        async def as_before() -> bool:
            return not await is_rejected(limited.url("app_ro", database=NAME))

        assert await eventually(as_before, 5)

    assert at_first == outside
    assert (left, read) == ([], 0)


async def is_rejected(url: str) -> bool:
    """Return whether pg_hba.conf, as the server has loaded it, lets nobody in there."""
    try:
        connection = await asyncpg.connect(url)
    except asyncpg.InvalidAuthorizationSpecificationError:
        return True
    await connection.close()
    return False


async def test_functions_of_migrations_are_for_the_service(limited: Cluster) -> None:
    """app_rw may call what migrations make; everybody else what was granted to them."""
    async with connected(limited, "app_rw") as writer, connected(limited, "app_ro") as reader:
        assert await writer.fetchval("SELECT whoami()") == "app_owner"
        assert await reader.fetchval("SELECT shown()") == "app_ro"
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await reader.fetchval("SELECT whoami()")


async def test_monitor_sees_no_statement(limited: Cluster) -> None:
    """It learns each session's role, state and age by the names that exporters ask for, and its statement by none."""
    async with connected(limited, "postgres") as typist, connected(limited, "monitor") as monitor:
        await typist.execute("SELECT 'a password somebody typed'")
        (seen,) = await monitor.fetch("SELECT * FROM pg_stat_activity WHERE pid = $1", typist.get_server_pid())
        texts = [
            *await monitor.fetch("SELECT query FROM pg_stat_activity"),
            *await monitor.fetch("SELECT query FROM pg_catalog.pg_stat_activity WHERE pid <> pg_backend_pid()"),
            *await monitor.fetch("SELECT query FROM pg_stat_get_activity(NULL) WHERE pid <> pg_backend_pid()"),
            *await monitor.fetch("SELECT pg_stat_get_backend_activity(id) FROM pg_stat_get_backend_idset() AS id"),
        ]

    assert (seen["usename"], seen["state"], seen["wait_event"]) == ("postgres", "idle", "ClientRead")
    assert seen["state_change"] is not None
    assert [text for (text,) in texts if text is not None and "typed" in text] == []


async def test_monitor_sees_what_exporters_ask_for(limited: Cluster) -> None:
    """Streams, receivers, the log's size, databases, and the progress of a VACUUM, at whichever server has them."""
    async with connected(limited, "monitor") as primary, connected(limited, "monitor", "replica") as replica:
        streams = await primary.fetch("SELECT application_name, state, replay_lsn FROM pg_stat_replication")
        segments = await primary.fetchval("SELECT count(*) FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$'")
        sizes = await primary.fetch("SELECT pg_database_size(datname) FROM pg_database")
        progress = await primary.fetch("SELECT s.param1 FROM pg_stat_get_progress_info('VACUUM'::text) AS s")
        receivers = await replica.fetch("SELECT status, slot_name FROM pg_stat_wal_receiver")
    watch = await asyncpg.connect(limited.url("monitor", server="replica", database="postgres"))
    watched = await watch.fetchval("SELECT status FROM pg_stat_wal_receiver")  # As postgres/replica.sh asks.
    await watch.close()

    assert [(row["application_name"], row["state"]) for row in streams] == [("replica", "streaming")]
    assert streams[0]["replay_lsn"] is not None
    assert segments > 0
    assert min(size for (size,) in sizes) > 0
    assert progress == []
    assert [tuple(row) for row in receivers] == [("streaming", "replica")]
    assert watched == "streaming"


async def test_what_earlier_scripts_granted_is_taken(limited: Cluster) -> None:
    """A second run closes what was open in a database that an earlier version of the script has made."""
    async with connected(limited, "postgres") as admin:
        await admin.execute("GRANT pg_monitor TO monitor; GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC")
        async with connected(limited, "monitor") as earlier:
            await create_roles(limited.primary, NAME, limited.passwords)

            ended = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)"
            assert await eventually(lambda: admin.fetchval(ended, earlier.get_server_pid()), 5)
    async with connected(limited, "monitor") as monitor, connected(limited, "app_ro") as reader:
        await reader.execute("SET default_transaction_read_only = off")

        assert await monitor.fetchval("SELECT pg_has_role('pg_read_all_stats', 'MEMBER')") is False
        assert await answer(monitor, "SHOW primary_conninfo") == "InsufficientPrivilegeError"
        assert await answer(reader, "SELECT lo_create(0)") == "InsufficientPrivilegeError"


async def test_changed_settings_are_told_and_put_back(limited: Cluster) -> None:
    """A role that has changed its own settings is named at the next run; what the script sets is as it was."""
    async with connected(limited, "app_ro") as reader:
        await reader.execute("SET default_transaction_read_only = off")
        await reader.execute("ALTER ROLE app_ro SET default_transaction_read_only = off")
        await reader.execute("ALTER ROLE app_ro SET work_mem = '5MB'")
    try:
        said = said_by_roles(limited)
    finally:
        async with connected(limited, "postgres") as admin:
            await admin.execute("ALTER ROLE app_ro RESET work_mem")
    again = said_by_roles(limited)

    assert (
        "Settings of app_ro were changed since the last run: default_transaction_read_only=off, work_mem=5MB." in said
    )
    async with connected(limited, "app_ro") as reader:
        assert await reader.fetchval("SHOW default_transaction_read_only") == "on"
    assert again == ""


def said_by_roles(cluster: Cluster) -> str:
    """Run postgres/roles.sql as an operator does, and return what it said."""
    passwords = {variable: cluster.passwords[role] for role, variable in VARIABLES.items()}
    done = subprocess.run(
        [
            programs(cluster.account) / "psql", "--no-psqlrc", "--quiet", "--set=VERBOSITY=terse", "--host", HOST,
            "--port", str(cluster.primary.port), "--username", "postgres", "--dbname", NAME, "--file", "-",
        ],
        input=(PROJECT / "postgres/roles.sql").read_text("utf-8"), capture_output=True, text=True, check=True, cwd="/",
        timeout=30, env=ENVIRONMENT | {"PGPASSWORD": cluster.passwords["postgres"]} | passwords,
        **cluster.account.arguments,
    )  # fmt: skip
    return str(done.stdout + done.stderr)


async def answer(connection: Connection, statement: str) -> str:
    """Try a statement in a transaction that leaves nothing behind; return the name of its error, or "done"."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(statement)
    except asyncpg.PostgresError as error:
        return type(error).__name__
    else:
        return "done"
    finally:
        await transaction.rollback()
