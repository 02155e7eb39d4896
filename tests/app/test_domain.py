"""A domain of one's own: one folder is copied, one word is written, and everything else finds it."""

import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import Database
from tests.interpreter import python

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".venv", ".git", ".local", "*_cache", "__pycache__")
USE = """
import asyncio, httpx
from app.main import create_app
from app.models import Base, load_models

async def use():
    load_models()
    assert "visits" in Base.metadata.tables
    app = create_app()
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    async with app.router.lifespan_context(app), client:
        visit = {"mrn": "V-1", "full_name": "Ada", "birth_date": "1980-01-01"}
        created = await client.post("/visits", json=visit, headers={"Idempotency-Key": "one"})
        found = await client.get(created.headers["location"])
        named = await client.get("/visits?name=ada")
        twin = await client.post("/visits", json=visit)
        print(created.status_code, found.json()["full_name"], len(named.json()), twin.json()["code"])

asyncio.run(use())
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Give a copy of the project in which `app/patients` was copied to `app/visits`, renamed, and named once."""
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    shutil.copytree(copy / "app/patients", copy / "app/visits")
    for file in (copy / "app/visits").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("patient", "visit").replace("Patient", "Visit"), encoding="utf-8")
    main = copy / "app/main.py"
    source = main.read_text(encoding="utf-8")
    main.write_text(source.replace('DOMAINS = ("patients", ', 'DOMAINS = ("visits", "patients", '), encoding="utf-8")
    return copy


@pytest.mark.slow
async def test_domain_is_one_folder_and_one_word(tree: Path, database: Database) -> None:
    """Its table is migrated, its routes answer, and the checks of floors and documents pass as they are."""
    environment = database.environment() | {"LOG_LEVEL": "ERROR"}

    async def run(*arguments: str) -> str:
        status, output = await python(*arguments, environment=environment, cwd=tree)
        assert status == 0, output
        return output

    await run("-m", "alembic", "revision", "--autogenerate", "--rev-id", "9999", "-m", "visits")
    await run("-m", "alembic", "upgrade", "head")
    checked = await run("-m", "alembic", "check")
    used = await run("-c", USE)
    # anyio, which comes with FastAPI and has a plugin for pytest, is imported already.
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")
    rules = await run("-m", "pytest", *options, "tests/test_floors.py", "tests/test_docs.py")

    assert "No new upgrade operations detected" in checked
    assert used.split() == ["201", "Ada", "1", "mrn_taken"]
    assert re.search(r"\d+ passed", rules)
