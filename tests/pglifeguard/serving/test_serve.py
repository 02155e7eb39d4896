"""`serve` in one process: by a port or a Unix socket, until Ctrl-C, with uvicorn's own options."""

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pglifeguard import DatabasesSettings
from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.serving import serve


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


class LivesSomewhere(Lives):
    """The same; presses Ctrl-C once it can be reached."""

    family: ClassVar[socket.AddressFamily]
    address: ClassVar[Any]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Knock while it lives."""

        async def is_reached() -> bool:
            with socket.socket(self.family) as knocking:
                return knocking.connect_ex(self.address) == 0

        async def leave() -> None:
            self.told.append("reached" if await eventually(is_reached, seconds=10) else "never reached")
            os.kill(os.getpid(), signal.SIGINT)

        leaving = asyncio.create_task(leave())
        await super().__call__(scope, receive, send)
        await leaving


@pytest.mark.parametrize("kind", ["port", "Unix socket"])
def test_one_process_is_served_until_ctrl_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    """`serve` returns to its caller, the application has stopped in order, and no socket's file is left."""
    Lives.told.clear()
    monkeypatch.setenv("DATABASE_URL", "postgresql://app:secret@127.0.0.1/none")
    port, path = free_port(), tmp_path / "service.sock"
    where: dict[str, Any] = {"port": port} if kind == "port" else {"uds": str(path)}
    LivesSomewhere.family = socket.AF_INET if kind == "port" else socket.AF_UNIX
    LivesSomewhere.address = ("127.0.0.1", port) if kind == "port" else str(path)

    serve(f"{__name__}:LivesSomewhere", DatabasesSettings(), log_config=None, **where)

    assert Lives.told == ["lifespan.startup", "reached", "lifespan.shutdown"]
    assert not path.exists()


def test_option_that_serve_sets_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that somebody asks for is silently another thing."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://app:secret@127.0.0.1/none")

    with pytest.raises(TypeError, match="proxy_headers"):
        serve(f"{__name__}:Lives", DatabasesSettings(), proxy_headers=False)
