"""`make clean`: remove what the targets of the Makefile made, and say so; the databases of `make run` stay.

It imports nothing that has to be installed: the environment goes first.
"""

import argparse
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROJECT = Path(__file__).parent.parent
MADE = (
    *(".venv", ".venv-audit", ".venv-backup", ".venv-docs", ".venv-examples", ".venv-fuzz", ".venv-ha"),
    *(".venv-release", "dist"),
    *(".coverage*", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".local/*"),
)
# What `make run` keeps in .local from one run to the next: servers, their passwords and logs, the service's variables.
DATABASES = ("data", "env", "lock", "passwords.json", "primary.log", "replica.log")


def clean(project: Path, *, databases: bool) -> Iterator[str]:
    """Remove what was made in the project, with or without the databases of `make run`; give what there is to say.

    Raises: SystemExit, with a sentence and before anything is removed, while a `make run` is at work.
    """
    folder = project / ".local"
    kept = [folder / name for name in DATABASES if (folder / name).exists()]
    with suppress(FileNotFoundError), (folder / "lock").open(encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"`make run` is at work (process {lock.read()}): stop it first.") from None
    goes = [path for pattern in MADE for path in sorted(project.glob(pattern)) if databases or path not in kept]
    for path in goes:
        remove(path)
    names = [str(path.relative_to(project)) for path in goes]
    yield f"Removed: {', '.join(names)}." if names else "There was nothing to remove."
    if databases or not kept:
        with suppress(OSError):
            folder.rmdir()
    else:
        yield "Kept: the databases of `make run`, in .local. They go, too, with: make clean ARGS=--databases"


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link with the folder behind it: where `data` lives that root may not serve."""
    if path.is_symlink():
        shutil.rmtree(path.resolve(), ignore_errors=True)
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def main() -> None:
    """Clean this project."""
    parser = argparse.ArgumentParser(prog="python -m local.clean", description="Remove what the other targets made.")
    parser.add_argument("--databases", action="store_true", help="remove what `make run` has stored, too")
    for sentence in clean(PROJECT, databases=parser.parse_args().databases):
        print(sentence)


if __name__ == "__main__":
    main()
