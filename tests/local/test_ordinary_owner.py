"""postgres/roles.sql as the owner of a database runs it who is no superuser, as on a managed server."""

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from app.settings import Settings
from local.cluster import Cluster
from local.setup import PROJECT, VARIABLES
from pglifeguard.embedded.directories import initialise, open_directory
from pglifeguard.embedded.postgres import HOST
from pglifeguard.embedded.programs import ENVIRONMENT, programs
from tests.service import serving

NAME = "managed"
PASSWORD = "of-the-owner"
PATIENT = {"mrn": "A-1", "full_name": "Ada", "birth_date": "1980-01-01"}
# What such an owner has no password for.
LEFT_OUT = {"replicator", "pgbouncer"}


class Managed:
    """A server whose superuser is somebody else, and what its owner does there."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self._script = directory / "roles.sql"
        self._script.write_bytes((PROJECT / "postgres" / "roles.sql").read_bytes())
        self._script.chmod(0o644)

    def url(self, role: str) -> str:
        """Return where the service's database is."""
        return self.cluster.url(role, database=NAME)

    async def execute(self, *statements: str, database: str = NAME) -> None:
        """Run statements as the superuser."""
        connection = await self.cluster.primary.connect(database)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()

    def roles(self, user: str = "dba", database: str = NAME, **passwords: str) -> tuple[int, str]:
        """Run the script as an operator does, and return its status and what it said."""
        account = self.cluster.account
        given = {role: self.cluster.passwords[role] for role in VARIABLES.keys() - LEFT_OUT} | passwords
        done = subprocess.run(
            [
                programs(account) / "psql", "--no-psqlrc", "--quiet", "--host", HOST,
                "--port", str(self.cluster.primary.port), "--username", user, "--dbname", database,
                "--file", self._script,
            ],
            capture_output=True, text=True, check=False, cwd="/", timeout=30,
            env=ENVIRONMENT | {"PGPASSWORD": PASSWORD} | {VARIABLES[role]: word for role, word in given.items()},
            **account.arguments,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
async def managed() -> AsyncIterator[Managed]:
    """Give a server on which a CREATEROLE owner without superuser has made the roles, twice, and migrated."""
    with open_directory() as directory:
        cluster = Cluster(directory)
        await initialise(cluster.primary, cluster.rules)
        await cluster.primary.start()
        try:
            here = Managed(cluster, directory)
            await here.execute(f"CREATE ROLE dba LOGIN CREATEROLE PASSWORD '{PASSWORD}'", database="postgres")
            await here.execute(f"CREATE DATABASE {NAME} OWNER dba", database="postgres")
            first = here.roles(app_ro="an-earlier-one")
            assert first[0] == 0, first[1]
            await cluster.migrate(NAME)
            second = here.roles()
            assert second[0] == 0, second[1]
            yield here
        finally:
            await cluster.primary.stop("immediate")
            cluster.remove()


async def test_owner_is_told_what_it_does_without(managed: Managed) -> None:
    """Each run names what takes a superuser, and makes no role that could not do its work."""
    status, output = managed.roles()

    assert status == 0, output
    assert [line.partition(":")[0] for line in output.splitlines()] == [
        "No superuser",
        "No replicator",
        "No pgbouncer",
        "Everybody may write large objects and messages in the log",
        "monitor sees no other role",
        "app_rw and app_ro are not in pg_read_all_stats",
        "Errors may quote rows in the server log",
    ]
    owner = await asyncpg.connect(managed.url("postgres"))
    made = await owner.fetch("SELECT rolname FROM pg_roles WHERE rolcanlogin AND rolname NOT IN ('postgres', 'dba')")
    await owner.close()
    assert {row["rolname"] for row in made} == VARIABLES.keys() - LEFT_OUT


async def test_service_works_with_these_roles(managed: Managed) -> None:
    """Writes, reads, reports and health, each as its own role, on tables that the migrations made between two runs."""
    reader: dict[str, Any] = {"url": managed.url("app_ro"), "pool_size": 2}
    settings = Settings(
        _env_file=None, environment="test", primary={"url": managed.url("app_rw"), "pool_size": 2}, analytics=reader
    )
    async with serving(settings) as service:
        written = await service.client.post("/patients", json=PATIENT)
        read = await service.client.get(written.headers["location"])
        report = await service.client.get("/reports/summary")
        ready = await service.client.get("/health/ready")

    answers = [written, read, report, ready]
    assert [answer.status_code for answer in answers] == [201, 200, 200, 200], [answer.text for answer in answers]


async def test_privileges_are_the_same(managed: Managed) -> None:
    """A reader writes nothing, a writer makes no table, and nobody else gets in."""
    await managed.execute(f"CREATE ROLE stranger LOGIN PASSWORD '{PASSWORD}'")
    reader, writer = [await asyncpg.connect(managed.url(role)) for role in ("app_ro", "app_rw")]
    await reader.execute("SET default_transaction_read_only = off")

    for connection, statement in ((reader, "DELETE FROM patients"), (writer, "CREATE TABLE more ()")):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="does not have CONNECT privilege"):
        await asyncpg.connect(
            host=HOST, port=managed.cluster.primary.port, user="stranger", password=PASSWORD, database=NAME
        )

    timeouts = await writer.fetchrow("SELECT current_setting('statement_timeout'), current_setting('jit')")
    assert timeouts is not None
    assert tuple(timeouts) == ("30s", "off")
    for connection in (reader, writer):
        await connection.close()
    await managed.execute("DROP ROLE stranger")  # The first test counts who may log in, and may be the next one.


async def test_owner_that_may_do_more_gets_more(managed: Managed) -> None:
    """With REPLICATION, statistics and log_min_messages granted, what only a superuser may touch is left out."""
    await managed.execute(
        "ALTER ROLE dba REPLICATION",
        "GRANT pg_monitor, pg_read_all_stats TO dba WITH ADMIN OPTION",
        "GRANT SET ON PARAMETER log_min_messages TO dba",
    )
    try:
        status, output = managed.roles(replicator=managed.cluster.passwords["replicator"])

        assert status == 0, output
        assert [line.partition(":")[0] for line in output.splitlines()] == [
            *("No superuser", "No pgbouncer", "Everybody may write large objects and messages in the log"),
        ]
        owner = await asyncpg.connect(managed.url("postgres"))
        assert await owner.fetchval("SELECT rolreplication FROM pg_roles WHERE rolname = 'replicator'") is True
        monitor = await asyncpg.connect(managed.url("monitor"))
        seen = await monitor.fetch("SELECT usename, query FROM pg_stat_activity WHERE usename <> 'monitor'")
        assert {row["query"] for row in seen} == {None}
        assert "postgres" in {row["usename"] for row in seen}
        await monitor.close()
        assert await owner.fetchval("SELECT pg_has_role('app_rw', 'pg_read_all_stats', 'USAGE')") is True
        await owner.close()
    finally:
        await managed.execute(
            "DROP ROLE IF EXISTS replicator",
            "DROP OWNED BY monitor_owner CASCADE",
            "REVOKE pg_monitor, pg_read_all_stats FROM dba CASCADE",
            "ALTER ROLE monitor RESET search_path",
            "ALTER ROLE dba NOREPLICATION",
        )


async def test_statements_that_somebody_else_opened_to_monitor_are_told(managed: Managed) -> None:
    """What a superuser has granted beside the script is not this owner's to take, and is said at each run."""
    await managed.execute("GRANT pg_read_all_stats TO monitor")
    try:
        status, output = managed.roles()
    finally:
        await managed.execute("REVOKE pg_read_all_stats FROM monitor")

    assert status == 0, output
    assert "monitor sees statements of other roles: somebody else has granted it" in output
    assert "monitor sees statements" not in managed.roles()[1]


async def test_hash_is_a_password_too(managed: Managed) -> None:
    """Where the server's log would show a password, its hash is handed over, and the password works."""
    owner = await asyncpg.connect(managed.url("postgres"))
    stored = await owner.fetchval("SELECT rolpassword FROM pg_authid WHERE rolname = 'app_ro'")
    await owner.close()

    status, output = managed.roles(app_ro=stored)

    assert status == 0, output
    await (await asyncpg.connect(managed.url("app_ro"))).close()


@pytest.mark.parametrize(
    ("attributes", "database", "sentence"),
    [
        ("NOCREATEROLE", "another", "role other has no CREATEROLE"),
        ("CREATEROLE", NAME, "role other does not own database managed"),
        ("CREATEROLE", "another", "role other did not make app_owner, app_ro, app_rw, monitor: it needs ADMIN OPTION"),
        ("CREATEROLE", "inherited", "role other does not own schema public"),
    ],
)
async def test_who_cannot_do_it_is_told_why(managed: Managed, attributes: str, database: str, sentence: str) -> None:
    """What is missing is said before anything is changed, not by a warning that a grant did nothing."""
    await managed.execute(
        f"CREATE ROLE other LOGIN {attributes} PASSWORD '{PASSWORD}'", f"GRANT CONNECT ON DATABASE {NAME} TO other"
    )
    if database != NAME:
        await managed.execute(f"CREATE DATABASE {database} OWNER other")
    if database == "inherited":
        await managed.execute("ALTER SCHEMA public OWNER TO postgres", database=database)
    try:
        status, output = managed.roles("other", database)

        assert status != 0
        assert sentence in output
    finally:
        if database != NAME:
            await managed.execute(f"DROP DATABASE {database}")
        await managed.execute(f"REVOKE ALL ON DATABASE {NAME} FROM other", "DROP ROLE other")
