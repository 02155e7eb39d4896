"""The primary and the replica of this project: the library's `Cluster`, with the roles of postgres/roles.sql.

`python -m local` serves on one, and each test run has one.
"""

import asyncio
import os
import re
import sys

from local.setup import PROJECT, ROLES, create_roles
from pglifeguard.embedded import cluster
from pglifeguard.embedded.account import EmbeddedError
from pglifeguard.embedded.programs import explain

DATABASE = "lifeguard"
STRANGE_DATA = (
    "\nThe data was migrated by code that is not here, of another branch or since taken out. Take that code back, or "
    "begin anew, without the data: make run ARGS=--fresh"
)
CHANGED_MIGRATION = """
If a migration was changed after it had run here, begin anew, without the data: make run ARGS=--fresh. Else mend it."""
CONFIGURATION = (PROJECT / "postgres" / "postgresql.conf").read_text(encoding="utf-8")
MAX_CONNECTIONS = re.findall(r"^max_connections = (\d+)", CONFIGURATION, re.MULTILINE)[0]


class Cluster(cluster.Cluster):
    """The database `lifeguard` has roles and no tables until `migrate()`."""

    database = DATABASE
    role = "app_rw"
    owner = "postgres"
    roles = ROLES
    configuration = CONFIGURATION
    rules = (PROJECT / "postgres" / "pg_hba.conf").read_text(encoding="utf-8")

    async def create_roles(self) -> None:
        """Bring the database and the roles up to postgres/roles.sql."""
        await create_roles(self.primary, self.database, self.passwords)

    async def migrate(self, database: str = DATABASE) -> None:
        """Run `alembic upgrade head` as app_owner. Raises: EmbeddedError with what Alembic said."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "alembic", "upgrade", "head",
            cwd=PROJECT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            env={**_without_database(), "MIGRATIONS_URL": self.url("app_owner", database=database)},
        )  # fmt: skip
        try:
            output, _ = await process.communicate()
        finally:
            if process.returncode is None:  # We were told to stop meanwhile.
                process.kill()
        if process.returncode != 0:
            text = output.decode(errors="replace")
            cure = STRANGE_DATA if "Can't locate revision" in text else CHANGED_MIGRATION
            raise EmbeddedError(explain(text, "alembic upgrade head") + cure)


def _without_database() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("DATABASE_")}
