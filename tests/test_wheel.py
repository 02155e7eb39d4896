"""What people install: the library alone, usable with what its extras ask for and no more."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling import build

import pglifeguard
from pglifeguard.extras import not_installed

ROOT = Path(__file__).parent.parent
# Imports a package in a process where these are not installed.
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import {package}
"""
SERVE = "pglifeguard.serving as serving; serving.serve('app:app', None)"
LISTEN = "asyncio, pglifeguard.testing.serving as serving; asyncio.run(serving.listening(None).__aenter__())"
SERVED = {"uvicorn", "httptools", "uvloop"}
COMMANDS = {"typer", "rich"}
# OpenTelemetry's API, which FastAPI brings along, and what its exporter needs.
TRACES = {"opentelemetry", "google"}
# What tests alone need.
TESTS = {"pytest", "pytest_asyncio", "psutil"}
SERVICE = {"alembic", "httpx", "jwt", "pythonjsonlogger", "app"}


def files() -> set[str]:
    """List the files of the library."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "pglifeguard"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    return set(listed.stdout.decode().split())


def test_wheel_holds_the_library_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the service, its tests or its migrations is in it; what types are promised by is."""
    monkeypatch.chdir(ROOT)

    wheel = tmp_path / build.build_wheel(str(tmp_path))

    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"pglifeguard-{pglifeguard.__version__}.dist-info/METADATA").decode()
    assert names == files()
    assert "pglifeguard/py.typed" in names
    assert "Provides-Extra: fastapi" in metadata


def test_sdist_holds_the_library_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with what is needed to build it."""
    monkeypatch.chdir(ROOT)

    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    assert names == files() | {"PKG-INFO", "pyproject.toml", "LICENSE", ".gitignore"}


@pytest.mark.parametrize(
    ("package", "missing"),
    [
        ("pglifeguard", {"dns", "fastapi", "starlette", *SERVED, *COMMANDS, *SERVICE, *TESTS, *TRACES}),
        ("pglifeguard.fastapi", SERVED | COMMANDS | SERVICE | TESTS | {"google"}),
        ("pglifeguard.serving.server", {"fastapi", "starlette", *COMMANDS, *SERVICE, *TESTS, *TRACES}),
        ("pglifeguard.cli", {"fastapi", "starlette", *SERVED, *SERVICE, *TESTS, *TRACES}),
        ("pglifeguard.embedded.cluster", {"fastapi", "starlette", "pytest", *SERVED, *COMMANDS, *SERVICE, *TRACES}),
        ("pglifeguard.testing", {"fastapi", "starlette", *SERVED, *COMMANDS, *TRACES, *(SERVICE - {"httpx"})}),
    ],
)
def test_each_part_needs_its_own_extra_alone(package: str, missing: set[str]) -> None:
    """A worker installs no FastAPI, and a service that another server runs no uvicorn."""
    subprocess.run([sys.executable, "-c", WITHOUT.format(missing=missing, package=package)], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("code", "missing", "sentence", "extra"),
    [
        ("pglifeguard.fastapi", "fastapi", "pglifeguard.fastapi needs fastapi,", "fastapi"),
        ("pglifeguard.fastapi", "starlette", "pglifeguard.fastapi needs starlette,", "fastapi"),
        ("pglifeguard.cli", "typer", "pglifeguard.cli needs typer,", "cli"),
        ("pglifeguard.cli", "rich", "pglifeguard.cli needs rich,", "cli"),
        ("pglifeguard.__main__", "typer", "pglifeguard.cli needs typer,", "cli"),
        ("pglifeguard.embedded.cluster", "psutil", "pglifeguard.embedded needs psutil,", "testing"),
        ("pglifeguard.testing", "pytest", "pglifeguard.testing needs pytest,", "testing"),
        ("pglifeguard.testing", "pytest_asyncio", "pglifeguard.testing needs pytest_asyncio,", "testing"),
        ("pglifeguard.testing", "httpx", "pglifeguard.testing needs httpx,", "testing"),
        ("pglifeguard.testing", "psutil", "pglifeguard.testing needs psutil,", "testing"),
        (LISTEN, "uvicorn", "A test that asks for live_url needs uvicorn,", "serving"),
        (SERVE, "uvicorn", "pglifeguard.serving.serve needs uvicorn,", "serving"),
        (SERVE, "httptools", "pglifeguard.serving.serve needs httptools,", "serving"),
        (SERVE, "uvloop", "pglifeguard.serving.serve needs uvloop,", "serving"),
    ],
)
def test_part_without_its_extra_says_what_to_install(code: str, missing: str, sentence: str, extra: str) -> None:
    """The command that installs what is missing is the last thing that a person reads."""
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing={missing}, package=code)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert run.returncode == 1
    last = run.stderr.splitlines()[-1].removeprefix("ModuleNotFoundError: ")
    installs = f"pip install 'pglifeguard[{extra}]'"
    assert last == f"{sentence} which is not installed. It comes with an extra: {installs}"


def test_missing_module_of_the_library_is_no_matter_of_extras() -> None:
    """Half an installation is told as what it is: an extra would not complete it."""
    for error in (ModuleNotFoundError("no name"), ModuleNotFoundError("half", name="pglifeguard.pool")):
        assert not_installed(error, "cli", "pglifeguard.cli") is error
