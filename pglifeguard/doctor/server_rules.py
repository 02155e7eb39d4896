"""What a login to one database shows: role, version, TLS, pooler, timeouts, rights. `health_rules` has the rest."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta

from pglifeguard.doctor import health_rules
from pglifeguard.doctor.facts import WRITING, Facts
from pglifeguard.doctor.findings import Finding, error, note, warning
from pglifeguard.settings import DatabasesSettings

# The day of the last release of each version. Source: https://www.postgresql.org/support/versioning/
END_OF_LIFE = {
    9: date(2021, 11, 11),
    10: date(2022, 11, 10),
    11: date(2023, 11, 9),
    12: date(2024, 11, 21),
    13: date(2025, 11, 13),
    14: date(2026, 11, 12),
    15: date(2027, 11, 11),
    16: date(2028, 11, 9),
    17: date(2029, 11, 8),
    18: date(2030, 11, 14),
}
SOON_DAYS = 180
CERTIFICATE_DAYS = PASSWORD_DAYS = 14
# A token or a log line is off by as much.
CLOCK_SECONDS = 2.0
Rule = Callable[[Facts, DatabasesSettings, date], Iterator[Finding]]


def judge_server(
    facts: Facts, settings: DatabasesSettings, today: date, *, repeated: bool = False
) -> Iterator[Finding]:
    """Find what is wrong with one database; `repeated` says that its server was judged under another variable."""
    if facts.refusal is not None:
        yield error("pooler_refused", facts.variable, f"It {facts.refusal}.", "Do what it says, or go past the pooler.")
    elif facts.failure is not None:
        yield error(
            "unreachable",
            facts.variable,
            facts.failure,
            "See that the server runs, may be reached and lets this role in; compare the URL with what it says.",
        )
    if facts.failure is not None:
        return
    for rule in RULES if repeated else (*RULES, *health_rules.RULES):
        yield from rule(facts, settings, today)


def _role(facts: Facts, _settings: DatabasesSettings, _today: date) -> Iterator[Finding]:
    if facts.target.purpose not in WRITING:
        return
    if facts.role == "standby":
        yield error(
            "standby_as_primary",
            facts.variable,
            "The server takes no writes: it is a standby.",
            f"Point {facts.variable} at the primary, or name all hosts of the cluster in it.",
        )
    elif facts.identity.get("read_only"):
        yield error(
            "read_only",
            facts.variable,
            "The server takes no writes: default_transaction_read_only is on.",
            "Take it off the server, the database or the role: ALTER … RESET default_transaction_read_only.",
        )


def _version(facts: Facts, _settings: DatabasesSettings, today: date) -> Iterator[Finding]:
    major = None if facts.version_number is None else facts.version_number // 10_000
    ends = None if major is None else END_OF_LIFE.get(major)
    if ends is None:
        return
    said = f"PostgreSQL {facts.settings.get('server_version')} has "
    if ends < today:
        yield warning(
            "end_of_life",
            facts.variable,
            f"{said}had no security fixes since {ends}.",
            "Upgrade to a version that is supported.",
        )
    elif ends - today < timedelta(days=SOON_DAYS):
        yield note("end_of_life_soon", facts.variable, f"{said}security fixes until {ends}.", "Plan the upgrade.")


def _encryption(facts: Facts, settings: DatabasesSettings, _today: date) -> Iterator[Finding]:
    used = facts.encryption
    if used is None:
        return
    if used.exposed:
        report = warning if settings.warn_unencrypted else note
        yield report(
            "not_encrypted",
            facts.variable,
            "The connection leaves this machine without encryption.",
            "Write sslmode=verify-full into the URL (docs/tls.md).",
        )
    elif used.version is not None and used.verified == "nothing" and used.leaves_machine:
        yield note(
            "not_verified",
            facts.variable,
            "The connection is encrypted, and nobody checked with whom.",
            "Write sslmode=verify-full and sslrootcert into the URL.",
        )
    days = None if used.certificate_ends is None else (used.certificate_ends - time.time()) / 86_400
    if days is not None and days < CERTIFICATE_DAYS:
        yield warning(
            "certificate_ends",
            facts.variable,
            f"The server's certificate ends in {max(0.0, days):.0f} days.",
            "Renew it on the server.",
        )


def _pooler(facts: Facts, _settings: DatabasesSettings, _today: date) -> Iterator[Finding]:
    if not facts.pooled:
        return
    found = facts.pooler
    if found is not None and found.keeps_statements is False and facts.target.settings.statement_cache_size:
        yield warning(
            "statements_lost",
            facts.variable,
            "The pooler in front does not keep prepared statements, so each statement costs a round trip more.",
            "Set max_prepared_statements there (PgBouncer 1.21 or later), or DATABASE_STATEMENT_CACHE_SIZE=0 here.",
        )
    if found is not None and found.lost:
        yield warning(
            "parameters_lost",
            facts.variable,
            f"The pooler in front drops start-up parameters of the URL: {', '.join(found.lost)}.",
            "ALTER ROLE … SET holds through it; leave them out of the URL.",
        )
    if facts.target.purpose == "listen":
        yield error(
            "listen_through_pooler",
            facts.variable,
            "It leads to a pooler, which does not hand notifications on.",
            "Point LISTEN_URL at the primary itself.",
        )
    if facts.target.purpose == "migrations":
        yield warning(
            "migrations_through_pooler",
            facts.variable,
            "It leads to a pooler; in transaction mode that spreads a session over connections, and migrations refuse.",
            "Point MIGRATIONS_URL at the primary itself.",
        )


def _timeouts(facts: Facts, settings: DatabasesSettings, _today: date) -> Iterator[Finding]:
    if facts.target.purpose not in {"primary", "replica", "analytics"}:
        return
    role = facts.identity.get("role", "…")
    statement, wanted = facts.timeouts.get("statement_timeout"), settings.statement_timeout_seconds
    cure = f"ALTER ROLE {role} SET statement_timeout = '{wanted:g}s', or change STATEMENT_TIMEOUT_SECONDS."
    if statement == 0:
        yield warning(
            "statement_timeout_off",
            facts.variable,
            f"No statement_timeout: a statement runs on after the client gave up ({_command(facts)} s).",
            cure,
        )
    elif statement is not None and statement < wanted:
        yield warning(
            "statement_timeout_low",
            facts.variable,
            f"statement_timeout is {statement:g} s, and STATEMENT_TIMEOUT_SECONDS says {wanted:g}: they end early.",
            cure,
        )
    elif statement is not None and statement > wanted:
        yield warning(
            "statement_timeout_high",
            facts.variable,
            f"statement_timeout is {statement:g} s, and STATEMENT_TIMEOUT_SECONDS says {wanted:g}: a shutdown, and the "
            f"client after {_command(facts)} s, would not wait for it.",
            cure,
        )
    lock = facts.timeouts.get("lock_timeout")
    if lock and statement and lock >= statement:
        yield note(
            "lock_timeout_idle",
            facts.variable,
            f"lock_timeout {lock:g} s >= statement_timeout {statement:g} s, so it never ends anything.",
            f"ALTER ROLE {role} SET lock_timeout to less.",
        )
    if facts.timeouts.get("idle_in_transaction_session_timeout") == 0:
        yield warning(
            "idle_in_transaction_timeout_off",
            facts.variable,
            "No idle_in_transaction_session_timeout: a client that hangs keeps its locks, and vacuum from cleaning up.",
            f"ALTER ROLE {role} SET idle_in_transaction_session_timeout = '60s'.",
        )
    transaction = facts.timeouts.get("transaction_timeout")
    if transaction and transaction < wanted:
        yield warning(
            "transaction_timeout_low",
            facts.variable,
            f"transaction_timeout is {transaction:g} s, less than STATEMENT_TIMEOUT_SECONDS {wanted:g}.",
            f"ALTER ROLE {role} SET transaction_timeout to more, or to 0.",
        )


def _command(facts: Facts) -> str:
    return f"{facts.target.settings.command_timeout_seconds:g}"


def _rights(facts: Facts, _settings: DatabasesSettings, today: date) -> Iterator[Finding]:
    purpose, role = facts.target.purpose, facts.identity.get("role")
    if facts.identity.get("superuser") and purpose != "migrations":
        yield warning(
            "superuser",
            facts.variable,
            f"Role {role} is a superuser, whom no limit holds and every row is open to.",
            "Connect as a role that owns nothing (postgres/roles.sql).",
        )
    ends = facts.password_ends
    if ends is not None and ends.date() - today < timedelta(days=PASSWORD_DAYS):
        expired = ends < datetime.now(UTC)
        yield warning(
            "password_ends",
            facts.variable,
            f"The password of role {role} {'ended' if expired else 'ends'} on {ends:%Y-%m-%d}.",
            "Set a new one: ALTER ROLE … PASSWORD … VALID UNTIL ….",
        )
    if purpose == "migrations" and facts.may_create is False and facts.role == "primary":
        yield error(
            "migrations_lack_rights",
            facts.variable,
            f"Role {role} may not create tables in the schema.",
            "Migrate as the role that owns the tables (app_owner of postgres/roles.sql).",
        )
    encoding = facts.identity.get("encoding")
    if encoding not in {None, "UTF8"}:
        yield warning(
            "encoding",
            facts.variable,
            f"The database's encoding is {encoding}: it takes only some characters.",
            "Create the database with ENCODING 'UTF8', and dump and restore into it.",
        )


def _clock(facts: Facts, _settings: DatabasesSettings, _today: date) -> Iterator[Finding]:
    ahead = facts.clock_difference_seconds
    if ahead is not None and abs(ahead) > CLOCK_SECONDS:
        yield warning(
            "clock_difference",
            facts.variable,
            f"The server's clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's.",
            "Have both follow the same time (NTP).",
        )


RULES: tuple[Rule, ...] = (
    _role,
    _version,
    _encryption,
    _pooler,
    _timeouts,
    _rights,
    _clock,
)
