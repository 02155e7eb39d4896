"""One server starts, and says why when it does not; it ends, whoever is in it."""

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pglifeguard.embedded import postgres
from pglifeguard.embedded.account import Account, EmbeddedError
from pglifeguard.embedded.directories import initialise, make_directory
from pglifeguard.embedded.postgres import HOST, Server, free_port

QUICK = {"fsync": "off", "shared_buffers": "1MB", "dynamic_shared_memory_type": "mmap"}


@pytest.fixture(scope="module")
async def data() -> AsyncIterator[Path]:
    """Give a data directory."""
    directory = make_directory()
    account = Account.current()
    account.own(directory)
    await initialise(server_of(directory / "data"))
    yield directory / "data"
    shutil.rmtree(directory)


def server_of(data: Path) -> Server:
    """Return a server over a data directory, which does not run."""
    return Server(data, log=data.with_name("log"), password="secret", base="", account=Account.current())


@pytest.fixture
async def server(data: Path) -> AsyncIterator[Server]:
    """Give a server that a test starts, with a log of its own."""
    data.with_name("log").unlink(missing_ok=True)
    made = server_of(data)
    made.settings |= QUICK
    yield made
    await made.stop("immediate")


async def test_server_takes_another_port_where_its_own_is_taken(server: Server) -> None:
    """Somebody was faster between the look and the start."""
    with socket.create_server((HOST, free_port())) as taken:
        server.port = taken.getsockname()[1]

        await server.start()

        assert server.port != taken.getsockname()[1]
    connection = await server.connect()
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


async def test_end_of_a_server_is_waited_for(server: Server) -> None:
    """Whoever ends it; one that was never started has ended."""
    await server.ended()
    await server.start()
    waiting = asyncio.create_task(server.ended())

    os.kill(server.pid, signal.SIGINT)
    await asyncio.wait_for(waiting, 20)

    assert not server.running


async def test_server_that_does_not_start_says_why(server: Server) -> None:
    """The last lines of its log are in the error."""
    server.settings["shared_buffers"] = "much"

    with pytest.raises(EmbeddedError, match="shared_buffers"):
        await server.start()

    assert not server.running
    with pytest.raises(EmbeddedError, match="is not running"):
        _ = server.pid


async def test_port_is_given_up_on_after_three(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each port is taken, the start ends with the server's own words."""
    with socket.create_server((HOST, free_port())) as taken:
        monkeypatch.setattr(postgres, "free_port", lambda: taken.getsockname()[1])

        with pytest.raises(EmbeddedError, match="Address already in use"):
            await server.start()


async def test_server_that_does_not_end_in_time_is_killed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """`smart` waits for its clients, and this one stays; one that has ended is stopped and killed already."""
    await server.start()
    connection = await server.connect()
    monkeypatch.setattr(postgres, "STOP_SECONDS", 0.1)

    await server.stop("smart")

    assert not server.running
    connection.terminate()
    await server.stop()
    await server.kill()


def test_missing_port_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may have none free."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(postgres, "PORTS", range(port, port + 1))

        with pytest.raises(EmbeddedError, match="No port between"):
            free_port()
