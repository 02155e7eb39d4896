"""`python -m app new-domain` makes a whole domain or nothing (tests/test_adding_a_domain.py goes on from there)."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from local.new_domain import Refused, make, singular_of

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".venv*", ".git", ".local", "*_cache", "__pycache__")
PUBLISHED, NEWEST = {"patients", "users", "reports"}, "0006"
NEXT = f"{int(NEWEST) + 1:04}"
MADE = ("__init__", "models", "queries", "routes", "schemas")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Give a copy of what a domain is made in."""
    for name in ("app", "migrations", "tests/app"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=LEFT_OUT)
    for name in ("alembic.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    take_out(tmp_path)
    return tmp_path


def contents(tree: Path) -> dict[str, str]:
    """Return every file with its text, and every folder."""
    paths = [path for path in tree.rglob("*") if not {"__pycache__", ".ruff_cache"} & set(path.parts)]
    return {str(path.relative_to(tree)): path.read_text("utf-8") if path.is_file() else "" for path in paths}


def domains(tree: Path) -> list[str]:
    """Return the names that the service serves."""
    for node in ast.parse((tree / "app/main.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DOMAINS":
            return list(ast.literal_eval(node.value))
    raise AssertionError("no DOMAINS")


def take_out(path: Path) -> None:
    """Have a copy of the tree begin as this one was published, whatever its owner has made or removed by now."""
    main = path / "app/main.py"
    source = main.read_text(encoding="utf-8")
    for name in set(domains(path)) - PUBLISHED:
        source = re.sub(rf'\s*"{name}",?', "", source)
        for folder in (path / "app" / name, path / "tests/app" / name):
            shutil.rmtree(folder, ignore_errors=True)
    main.write_text(source, encoding="utf-8")
    for migration in (path / "migrations/versions").glob("[0-9]*.py"):
        if migration.name[:4] > NEWEST:
            migration.unlink()


@pytest.mark.parametrize(
    ("name", "singular", "one"),
    [
        ("orders", None, "order"),
        ("lab_results", None, "lab_result"),
        ("bodies", None, "body"),
        ("addresses", None, "address"),
        ("invoices", None, "invoice"),
        ("people", "person", "person"),
        ("sessions", None, "session"),
        ("x" * 39 + "s", None, "x" * 39),
    ],
)
def test_domain_is_made_in_the_words_of_its_name(tree: Path, name: str, singular: str | None, one: str) -> None:
    """Folder, tests, migration and word are there, formatted; nothing else has changed; no other word is left."""
    before, known = contents(tree), domains(tree)

    made = make(name, singular, root=tree)

    after = contents(tree)
    new = {path: text for path, text in after.items() if path not in before}
    texts = "".join(new.values())
    assert {str(path) for path in made} == {path for path in new if path.endswith(".py")} | {"app/main.py"}
    assert {f"app/{name}/{module}.py" for module in MADE} < set(new)
    assert {f"tests/app/{name}/test_routes.py", f"migrations/versions/{NEXT}_{name}.py"} < set(new)
    assert {path for path in before if after[path] != before[path]} == {"app/main.py"}
    assert domains(tree) == [*known, name]
    assert f"async def add_{one}(" in texts
    assert "thing" not in texts.lower().replace("nothing", "")
    assert f'revision = "{NEXT}"\ndown_revision = "{NEWEST}"\n' in texts


@pytest.mark.parametrize(
    ("name", "one"),
    [
        *[("orders", "order"), ("cities", "city"), ("boxes", "box"), ("statuses", "status"), ("viruses", "virus")],
        *[("houses", "house"), ("clauses", "clause"), ("heroes", "hero"), ("analyses", "analysis"), ("cases", "case")],
    ],
)
def test_singular_is_guessed(name: str, one: str) -> None:
    """By the ending; `--singular` says what no rule tells."""
    assert singular_of(name) == one


@pytest.mark.parametrize(
    ("name", "singular", "sentence"),
    [
        ("", None, "no name for a domain"),
        ("Orders", None, "no name for a domain"),
        ("../orders", None, "no name for a domain"),
        ("9s", None, "begins with a small letter"),
        ("a", None, "from 2 to 40"),
        ("x" * 40 + "s", None, "from 2 to 40"),
        ("class", None, "word of Python"),
        ("people", None, "say --singular"),
        ("series", None, "say --singular"),
        ("sheep", "sheep", "both plural and singular"),
        ("people", "Person", "no name for a domain"),
        ("patients", None, "app/main.py names 'patients' already"),
        ("fields", None, "two meanings"),
        ("queries", None, "'Query' two meanings"),
        ("logs", None, "app/logs.py exists already"),
        ("metrics", None, "of the library"),
    ],
)
def test_name_that_will_not_do_is_refused(tree: Path, name: str, singular: str | None, sentence: str) -> None:
    """A sentence says why, and nothing was changed."""
    before = contents(tree)

    with pytest.raises(Refused, match=sentence):
        make(name, singular, root=tree)

    assert contents(tree) == before


@pytest.mark.parametrize("place", ["app/orders", "tests/app/orders"])
def test_nothing_is_overwritten(tree: Path, place: str) -> None:
    """A folder of that name, though no domain, stays as it is."""
    (tree / place).mkdir()
    (tree / place / "mine.py").write_text("MINE = 1\n", encoding="utf-8")
    before = contents(tree)

    with pytest.raises(Refused, match=f"{place} exists already"):
        make("orders", root=tree)

    assert contents(tree) == before


def test_nothing_half_made_is_left(tree: Path) -> None:
    """When ruff refuses what was written, all of it is taken back."""
    (tree / "app/ruff.toml").write_text('line-length = 40\nlint.select = ["E501"]\n', encoding="utf-8")
    before = contents(tree)

    with pytest.raises(Refused, match="E501"):
        make("orders", root=tree)

    assert contents(tree) == before


def test_place_for_the_name_has_to_be_there(tree: Path) -> None:
    """Without the line of domains, or with two newest migrations, nothing is guessed."""
    main, versions = tree / "app/main.py", tree / "migrations/versions"
    source = main.read_text(encoding="utf-8")
    main.write_text(source.replace("DOMAINS = (", "DOMAINS: Any = ("), encoding="utf-8")

    with pytest.raises(Refused, match="no line like DOMAINS"):
        make("orders", root=tree)
    third = (versions / "0003_headers_of_kept_answers.py").read_text(encoding="utf-8")
    (versions / "9999_other.py").write_text(third.replace('"0003"', '"9999"'), encoding="utf-8")
    with pytest.raises(Refused, match=f"{NEWEST}, 9999"):
        make("orders", root=tree)

    assert not (tree / "app/orders").exists()


def test_line_of_many_domains_is_broken(tree: Path) -> None:
    """Whatever form it has, the next name is added to it."""
    names, known = [f"{letter * 20}s" for letter in "abcde"], domains(tree)

    for name in names:
        make(name, root=tree)

    assert domains(tree) == [*known, *names]
    assert max(map(len, (tree / "app/main.py").read_text(encoding="utf-8").splitlines())) <= 120


def test_tests_pass_at_once(tmp_path: Path) -> None:
    """Its own pass, and the rules of the house, though the library has a module of that name."""
    tree = tmp_path / "project"
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    take_out(tree)
    make("orders", root=tree)

    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/app/orders", "tests/test_floors.py"],
        cwd=tree, env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert ran.returncode == 0, ran.stdout


def test_what_was_made_can_be_taken_out(tree: Path) -> None:
    """Tests that make a domain pass in a tree that has one of that name: their copy is freed of it."""
    known, before = domains(tree), set(contents(tree))
    for name, singular in (("orders", None), ("people", "person")):
        make(name, singular, root=tree)

    take_out(tree)

    assert domains(tree) == known
    assert set(contents(tree)) == before
