"""docs/adding-a-domain.md is done as it is written, in a copy of the tree, and what it makes serves."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Database, Execute
from tests.interpreter import python
from tests.local.test_new_domain import NEWEST, take_out

ROOT = Path(__file__).parent.parent
ADDING, REMOVING = (ROOT / "docs/adding-a-domain.md").read_text(encoding="utf-8").split("\n## Removing a domain\n")
LEFT_OUT = shutil.ignore_patterns(".venv*", ".git", ".local", "*_cache", "__pycache__")
# A block, with the file that holds it, or the file and the line below which it comes, or commands.
STEP = re.compile(
    r"`(?P<file>[\w./]+\.py)`:\n\n```python\n(?P<text>.*?)```"
    r"|`(?P<table>[\w./]+)`, below ``(?P<line>[^\n]*?)``:\n\n```text\n(?P<rows>.*?)```"
    r"|```console\n(?P<commands>.*?)```",
    re.DOTALL,
)
TRIGGERS = """
SELECT string_agg(tgname, ' ' ORDER BY tgname) FROM pg_trigger WHERE tgrelid = 'users'::regclass AND NOT tgisinternal
"""
# Clients of what was made: each prints what it was answered.
CLIENT = """
import asyncio, httpx
from app.main import create_app

async def use():
    app = create_app()
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    async with app.router.lifespan_context(app), client:
        await ask(client)

async def ask(client):
    patient = {"mrn": "A-1", "full_name": "Ada", "birth_date": "1980-01-01"}
    created = await client.post("/patients", json=patient)
    found = await client.get(created.headers["location"])
    print(created.status_code, found.json()["full_name"])
"""
BOOK = """
    user = await client.post("/users", json={"email": "grace@example.com", "full_name": "Grace"})
    booking = {"patient_id": found.json()["id"], "user_id": user.json()["id"]}
    times = [f"2026-01-31T09:{minute:02}:00Z" for minute in range(0, 60, 15)]
    for start, end in zip(times, times[2:] + ["2026-01-31T10:00:00Z", "2026-01-31T10:15:00Z"]):
        answer = await client.post("/appointments", json=booking | {"starts_at": start, "ends_at": end})
        print(answer.status_code, answer.json().get("code"))
    page = await client.get("/appointments?limit=1")
    last = await client.get(page.links["next"]["url"])
    print([each["id"] for each in page.json() + last.json()], last.links)
"""
NO_USERS = """
    print((await client.get("/users")).status_code, (await client.get("/reports/summary")).status_code)
    print(sorted(path for path in client._transport.app.openapi()["paths"] if "users" in path))
"""
SEED = "import asyncio, os, local.seed; print(asyncio.run(local.seed.seed(os.environ['DATABASE_URL'], 3)))"
RUN = "\nasyncio.run(use())\n"


@dataclass(frozen=True)
class Tree:
    """A copy of the project, with the environment of this one, beside a database."""

    path: Path
    variables: dict[str, str]

    async def follow(self, page: str) -> list[str]:
        """Do each step of a page, in order, and return the commands that were run. Each has to succeed."""
        run = []
        for step in STEP.finditer(page):
            if step["file"]:
                (self.path / step["file"]).write_text(step["text"], encoding="utf-8")
            elif step["table"]:
                self.insert(step["table"], step["line"], step["rows"])
            else:
                run += [await self.run(command) for command in commands(step["commands"])]
        return run

    async def run(self, command: str) -> str:
        """Run a command as a shell does, and return it."""
        environment = os.environ if "pytest" in command else self.variables  # Tests have databases of their own.
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", command,
            cwd=self.path, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        assert process.returncode == 0, f"{command}\n{output.decode()}"
        return command

    def insert(self, name: str, beginning: str, rows: str) -> None:
        """Write rows below the one line that begins so, unless they are there."""
        file = self.path / name
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        if set(rows.splitlines(keepends=True)) <= set(lines):
            return  # The reader has written them.
        (number,) = [number for number, line in enumerate(lines) if line.startswith(beginning)]
        lines.insert(number + 1, rows)
        file.write_text("".join(lines), encoding="utf-8")

    async def use(self, *code: str) -> list[str]:
        """Serve what the tree holds, ask it, and return what was printed."""
        status, output = await python("-c", "".join((CLIENT, *code, RUN)), environment=self.variables, cwd=self.path)
        assert status == 0, output
        return output.splitlines()


def commands(block: str) -> Iterator[str]:
    """List what is typed."""
    for line in block.splitlines():
        assert line.startswith("$ "), line
        yield line.removeprefix("$ ")


@pytest.fixture
def tree(tmp_path: Path, database: Database) -> Tree:
    """Give a copy of the tree, and what mypy knows of the packages of others: to learn that would take 20 s."""
    path = tmp_path / "project"
    shutil.copytree(ROOT, path, ignore=LEFT_OUT)
    take_out(path)
    (path / ".venv").symlink_to(sys.prefix)
    if (known := ROOT / ".mypy_cache").exists():
        shutil.copytree(known, path / known.name)
    # The machine may be busy, which is not what is tested.
    patient = {"DATABASE_POOL_TIMEOUT": "20", "LOG_LEVEL": "ERROR"}
    variables = os.environ | database.environment() | patient
    back = [sys.executable, "-m", "alembic", "downgrade", NEWEST]
    subprocess.run(back, cwd=ROOT, env=variables, capture_output=True, check=True)
    return Tree(path, variables)


def test_every_block_of_the_page_is_a_step() -> None:
    """Nothing that a reader would type or write is left out."""
    blocks = re.findall(r"^```\w+$", ADDING + REMOVING, re.MULTILINE)

    assert len(blocks) == len(STEP.findall(ADDING)) + len(STEP.findall(REMOVING)) > 15


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_domain_is_made_as_the_page_says(tree: Tree) -> None:
    """Each command succeeds, the routes book, refuse what overlaps and give pages, and the schema is the models'."""
    run = await tree.follow(ADDING)
    answers = await tree.use(BOOK)

    assert [command.split()[0] for command in run[-2:]] == [".venv/bin/python", ".venv/bin/alembic"]
    assert answers == [
        "201 Ada",
        "201 None",
        "409 appointment_overlaps",
        "201 None",
        "409 appointment_overlaps",
        "[1, 3] {}",
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_domain_is_removed_as_the_page_says(tree: Tree, execute: Execute) -> None:
    """Without its folder, its word and its table the service starts, the others work, and the schema is the models'.

    The downgrade gives the table back with what notes its changes.
    """
    tree.variables["DIRECTORY_URL"] = "http://directory"  # A deployment may still set it.
    triggers = await execute(TRIGGERS)

    run = await tree.follow(REMOVING)
    _, seeded = await python("-c", SEED, environment=tree.variables, cwd=tree.path)
    answers = await tree.use(NO_USERS)
    await python("-m", "alembic", "downgrade", NEWEST, environment=tree.variables, cwd=tree.path)

    assert "alembic check" in " ".join(run)
    assert not (tree.path / "app/users").exists()
    assert seeded == "True\n"
    assert await execute(TRIGGERS) == triggers
    assert "audit_change" in triggers
    assert answers == ["201 Ada", "404 200", "[]"]
