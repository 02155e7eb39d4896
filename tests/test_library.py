"""docs/library.md: its examples run as they are written, and its tables say what the code says."""

import ast
import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

import pglifeguard
import pglifeguard.doctor
import pglifeguard.fastapi
import pglifeguard.serving
import pglifeguard.testing
from tests.conftest import Database

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/library.md").read_text(encoding="utf-8")
IN_FASTAPI, ALONE = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def run(source: str) -> dict[str, Any]:
    """Run a snippet of the page and return its names."""
    names: dict[str, Any] = {}
    exec(compile(source, "library.md", "exec", dont_inherit=True), names)  # noqa: S102  # It is our own text.
    return names


@pytest.fixture
def environment(database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set DATABASE_URL and nothing else."""
    monkeypatch.setenv("DATABASE_URL", database.url())
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("environment")
async def test_ten_lines_serve() -> None:
    """The application of the page answers, and has the library's routes and error answers."""
    app = run(IN_FASTAPI)["app"]
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    async with app.router.lifespan_context(app), client:
        answers = [await client.get(path) for path in ("/sum?a=1&b=2", "/health/db", "/debug/pool-stats", "/nothing")]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 404]
    assert (answers[0].json(), answers[3].json()["code"]) == (3, "not_found")


@pytest.mark.usefixtures("environment")
async def test_script_needs_no_application(capsys: pytest.CaptureFixture[str]) -> None:
    """The script of the page runs in an event loop of its own, and prints what it has counted."""
    await asyncio.to_thread(run, ALONE)

    assert int(capsys.readouterr().out) > 100


@pytest.mark.parametrize(
    "package",
    [pglifeguard, pglifeguard.fastapi, pglifeguard.serving, pglifeguard.testing, pglifeguard.doctor],
    ids=lambda package: package.__name__,
)
def test_every_public_name_is_on_the_page(package: ModuleType) -> None:
    """In the order of `__all__`, each with a sentence, and each with a docstring where it can have one."""
    section = PAGE.partition(f"\n### `{package.__name__}`\n")[2].partition("\n##")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.{20,}) \|$", section, re.MULTILINE)

    assert [name for name, _ in rows] == package.__all__
    for name in package.__all__:
        found = getattr(package, name)
        assert not isinstance(found, type) or found.__doc__


def private_imports(tree: ast.AST) -> Iterator[str]:
    """List what a module imports from private places of other packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if "._" in alias.name)
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("pglifeguard"):
            for alias in node.names:
                if any(part.startswith("_") for part in (*str(node.module).split("."), alias.name)):
                    yield f"{node.module}.{alias.name}"


# Public words of a named tuple, which begin so that no field has their names.
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}


def private_attributes(tree: ast.AST) -> Iterator[str]:
    """List the private attributes that are used of anything but `self`, where they may be somebody else's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value
            if not (isinstance(owner, ast.Name) and owner.id in {"self", "cls", "sys"}):
                yield node.attr


def test_what_is_private_elsewhere_is_on_the_page() -> None:
    """Whoever upgrades a package finds what it may break."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "pglifeguard").rglob("*.py"))]
    own = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    } | {
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    used = {name for tree in trees for name in private_attributes(tree)} - own - OF_NAMED_TUPLES
    imported = {name for tree in trees for name in private_imports(tree)}
    section = PAGE.partition("\n## What it takes that is private\n")[2]
    words = set(re.findall(r"[\w.]+", section))

    assert imported - words == set()
    assert {name for name in used if not any(word.endswith(name) for word in words)} == set()
