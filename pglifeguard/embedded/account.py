"""Who PostgreSQL runs as, and where that account can reach: the one place that knows about root.

PostgreSQL refuses to run as root, which is what containers and CI are. Then its programs run as `nobody`, who
cannot look into a clone below a closed home (/root has mode 700): the data then lives in /var/lib/lifeguard.
"""

import os
import pwd
import shutil
import stat
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

# Its parent is writable by root alone, unlike /var/tmp, so that nobody can put programs there before us.
OUTSIDE_HOMES = Path("/var/lib/lifeguard")


class EmbeddedError(Exception):
    """The embedded cluster cannot do what was asked; the text is a sentence for a person and says what to do."""


@dataclass(frozen=True)
class Account:
    """The account for PostgreSQL's programs; `None` stands for the one that runs Python."""

    uid: int | None
    gid: int | None

    @classmethod
    def current(cls) -> "Account":
        """Return `nobody` to root, who must not run PostgreSQL, and everybody else themselves."""
        if os.geteuid() != 0:
            return cls(None, None)
        nobody = pwd.getpwnam("nobody")
        return cls(nobody.pw_uid, nobody.pw_gid)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for `subprocess` that make a program run as this account."""
        return {} if self.uid is None else {"user": self.uid, "group": self.gid, "extra_groups": []}

    @property
    def prefix(self) -> list[str]:
        """What makes a program run as this account, and read our Python below a home that is closed to it."""
        if self.uid is None:
            return []
        ids = ["--reuid", str(self.uid), "--regid", str(self.gid), "--clear-groups"]
        return ["setpriv", *ids, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]

    def own(self, path: Path) -> None:
        """Give a file or directory to this account."""
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)

    def home(self, wanted: Path) -> Path:
        """Make `wanted`, and return where its contents really live.

        That is `wanted` itself, or, when this account cannot get there, a directory outside, to which `wanted` is
        then a link. Deleting the link abandons what was there.
        """
        wanted = wanted.absolute()
        outside = OUTSIDE_HOMES / sha256(bytes(wanted)).hexdigest()[:16]
        if self.uid is None or open_to_all(wanted.parent):
            if wanted.is_symlink():  # Left by a clone that has moved here from a closed home.
                wanted.unlink()
            wanted.mkdir(exist_ok=True)
            return wanted
        if wanted.is_symlink() and wanted.readlink() == outside and outside.is_dir():
            return outside
        if wanted.is_dir() and not wanted.is_symlink():
            raise EmbeddedError(f"PostgreSQL does not run as root, and nobody else can reach {wanted}: use --fresh.")
        wanted.unlink(missing_ok=True)
        remove_tree(outside)
        outside.mkdir(parents=True)
        wanted.symlink_to(outside)
        return outside


def remove_tree(path: Path) -> None:
    """Remove a directory that may not be there, or what a link points to and then the link."""
    if path.is_symlink():
        shutil.rmtree(path.readlink(), ignore_errors=True)
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def open_to_all(path: Path) -> bool:
    """Tell whether any account may pass through every directory down to this one."""
    return all(place.stat().st_mode & stat.S_IXOTH for place in (path, *path.parents))
