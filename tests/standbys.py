"""A second standby beside the cluster's replica, and one address in front of both."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import cycle

from sqlalchemy.engine import make_url

from local.cluster import Cluster
from pglifeguard.embedded.account import remove_tree
from pglifeguard.embedded.directories import half_made, run
from pglifeguard.embedded.postgres import HOST, Server
from pglifeguard.embedded.waiting import eventually

REPLAYS = "SELECT pg_is_in_recovery() AND EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')"


@asynccontextmanager
async def second_standby(cluster: Cluster, *, host: str = HOST, port: int = 0) -> AsyncIterator[Server]:
    """Clone the primary into another standby, which streams when it is given; by default on a port of its own."""
    server = cluster.server("second")
    server.host, server.port = host, port
    half = half_made(server.data, server.account)
    await run(
        server.account,
        "pg_basebackup", "--host", HOST, "--port", str(cluster.primary.port), "--username", "replicator",
        "--no-password", "--pgdata", str(half), "--checkpoint", "fast", "--no-sync",
        PGPASSWORD=cluster.passwords["replicator"],
    )  # fmt: skip
    (half / "standby.signal").touch()
    remove_tree(server.data)
    half.rename(server.data)
    server.settings["primary_conninfo"] = (
        f"host={HOST} port={cluster.primary.port} user=replicator password={cluster.passwords['replicator']} "
        "application_name=second sslmode=disable gssencmode=disable connect_timeout=2"
    )
    await server.start()
    try:
        connection = await server.connect()

        async def streams() -> bool:
            return bool(await connection.fetchval(REPLAYS))

        assert await eventually(streams, 10)
        await connection.close()
        yield server
    finally:
        await server.stop("immediate")


@asynccontextmanager
async def cascading_standby(cluster: Cluster) -> AsyncIterator[Server]:
    """Give a standby that follows the cluster's replica."""
    async with second_standby(cluster) as server:
        primary, replica = f"port={cluster.primary.port}", f"port={cluster.replica.port}"
        server.settings["primary_conninfo"] = server.settings["primary_conninfo"].replace(primary, replica)
        await server.restart()
        connection = await server.connect()

        async def streams() -> bool:
            return bool(await connection.fetchval(REPLAYS))

        assert await eventually(streams, 10)
        await connection.close()
        yield server


class Balancer:
    """One address that leads each new connection to the next of several servers, as `-ro` services do."""

    def __init__(self, ports: Sequence[int]) -> None:
        self.port = 0
        self._next = cycle(ports)
        self._tasks: set[asyncio.Task[None]] = set()

    def url(self, url: str) -> str:
        """Return the URL with this address in place of its own."""
        return make_url(url).set(host=HOST, port=self.port).render_as_string(hide_password=False)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes on, both ways, until either side ends."""
        there, back = await asyncio.open_connection(HOST, next(self._next))
        ways = [asyncio.create_task(_pass_on(reader, back)), asyncio.create_task(_pass_on(there, writer))]
        self._tasks.update(ways)
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for end in (back, writer):
            end.close()
        await asyncio.gather(*ways, return_exceptions=True)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def balancing(*ports: int, host: str = HOST, port: int = 0) -> AsyncIterator[Balancer]:
    """Listen in front of several servers."""
    balancer = Balancer(ports)
    server = await asyncio.start_server(balancer.accept, host, port)
    balancer.port = server.sockets[0].getsockname()[1]
    try:
        yield balancer
    finally:
        server.close()
        for task in balancer._tasks:
            task.cancel()
        await asyncio.gather(*balancer._tasks, return_exceptions=True)
