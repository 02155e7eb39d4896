"""Directories are made where there is room for them, and data in them by each version's own means."""

import shutil
from pathlib import Path

import pytest

from pglifeguard.embedded import directories
from pglifeguard.embedded.account import Account
from pglifeguard.embedded.directories import initialise, open_directory
from pglifeguard.embedded.postgres import Server


@pytest.mark.parametrize("memory", ["none", "little"])
def test_directory_is_on_the_disk_without_memory(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker gives a container 64 MB of it, and some systems none."""
    monkeypatch.setattr(directories, "MEMORY", tmp_path / "none" if memory == "none" else tmp_path)
    monkeypatch.setattr(directories, "MEMORY_BYTES", shutil.disk_usage(tmp_path).total)

    with open_directory() as directory:
        assert tmp_path not in directory.parents

    assert not directory.exists()


async def test_version_without_builtin_locales_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL 15 and 16 sort by code point with the C of libc; the rules that were given are its pg_hba.conf."""
    monkeypatch.setattr(directories, "major_version", lambda _account: 16)
    with open_directory() as directory:
        Account.current().own(directory)
        server = Server(
            directory / "data", log=directory / "log", password="secret", base="", account=Account.current()
        )

        await initialise(server, "local all all reject\n")

        assert (directory / "data/pg_hba.conf").read_text(encoding="utf-8") == "local all all reject\n"
