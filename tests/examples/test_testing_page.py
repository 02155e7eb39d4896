"""The page of tests: everything on it runs, in a project that has nothing but the wheel, in two processes at once."""

import asyncio
import os
import re
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

import pytest

from tests.examples.conftest import ROOT

PAGE = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
# What the plugins of this project would import for two seconds.
WITHOUT = [f"-pno:{name}" for name in ("schemathesis", "hypothesispytest", "cloudcoil", "locust")]
# Nothing of this project is to be found from there, and no servers but those that the plugin starts.
KEPT = {"PATH", "HOME", "LANG", "TMPDIR"}


def files() -> dict[str, str]:
    """Return the files of the page by name: a first line names one, and what has none goes on with the one before."""
    made: dict[str, str] = {}
    for block in re.findall(r"^```(?:python|toml|sql)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        named = re.match(r"(?:#|--) (\S+)\n", block)
        name = named[1] if named else list(made)[-1]
        made[name] = f"{made.get(name, '')}\n\n{block}"
    return made


async def pytest_in(project: Path, python: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Run pytest there; return its status and what it said."""
    process = await asyncio.create_subprocess_exec(
        python, "-B", "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *WITHOUT, *arguments,
        cwd=project, env={name: os.environ[name] for name in KEPT & set(os.environ)} | variables,
        stdout=PIPE, stderr=STDOUT,
    )  # fmt: skip
    try:
        said = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, said


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Give a folder with the files of the page."""
    for name, text in files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


async def test_every_example_passes_in_two_processes(project: Path, fresh_python: Path) -> None:
    """Ten and more, each in a database of its own; each process has a primary and a replica, and nothing is left."""
    examples = re.findall(r"^(?:async )?def (test_\w+)", PAGE, re.MULTILINE)

    status, said = await pytest_in(project, fresh_python, "-v", "-n", "2", "--basetemp", str(project / "made"))

    assert status == 0, said
    assert len(examples) >= 10
    assert {f"PASSED test_shop.py::{name}" for name in examples} <= set(re.findall(r"PASSED test_shop\.py::\w+", said))
    assert set(re.findall(r"\[(gw\d)\]", said)) == {"gw0", "gw1"}
