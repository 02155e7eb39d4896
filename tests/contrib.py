"""PostgreSQL with its contrib extensions, as Debian builds it: the embedded one has pgvector alone."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pglifeguard.embedded.directories import open_directory
from pglifeguard.embedded.postgres import Server
from tests.tls_server import create
from tests.tls_server import programs as debian

PASSWORD = "of-the-superuser"  # The server lives for one module of tests.
MISSING = "PostgreSQL with contrib is not installed: apt-get install postgresql"


def programs() -> Path | None:
    """Return the directory of a PostgreSQL of this machine that has hstore and citext; None where there is none."""
    found = debian()
    if found is None:
        return None
    directory = (found / "postgres").resolve().parent
    shared = Path("/usr/share/postgresql", directory.parent.name)
    return directory if (shared / "extension" / "hstore.control").exists() else None


@asynccontextmanager
async def running() -> AsyncIterator[Server]:
    """Run a server that anybody of this machine may log in to as `postgres`."""
    directory = programs()
    assert directory is not None
    with open_directory() as home:
        server = create(directory, home, PASSWORD)
        server.settings = {"fsync": "off", "shared_buffers": "16MB"}
        try:
            await server.start()
            yield server
        finally:
            await server.stop("immediate")
