"""PgBouncer from PATH in front of the cluster: transaction mode, 30 server connections at most, as in compose."""

import asyncio
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from bench.load import BenchError
from local.cluster import DATABASE, Cluster
from local.postgres import HOST, free_port
from local.waiting import eventually

SERVER_CONNECTIONS = 30
START_SECONDS = 10
# From here on it follows prepared statements; before, a client must not keep any.
FOLLOWS_STATEMENTS = (1, 21)


def version() -> tuple[int, int] | None:
    """Return the version of the one on PATH; None without one."""
    if shutil.which("pgbouncer") is None:
        return None
    output = subprocess.run(["pgbouncer", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"PgBouncer (\d+)\.(\d+)", output)
    return (int(found[1]), int(found[2])) if found else None


@asynccontextmanager
async def pooling(cluster: Cluster) -> AsyncIterator[dict[str, str]]:
    """Run it and yield the variables that lead the service through it."""
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
            ["pgbouncer", "-q", str(config)], stderr=subprocess.DEVNULL, **cluster.account.arguments
        )
        try:
            url = f"postgresql://{{role}}:{{password}}@{HOST}:{port}/{{database}}"
            reader = url.format(role="app_ro", password=cluster.passwords["app_ro"], database="replica")
            if not await eventually(lambda: _answers(reader), START_SECONDS):
                raise BenchError("PgBouncer did not start.")
            yield {
                "DATABASE_URL": url.format(role="app_rw", password=cluster.passwords["app_rw"], database="primary"),
                "DATABASE_REPLICA_URL": reader,
                "DATABASE_ANALYTICS_URL": reader,
            } | ({} if follows else {"DATABASE_STATEMENT_CACHE_SIZE": "0"})
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
    prepared = "max_prepared_statements = 200\n" if follows else ""
    half = SERVER_CONNECTIONS // 2
    return f"""[databases]
primary = host={HOST} port={cluster.primary.port} dbname={DATABASE}
replica = host={HOST} port={cluster.replica.port} dbname={DATABASE}
[pgbouncer]
listen_addr = {HOST}
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {users}
pool_mode = transaction
default_pool_size = {half}
max_db_connections = {half}
max_client_conn = 1000
query_wait_timeout = 5
{prepared}"""
