"""What people install: the library alone, usable with what its extras ask for and no more."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling import build

import pglifeguard
from tests.pglifeguard.test_extras import WITHOUT

ROOT = Path(__file__).parent.parent
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
