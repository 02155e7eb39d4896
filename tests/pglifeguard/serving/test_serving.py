"""Where the serving parts run, and what is said where they do not."""

import importlib
import subprocess
import sys

import pytest

from pglifeguard import serving

# Windows has none of these. There an import of them fails as it does here.
WITHOUT = "import sys; sys.modules |= dict.fromkeys(['fcntl', 'grp', 'pwd', 'resource', 'termios', 'uvloop']); "


def python(code: str) -> "subprocess.CompletedProcess[str]":
    """Run code in a process of its own that has no module of Unix's."""
    return subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["pglifeguard.fastapi", "pglifeguard.serving", "app.main"])
def test_windows_is_refused_with_a_sentence(package: str) -> None:
    """The import fails with what to do, and not with the name of a module that nobody can install."""
    done = python(f"import {package}")

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: pglifeguard.fastapi and pglifeguard.serving need Linux or macOS, and this Python is one for "
        f"{sys.platform}. On Windows install it in WSL."
    )


@pytest.mark.parametrize(
    ("package", "sentence"),
    [("app", "need Linux or macOS"), ("local", "The embedded servers need Linux or macOS")],
)
def test_programs_end_with_the_sentence_alone(package: str, sentence: str) -> None:
    """Whoever types `python -m app` on Windows reads one line."""
    done = python(f"import runpy; runpy.run_module({package!r}, run_name='__main__', alter_sys=True)")

    assert done.returncode == 1
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_package_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported anew where `fcntl` is missing, it fails, and names that module for whoever wants to tell it apart."""
    monkeypatch.setitem(sys.modules, "fcntl", None)

    with pytest.raises(ImportError, match="On Windows install it in WSL") as raised:
        importlib.reload(serving)

    assert raised.value.name == "fcntl"


def test_library_alone_takes_no_module_of_unix() -> None:
    """A script may use `Databases` anywhere that Python's asyncio, SQLAlchemy and asyncpg run."""
    done = python("import pglifeguard, pglifeguard.cli")

    assert (done.returncode, done.stderr) == (0, "")
