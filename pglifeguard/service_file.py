"""libpq's connection service file: `?service=name` stands for the parameters under [name].

Source: PostgreSQL 18 manual, "The Connection Service File" (34.17).
"""

import os
from collections.abc import Iterator
from pathlib import Path


def parameters_of_service(service: str, *, file: str | None) -> list[tuple[str, str]]:
    """Return what the file says of a service, in its order.

    The file is `file`, else PGSERVICEFILE, else ~/.pg_service.conf; what that one does not describe is looked up in
    pg_service.conf of PGSYSCONFDIR.

    Raises: ValueError when nothing describes the service, or a line cannot be read. No line is repeated.
    """
    own = Path(file or os.environ.get("PGSERVICEFILE") or "~/.pg_service.conf").expanduser()
    system = Path(os.environ.get("PGSYSCONFDIR", "/etc/postgresql-common")) / "pg_service.conf"
    for path in (own, system):
        if (found := _section(path, service, named=path == own and file is not None)) is not None:
            return found
    raise ValueError(f"has the parameter service, and neither {own} nor {system} describes that service")


def _section(path: Path, service: str, *, named: bool) -> list[tuple[str, str]] | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        if named:
            raise ValueError("has the parameter servicefile, and that file cannot be read") from None
        return None
    return list(_parameters(path, lines, service)) if f"[{service}]" in map(str.strip, lines) else None


def _parameters(path: Path, lines: list[str], service: str) -> Iterator[tuple[str, str]]:
    within = False
    for number, text in enumerate(lines, 1):
        line = text.strip()
        if line.startswith("["):
            if within:
                return
            within = line == f"[{service}]"
        elif within and line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            if not equals or name in {"service", "servicefile"} or name.startswith("ldap"):
                raise ValueError(f"has the parameter service, and line {number} of {path} is not name=value")
            yield name, value
