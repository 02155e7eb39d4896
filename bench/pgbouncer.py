"""PgBouncer from PATH in front of the cluster, with the figures of compose."""

import asyncio
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from configparser import ConfigParser
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from bench.load import BenchError
from local.cluster import DATABASE, Cluster
from local.setup import PROJECT
from pglifeguard.embedded.postgres import HOST, free_port
from pglifeguard.embedded.waiting import eventually

START_SECONDS = 10
# From here on it follows prepared statements; before, a client must not keep any.
FOLLOWS_STATEMENTS = (1, 21)


@dataclass(frozen=True)
class Pooler:
    """One that runs: its process, and the variables that lead the service through it."""

    pid: int
    variables: dict[str, str]


def version() -> tuple[int, int] | None:
    """Return the version of the one on PATH; None without one."""
    if shutil.which("pgbouncer") is None:
        return None
    output = subprocess.run(["pgbouncer", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"PgBouncer (\d+)\.(\d+)", output)
    return (int(found[1]), int(found[2])) if found else None


@asynccontextmanager
async def pooling(cluster: Cluster) -> AsyncIterator[Pooler]:
    """Run it in front of primary and replica."""
    found, port = version(), free_port()
    if found is None:
        raise BenchError("pgbouncer is not on PATH")
    follows = found >= FOLLOWS_STATEMENTS
    with tempfile.TemporaryDirectory(prefix="lifeguard-pgbouncer-") as name:
        directory = Path(name)
        users = directory / "users.txt"
        users.write_text("".join(f'"{r}" "{cluster.passwords[r]}"\n' for r in ("app_rw", "app_ro")), encoding="utf-8")
        config = directory / "pgbouncer.ini"
        config.write_text(_config(cluster, port, users, follows=follows), encoding="utf-8")
        for path in (directory, users, config):
            cluster.account.own(path)
        process = subprocess.Popen(  # noqa: ASYNC220  # It returns at once.
            ["pgbouncer", "-q", str(config)],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **cluster.account.arguments,
        )
        try:
            url = f"postgresql://{{role}}:{{password}}@{HOST}:{port}/{{database}}"
            reader = url.format(role="app_ro", password=cluster.passwords["app_ro"], database="replica")
            if not await eventually(lambda: _answers(reader), START_SECONDS):
                raise BenchError("PgBouncer did not start.")
            urls = {
                "DATABASE_URL": url.format(role="app_rw", password=cluster.passwords["app_rw"], database="primary"),
                "DATABASE_REPLICA_URL": reader,
                "DATABASE_ANALYTICS_URL": reader,
            }
            yield Pooler(process.pid, urls | ({} if follows else {"DATABASE_STATEMENT_CACHE_SIZE": "0"}))
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait)


async def _answers(url: str) -> bool:
    try:
        connection = await asyncpg.connect(url, timeout=1, statement_cache_size=0)
    except (OSError, asyncpg.PostgresError):
        return False
    await connection.close()
    return True


def _config(cluster: Cluster, port: int, users: Path, *, follows: bool) -> str:
    """Take compose's configuration, with the databases and the logins of here."""
    found = ConfigParser(interpolation=None)
    found.read(PROJECT / "pgbouncer" / "pgbouncer.ini", encoding="utf-8")
    settings = dict(found["pgbouncer"])
    for name in ("auth_user", "auth_query", "auth_dbname", *(() if follows else ("max_prepared_statements",))):
        del settings[name]
    settings |= {"listen_addr": HOST, "listen_port": str(port), "unix_socket_dir": "", "auth_file": str(users)}
    servers = {"primary": cluster.primary, "replica": cluster.replica}
    lines = [
        "[databases]",
        *(f"{name} = host={HOST} port={server.port} dbname={DATABASE}" for name, server in servers.items()),
        "[pgbouncer]",
        *(f"{name} = {value}" for name, value in settings.items()),
    ]
    return "\n".join([*lines, ""])
