"""What a DBA looks at in a minute: slots, standbys, long transactions, room for connections, storage, wear."""

from collections.abc import Iterator
from datetime import date

from pglifeguard.doctor.examination import FORGOTTEN_SECONDS, LONG_SECONDS, PREPARED_SECONDS
from pglifeguard.doctor.facts import Facts, size
from pglifeguard.doctor.findings import Finding, error, note, warning
from pglifeguard.settings import DatabasesSettings

# Of what ordinary roles have: the alert ConnectionBudgetNearlySpent fires at the same share.
NEARLY_FULL = 0.8
# Half and four fifths of the transactions after which PostgreSQL stops taking writes.
AGE_TO_WARN, AGE_TO_ACT = 1_000_000_000, 1_600_000_000
# Slots that keep less are those of a standby that is busy, or restarts.
RETAINED_BYTES = 1 << 30
KILOBYTE = 1024
BLOCK = 8192


def _slots(facts: Facts, _settings: DatabasesSettings, _today: date) -> Iterator[Finding]:
    for slot in facts.slots:
        name, retained = slot["name"], slot["retained_bytes"]
        keeps = "" if retained is None else f", and {size(retained)} of WAL are kept for it"
        if slot["wal_status"] == "lost":
            yield warning(
                "slot_lost",
                facts.variable,
                f"The replication slot {name} has lost WAL that its standby needs.",
                f"Clone that standby anew, and SELECT pg_drop_replication_slot('{name}').",
            )
        elif not slot["active"]:
            yield warning(
                "slot_inactive",
                facts.variable,
                f"Nobody streams from the replication slot {name}{keeps}.",
                f"Start its standby, or SELECT pg_drop_replication_slot('{name}') before the disk is full.",
            )
        elif retained is not None and retained > RETAINED_BYTES:
            yield warning(
                "slot_behind",
                facts.variable,
                f"{size(retained)} of WAL are kept for the replication slot {name}.",
                "See why its standby does not keep up; bound what is kept by max_slot_wal_keep_size.",
            )


def _synchronous(facts: Facts, _settings: DatabasesSettings, _today: date) -> Iterator[Finding]:
    names = facts.settings.get("synchronous_standby_names", "").strip()
    if names and facts.standbys == []:
        yield error(
            "synchronous_standby_missing",
            facts.variable,
            f"synchronous_standby_names is {names!r}, and no standby streams: each commit waits for ever.",
            "Start the standby, or take it out: ALTER SYSTEM SET synchronous_standby_names = '' and pg_reload_conf().",
        )
    elif names and facts.standbys and all(one["sync_state"] == "async" for one in facts.standbys):
        yield error(
            "synchronous_standby_missing",
            facts.variable,
            f"synchronous_standby_names is {names!r}, and no standby that streams is one of them: commits wait.",
            "Name a standby by its application_name, or start the one that is named.",
        )


def _activity(facts: Facts, _settings: DatabasesSettings, _today: date) -> Iterator[Finding]:
    seen = facts.activity
    if seen.get("long"):
        yield warning(
            "long_transactions",
            facts.variable,
            f"{seen['long']} transactions have been at work for more than {LONG_SECONDS:g} s, the oldest for "
            f"{seen['long_seconds']:.0f} s: vacuum cleans up nothing that is newer.",
            "See them by `connections`, and end what nobody waits for by pg_cancel_backend(pid).",
        )
    if seen.get("forgotten"):
        yield warning(
            "idle_in_transaction",
            facts.variable,
            f"{seen['forgotten']} sessions have idled in a transaction for more than {FORGOTTEN_SECONDS:g} s, the "
            f"oldest for {seen['forgotten_seconds']:.0f} s, and hold their locks.",
            "See them by `connections`, and end them by pg_terminate_backend(pid).",
        )
    if facts.prepared.get("transactions"):
        yield warning(
            "prepared_transactions",
            facts.variable,
            f"{facts.prepared['transactions']} prepared transactions have waited for more than {PREPARED_SECONDS:g} s, "
            "and hold their locks across restarts.",
            "COMMIT PREPARED or ROLLBACK PREPARED what pg_prepared_xacts lists.",
        )


def _room(facts: Facts, _settings: DatabasesSettings, _today: date) -> Iterator[Finding]:
    usable, taken = facts.usable_connections, facts.activity.get("connections")
    if usable and taken is not None and taken > usable * NEARLY_FULL:
        yield warning(
            "connections_nearly_spent",
            facts.variable,
            f"{taken} of {usable} connections for ordinary roles are taken.",
            "See by `connections` who has them (docs/runbook.md#connectionbudgetnearlyspent).",
        )
    limit, own = facts.identity.get("role_limit", -1), facts.activity.get("of_role")
    if limit >= 0 and own is not None and own > limit * NEARLY_FULL:
        yield warning(
            "role_limit_nearly_spent",
            facts.variable,
            f"{own} of the {limit} connections of role {facts.identity['role']} are taken.",
            "ALTER ROLE … CONNECTION LIMIT to more, or close what idles: `connections --terminate-idle 10m`.",
        )
    memory, cache = facts.integer("work_mem"), facts.integer("effective_cache_size")
    most = facts.integer("max_connections")
    if memory and cache and most and memory * KILOBYTE * most > cache * BLOCK:
        yield warning(
            "work_mem_times_connections",
            facts.variable,
            f"work_mem {size(memory * KILOBYTE)} x max_connections {most} = {size(memory * KILOBYTE * most)} is more "
            f"than the memory that effective_cache_size expects, {size(cache * BLOCK)}.",
            "Lower work_mem and raise it for the roles that sort much, or lower max_connections.",
        )


def _storage(facts: Facts, _settings: DatabasesSettings, _today: date) -> Iterator[Finding]:
    # A standby has these from its primary, and would say the same again.
    if facts.role != "primary":
        return
    for name in ("fsync", "full_page_writes"):
        if facts.settings.get(name) == "off":
            yield warning(
                "crash_unsafe",
                facts.variable,
                f"{name} is off: a crash of the machine may lose the whole database.",
                f"Set {name} = on, unless this data may be lost.",
            )
    if facts.settings.get("data_checksums") == "off":
        yield note(
            "checksums_off",
            facts.variable,
            "Data checksums are off: a page that the disk has damaged is not noticed.",
            "Stop the server and run pg_checksums --enable.",
        )
    if facts.settings.get("autovacuum") == "off":
        yield warning(
            "autovacuum_off",
            facts.variable,
            "autovacuum is off: tables grow, and plans go by old statistics.",
            "Set autovacuum = on.",
        )
    if facts.pending_restart:
        yield note(
            "restart_pending",
            facts.variable,
            f"Changed, and not in force before a restart: {', '.join(facts.pending_restart)}.",
            "Restart the server when it suits.",
        )


def _wear(facts: Facts, _settings: DatabasesSettings, _today: date) -> Iterator[Finding]:
    # A standby has these from its primary, and would say the same again.
    if facts.role != "primary":
        return
    age = facts.oldest.get("age", 0)
    if age > AGE_TO_WARN:
        report = error if age > AGE_TO_ACT else warning
        yield report(
            "wraparound_near",
            facts.variable,
            f"Database {facts.oldest['database']} is {age:,} transactions old; after 2,147,483,648 nothing is written.",
            "Find what keeps vacuum back (long transactions, slots, prepared transactions), and run VACUUM FREEZE.",
        )
    if facts.unarchived is not None:
        yield warning(
            "archiving_fails",
            facts.variable,
            f"WAL is not archived: {facts.unarchived} failed last.",
            "See the server's log for what archive_command says; WAL is kept until it works, and fills the disk.",
        )
    if facts.invalid_indexes:
        yield warning(
            "invalid_indexes",
            facts.variable,
            f"Invalid indexes, written and never read: {', '.join(facts.invalid_indexes)}.",
            "DROP INDEX CONCURRENTLY them and build them again.",
        )
    recorded = facts.identity.get("collation_version")
    if recorded and facts.collation_actual and recorded != facts.collation_actual:
        yield warning(
            "collation_changed",
            facts.variable,
            f"The collation was of version {recorded}, and is {facts.collation_actual}: indexes of text may be wrong.",
            "REINDEX DATABASE, then ALTER DATABASE … REFRESH COLLATION VERSION.",
        )


def _sight(facts: Facts, _settings: DatabasesSettings, _today: date) -> Iterator[Finding]:
    hidden = facts.activity.get("hidden")
    if facts.unseen or hidden:
        what = [*facts.unseen, *([f"the state of {hidden} sessions of other roles"] if hidden else [])]
        yield note(
            "not_seen",
            facts.variable,
            f"Role {facts.identity.get('role')} was not told: {', '.join(what)}.",
            "GRANT pg_monitor to the role, or run this with the URL of a role that has it.",
        )


RULES = (_slots, _synchronous, _activity, _room, _storage, _wear, _sight)
