"""How data directories come to be: the first one by initdb, its roles by psql, the replica's by pg_basebackup.

Everything is made beside its place and renamed when whole, so that no later run meets a half.
"""

import asyncio
import json
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import asyncpg

from local.account import Account, remove_tree
from local.postgres import HOST, Server
from local.programs import run_program
from local.waiting import eventually

PROJECT = Path(__file__).parent.parent
# Where `make run` keeps its databases, unless it is told otherwise.
DIRECTORY = PROJECT / ".local"
SLOT = "replica"
SLOT_SECONDS = 20.0
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


def read_passwords(path: Path) -> dict[str, str]:
    """Read the passwords of a directory, made once; nothing in them needs quoting in SQL, URLs or files."""
    if not path.exists():
        made = {role: secrets.token_urlsafe(24) for role in ROLES}
        half = path.with_suffix(".half")
        half.touch(mode=0o600)
        half.write_text(json.dumps(made), encoding="utf-8")
        half.rename(path)
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found


async def initialise(server: Server) -> None:
    """Make an empty cluster whose superuser is `postgres`."""
    half = _half_made(server.data, server.account)
    password = half.with_name("superuser")
    password.touch(mode=0o600)
    password.write_text(server.password, encoding="utf-8")
    server.account.own(password)
    try:
        # The builtin provider sorts by code point on every system, and no upgrade of libc changes an index.
        await _run(
            server.account,
            "initdb", "--pgdata", str(half), "--username", "postgres", "--pwfile", str(password),
            "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C",
            "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8", "--no-sync", "--no-instructions",
        )  # fmt: skip
    finally:
        password.unlink()
    shutil.copyfile(PROJECT / "postgres" / "pg_hba.conf", half / "pg_hba.conf")
    half.rename(server.data)


async def create_roles(primary: Server, database: str, passwords: Mapping[str, str]) -> None:
    """Make the database, if it is not there, and bring its roles up to postgres/roles.sql."""
    connection = await primary.connect()
    try:
        with suppress(asyncpg.DuplicateDatabaseError):
            await connection.execute(f'CREATE DATABASE "{database}"')
    finally:
        await connection.close()
    await _run(
        primary.account,
        "psql", "--no-psqlrc", "--quiet", "--host", HOST, "--port", str(primary.port),
        "--username", "postgres", "--dbname", database, "--file", "-",
        stdin=(PROJECT / "postgres" / "roles.sql").read_text(encoding="utf-8"),
        PGPASSWORD=primary.password,
        **{variable: passwords[role] for role, variable in VARIABLES.items()},
    )  # fmt: skip


async def clone(primary: Server, data: Path, *, password: str) -> None:
    """Put a standby's data directory, with a slot of its own on the primary, where an older one may be."""
    remove_tree(data)
    await _renew_slot(primary)
    half = _half_made(data, primary.account)
    await _run(
        primary.account,
        "pg_basebackup", "--host", HOST, "--port", str(primary.port), "--username", "replicator", "--no-password",
        "--pgdata", str(half), "--slot", SLOT, "--checkpoint", "fast", "--no-sync",
        PGPASSWORD=password,
    )  # fmt: skip
    (half / "standby.signal").touch()
    half.rename(data)


async def _renew_slot(primary: Server) -> None:
    """Make the slot anew: an old one keeps log that nobody wants, or has lost what a standby would need."""
    connection = await primary.connect()
    try:

        async def dropped() -> bool:
            try:
                await connection.execute("SELECT pg_drop_replication_slot($1)", SLOT)
            except asyncpg.UndefinedObjectError:
                return True
            except asyncpg.ObjectInUseError:  # The sender has not noticed yet that its standby was killed.
                return False
            return True

        await eventually(dropped, SLOT_SECONDS)
        await connection.execute("SELECT pg_create_physical_replication_slot($1, true)", SLOT)
    finally:
        await connection.close()


def _half_made(data: Path, account: Account) -> Path:
    half = data.with_name(f"{data.name}.half")
    remove_tree(half)
    half.mkdir(mode=0o700)
    account.own(half)
    return half


async def _run(account: Account, program: str, *arguments: str, stdin: str = "", **environment: str) -> None:
    await asyncio.to_thread(run_program, account, program, *arguments, stdin=stdin, **environment)
