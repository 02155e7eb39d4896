"""Connections of the migration job: opened as the service's are, and patient where those are quick."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from alembic.util import CommandError

from pglifeguard import DatabaseSettings
from pglifeguard.connector import Connector, KeptAliveConnection

CLOSE_SECONDS = 5.0
WHO_ANSWERS = "SELECT pg_backend_pid()"
POOLER_QUESTIONS = 10
POOLER_PAUSE_SECONDS = 0.03


@asynccontextmanager
async def connected(
    to: DatabaseSettings, *, writable: bool, console: bool = False
) -> AsyncIterator[KeptAliveConnection]:
    """Give a connection to the first host that will do, or to PgBouncer's admin console, and close it.

    Raises: DatabaseUnreachable when none of them does within its connect_timeout, or within DATABASE_WAKE_SECONDS when
    the database sleeps.
    """
    connector = Connector(to, writable=writable, console=console)
    patience = to.seconds_of_a_job(to.connect_timeout_seconds * len(connector.hosts))
    try:
        deadline = asyncio.get_running_loop().time() + patience
        connection = await connector.open_patiently(deadline, waking=to.sleeps)
        try:
            yield connection
        finally:
            await connection.close(timeout=CLOSE_SECONDS)
    finally:
        # A login at another host may still be under way.
        await connector.close()


async def check_server(connection: KeptAliveConnection, to: DatabaseSettings) -> None:
    """Refuse a standby, and a pooler that spreads a session over connections: the runners' lock would stay behind.

    Raises: CommandError.
    """
    if await connection.fetchval("SELECT pg_is_in_recovery()"):
        raise CommandError(
            f"{to.server} is a standby, which takes no migrations: MIGRATIONS_URL has to name the primary."
        )
    process = await connection.fetchval(WHO_ANSWERS)
    if process == connection.get_server_pid():
        return
    # Somebody stands in between. In transaction mode the next client is served by the process that is free again, and
    # this one by another; asked several times, for other clients may take turns with both.
    async with connected(to, writable=True) as other:
        for _ in range(POOLER_QUESTIONS):
            if await other.fetchval(WHO_ANSWERS) == process or await connection.fetchval(WHO_ANSWERS) != process:
                raise CommandError(
                    f"{to.server} is a pooler in transaction mode, which spreads a session over connections: "
                    "MIGRATIONS_URL has to name the primary itself, or a pooler in session mode."
                )
            await asyncio.sleep(POOLER_PAUSE_SECONDS)
    # In session mode the session is this client's own, whatever it leaves there.
    connection.pooled = False
