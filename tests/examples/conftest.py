"""The library as people install it: its wheel in a fresh environment, and programs that run there."""

import asyncio
import subprocess
import sys
import sysconfig
import venv
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import asyncpg
import pytest
from hatchling import build

from tests.conftest import Database

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TOKEN_KEY = "a key of the examples, long enough"
# Starts a program of the fresh environment, in a folder of examples/, with variables.
Start: TypeAlias = Callable[..., Awaitable[Process]]


@pytest.fixture(scope="session")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel without its dependencies, which are those of the tests' own interpreter."""
    folder = tmp_path_factory.mktemp("fresh")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        wheel = folder / build.build_wheel(str(folder))
    venv.create(folder / "venv")
    python = folder / "venv/bin/python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    return python


@pytest.fixture
async def start(fresh_python: Path) -> AsyncIterator[Start]:
    """Give a way to start programs, which are killed at the end of the test if they still run."""
    started: list[Process] = []

    async def run(folder: str, *arguments: str, **variables: str) -> Process:
        process = await asyncio.create_subprocess_exec(
            fresh_python, "-B", *arguments,
            cwd=EXAMPLES / folder, env={"TOKEN_KEY": TOKEN_KEY, **variables}, stdout=PIPE, stderr=STDOUT,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def make_tables(database: Database, folder: str) -> None:
    """Run an example's schema.sql as the owner of the service's tables, and wait until the replica has it too."""
    owner = await asyncpg.connect(database.url("app_owner"))
    await owner.execute((EXAMPLES / folder / "schema.sql").read_text(encoding="utf-8"))
    await owner.close()
    await database.cluster.wait_replayed()
