"""What stands between the service and its server, and what follows from it: a pooler, its mode, a read/write split.

`pooler_look` finds it out at the first login; this module says what a finding means. A pooler is adapted to where that
is safe. Where data would be wrong the service refuses, with a sentence that says which URL, why and what to do.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

Mode = Literal["transaction", "session", "statement"]

FORGETS = (
    "a pooler in front of this database hands prepared statements on and does not keep them: none are kept here, "
    "which costs a round trip for each; set max_prepared_statements there (PgBouncer 1.21 or later), or say that you "
    "know by DATABASE_STATEMENT_CACHE_SIZE=0"
)
LOST = "the pooler in front of this database drops start-up parameters of the URL; ALTER ROLE … SET holds through it"
UNTOLD = "what stands in front of this database could not be told; docs/poolers.md says what has to be known of it"

STATEMENT_MODE = (
    "leads to a pooler in statement mode, where a transaction of two statements would be stored by halves: set its "
    "mode to transaction (PgBouncer: pool_mode = transaction)"
)
SPLIT = (
    "leads to a pooler that sends the statements of one session to several servers: what was read could be older than "
    "the client's own write, whatever its consistency token says. Switch the split off there for this database "
    "(pgpool-II: load_balance_mode = off) and name the replica in DATABASE_REPLICA_URL, where the lag is watched"
)
LOST_MEANING = (
    "sets {names} by its options, and the pooler that it leads to drops what it is sent so: statements would mean "
    "something else. ALTER ROLE … SET holds through poolers; leave it out of the URL"
)
REFUSED = (
    "leads to a pooler that refuses the start-up parameter {name}. ALTER ROLE … SET holds through poolers: leave it "
    "out of the URL (PgBouncer's ignore_startup_parameters lets the login through and drops the parameter)"
)
# Without these, a statement finds other tables or rows, or answers in another form. So does a setting of the
# application's own, as row security reads them; its name has a dot.
MEANING = frozenset(
    {
        "search_path", "role", "session_authorization", "row_security", "timezone", "datestyle", "intervalstyle",
        "bytea_output", "default_transaction_isolation", "default_transaction_read_only",
    }
)  # fmt: skip
# PgDog takes these for itself.
FOR_THE_POOLER = "pgdog."
# PgBouncer's words, and those of Amazon's RDS Proxy.
_REFUSAL = re.compile(r"unsupported startup parameter(?: in options)?: (?P<name>\S+)|(?P<options>command-line options)")
# `-c name=value` and `--name=value`, as PostgreSQL reads `options`.
_OPTION = re.compile(r"(?:-c\s*|--)([A-Za-z_][\w.-]*)=")


class Pooler(NamedTuple):
    """What a look has found; None for what it could not tell.

    `present`: whether the login was answered by something that is not PostgreSQL. `splits`: whether the statements of
    one session reach several servers. `lost`: the start-up parameters that are not in force.
    """

    present: bool | None = None
    mode: Mode | None = None
    keeps_statements: bool | None = None
    splits: bool | None = None
    lost: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in a few words, as /health/db does."""
        if not self.present:
            return "unknown" if self.present is None else "none"
        statements = {True: "prepared statements kept", False: "prepared statements not kept"}
        parts = (
            "unknown mode" if self.mode is None else f"{self.mode} mode",
            "" if self.keeps_statements is None else statements[self.keeps_statements],
            "read/write split" if self.splits else "",
            f"drops {', '.join(self.lost)}" if self.lost else "",
        )
        return ", ".join(part for part in parts if part)

    @property
    def refusal(self) -> str | None:
        """Say why a service must not work behind it, as the end of a sentence about its URL; None when it may."""
        if self.mode == "statement":
            return STATEMENT_MODE
        if self.splits:
            return SPLIT
        meaning = [name for name in self.lost if name.lower() in MEANING or "." in name]
        return LOST_MEANING.format(names=", ".join(meaning)) if meaning else None


# PostgreSQL itself, which needs no adapting to.
NONE = Pooler(present=False, mode="session", keeps_statements=True, splits=False)


def refused_parameter(error: BaseException) -> str | None:
    """Say, as `Pooler.refusal`, that a pooler refused a login for a start-up parameter; None for other errors."""
    found = _REFUSAL.search(str(error))
    return None if found is None else REFUSED.format(name=found["name"] or "options")


def startup_parameters(settings: Mapping[str, str]) -> list[str]:
    """List the settings that a login asks the server for, those inside of `options` too."""
    names = [name for name in settings if name != "options"]
    names += [name.replace("-", "_") for name in _OPTION.findall(settings.get("options", ""))]
    return [name for name in names if not name.startswith(FOR_THE_POOLER)]


class PoolerRefused(ConnectionError):
    """A connection must not be used because of the pooler that it leads to; the text says why and what to do."""

    def __init__(self, refusal: str) -> None:
        super().__init__(f"the URL {refusal}")
        self.refusal = refusal
