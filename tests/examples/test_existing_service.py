"""A service that exists takes the library by 15 changed lines, and then survives its database."""

import difflib
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import jwt
import pytest

from pglifeguard.embedded.postgres import HOST, free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database
from tests.examples.conftest import EXAMPLES, ROOT, TOKEN_KEY, Start, make_tables

BEFORE, AFTER = (EXAMPLES / "existing_service" / name / "app.py" for name in ("before", "after"))
HEADING = "\n## In a service that you have\n"


def difference() -> list[str]:
    """Return the unified diff of the two services, without context and file names."""
    before, after = (path.read_text(encoding="utf-8").splitlines() for path in (BEFORE, AFTER))
    return [
        line for line in difflib.unified_diff(before, after, n=0, lineterm="") if not line.startswith(("---", "+++"))
    ]


def changes(lines: list[str]) -> list[str]:
    """Return the lines of a diff that were added or removed, empty ones too."""
    return [line.rstrip() for line in lines if line.startswith(("+", "-"))]


def test_fifteen_lines_change() -> None:
    """Added and removed ones together."""
    assert 0 < len(changes(difference())) <= 15


def test_page_shows_the_difference() -> None:
    """Line for line, under its heading."""
    page = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```diff\n(.*?)```", page.partition(HEADING)[2].partition("\n## ")[0], re.DOTALL)

    assert changes(block.splitlines()) == changes(difference())


async def test_the_wheel_is_what_runs(start: Start, fresh_python: Path) -> None:
    """Neither the folder of the sources nor one that the tests' interpreter finds."""
    process = await start("existing_service", "-c", "import pglifeguard; print(pglifeguard.__file__)")
    printed, _ = await process.communicate()

    assert Path(printed.decode().strip()).is_relative_to(fresh_python.parents[1])


@pytest.mark.parametrize(("folder", "replica"), [("before", "none"), ("after", "none"), ("after", "replica")])
async def test_tests_of_the_service_pass(start: Start, database: Database, folder: str, replica: str) -> None:
    """The same claims before and after, on the primary alone and with a replica."""
    await make_tables(database, "existing_service")
    scheme = database.url().replace("postgresql://", "postgresql+asyncpg://")
    variables = {"DATABASE_URL": scheme} | (
        {"DATABASE_REPLICA_URL": database.replica_url()} if replica == "replica" else {}
    )

    arguments = ("-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", ".", "-p", "no:cacheprovider")
    process = await start(f"existing_service/{folder}", *arguments, **variables)
    printed, _ = await process.communicate()

    assert process.returncode == 0, printed.decode()
    assert "5 passed" in printed.decode()


@asynccontextmanager
async def served(start: Start, folder: str, url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the app by uvicorn, and give a client with a token when it answers."""
    port = free_port()
    arguments = ("-m", "uvicorn", "app:app", "--port", str(port))
    process = await start(f"existing_service/{folder}", *arguments, DATABASE_URL=url)
    token = jwt.encode({"sub": "ada", "exp": time.time() + 600}, TOKEN_KEY, "HS256")
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", headers=headers, timeout=30) as client:
        assert await eventually(lambda: reads(client), 30)
        yield client
    process.terminate()
    await process.communicate()


async def reads(client: httpx.AsyncClient, *, status: int = 200) -> bool:
    """Tell whether the service answers a read with this status."""
    try:
        return (await client.get("/authors")).status_code == status
    except httpx.TransportError:
        return False


def lose(proxy: Proxy) -> None:
    """Cut every connection to the database, and let none in."""
    proxy.refuse()
    proxy.cut()


async def test_service_says_503_while_its_database_is_away(start: Start, database: Database, proxy: Proxy) -> None:
    """A problem document with Retry-After, through all of the service's own middleware; 200 when it is back."""
    await make_tables(database, "existing_service")
    author = {"name": "Ada", "books": [{"title": "Notes"}]}
    async with served(start, "after", proxy.url(database.url())) as client:
        lose(proxy)
        answers = [
            await client.get("/authors"),
            await client.post("/authors", json=author),
            await client.get("/authors", headers={"Origin": "https://books.example"}),
        ]
        about = await client.get("/about")
        await proxy.accept()

        assert [answer.status_code for answer in answers] == [503, 503, 503]
        assert {answer.headers["Content-Type"] for answer in answers} == {"application/problem+json"}
        assert {answer.json()["code"] for answer in answers} <= {"connection_lost", "database_unreachable"}
        assert all(answer.headers["Retry-After"] and answer.headers["Server-Timing"] for answer in answers)
        assert answers[2].headers["Access-Control-Allow-Origin"] == "https://books.example"
        assert about.status_code == 200
        assert await eventually(lambda: reads(client), 15)
        assert (await client.post("/authors", json=author)).status_code == 201
        assert (await client.get("/authors")).json() == [author]


async def test_service_said_500_before(start: Start, database: Database, proxy: Proxy) -> None:
    """The network of these tests does break a service."""
    await make_tables(database, "existing_service")
    async with served(start, "before", proxy.url(database.url()).replace("://", "+asyncpg://")) as client:
        lose(proxy)

        # Its commits come after its answers: one that was cut closes the client's connection instead.
        assert await eventually(lambda: reads(client, status=500), 15)
