"""The service as `make run` serves it, with tokens: a process of its own over a primary and a replica of its own."""

import asyncio
import os
import secrets
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from fastapi import FastAPI

from fuzz.documented import Documented, documented
from local.load.target import make_token
from local.runs import marked
from local.serve import Running, running_in
from local.setup import PROJECT
from pglifeguard.embedded.account import EmbeddedError
from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing.serving import listening

START_SECONDS = 90.0
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Stage:
    """The service that is fuzzed; `log` has what it writes, and `token` every scope of its OpenAPI document."""

    port: int
    token: str
    promised: Documented
    log: Path
    run: Running
    directory: Path
    client: httpx.AsyncClient

    @property
    def url(self) -> str:
        """Where it answers."""
        return self.run.url

    def processes(self) -> list[int]:
        """Return the ids of its processes."""
        return sorted(process.pid for process, _ in marked(str(self.directory.absolute())))


@asynccontextmanager
async def staged(directory: Path, *, port: int) -> AsyncIterator[Stage]:
    """Start servers and service anew in this directory, and stop them at the end.

    Raises: EmbeddedError when the service does not become ready.
    """
    variables = {
        # A machine's other services are none of ours.
        **{name: value for name, value in os.environ.items() if not name.startswith(("DATABASE_", "OTEL_"))},
        "AUTH_SECRET": secrets.token_hex(32),
        "LOG_FORMAT": "json",
        # What is found is to be the service's: a busy machine may take longer to log in than its usual 0.5 s.
        "DATABASE_POOL_TIMEOUT": "10",
    }
    async with AsyncExitStack() as stack:
        variables["DIRECTORY_URL"] = await stack.enter_async_context(listening(_profiles()))
        with (directory / "out").open("wb") as out, (directory / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "local", "--fresh", "--port", str(port), "--directory", directory / "databases",
                cwd=PROJECT, env=variables, stdout=out, stderr=log, start_new_session=True,
            )  # fmt: skip
        stack.push_async_callback(_stop, process)
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False)
        )
        await _ready(client, process, directory / "log")
        run = running_in(directory / "databases")
        if run is None:
            raise EmbeddedError("The service answers, and its process is not to be found.")
        promised = documented((await client.get("/openapi.json")).json())
        token = await asyncio.to_thread(make_token, run, promised.scopes)
        client.headers["Authorization"] = f"Bearer {token}"
        yield Stage(port, token, promised, directory / "log", run, directory / "databases", client)


async def _ready(client: httpx.AsyncClient, process: Process, log: Path) -> None:
    async def ready_or_ended() -> bool:
        try:
            return process.returncode is not None or (await client.get("/health/ready")).is_success
        except httpx.TransportError:
            return False

    if not await eventually(ready_or_ended, START_SECONDS) or process.returncode is not None:
        raise EmbeddedError(f"The service did not become ready; {log} says why.")


async def _stop(process: Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _profiles() -> FastAPI:
    """Make the user directory of `POST /users/{id}/sync`."""
    app = FastAPI()

    @app.get("/profiles/{email:path}")
    async def get_profile(email: str) -> dict[str, object]:
        return {"full_name": email[:200], "is_active": True}  # An address may be longer than a name.

    return app
