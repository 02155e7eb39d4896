"""The network breaks in each way, and is whole again."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TypeAlias

import asyncpg
import pytest

from pglifeguard.embedded.postgres import HOST, free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing import Database, DatabaseServers, Network, Proxy
from pglifeguard.testing.proxy import Fate, Sleep

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
FATAL = b"SFATAL\0C57P01\0Mterminated\0\0"
# What a client sees of a connection that was closed under it.
LOST = (OSError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError)


@pytest.fixture
def proxy(network: Network) -> Proxy:
    """Give the one in front of the primary."""
    return network.primary


@pytest.fixture
async def connection(network: Network, database: Database) -> AsyncIterator[Connection]:
    """Give a connection through it."""
    assert database.network is network
    made = await asyncpg.connect(database.url)
    yield made
    made.terminate()


async def hangs(connection: Connection) -> "asyncio.Task[int]":
    """Ask something, and return what waits for the answer, which does not come in time."""
    asking = asyncio.create_task(connection.fetchval("SELECT 1"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(asking), 0.1)
    return asking


async def test_black_hole_keeps_what_it_was_sent(proxy: Proxy, connection: Connection, database: Database) -> None:
    """Requests of open connections, new connections, and what a server says meanwhile; `resume` passes all on."""
    proxy.hang()
    asking = await hangs(connection)
    login = asyncio.create_task(asyncpg.connect(database.url))

    async def both_there() -> bool:
        return proxy.open == 2

    assert await eventually(both_there, 5)

    proxy.resume()

    assert await asking == 1
    other = await login
    await other.close()


async def test_frozen_connections_are_those_that_are_open(
    proxy: Proxy, connection: Connection, database: Database
) -> None:
    """New ones work; a server that leaves meanwhile is noticed when nothing is held back any more."""
    pid = connection.get_server_pid()
    proxy.freeze()
    asking = await hangs(connection)
    other = await asyncpg.connect(database.url)
    await other.fetchval("SELECT pg_terminate_backend($1::int, 5000)", pid)

    proxy.resume()

    with pytest.raises(LOST):
        await asking
    await other.close()


@pytest.mark.parametrize(("fate", "stored"), [("lose_request", 0), ("lose_answer", 1), ("hang", 0)])
async def test_statement_with_a_text_has_a_fate(
    proxy: Proxy, connection: Connection, database: Database, fate: Fate, stored: int
) -> None:
    """Lost before the server has it, afterwards, or on the way; sent as a text or prepared before."""
    proxy.fates["INSERT INTO books"] = fate

    with pytest.raises((TimeoutError, *LOST)):
        await asyncio.wait_for(connection.execute("INSERT INTO books (title) VALUES ('Notes')"), 0.2)

    assert await database.execute("SELECT count(*) FROM books") == stored


async def test_client_is_told_in_the_name_of_the_server(proxy: Proxy, connection: Connection) -> None:
    """As when an administrator ends the session."""
    proxy.say(b"E" + (len(FATAL) + 4).to_bytes(4, "big") + FATAL)
    proxy.reset()

    with pytest.raises(LOST):
        await connection.fetchval("SELECT 1")
    assert proxy.open == 0


async def test_statement_in_pieces_is_one(proxy: Proxy, connection: Connection) -> None:
    """A large one comes in many packets."""
    comment = "x" * 1_000_000

    assert await connection.fetchval(f"SELECT 1 /* {comment} */") == 1

    assert [statement.endswith("*/") for statement in proxy.statements] == [True]


async def test_answers_take_longer(proxy: Proxy, connection: Connection) -> None:
    """By what is said."""
    loop = asyncio.get_running_loop()
    proxy.delay_seconds, began = 0.1, loop.time()

    await connection.execute("SELECT 1")

    assert loop.time() - began >= 0.1


@pytest.mark.parametrize("how", ["holds", "refuses", "says_starting", "forgets"])
async def test_server_sleeps(proxy: Proxy, connection: Connection, database: Database, how: Sleep) -> None:
    """Its connections are closed; who connects waits or is refused, until it is awake."""
    proxy.fall_asleep(how)
    with pytest.raises(LOST):
        await connection.fetchval("SELECT 1")
    arriving = asyncio.create_task(asyncpg.connect(database.url, timeout=2))
    done, _ = await asyncio.wait({arriving}, timeout=0.1)

    await proxy.wake_up(how)

    assert bool(done) == (how in {"refuses", "says_starting"})
    with suppress(TimeoutError, asyncpg.CannotConnectNowError, *LOST):
        await (await arriving).close()
    assert (arriving.exception() is None) == (how == "holds")
    awake = await asyncpg.connect(database.url)
    await awake.close()


async def test_server_that_is_not_there_closes_the_connection(database_servers: DatabaseServers) -> None:
    """What stands in front of nothing accepts, and ends; to accept twice is to accept."""
    assert database_servers.primary
    async with Proxy(free_port()) as proxy:
        await proxy.accept()
        reader, writer = await asyncio.open_connection(HOST, proxy.port)

        with suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()

    proxy = Proxy(free_port())
    proxy.refuse()
    assert proxy.open == 0


@pytest.mark.parametrize("turns", range(6))
async def test_no_connection_outlives_it(turns: int) -> None:
    """A client that connects while the block is left is closed, in whichever turn of the loop it is accepted."""
    with socket.create_server((HOST, 0)) as upstream, socket.socket() as client:
        client.setblocking(False)
        async with Proxy(upstream.getsockname()[1]) as proxy:
            with suppress(BlockingIOError):
                client.connect((HOST, proxy.port))
            for _ in range(turns):
                await asyncio.sleep(0)

        async with asyncio.timeout(5):
            with suppress(ConnectionError):
                assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
