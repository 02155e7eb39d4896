"""`make clean` in a project of its own: what goes, what stays, and what is said of both."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from local.clean import MADE
from local.setup import PROJECT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Give a project in which targets were made, and a run has left its databases, somewhere else than they seem."""
    # A path may have a space anywhere, also that of the interpreter.
    project = tmp_path / "the project"
    (project / "local").mkdir(parents=True)
    for name in ("__init__.py", "clean.py"):
        shutil.copy(PROJECT / "local" / name, project / "local")
    shutil.copy(PROJECT / "Makefile", project)
    for folder in (".venv", ".venv-docs", ".mypy_cache", ".local/site", "app", "elsewhere/primary"):
        (project / folder).mkdir(parents=True)
        (project / folder / "file").touch()
    for name in (".coverage", ".coverage.a.1", ".env", ".local/env", ".local/passwords.json", ".local/primary.log"):
        (project / name).touch()
    (project / ".local/lock").write_text("4711", encoding="utf-8")
    (project / ".local/data").symlink_to(project / "elsewhere")
    return project


def make_clean(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Type `make clean`."""
    python = project.parent / "my python"
    python.unlink(missing_ok=True)
    python.symlink_to(sys.executable)
    command = ["make", "--no-print-directory", "clean", f"PYTHON={python}", *arguments]
    # This may be a `make test` itself, which hands its flags and its ARGS on.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ARGS", "MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def names(project: Path) -> set[str]:
    """List what is there, but for what is the project's own."""
    return {path.name for folder in (project, project / ".local") for path in folder.glob("*")} - {"Makefile", "local"}


def test_clean_says_what_goes_and_keeps_the_databases(project: Path) -> None:
    """Whoever has written something into the service of `make run` finds it there again, and `.env` is theirs."""
    cleaned = make_clean(project)

    assert cleaned.returncode == 0, cleaned.stderr
    removed = ".venv, .venv-docs, .coverage, .coverage.a.1, .mypy_cache, .local/site"
    assert cleaned.stdout.splitlines() == [
        f"Removed: {removed}.",
        "Kept: the databases of `make run`, in .local. They go, too, with: make clean ARGS=--databases",
    ]
    databases = {"data", "env", "lock", "passwords.json", "primary.log"}
    assert names(project) == {".env", ".local", "app", "elsewhere"} | databases
    assert (project / "elsewhere/primary/file").exists()
    assert make_clean(project).stdout.startswith("There was nothing to remove.\nKept: ")


def test_clean_removes_the_databases_when_it_is_asked_to(project: Path) -> None:
    """With them goes what their link leads to, and the folder that they were in."""
    cleaned = make_clean(project, "ARGS=--databases")

    assert cleaned.returncode == 0, cleaned.stderr
    assert ".local/data" in cleaned.stdout
    assert "Kept" not in cleaned.stdout
    assert names(project) == {".env", "app"}
    assert make_clean(project, "ARGS=--databases").stdout == "There was nothing to remove.\n"


@pytest.mark.parametrize("arguments", [(), ("ARGS=--databases",)])
def test_clean_touches_nothing_while_a_run_is_at_work(project: Path, arguments: tuple[str, ...]) -> None:
    """Otherwise its environment and its databases would go from under it."""
    before = names(project)
    with (project / ".local/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        cleaned = make_clean(project, *arguments)

    assert cleaned.returncode != 0
    assert "`make run` is at work (process 4711): stop it first." in cleaned.stderr
    assert names(project) == before


def test_help_says_what_clean_keeps() -> None:
    """A list of targets is where somebody looks before they type it."""
    listed = subprocess.run(["make", "help"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout

    line = next(line for line in listed.splitlines() if line.startswith("  make clean "))
    assert "the databases of `make run` stay (ARGS=--databases" in line


def test_clean_knows_every_environment() -> None:
    """Each that a target makes goes with the others."""
    environments = set(re.findall(r"\.venv[\w-]*", (PROJECT / "Makefile").read_text(encoding="utf-8")))

    assert len(environments) > 1
    assert environments <= {*MADE}
