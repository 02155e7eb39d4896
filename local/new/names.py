"""Which names a copy may have: one word, good for a database, a compose project, a chart, an image and Python."""

import builtins
import keyword
import re
import sys
from collections.abc import Collection

LONGEST = 20
# PostgreSQL's reserved words that are no Python keywords (manual, appendix C).
SQL = """
all analyse analyze any array asc asymmetric authorization binary both case cast check collate collation column
concurrently constraint create cross default deferrable desc distinct do end fetch foreign freeze full grant group
having ilike initially inner intersect into isnull join lateral leading left like limit localtime localtimestamp
natural notnull null offset only order outer overlaps placing primary references returning right select similar some
symmetric table tablesample then to trailing union unique user using variadic verbose when where window
"""
# What YAML reads as true, false or nothing: the compose project's and the chart's name would be no text.
YAML = "false no null off on true yes"
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
    if (
        keyword.iskeyword(name)
        or keyword.issoftkeyword(name)
        or name in sys.stdlib_module_names
        or hasattr(builtins, name)
    ):
        return f"NAME {name!r} is a word or a module of Python's own; choose another one."
    for words, what in (
        (SQL, "a reserved word of SQL"),
        (YAML, "what YAML takes for a value that is no text"),
        (TAKEN, "what something else is called here"),
    ):
        if name in words.split():
            return f"NAME {name!r} is {what}; choose another one."
    if name in packages:
        return f"NAME {name!r} is a package that the service depends on; choose another one."
    return None
