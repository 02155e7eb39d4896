"""How data directories come to be: the first one by initdb, the replica's by pg_basebackup.

Everything is made beside its place and renamed when whole, so that no later run meets a half.
"""

import asyncio
import json
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg

from pglifeguard.embedded.account import Account, remove_tree
from pglifeguard.embedded.leftovers import remove_at_the_end
from pglifeguard.embedded.postgres import HOST, Server
from pglifeguard.embedded.programs import major_version, run_program
from pglifeguard.embedded.waiting import eventually

SLOT = "replica"
SLOT_SECONDS = 20.0
# What a cluster may take in memory: two servers with their write-ahead logs. Docker gives containers 64 MB by default.
MEMORY_BYTES = 3_000_000_000
MEMORY = Path("/dev/shm")  # noqa: S108  # mkdtemp makes an unguessable name in it.
# The first version whose builtin provider sorts by code point on every system, and no upgrade of libc changes an index.
BUILTIN_LOCALES = 17


@contextmanager
def open_directory() -> Iterator[Path]:
    """Give an empty directory that PostgreSQL's account can reach, also where that is not ours because we are root."""
    directory = make_directory()
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def make_directory() -> Path:
    """Make such a directory; whoever asks removes it, or else it is removed when this process has ended."""
    # In memory, a database of one's own is made and replayed in 20 ms; on a disk that others use in 50 to 200.
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES
    directory = Path(tempfile.mkdtemp(prefix="lifeguard-tests-", dir=MEMORY if roomy else None))
    directory.chmod(0o711)
    remove_at_the_end(directory)
    return directory


def read_passwords(path: Path, roles: Collection[str]) -> dict[str, str]:
    """Read the roles' passwords, made once; nothing in them needs quoting in SQL, URLs or files."""
    if not path.exists():
        made = {role: secrets.token_urlsafe(24) for role in roles}
        half = path.with_suffix(".half")
        half.touch(mode=0o600)
        half.write_text(json.dumps(made), encoding="utf-8")
        half.rename(path)
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found


async def initialise(server: Server, rules: str | None = None) -> None:
    """Make an empty cluster whose superuser is `postgres`; `rules` are its pg_hba.conf, else it asks for passwords."""
    half = half_made(server.data, server.account)
    password = half.with_name("superuser")
    password.touch(mode=0o600)
    password.write_text(server.password, encoding="utf-8")
    server.account.own(password)
    builtin = ["--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"]
    try:
        await run(
            server.account,
            "initdb", "--pgdata", str(half), "--username", "postgres", "--pwfile", str(password),
            "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C",
            *(builtin if major_version(server.account) >= BUILTIN_LOCALES else ()), "--no-sync", "--no-instructions",
        )  # fmt: skip
    finally:
        password.unlink()
    if rules is not None:
        (half / "pg_hba.conf").write_text(rules, encoding="utf-8")
    half.rename(server.data)


async def clone(primary: Server, data: Path, *, password: str) -> None:
    """Put a standby's data directory, with a slot of its own on the primary, where an older one may be."""
    remove_tree(data)
    await _renew_slot(primary)
    half = half_made(data, primary.account)
    await run(
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


def half_made(data: Path, account: Account) -> Path:
    """Make the directory in which the data are made before they are renamed to their place."""
    half = data.with_name(f"{data.name}.half")
    remove_tree(half)
    half.mkdir(mode=0o700)
    account.own(half)
    return half


async def run(account: Account, program: str, *arguments: str, stdin: str = "", **environment: str) -> None:
    """Run one of PostgreSQL's programs beside the event loop. Raises: EmbeddedError with what it said."""
    await asyncio.to_thread(run_program, account, program, *arguments, stdin=stdin, **environment)
