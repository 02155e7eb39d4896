"""New connections are accepted several at a time: a busy loop does not keep them waiting for a turn each."""

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any, ClassVar

import pytest
import uvicorn
import uvloop

from pglifeguard import DatabasesSettings
from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.serving import serve
from pglifeguard.serving.accepting import AT_ONCE, Server

# The loop's turns are counted by a callback that asks for the next one.
_turn = 0
_accepted: list[int] = []


class NotesTurn(asyncio.Protocol):
    """Notes in which turn of the loop its client was accepted."""

    def __init__(self, **_given: Any) -> None:
        pass

    def connection_made(self, transport: Any) -> None:
        """Note it, and leave."""
        _accepted.append(_turn)
        transport.close()


async def no_request_comes(scope: Any, receive: Any, send: Any) -> None:
    """Be the application that uvicorn wants."""
    raise AssertionError(scope, receive, send)


def accepted_in(server_class: type[uvicorn.Server]) -> int:
    """Count the turns that a server takes to accept `AT_ONCE` clients who have come while its loop was busy."""

    def count() -> None:
        global _turn  # noqa: PLW0603
        _turn += 1
        asyncio.get_running_loop().call_soon(count)

    async def main() -> None:
        port = free_port()
        config = uvicorn.Config(
            no_request_comes, port=port, http=NotesTurn, lifespan="off", log_config=None, timeout_graceful_shutdown=5
        )
        server = server_class(config)

        async def started() -> bool:
            return server.started

        async def all_accepted() -> bool:
            return len(_accepted) == AT_ONCE

        serving = asyncio.create_task(server.serve())
        assert await eventually(started, seconds=10)
        count()
        # Nothing is awaited here, so the loop stands still while they come.
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(AT_ONCE)]
        assert await eventually(all_accepted, seconds=10)
        for client in clients:
            client.close()
        server.should_exit = True
        await serving
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))

    _accepted.clear()
    uvloop.run(main())
    return len(set(_accepted))


class Lives:
    """An application with a lifespan and nothing else."""

    told: ClassVar[list[str]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Say that it has started, and that it has stopped."""
        assert scope["type"] == "lifespan"
        for _ in ("startup", "shutdown"):
            message = await receive()
            self.told.append(message["type"])
            await send({"type": f"{message['type']}.complete"})


async def interrupt() -> None:
    """Press Ctrl-C; uvicorn calls this in its first turn."""
    os.kill(os.getpid(), signal.SIGINT)


def test_one_process_is_served_until_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` returns to its caller, and the application has stopped in order."""
    Lives.told.clear()
    monkeypatch.setenv("DATABASE_URL", "postgresql://app:secret@127.0.0.1/none")

    serve(
        f"{__name__}:Lives",
        DatabasesSettings(),
        port=free_port(),
        log_config=None,
        callback_notify=interrupt,
        timeout_notify=0,
    )

    assert Lives.told == ["lifespan.startup", "lifespan.shutdown"]


class LivesAtASocket(Lives):
    """The same; presses Ctrl-C when its Unix socket is there."""

    address: ClassVar[Path]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Look for the socket while it lives."""

        async def is_there() -> bool:
            return self.address.is_socket()

        async def leave() -> None:
            self.told.append("socket" if await eventually(is_there, seconds=10) else "no socket")
            await interrupt()

        leaving = asyncio.create_task(leave())
        await super().__call__(scope, receive, send)
        await leaving


def test_unix_socket_is_left_to_uvicorn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is served, and its file is gone afterwards."""
    Lives.told.clear()
    monkeypatch.setenv("DATABASE_URL", "postgresql://app:secret@127.0.0.1/none")
    LivesAtASocket.address = tmp_path / "service.sock"

    serve(f"{__name__}:LivesAtASocket", DatabasesSettings(), uds=str(LivesAtASocket.address), log_config=None)

    assert Lives.told == ["lifespan.startup", "socket", "lifespan.shutdown"]
    assert not LivesAtASocket.address.exists()


def test_option_that_serve_sets_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that somebody asks for is silently another thing."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://app:secret@127.0.0.1/none")

    with pytest.raises(TypeError, match="proxy_headers"):
        serve(f"{__name__}:Lives", DatabasesSettings(), proxy_headers=False)


def test_several_are_accepted_in_a_turn() -> None:
    """By itself uvicorn takes a turn for each."""
    assert accepted_in(Server) == 1
    assert accepted_in(uvicorn.Server) == AT_ONCE
