"""A primary and its streaming replica over one directory.

`start()` mends whatever it finds: servers that a killed process left behind, a replica that cannot follow, an
interrupted first run. A service with roles of its own subclasses `Cluster`: see `create_roles`.
"""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import asyncpg

from pglifeguard.embedded import databases
from pglifeguard.embedded.account import Account, EmbeddedError, remove_tree
from pglifeguard.embedded.directories import SLOT, clone, initialise, read_passwords
from pglifeguard.embedded.leftovers import end_server
from pglifeguard.embedded.postgres import HOST, Server
from pglifeguard.embedded.waiting import eventually

# Two servers take 150 MB when new, and keep 1 GB of write-ahead log at most.
NEEDED_BYTES = 500_000_000
FOLLOW_SECONDS = 5.0
SLOT_SERVES = "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1 AND wal_status <> 'lost')"
STREAMS = "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE application_name = 'replica' AND state = 'streaming')"


class Cluster:
    """`primary` and `replica`, made at the first `start()` and kept in `directory`.

    durable=False turns fsync off: three times as fast to write, and lost with the machine.
    """

    # Where `url()` leads, and as whom. The database is there after `start()`, and has no tables.
    database = "app"
    role = "app"
    # Who owns the databases that `create_database` makes.
    owner = "app"
    # Those that have a password; `replicator` is the replica's.
    roles: tuple[str, ...] = ("postgres", "replicator", "app")
    # The text of postgresql.conf that both servers share, and that of pg_hba.conf; None asks everybody for a password.
    configuration = ""
    rules: str | None = None

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory.absolute()
        self.account = Account.current()
        self.passwords = read_passwords(self.directory / "passwords.json", self.roles)
        self._durable = durable
        self._home = self.account.home(self.directory / "data")
        self.primary = self.server("primary")
        self.replica = self.server("replica")

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def remove(self) -> None:
        """Remove everything that was kept in the directory; the servers must not run. Make a new Cluster to go on."""
        remove_tree(self.directory / "data")
        for name in ("passwords.json", "primary.log", "replica.log"):
            (self.directory / name).unlink(missing_ok=True)

    async def end_leftovers(self) -> None:
        """End the servers that an earlier process, killed without warning, left running over this directory."""
        for server in (self.replica, self.primary):
            if not server.running:
                await end_server(server.data)

    async def start(self, progress: Callable[[str], None] = lambda _: None) -> None:
        """Bring both servers up, from whatever state they are in: new, stopped, frozen, killed, promoted.

        Returns when the replica streams from the primary. Raises: EmbeddedError with a sentence for a person.
        """
        _check_space(self._home)
        for server in (self.replica, self.primary):
            if server.running:
                server.thaw()
        await self.end_leftovers()
        if not self.primary.data.exists():
            progress("Creating the primary")
            await initialise(self.primary, self.rules)
        if not self.primary.running:
            progress("Starting the primary")
            await self.primary.start()
        await self.create_roles()
        self.replica.settings["primary_slot_name"] = SLOT
        self.replica.settings["primary_conninfo"] = (
            f"host={HOST} port={self.primary.port} user=replicator password={self.passwords['replicator']} "
            "application_name=replica sslmode=disable gssencmode=disable connect_timeout=2"
        )
        if self.replica.data.exists():
            progress("Starting the replica")
            if await self._replica_follows():
                return
        progress("Cloning the primary into a replica")
        await self.clone_replica()

    async def stop(self) -> None:
        """Stop the replica, then the primary, which waits for its replica otherwise.

        Also a replica that another process, `python -m local.load`, has started again meanwhile.
        """
        if not self.replica.running:
            await end_server(self.replica.data)
        await self.replica.stop()
        await self.primary.stop()

    async def clone_replica(self) -> None:
        """Make the replica anew from the primary, whatever became of the old one; returns when it streams."""
        await self.replica.kill()
        await clone(self.primary, self.replica.data, password=self.passwords["replicator"])
        if not await self._replica_follows():
            raise EmbeddedError(f"The new replica does not follow the primary; {self.replica.log} says why.")

    async def create_roles(self) -> None:
        """Make the roles and the database, if they are not there. The primary runs, the replica does not yet."""
        connection = await self.primary.connect()
        try:
            for role, attribute in (("replicator", "REPLICATION"), (self.role, "")):
                with suppress(asyncpg.DuplicateObjectError):
                    await connection.execute(f'CREATE ROLE "{role}" LOGIN {attribute}')
                await connection.execute(f"""ALTER ROLE "{role}" PASSWORD '{self.passwords[role]}'""")
            with suppress(asyncpg.DuplicateDatabaseError):
                await connection.execute(f'CREATE DATABASE "{self.database}" OWNER "{self.owner}"')
        finally:
            await connection.close()

    def url(
        self,
        role: str | None = None,
        *,
        server: Literal["primary", "replica"] = "primary",
        database: str | None = None,
    ) -> str:
        """Return postgresql://… with the role's password; the role `postgres` is the superuser."""
        port = self.primary.port if server == "primary" else self.replica.port
        role, database = role or self.role, database or self.database
        return f"postgresql://{role}:{self.passwords[role]}@{HOST}:{port}/{database}"

    async def create_database(self, name: str, *, template: str | None = None) -> None:
        """Copy a database that nobody is connected to; `wait_replayed()` tells when the replica has it too."""
        template = template or self.database
        await databases.copy_database(self._superuser("primary"), name, template=template, owner=self.owner)

    async def drop_database(self, name: str) -> None:
        """Drop a database, disconnecting whoever is in it."""
        await databases.drop_database(self._superuser("primary"), name)

    async def wait_replayed(self, timeout_seconds: float = 10.0) -> None:
        """Wait until the replica shows everything that is committed on the primary now. Raises: TimeoutError."""
        await databases.wait_replayed(self._superuser("primary"), self._superuser("replica"), timeout_seconds)

    async def pause_replay(self) -> None:
        """Make the replica fall behind: it goes on receiving, and shows nothing new. Returns when it has stopped."""
        replica = await self.replica.connect()
        try:
            await replica.execute("SELECT pg_wal_replay_pause()")

            async def paused() -> bool:
                return bool(await replica.fetchval("SELECT pg_get_wal_replay_pause_state() = 'paused'"))

            if not await eventually(paused, FOLLOW_SECONDS):
                raise TimeoutError("the replica does not pause its replay")
        finally:
            await replica.close()

    async def resume_replay(self) -> None:
        """Let the replica catch up."""
        await databases.ask(self._superuser("replica"), "SELECT pg_wal_replay_resume()")

    def server(self, name: str) -> Server:
        """Return a server that has the settings of the others, and a data directory, perhaps empty, of its own."""
        server = Server(
            self._home / name,
            log=self.directory / f"{name}.log",
            password=self.passwords["postgres"],
            base=self.configuration,
            account=self.account,
        )
        if not self._durable:
            server.settings |= {
                "fsync": "off",
                "full_page_writes": "off",
                "max_wal_size": "256MB",  # A test run may have it in memory.
                "dynamic_shared_memory_type": "mmap",  # Goes with the directory, also after a kill.
            }
        return server

    async def _replica_follows(self) -> bool:
        """Start the replica if need be, and tell whether it streams from this primary before long."""
        if not (self.replica.data / "standby.signal").exists():  # It was promoted, and is nobody's replica now.
            return False
        try:
            if not self.replica.running:
                await self.replica.start()
        except EmbeddedError:  # Another primary's data, or half of it; the log has the details.
            return False
        primary = await self.primary.connect()
        try:
            if not await primary.fetchval(SLOT_SERVES, SLOT):
                return False

            async def streams_or_ended() -> bool:
                return not self.replica.running or bool(await primary.fetchval(STREAMS))

            await eventually(streams_or_ended, FOLLOW_SECONDS)
            return self.replica.running and bool(await primary.fetchval(STREAMS))
        finally:
            await primary.close()

    def _superuser(self, server: Literal["primary", "replica"]) -> str:
        return self.url("postgres", server=server, database="postgres")


def _check_space(home: Path) -> None:
    free = shutil.disk_usage(home).free
    if free < NEEDED_BYTES:
        raise EmbeddedError(
            f"The disk of {home} has {free // 1_000_000} MB left, and the two servers need "
            f"{NEEDED_BYTES // 1_000_000}: free some space, then run this again."
        )
