"""What is said where a part of the library is used without the extra that it needs."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pglifeguard.extras import not_installed
from pglifeguard.serving import serve
from pglifeguard.testing.serving import listening

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("pglifeguard.cli", "typer"),
        ("pglifeguard.embedded", "psutil"),
        ("pglifeguard.fastapi", "pglifeguard.fastapi.idempotency"),
        ("pglifeguard.testing", "pglifeguard.testing.fixtures"),
    ],
)
def test_import_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, name: str, missing: str) -> None:
    """A package of somebody else's by its extra, a module of the library as it is."""
    monkeypatch.setitem(sys.modules, missing, None)
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None

    with pytest.raises(ModuleNotFoundError) as caught:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    assert caught.value.name == missing
    assert ("pip install" in str(caught.value)) is not missing.startswith("pglifeguard")


async def test_call_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What imports a server when it is called says so then."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    settings: Any = None

    with pytest.raises(ModuleNotFoundError, match=r"pglifeguard\.serving\.serve needs uvloop, .*\[serving\]"):
        serve("app:app", settings)
    with pytest.raises(ModuleNotFoundError, match=r"live_url needs uvicorn, .*\[serving\]"):
        await listening(None).__aenter__()
