"""Who runs PostgreSQL, and where its data then live."""

import os
from pathlib import Path

import pytest

from pglifeguard.embedded import account
from pglifeguard.embedded.account import Account, EmbeddedError, open_to_all, remove_tree
from pglifeguard.embedded.directories import open_directory

MYSELF = Account(None, None)
# Another account, as far as the code knows; to give ourselves a file needs no rights.
OTHER = Account(os.getuid(), os.getgid())


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a directory that only its owner can enter; what others must reach goes outside."""
    monkeypatch.setattr(account, "OUTSIDE_HOMES", tmp_path / "outside")
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    return home


def test_root_lets_nobody_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody else runs it themselves."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    nobody = Account.current()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    myself = Account.current()

    assert (nobody.arguments["extra_groups"], nobody.prefix[0]) == ([], "setpriv")
    assert (myself, myself.arguments, myself.prefix) == (MYSELF, {}, [])


def test_file_is_given_to_the_account(tmp_path: Path) -> None:
    """Nothing is to be given to oneself."""
    MYSELF.own(tmp_path)
    OTHER.own(tmp_path)

    assert tmp_path.stat().st_uid == os.getuid()


def test_data_live_where_they_are_wanted() -> None:
    """Also where an earlier run has left a link, because the place could not be reached then."""
    with open_directory() as directory:
        (directory / "data").symlink_to(directory / "elsewhere")

        homes = [each.home(directory / "data") for each in (MYSELF, OTHER)]

        assert homes == [directory / "data"] * 2
        assert (directory / "data").is_dir()
        assert not (directory / "data").is_symlink()


def test_data_live_outside_of_a_closed_home(closed: Path) -> None:
    """A link leads there, and is followed the next time; to delete the link is to begin anew."""
    first = OTHER.home(closed / "data")
    (first / "kept").touch()
    again = OTHER.home(closed / "data")
    kept = (again / "kept").exists()
    (closed / "data").unlink()

    anew = OTHER.home(closed / "data")

    assert (first.parent, kept) == (account.OUTSIDE_HOMES, True)
    assert first == again == anew == (closed / "data").resolve()
    assert not (anew / "kept").exists()


def test_data_of_somebody_else_are_not_taken(closed: Path) -> None:
    """A directory in a closed home was made by whoever ran it before as another account."""
    MYSELF.home(closed / "data")

    with pytest.raises(EmbeddedError, match="use --fresh"):
        OTHER.home(closed / "data")


def test_tree_is_removed_with_its_link(closed: Path) -> None:
    """And nothing is wrong with one that is not there."""
    outside = OTHER.home(closed / "data")
    plain = closed / "plain"
    plain.mkdir()

    for place in (closed / "data", plain, closed / "nothing"):
        remove_tree(place)

    assert list(closed.iterdir()) == []
    assert not outside.exists()
    assert not open_to_all(closed)
