"""What the facts of several databases mean together: replicas and primary, URLs that should lead to one server."""

from collections.abc import Iterator

from pglifeguard.doctor.facts import Facts, size
from pglifeguard.doctor.findings import Finding, error, note, warning
from pglifeguard.settings import DatabasesSettings


def judge_cluster(examined: list[Facts], settings: DatabasesSettings) -> Iterator[Finding]:
    """Compare the databases with the primary; says nothing about those that did not answer."""
    primary = next(facts for facts in examined if facts.target.purpose == "primary")
    for facts in examined:
        if facts.answers and primary.answers and facts.role is not None and facts is not primary:
            if facts.target.purpose == "replica":
                yield from _replica(facts, primary, settings)
            elif facts.target.purpose in {"listen", "migrations"}:
                yield from _same_server(facts, primary)


def lag_of(facts: Facts, primary: Facts) -> tuple[int | None, float | None]:
    """Return bytes and seconds behind the primary; None where the two cannot be compared."""
    there, here = primary.position, facts.position
    if there.lsn is None or here.lsn is None or here.is_foreign(there) or here.is_diverged(there):
        return None, None
    behind = max(0, there.lsn - here.lsn)
    return behind, 0.0 if behind == 0 else here.replay_age


def _replica(facts: Facts, primary: Facts, settings: DatabasesSettings) -> Iterator[Finding]:
    if facts.position.is_foreign(primary.position):
        yield error(
            "replica_of_another_cluster",
            facts.variable,
            "It is no standby of this primary: the clusters differ.",
            "Point it at a standby of DATABASE_URL's cluster, or clone it anew; the service does not read there.",
        )
    elif facts.role == "primary" and facts.position.is_same_server(primary.position):
        yield note(
            "replica_is_primary",
            facts.variable,
            "It is the primary itself, so reads are not taken off it.",
            "Point it at a standby, or leave it out.",
        )
    elif facts.role == "primary":
        yield error(
            "replica_takes_writes",
            facts.variable,
            "It was promoted, and has a history of its own.",
            "Clone it anew as a standby; the service does not read there.",
        )
    elif facts.position.is_diverged(primary.position):
        yield error(
            "replica_on_another_timeline",
            facts.variable,
            f"It is on timeline {facts.position.timeline}, the primary on {primary.position.timeline}.",
            "Have it follow the new primary (recovery_target_timeline = 'latest'), or clone it anew.",
        )
    else:
        yield from _lag(facts, primary, settings)


def _lag(facts: Facts, primary: Facts, settings: DatabasesSettings) -> Iterator[Finding]:
    behind, seconds = lag_of(facts, primary)
    if behind is None:
        yield note(
            "lag_unknown",
            facts.variable,
            "Its server or the primary tells no LSN, so no lag can be measured.",
            "Reads go there without a bound on the lag; docs/providers.md says which providers are so.",
        )
    elif behind > settings.replica_max_lag_bytes and (seconds is None or seconds > settings.replica_max_lag_seconds):
        ago = "an unknown time" if seconds is None else f"{seconds:.0f} s"
        yield warning(
            "replica_lags",
            facts.variable,
            f"It is {size(behind)} and {ago} behind, and serves no reads.",
            "See what keeps it (docs/runbook.md#replicalagging).",
        )


def _same_server(facts: Facts, primary: Facts) -> Iterator[Finding]:
    if facts.position.is_foreign(primary.position):
        yield error(
            "another_cluster",
            facts.variable,
            "It leads to another cluster than DATABASE_URL.",
            f"Point {facts.variable} at the primary of the same cluster.",
        )
    elif facts.identity.get("database") != primary.identity.get("database"):
        yield error(
            "another_database",
            facts.variable,
            f"It leads to the database {facts.identity.get('database')}, and DATABASE_URL to "
            f"{primary.identity.get('database')}.",
            f"Name the same database in both, or set {facts.variable} to where the service's tables are.",
        )
