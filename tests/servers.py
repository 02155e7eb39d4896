"""The servers that tests run on, and what becomes of them when a test leaves them broken.

Most tests share one cluster and change nothing of it. A test that stops, kills, freezes or promotes a server has a
second cluster. After such a test, and after every test that failed, the cluster is inspected: it is mended where that
restores it completely, and replaced by a fresh one where it does not. So the failure of one test stays its own.
"""

import logging
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from local.cluster import Cluster
from pglifeguard.embedded.account import EmbeddedError
from pglifeguard.embedded.directories import make_directory
from pglifeguard.embedded.postgres import HOST, Server
from pglifeguard.embedded.waiting import eventually

logger = logging.getLogger(__name__)

# The database that every test's own is copied from; nobody connects to it.
TEMPLATE = "migrated"
# What nobody may have left in the way of the next test: settings of ALTER SYSTEM, a paused replay, a lost stream.
LEFT_BEHIND = "SELECT count(*) FROM pg_file_settings WHERE sourcefile LIKE '%postgresql.auto.conf'"
REPLAYS = "SELECT pg_is_in_recovery() AND pg_get_wal_replay_pause_state() = 'not paused'"
STREAMS = "SELECT NOT pg_is_in_recovery() AND EXISTS (SELECT FROM pg_stat_replication WHERE state = 'streaming')"
TESTS_OWN = "SELECT datname FROM pg_database WHERE datname LIKE 'test\\_%'"
# A failure of the inspection itself says that the cluster is not sound.
UNSOUND = (OSError, EmbeddedError, asyncpg.PostgresError, asyncpg.InterfaceError)


@asynccontextmanager
async def setting(server: Server, name: str, value: str) -> AsyncIterator[None]:
    """Let a running server have another value of a setting."""
    connection = await server.connect()
    await connection.execute(f"ALTER SYSTEM SET {name} = {value}")
    await connection.execute("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        await connection.execute(f"ALTER SYSTEM RESET {name}")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()


def last_lines(log: Path, count: int = 25) -> str:
    """Return the end of a server's log, which often says why a test failed; nothing of a log that is not there."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
    except FileNotFoundError:
        return ""


class Servers:
    """One cluster after the other, each for as many tests as leave it sound."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._cluster: Cluster | None = None
        self._own: dict[Server, dict[str, str]] = {}
        # Kept open from test to test: logging in takes longer than what is asked.
        self._connections: dict[Server, asyncpg.Connection[asyncpg.Record]] = {}

    async def take(self) -> Cluster:
        """Return the running cluster with its template database, made at the first call."""
        if self._cluster is not None and not (_listens(self._cluster.primary) and _listens(self._cluster.replica)):
            # Somebody ended a server between two tests, or a test that was itself ended did not get to its inspection.
            await self.inspect()
        if self._cluster is None:
            self._cluster = await self._make()
        return self._cluster

    async def create_database(self, name: str) -> None:
        """Copy the migrated template; returns when the replica has the copy."""
        primary = await self._connect((await self.take()).primary)
        await primary.execute(f'CREATE DATABASE "{name}" TEMPLATE "{TEMPLATE}" STRATEGY wal_log')
        await self.wait_replayed()

    async def drop_database(self, name: str) -> None:
        """Drop a database, disconnecting whoever is in it."""
        primary = await self._connect((await self.take()).primary)
        await primary.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    async def wait_replayed(self) -> None:
        """Wait until the replica shows what is committed on the primary now. Raises: TimeoutError."""
        cluster = await self.take()
        primary, replica = await self._connect(cluster.primary), await self._connect(cluster.replica)
        target = await primary.fetchval("SELECT pg_current_wal_flush_lsn()::text")

        async def replayed() -> bool:
            return bool(await replica.fetchval("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", target))

        if not await eventually(replayed, 10):
            raise TimeoutError(f"the replica has not replayed {target}")

    async def inspect(self) -> None:
        """Mend the cluster, or give it up so that the next `take` makes a fresh one."""
        self._disconnect()
        cluster = self._cluster
        if cluster is None:
            return
        try:
            if await self._sound(cluster):
                return
        except UNSOUND as error:
            logger.warning("the %s servers cannot be mended: %s", self.name, error)
        await self.end()

    async def end(self) -> None:
        """Stop the servers and remove what they kept."""
        self._disconnect()
        cluster, self._cluster = self._cluster, None
        if cluster is None:
            return
        for server in (cluster.replica, cluster.primary):
            # A killed one would leave a segment of shared memory behind: the system has 4096, then starts no server.
            await server.stop("immediate")
        shutil.rmtree(cluster.directory)

    async def _make(self) -> Cluster:
        cluster = Cluster(make_directory())
        for server in (cluster.primary, cluster.replica):
            # Both sides compute each iteration at each login, and a test logs in a dozen times.
            server.settings["scram_iterations"] = "1"
        try:
            await cluster.start()
            await _hash_anew(cluster)
            await cluster.create_database(TEMPLATE)
            await cluster.migrate(TEMPLATE)
        except BaseException:
            await cluster.stop()
            raise
        self._own = {server: dict(server.settings) for server in (cluster.primary, cluster.replica)}
        return cluster

    async def _connect(self, server: Server) -> "asyncpg.Connection[asyncpg.Record]":
        if server not in self._connections or self._connections[server].is_closed():
            self._connections[server] = await server.connect()
            # A test may count the connections that have no name.
            await self._connections[server].execute("SET application_name = 'fixtures'")
        return self._connections[server]

    def _disconnect(self) -> None:
        while self._connections:
            self._connections.popitem()[1].terminate()

    async def _sound(self, cluster: Cluster) -> bool:
        if any(server.settings != own for server, own in self._own.items()):
            return False
        await cluster.start()
        connection = await cluster.primary.connect()
        try:
            for row in await connection.fetch(TESTS_OWN):
                await cluster.drop_database(row["datname"])
        finally:
            await connection.close()
        primary, replica = await _ask(cluster.primary, STREAMS), await _ask(cluster.replica, REPLAYS)
        return bool(primary and replica)


def _listens(server: Server) -> bool:
    """Tell whether somebody answers at the server's port; its own backlog does, and nothing is waited for."""
    try:
        socket.create_connection((HOST, server.port), timeout=1).close()
    except OSError:
        return False
    return True


async def _hash_anew(cluster: Cluster) -> None:
    """Set the superuser's password again: initdb has hashed it with PostgreSQL's own number of iterations."""
    connection = await cluster.primary.connect()
    try:
        await connection.execute(f"ALTER ROLE postgres PASSWORD '{cluster.passwords['postgres']}'")
    finally:
        await connection.close()


async def _ask(server: Server, question: str) -> bool:
    connection = await server.connect()
    try:
        return bool(await connection.fetchval(question)) and await connection.fetchval(LEFT_BEHIND) == 0
    finally:
        await connection.close()
