"""Which names a copy may have: one word, good for a database, a compose project, a chart, an image and Python."""

import keyword
import re
import sys
from collections.abc import Collection

LONGEST = 20
# PostgreSQL's reserved words that are no Python keywords (manual, appendix C).
SQL = """
all analyse analyze any array asc asymmetric both case cast check collate column constraint create default
deferrable desc distinct do end fetch foreign grant group having initially intersect into lateral leading limit
localtime localtimestamp null offset only order placing primary references returning select some symmetric table
then to trailing union unique user using variadic when where window
"""
# The tree's own folders, services, roles and databases; and those of the server.
TAKEN = """
alertmanager alembic analytics app backup balancer bench defaultdb deploy docs examples grafana haproxy helm
lifeguard local main migrate migrations monitor patients pgbouncer pglifeguard postgres preflight prometheus
public replica replicator reports restore root service template template0 template1 test tests users vendor
"""


def refusal(name: str, packages: Collection[str] = ()) -> str | None:
    """Say why a copy cannot be called so; None when it can. `packages` are those that it depends on."""
    if not re.fullmatch(rf"[a-z][a-z0-9]{{1,{LONGEST - 1}}}", name):
        return (
            f"NAME {name!r} becomes the name of a database, a compose project, a chart and an image, so it has 2 to "
            f"{LONGEST} lower-case letters and digits, and begins with a letter: clinic, for instance."
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or name in sys.stdlib_module_names:
        return f"NAME {name!r} is a word or a module of Python's own; choose another one."
    if name in SQL.split():
        return f"NAME {name!r} is a reserved word of SQL; choose another one."
    if name in TAKEN.split():
        return f"NAME {name!r} is what something else is called here; choose another one."
    if name in packages:
        return f"NAME {name!r} is a package that the service depends on; choose another one."
    return None
