"""What `make new` makes works: it installs by its locks, serves, and passes its own checks."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from local.setup import PROJECT
from tests.local.test_main import until

# On a busy machine PostgreSQL takes its time to start.
SERVE_SECONDS = 90
CI = {"HOME": "/nonexistent", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}

# What `make test-new ARGS=…` is told is for pytest, and not for each make that is run below it.
OWN = {name: value for name, value in os.environ.items() if name not in {"ARGS", "MAKEFLAGS"}}


def run(*command: str | Path, directory: Path, **environment: str) -> str:
    """Run a command to its end, show what it writes, and fail with it."""
    process = subprocess.run(
        command, cwd=directory, env=OWN | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    sys.stdout.write(process.stdout)
    assert process.returncode == 0, process.stdout[-4000:]
    return process.stdout


def free_port() -> int:
    """Return a port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a project as `make new` makes it where git knows nobody."""
    directory = tmp_path_factory.mktemp("new") / "clinic"
    run("make", "new", "NAME=clinic", f"DIR={directory}", "AUTHOR=Clinic & Co", directory=PROJECT, **CI)
    return directory


@pytest.fixture(scope="module")
def installed(made: Path) -> Path:
    """Give the project with everything that its locks name, each by its hash."""
    run("make", "install", f"PYTHON={sys.executable}", directory=made)
    return made


@pytest.fixture
def served(installed: Path, tmp_path: Path) -> Iterator[httpx.Client]:
    """Give the service as `make run` starts it."""
    port = free_port()
    arguments = f"ARGS=--port {port} --directory {tmp_path / 'databases'}"
    with (tmp_path / "out").open("wb") as output:
        process = subprocess.Popen(
            ["make", "run", arguments], cwd=installed, env=OWN, stdout=output, stderr=output, start_new_session=True
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(SERVE_SECONDS)
        sys.stdout.write((tmp_path / "out").read_text(encoding="utf-8"))


def test_serves(served: httpx.Client) -> None:
    """`make run` answers with a seeded patient, the copy's title, and the library's operations routes."""

    def answers() -> bool:
        try:
            return served.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    until(answers, SERVE_SECONDS)
    patient, document, pools = [served.get(path) for path in ("/patients/1", "/openapi.json", "/debug/pool-stats")]

    assert patient.json()["mrn"] == "MRN-000001"
    assert document.json()["info"]["title"] == "Clinic"
    assert document.json()["info"]["version"] == "0.1.0"
    assert {"primary", "replica", "analytics"} <= pools.json().keys()


def test_passes_its_own_checks(installed: Path) -> None:
    """`make check`: style, types, and its tests with the coverage that it asks for, with a domain of its owner's."""
    run(installed / ".venv/bin/python", "-m", "app", "new-domain", "appointments", directory=installed)
    run("make", "check", directory=installed)


def test_passes_its_own_fuzzing(installed: Path) -> None:
    """`make fuzz`: its environment by its lock, and no finding."""
    told = run("make", "fuzz", f"PYTHON={sys.executable}", "ARGS=--seconds 30", directory=installed)

    assert "0 findings" in told


def test_judges_its_own_chart(installed: Path) -> None:
    """`make test-deploy`: the chart under its new name, rendered and judged by what the copy's lock installs."""
    run("make", "test-deploy", directory=installed)


def test_smallest_passes_its_tests(installed: Path, tmp_path: Path) -> None:
    """Without users, reports and containers: types, and the quick tests, in the environment of the other."""
    small = tmp_path / "small"
    run(
        "make", "new", "NAME=smallest", f"DIR={small}", "WITHOUT=users reports", "ARGS=--no-docker",
        directory=PROJECT, **CI,
    )  # fmt: skip
    python = installed / ".venv/bin/python"

    run(python, "-m", "mypy", directory=small)
    run(python, "-m", "pytest", "-q", "-m", "not slow", directory=small)
    run(python, "-m", "pytest", "-q", "-k", "not own_tests", "tests/test_alerts.py", directory=small)


def test_another_library_of_the_same_version_is_installed(installed: Path, tmp_path: Path) -> None:
    """`make update-pglifeguard`: a checkout keeps its version, and pip would keep what it has."""
    checkout, changed = tmp_path / "pglifeguard", "# Another library.\n"
    checkout.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(PROJECT / name, checkout)
    shutil.copytree(PROJECT / "pglifeguard", checkout / "pglifeguard", ignore=shutil.ignore_patterns("__pycache__"))
    with (checkout / "pglifeguard/__init__.py").open("a", encoding="utf-8") as module:
        module.write(changed)

    run("make", "update-pglifeguard", f"FROM={checkout}", directory=installed)
    run("make", "install", directory=installed)

    code = "import pathlib, pglifeguard; print(pathlib.Path(pglifeguard.__file__).read_text(encoding='utf-8'))"
    assert run(installed / ".venv/bin/python", "-c", code, directory=tmp_path).rstrip().endswith(changed.rstrip())
