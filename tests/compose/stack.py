"""The running stack, from outside: compose's commands, the servers' own words, and waiting for a condition."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

ROOT = Path(__file__).parent.parent.parent
T = TypeVar("T")

NOTHING: Mapping[str, str] = MappingProxyType({})
# Beside a stack that somebody may be running on the usual ports.
PORTS = {"APP_PORT": "18000", "OPERATIONS_PORT": "18405", "PROMETHEUS_PORT": "19090", "ALERTMANAGER_PORT": "19093"}
SUPERUSER_PASSWORD = "development-postgres"  # The default of docker-compose.yml.


class Stack:
    """One project of compose."""

    def __init__(self, project: str, *files: str, **environment: str) -> None:
        self.project = project
        self.files = files
        # What a developer has exported must not leak into the stack under test.
        keep = {"PATH", "HOME", "DOCKER_HOST", "DOCKER_CONFIG"}
        self.environment = {k: v for k, v in os.environ.items() if k in keep} | PORTS | environment

    def with_file(self, file: str) -> "Stack":
        """Give the same project with one more file."""
        stack = Stack(self.project, *self.files, file)
        stack.environment = self.environment
        return stack

    async def compose(self, *arguments: str, check: bool = True, env: Mapping[str, str] = NOTHING) -> str:
        """Run `docker compose …` and return what it printed; what it said on standard error is in the failure."""
        files = [part for file in self.files for part in ("-f", file)]
        return await self.docker(
            "compose", "--ansi", "never", "-p", self.project, *files, *arguments, check=check, env=env
        )

    async def docker(self, *arguments: str, check: bool = True, env: Mapping[str, str] = NOTHING) -> str:
        """Run `docker …` in the same way."""
        process = await asyncio.create_subprocess_exec(
            "docker",
            *arguments,
            cwd=ROOT,
            env={**self.environment, **env},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        printed, said = await process.communicate()
        if check and process.returncode != 0:
            raise AssertionError(f"docker {' '.join(arguments)}: {said.decode()[-3000:]}{printed.decode()[-1000:]}")
        return printed.decode() if check else printed.decode() + said.decode()

    async def script(self, *command: str, env: Mapping[str, str] = NOTHING) -> tuple[int, str]:
        """Run one of the repository's scripts for this project; return its exit code and all that it said."""
        composition = {"COMPOSE_FILE": ":".join(self.files), "COMPOSE_PROJECT_NAME": self.project}
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            env={**self.environment, **composition, **env},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        return process.returncode or 0, said.decode()

    async def up(self, *arguments: str, env: Mapping[str, str] = NOTHING) -> None:
        """Bring the stack, or a part, up and wait until it is healthy."""
        await self.compose("up", "--detach", "--wait", *arguments, env=env)

    async def psql(self, service: str, sql: str, *options: str) -> list[list[str]]:
        """Ask a server itself, as its superuser, past every pooler."""
        answer = await self.compose(
            *("exec", "-T", "-e", f"PGPASSWORD={SUPERUSER_PASSWORD}", service),
            *("psql", "-XqAt", "-U", "postgres", "-d", "lifeguard", "-v", "ON_ERROR_STOP=1", *options, "-c", sql),
        )
        return [line.split("|") for line in answer.splitlines() if line]

    async def lock_patient(self, patient: int, *, seconds: float) -> None:
        """Hold the row of a patient, so that everybody who changes it waits."""
        lock = f"BEGIN; SELECT FROM patients WHERE id = {patient} FOR UPDATE; SELECT pg_sleep({seconds}); COMMIT"
        await self.psql("primary", lock)

    async def console(self, command: str) -> list[dict[str, str]]:
        """Ask PgBouncer's admin console; one dictionary for each row."""
        answer = await self.compose(
            *("exec", "-T", "pgbouncer", "psql", "-XqA", "-h", "/run/pgbouncer", "-p", "6432", "-U", "pgbouncer"),
            *("-P", "footer=off", "-c", command, "pgbouncer"),
        )
        header, *rows = [line.split("|") for line in answer.splitlines() if line] or [[]]
        return [dict(zip(header, row, strict=True)) for row in rows]

    async def containers(self, service: str = "") -> list[dict[str, Any]]:
        """Describe the containers of a service, or all, as `docker inspect` does."""
        ids = (await self.compose("ps", "--all", "--quiet", *([service] if service else []))).split()
        return list(json.loads(await self.docker("inspect", *ids))) if ids else []


async def eventually(ask: Callable[[], Awaitable[T]], *, within: float, every: float = 0.25) -> T:
    """Ask until the answer is truthy, and return it; fail with the last answer when `within` seconds have passed."""
    deadline = time.monotonic() + within
    while True:
        answer = await ask()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within:g} s; the last answer was {answer!r}")
        await asyncio.sleep(every)
