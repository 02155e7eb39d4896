"""postgres/make-secrets.sh: the folder of secrets that docker-compose.secrets.yml mounts."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "postgres/make-secrets.sh"


def make(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the script."""
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)


def read(folder: Path) -> dict[str, str]:
    """Read every secret."""
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder of secrets."""
    assert make(tmp_path / "secrets").returncode == 0
    return tmp_path / "secrets"


def test_second_run_keeps_what_is_there(folder: Path) -> None:
    """An update adds what is new, and changes nothing that a database was made with."""
    before = read(folder)
    (folder / "auth_secret").unlink()

    assert make(folder).returncode == 0

    after = read(folder)
    assert after.pop("auth_secret") != before.pop("auth_secret")
    assert after == before


@pytest.mark.parametrize(
    ("role", "files"),
    [
        ("app_owner", {"app_owner_password", "migrations_url"}),
        ("app_rw", {"app_rw_password", "database_url"}),
        ("app_ro", {"app_ro_password", "database_replica_url"}),
        ("monitor", {"monitor_password", "pgbouncer_exporter_flags"}),
        ("replicator", {"replicator_password"}),
        ("pgbouncer", {"pgbouncer_password", "pgbouncer_admin_url"}),
    ],
)
def test_renewed_password_is_in_every_file_that_holds_it(folder: Path, role: str, files: set[str]) -> None:
    """The files that docs/servers.md names for the role change, in place, and no other does."""
    before, inodes = read(folder), {file.name: file.stat().st_ino for file in folder.iterdir()}
    documented = (SCRIPT.parent.parent / "docs/servers.md").read_text(encoding="utf-8")

    result = make("--renew", role, folder)

    after = read(folder)
    changed = {name for name in after if after[name] != before[name]}
    assert result.returncode == 0, result.stderr
    assert changed == files
    assert {Path(line).name for line in result.stdout.splitlines()} == files
    assert all(after[f"{role}_password"].strip() in after[name] for name in files)
    assert {file.name: file.stat().st_ino for file in folder.iterdir()} == inodes
    row = next(line for line in documented.splitlines() if line.startswith(f"| `{role}` | `{role}_password`"))
    assert all(f"`{name}`" in row for name in files)


@pytest.mark.parametrize("role", ["", "postgres", "auth_secret"])
def test_what_the_roles_script_does_not_set_is_not_renewed(folder: Path, role: str) -> None:
    """A new password that nothing tells the database would shut everybody out."""
    before = read(folder)

    result = make("--renew", role, folder)

    assert result.returncode == 2
    assert "app_owner app_rw" in result.stderr
    assert read(folder) == before
