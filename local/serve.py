"""The service as a child process on a cluster: started, waited for, stopped, found again after a kill -9."""

import asyncio
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.
from dotenv import dotenv_values

from local.cluster import MAX_CONNECTIONS, Cluster
from local.runs import MARK, end_service, marked
from local.setup import DIRECTORY, PROJECT
from pglifeguard.embedded.account import EmbeddedError
from pglifeguard.embedded.programs import explain
from pglifeguard.embedded.waiting import eventually

READY_SECONDS = 30.0
# Short of the service's own patience with requests in flight: who presses Ctrl-C on a laptop wants the prompt back.
STOP_SECONDS = 5.0
PORT_SECONDS = 2.0
# Below the first one ports are root's; the last one is that of TCP.
FIRST_PORT, LAST_PORT = 8001, 65_536
# The status of local/check_settings.py where a setting is wrong, and not the code.
WRONG_SETTINGS = 2
# Where the databases will be is not known before they are there. A sentence about them names them by their roles: at
# 127.0.0.1:5432 it may be somebody else who listens.
SOME_URLS = [
    f"postgresql://{role}:password@{host}/db" for role, host in (("a", "primary"), ("b", "replica"), ("c", "primary"))
]


class Service:
    """`python -m app serve` over the cluster in `directory`; a mark in the environment tells its processes."""

    def __init__(self, directory: Path, *, host: str, port: int, workers: int, reload: bool) -> None:
        self.host = host
        self.port = port
        self.workers = workers
        self.reload = reload
        self._directory = directory
        self._mark = str(directory.absolute())
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        return _url(self.host, self.port)

    async def take_port(self) -> None:
        """Make sure of the port before anything slow is started, ending the service that a killed run left on it.

        Raises: EmbeddedError when somebody else has it.
        """
        # A process that was killed is gone a moment before the kernel has closed what it listened on.
        patience = PORT_SECONDS if await end_service(self._mark) else 0.0

        async def free() -> bool:
            return self._is_free(self.port)

        if not await eventually(free, patience):
            another = next(filter(self._is_free, range(self.port + 1, LAST_PORT)), FIRST_PORT)
            elsewhere = "" if self._directory == DIRECTORY else f"--directory {shlex.quote(str(self._directory))} "
            raise EmbeddedError(
                f"Port {self.port} on {self.host} is taken or not ours to use. Stop what listens there, or choose "
                f'another: make {"dev" if self.reload else "run"} ARGS="{elsewhere}--port {another}"'
            )

    async def check_settings(self) -> bool:
        """Make sure that the environment and `.env` are ones with which the service would start.

        Returns whether its routes will want tokens.

        Raises: EmbeddedError, with the service's own words.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "local.check_settings",
            cwd=PROJECT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=os.environ | _variables(*SOME_URLS) | self._chosen(),
        )  # fmt: skip
        try:
            said, output = await process.communicate()
        finally:
            if process.returncode is None:  # We were told to stop meanwhile.
                process.kill()
        if process.returncode != 0:
            text = output.decode(errors="replace").strip()
            raise EmbeddedError(text if process.returncode == WRONG_SETTINGS else explain(text, "Reading the settings"))
        return bool(said.strip())

    async def start(self, environment: dict[str, str]) -> None:
        """Start and wait until /health/ready says yes.

        With `reload` it may take as long as somebody needs to mend what does not start.

        Raises: EmbeddedError when it ends, or takes over 30 seconds.
        """
        options = ["--host", self.host, "--port", str(self.port), "--workers", str(self.workers)]
        if self.reload:
            options.append("--reload")
        self._process = subprocess.Popen(  # noqa: ASYNC220  # It returns at once.
            [sys.executable, "-m", "app", "serve", *options],
            cwd=PROJECT,
            env=os.environ | environment | self._chosen() | {MARK: self._mark},
            start_new_session=True,  # Ctrl-C is for the parent, which stops the service before its databases.
        )
        async with httpx.AsyncClient(base_url=self.url, timeout=1, trust_env=False) as client:

            async def ready_or_ended() -> bool:
                with suppress(httpx.TransportError):
                    return not self.running or (await client.get("/health/ready")).is_success
                return not self.running

            patience = math.inf if self.reload else READY_SECONDS
            if not await eventually(ready_or_ended, patience) or not self.running:
                raise EmbeddedError("The service did not become ready; its own words are above.")

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    async def wait(self) -> int:
        """Wait until the service ends by itself and return its exit status."""
        return 0 if self._process is None else await asyncio.to_thread(self._process.wait)

    async def stop(self) -> None:
        """Ask it to stop, and after five seconds insist, to its workers too."""
        if self._process is not None and self.running:
            self._process.terminate()

            async def ended() -> bool:
                return not self.running

            if not await eventually(ended, STOP_SECONDS):
                os.killpg(self._process.pid, signal.SIGKILL)
                await asyncio.to_thread(self._process.wait)

    @property
    def place(self) -> dict[str, str]:
        """The variables that lead an operator's commands to it."""
        return {"HOST": self.host, "PORT": str(self.port)}

    def _chosen(self) -> dict[str, str]:
        """Return what the service makes of its command line, and what it may count on if nobody has said it."""
        budget = {"CONNECTION_LIMIT": MAX_CONNECTIONS, "INSTANCES": "1", "SURGE_INSTANCES": "0"}
        said = {*dotenv_values(PROJECT / ".env"), *os.environ}
        left_open = {name: value for name, value in budget.items() if name not in said}
        return self.place | {"WORKERS": str(self.workers)} | left_open

    def _is_free(self, port: int) -> bool:
        with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, port))
            except OSError:
                return False
            return True


@dataclass(frozen=True)
class Running:
    """A service that somebody else started; `environment` has the addresses of its databases."""

    url: str
    workers: int
    environment: dict[str, str]


def running_in(directory: Path) -> Running | None:
    """Find the service over the cluster in this directory, by its mark and its command line."""
    for process, environment in marked(str(directory.absolute())):
        with suppress(psutil.Error):
            command = process.cmdline()
            if "serve" in command:  # The workers' command lines have another form.
                host, port, workers = (
                    command[command.index(option) + 1] for option in ("--host", "--port", "--workers")
                )
                return Running(_url(host, int(port)), int(workers), environment)
    return None


def _url(host: str, port: int) -> str:
    """Say where a browser on this machine finds a service."""
    return f"http://{'127.0.0.1' if host in {'0.0.0.0', '::'} else host}:{port}"  # noqa: S104


def environment(cluster: Cluster) -> dict[str, str]:
    """Return the variables that point the service at the cluster: what a deployment would set."""
    reader = cluster.url("app_ro", server="replica")
    return _variables(cluster.url("app_rw"), reader, cluster.url("app_owner"))


def _variables(primary: str, replica: str, owner: str) -> dict[str, str]:
    return {
        "DATABASE_URL": primary,
        "DATABASE_REPLICA_URL": replica,
        "DATABASE_ANALYTICS_URL": replica,
        "MIGRATIONS_URL": owner,
    }
