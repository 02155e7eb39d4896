"""PgBouncer as a process of the test's own, in transaction mode, in front of one server."""

import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import asyncpg
from sqlalchemy.engine import make_url

from local.account import Account
from local.cluster import Cluster
from local.postgres import HOST, free_port
from local.waiting import eventually

# Since then it keeps track of prepared statements in transaction mode.
TRACKS_STATEMENTS = (1, 21)
NOTHING: Mapping[str, Any] = MappingProxyType({})
# Debian puts it where only root's PATH looks.
PLACES = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"


def program() -> str | None:
    """Return where PgBouncer is, None where it is not installed."""
    return shutil.which("pgbouncer", path=PLACES)


def statement_cache_size() -> int:
    """Return what DATABASE_STATEMENT_CACHE_SIZE has to be for this PgBouncer."""
    said = subprocess.run([str(program()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"PgBouncer (\d+)\.(\d+)", said)
    return 0 if found is None or (int(found[1]), int(found[2])) < TRACKS_STATEMENTS else 500


@asynccontextmanager
async def pooling(  # noqa: PLR0913  # What PgBouncer is told.
    cluster: Cluster,
    directory: Path,
    *,
    size: int,
    keeps_statements: bool = True,
    mode: str = "transaction",
    more: Mapping[str, Any] = NOTHING,
) -> AsyncIterator[int]:
    """Run PgBouncer in front of the primary; give its port. Before 1.21 it never keeps prepared statements.

    `more` are settings beside those below.
    Its roles are app_rw and app_owner, who may use its console too.
    """
    port = free_port()
    users = directory / "users.txt"
    logins = [f'"{role}" "{cluster.passwords[role]}"' for role in ("app_rw", "app_owner")]
    users.write_text("\n".join([*logins, ""]), encoding="utf-8")
    configuration = directory / "pgbouncer.ini"
    settings = {
        "listen_addr": HOST,
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "plain",
        "auth_file": users,
        "pool_mode": mode,
        "admin_users": "app_owner",
        "default_pool_size": size,
        "max_client_conn": 200,
        **({"max_prepared_statements": 200 if keeps_statements else 0} if statement_cache_size() else {}),
        **more,
    }
    lines = [f"{name} = {value}" for name, value in settings.items()]
    upstream = f"* = host={HOST} port={cluster.primary.port}"
    configuration.write_text("\n".join(["[databases]", upstream, "[pgbouncer]", *lines, ""]), encoding="utf-8")
    for path in (directory, users, configuration):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with (directory / "pgbouncer.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220  # It returns at once.
            [str(program()), str(configuration)], stdout=log, stderr=log, cwd="/", **Account.current().arguments
        )
    try:

        async def answers() -> bool:
            assert process.poll() is None, (directory / "pgbouncer.log").read_text(encoding="utf-8")
            try:
                url = make_url(cluster.url("app_rw")).set(port=port).render_as_string(hide_password=False)
                connection = await asyncpg.connect(url, timeout=1, statement_cache_size=0)
            except OSError:
                return False
            await connection.close()
            return True

        assert await eventually(answers, 10)
        yield port
    finally:
        process.terminate()
        process.wait(10)
