"""Where this project's files are, and the roles of postgres/roles.sql, which psql brings a server up to."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import asyncpg

from pglifeguard.embedded.directories import run
from pglifeguard.embedded.postgres import HOST, Server

PROJECT = Path(__file__).parent.parent
# Where `make run` keeps its databases, unless it is told otherwise.
DIRECTORY = PROJECT / ".local"
# The variable in which postgres/roles.sql finds each role's password.
VARIABLES = {
    "app_owner": "APP_OWNER_PASSWORD",
    "app_rw": "APP_RW_PASSWORD",
    "app_ro": "APP_RO_PASSWORD",
    "monitor": "MONITOR_PASSWORD",
    "replicator": "REPLICATOR_PASSWORD",
    "pgbouncer": "PGBOUNCER_PASSWORD",
}
ROLES = ("postgres", *VARIABLES)


async def create_roles(primary: Server, database: str, passwords: Mapping[str, str]) -> None:
    """Make the database, if it is not there, and bring its roles up to postgres/roles.sql."""
    connection = await primary.connect()
    try:
        with suppress(asyncpg.DuplicateDatabaseError):
            await connection.execute(f'CREATE DATABASE "{database}"')
    finally:
        await connection.close()
    await run(
        primary.account,
        "psql", "--no-psqlrc", "--quiet", "--host", HOST, "--port", str(primary.port),
        "--username", "postgres", "--dbname", database, "--file", "-",
        stdin=(PROJECT / "postgres" / "roles.sql").read_text(encoding="utf-8"),
        PGPASSWORD=primary.password,
        **{variable: passwords[role] for role, variable in VARIABLES.items()},
    )  # fmt: skip
