"""`python -m local.library ../pglifeguard`: take another pglifeguard, a checkout or a wheel, into `vendor/`.

A service made by pglifeguard's `make new` has the library there as a wheel, and the locks name its hash. Whatever
reads the locks, pip with `--require-hashes`, the image's build, mypy, then has it as any other dependency.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer

PROJECT = Path(__file__).parent.parent
_WHEEL = re.compile(r"pglifeguard-(?P<version>[\w.+!]+)-py3-none-any\.whl")
_LOCKED = re.compile(r"^pglifeguard==\S+ \\\n    --hash=sha256:\w+", re.MULTILINE)
_DEMANDED = re.compile(r'(?<="pglifeguard\[)([\w,-]+)\]==[^"]+')


class LibraryError(Exception):
    """There is no library to take; the text is a sentence for a person."""


def vendor(source: Path, project: Path) -> str:
    """Put the library at `source` into the project's `vendor/` in place of the one there; return what a lock has of it.

    Raises: LibraryError when `source` is neither a wheel of pglifeguard nor a checkout from which one can be built.
    """
    with tempfile.TemporaryDirectory() as directory:
        wheel = _built(source, Path(directory)) if source.is_dir() else source
        if (named := _WHEEL.fullmatch(wheel.name)) is None or not wheel.is_file():
            raise LibraryError(f"{source} is neither a checkout of pglifeguard nor a wheel of it.")
        if not zipfile.is_zipfile(wheel):
            raise LibraryError(f"{source} is called as a wheel of pglifeguard, and is none.")
        content = wheel.read_bytes()
    folder = project / "vendor"
    if not folder.is_dir():
        raise LibraryError(f"{project} has no vendor/ for it: it was not made by pglifeguard's `make new`.")
    for old in folder.glob("pglifeguard-*.whl"):
        old.unlink()
    (folder / wheel.name).write_bytes(content)
    return f"pglifeguard=={named['version']} \\\n    --hash=sha256:{hashlib.sha256(content).hexdigest()}"


def _named(source: str) -> Path:
    if not source:
        raise LibraryError("Say FROM=…, as in: make update-pglifeguard FROM=../pglifeguard")
    return Path(source)


def _built(checkout: Path, directory: Path) -> Path:
    """Build a checkout's wheel, with the build backend that is a development dependency already."""
    if not (checkout / "pglifeguard" / "__init__.py").is_file():
        raise LibraryError(f"{checkout} is no checkout of pglifeguard.")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run = subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(directory), str(checkout.resolve())],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise LibraryError(f"No wheel could be built of {checkout}: {run.stderr.strip()}")
    (wheel,) = directory.glob("*.whl")
    return wheel


def main(
    source: Annotated[str, typer.Argument(help="A checkout of pglifeguard, or a wheel of it.")],
    project: Annotated[Path, typer.Option(help="The service that takes it.")] = PROJECT,
) -> None:
    """Replace the pglifeguard in vendor/, and name its version and hash in the locks."""
    try:
        locked = vendor(_named(source), project)
    except LibraryError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    version = locked.split(" ")[0].removeprefix("pglifeguard==")
    for path in sorted(project.glob("requirements*.txt")):
        path.write_text(_LOCKED.sub(lambda _: locked, path.read_text(encoding="utf-8")), encoding="utf-8")
    path = project / "pyproject.toml"
    path.write_text(_DEMANDED.sub(rf"\1]=={version}", path.read_text(encoding="utf-8")), encoding="utf-8")
    typer.echo(f"pglifeguard {version}. If what it depends on has changed, `make lock`; then `make check`.")


if __name__ == "__main__":
    typer.run(main)
