"""A role of a test's own, whose password is rotated as an operator or a token service does it."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import asyncpg

from tests.conftest import Database


@dataclass
class Rotating:
    """A role that may do what `app_rw` may. `password` is what the server knows, `path` the file beside it."""

    name: str
    path: Path
    database: Database
    _admin: "asyncpg.Connection[asyncpg.Record]"
    password: str = ""

    async def rotate(self, *, publish: bool = True) -> str:
        """Give the server a new password, and write it to the file unless that is to come later."""
        self.password = secrets.token_urlsafe(18)
        await self._admin.execute(f"ALTER ROLE {self.name} PASSWORD '{self.password}'")
        # The replica lets it in by what it has replayed.
        await self.database.cluster.wait_replayed()
        if publish:
            self.publish()
        return self.password

    def publish(self) -> None:
        """Write the password to the file, which is replaced as a whole."""
        new = self.path.with_suffix(".new")
        new.write_text(f"{self.password}\n", encoding="utf-8")
        new.replace(self.path)

    def url(self, *, replica: bool = False, port: int | None = None, password: str = "") -> str:
        """Return where the database is, for this role, without a password unless one is given."""
        cluster = self.database.cluster
        to = port or (cluster.replica if replica else cluster.primary).port
        login = f"{self.name}:{quote(password, safe='')}" if password else self.name
        return f"postgresql://{login}@127.0.0.1:{to}/{self.database.name}"

    async def sessions(self) -> set[int]:
        """Return the processes of the role's sessions on the primary."""
        rows = await self._admin.fetch("SELECT pid FROM pg_stat_activity WHERE usename = $1", self.name)
        return {row["pid"] for row in rows}


@asynccontextmanager
async def rotating(database: Database, directory: Path, *, of: str = "app_rw") -> AsyncIterator[Rotating]:
    """Make a role with the rights of another one, and drop it."""
    admin = await asyncpg.connect(database.url("postgres"))
    role = Rotating(f"rotating_{secrets.token_hex(4)}", directory / "password", database, admin)
    try:
        await admin.execute(f"CREATE ROLE {role.name} LOGIN IN ROLE {of}")
        await role.rotate()
        yield role
        await admin.execute(f"DROP ROLE {role.name}")
    finally:
        await admin.close()
