"""What facts mean that no server of the tests can be brought to: versions, certificates, ages, other clusters."""

import time
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from app.settings import Settings
from pglifeguard.doctor import Target, note
from pglifeguard.doctor.budget_rules import judge_budget
from pglifeguard.doctor.cluster_rules import judge_cluster
from pglifeguard.doctor.facts import Facts, Purpose, size
from pglifeguard.doctor.findings import Finding, status_of
from pglifeguard.doctor.server_rules import judge_server
from pglifeguard.duration import parse_duration
from pglifeguard.pooler import Pooler
from pglifeguard.server_position import UNKNOWN, Position
from pglifeguard.tls import Encryption
from tests.pglifeguard.conftest import service_settings

TODAY = date(2026, 11, 28)
URL = "postgresql://a@db.example:5432/lifeguard"
AT = Position(in_recovery=False, system=1, started=1.0, timeline=1, lsn=100_000_000, granted=97)


def settings(**changes: object) -> Settings:
    """Return settings of a service with one server."""
    return service_settings(URL, **changes)


def known(purpose: Purpose = "primary", **changes: Any) -> Facts:
    """Return the facts of a server with which nothing is wrong."""
    facts = Facts(
        Target("DATABASE_URL", purpose, settings().primary),
        identity={"in_recovery": False, "role": "app", "database": "lifeguard", "encoding": "UTF8"},
        settings={"server_version_num": "180004", "server_version": "18.4"},
        timeouts={"statement_timeout": 30.0, "idle_in_transaction_session_timeout": 60.0},
        position=AT,
    )
    for name, value in changes.items():
        before = getattr(facts, name)
        setattr(facts, name, before | value if isinstance(before, dict) else value)
    return facts


def plain(**changes: Any) -> Encryption:
    """Return the protection of a connection to another machine."""
    return Encryption("TLSv1.3", "name", None, leaves_machine=True)._replace(**changes)


def severities(findings: list[Finding]) -> dict[str, str]:
    """Return what was found, by code."""
    return {finding.code: finding.severity for finding in findings}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"settings": {"server_version_num": "140020"}}, {"end_of_life": "warning"}),
        ({"settings": {"server_version_num": "990001"}}, {}),
        ({"settings": {"server_version_num": None}}, {}),
        ({"encryption": plain(version=None)}, {"not_encrypted": "note"}),
        ({"encryption": plain(verified="nothing")}, {"not_verified": "note"}),
        ({"encryption": plain(certificate_ends=time.time() + 86_400)}, {"certificate_ends": "warning"}),
        ({"encryption": plain(certificate_ends=time.time() + 86_400 * 90)}, {}),
        ({"pooled": True, "pooler": Pooler(True, "transaction", False)}, {"statements_lost": "warning"}),
        ({"pooled": True, "pooler": Pooler(True, "session", lost=("work_mem",))}, {"parameters_lost": "warning"}),
        ({"failure": "No.", "refusal": "leads to a pooler"}, {"pooler_refused": "error"}),
        (
            {"slots": [{"name": "a", "active": False, "wal_status": "lost", "retained_bytes": None}]},
            {"slot_lost": "warning"},
        ),
        (
            {"slots": [{"name": "a", "active": False, "wal_status": None, "retained_bytes": None}]},
            {"slot_inactive": "warning"},
        ),
        (
            {"slots": [{"name": "a", "active": True, "wal_status": "extended", "retained_bytes": 1 << 31}]},
            {"slot_behind": "warning"},
        ),
        ({"settings": {"synchronous_standby_names": "b"}, "standbys": []}, {"synchronous_standby_missing": "error"}),
        (
            {"settings": {"synchronous_standby_names": "b"}, "standbys": [{"sync_state": "async"}]},
            {"synchronous_standby_missing": "error"},
        ),
        ({"settings": {"synchronous_standby_names": "b"}, "standbys": [{"sync_state": None}]}, {}),
        ({"activity": {"long": 2, "long_seconds": 400.0}}, {"long_transactions": "warning"}),
        ({"activity": {"forgotten": 2, "forgotten_seconds": 400.0}}, {"idle_in_transaction": "warning"}),
        ({"prepared": {"transactions": 1}}, {"prepared_transactions": "warning"}),
        ({"activity": {"connections": 90}}, {"connections_nearly_spent": "warning"}),
        ({"identity": {"role_limit": 10}, "activity": {"of_role": 9}}, {"role_limit_nearly_spent": "warning"}),
        ({"identity": {"role_limit": 10}, "activity": {"of_role": 2}}, {}),
        (
            {"settings": {"work_mem": "1048576", "effective_cache_size": "524288", "max_connections": "100"}},
            {"work_mem_times_connections": "warning"},
        ),
        ({"settings": {"data_checksums": "off"}}, {"checksums_off": "note"}),
        ({"settings": {"autovacuum": "off"}}, {"autovacuum_off": "warning"}),
        ({"oldest": {"age": 1_200_000_000, "database": "x"}}, {"wraparound_near": "warning"}),
        ({"oldest": {"age": 1_700_000_000, "database": "x"}}, {"wraparound_near": "error"}),
        ({"unarchived": "0000000100000001"}, {"archiving_fails": "warning"}),
        ({"invalid_indexes": ["half"]}, {"invalid_indexes": "warning"}),
        ({"identity": {"collation_version": "2.36"}, "collation_actual": "2.41"}, {"collation_changed": "warning"}),
        ({"pending_restart": ["max_connections"]}, {"restart_pending": "note"}),
        ({"identity": {"superuser": True}}, {"superuser": "warning"}),
        ({"identity": {"password_ends": datetime.now(UTC) + timedelta(days=3)}}, {"password_ends": "warning"}),
        ({"identity": {"password_ends": datetime.max.replace(tzinfo=UTC)}}, {}),
        ({"identity": {"encoding": "SQL_ASCII"}}, {"encoding": "warning"}),
        ({"clock_difference_seconds": 9.0}, {"clock_difference": "warning"}),
        ({"clock_difference_seconds": -9.0}, {"clock_difference": "warning"}),
        ({"unseen": ["slots"]}, {"not_seen": "note"}),
        ({"timeouts": {"transaction_timeout": 60.0, "lock_timeout": 5.0, "statement_timeout": None}}, {}),
    ],
)
def test_facts_are_judged(changes: dict[str, Any], expected: dict[str, str]) -> None:
    """Each finding has a severity and a cure, and nothing else is found."""
    found = list(
        judge_server(known(**changes), settings(), datetime.now(UTC).date() if "identity" in changes else TODAY)
    )

    assert severities(found) == expected
    assert all(finding.cure.endswith((".", "….")) for finding in found)


def test_version_that_ends_soon_is_a_note() -> None:
    """Half a year is time to plan an upgrade."""
    found = list(judge_server(known(), settings(), date(2030, 8, 1)))

    assert severities(found) == {"end_of_life_soon": "note"}


def test_missing_encryption_is_a_warning_where_it_is_asked_for() -> None:
    """WARN_UNENCRYPTED is on in production."""
    (found,) = judge_server(known(encryption=plain(version=None)), settings(warn_unencrypted=True), TODAY)

    assert (found.code, found.severity) == ("not_encrypted", "warning")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"replica_takes_writes": "error"}),
        ({"started": 1.0}, {"replica_is_primary": "note"}),
        ({"system": 2}, {"replica_of_another_cluster": "error"}),
        ({"in_recovery": True, "timeline": 2}, {"replica_on_another_timeline": "error"}),
        ({"in_recovery": True, "lsn": None}, {"lag_unknown": "note"}),
        ({"in_recovery": True, "lsn": 1000, "replay_age": 60.0}, {"replica_lags": "warning"}),
        ({"in_recovery": True, "lsn": 1000}, {"replica_lags": "warning"}),
        ({"in_recovery": True, "lsn": 1000, "replay_age": 1.0}, {}),
        ({"in_recovery": True}, {}),
    ],
)
def test_replica_is_compared_with_its_primary(changes: dict[str, Any], expected: dict[str, str]) -> None:
    """As the service does before it reads there."""
    position = replace(AT, **{"started": 2.0, **changes})
    replica = known("replica", position=position, identity={"in_recovery": position.in_recovery})

    assert severities(list(judge_cluster([known(), replica], settings()))) == expected


def test_migrations_of_another_cluster_are_an_error() -> None:
    """Two clusters may have databases of one name; analytics may be anywhere."""
    elsewhere = replace(AT, system=2)

    found = list(judge_cluster([known(), known("analytics", position=elsewhere)], settings()))
    wrong = list(judge_cluster([known(), known("migrations", position=elsewhere)], settings()))

    assert found == []
    assert severities(wrong) == {"another_cluster": "error"}


def test_server_that_tells_no_limit_is_not_judged_by_one() -> None:
    """Without max_connections nothing is known to be too much."""
    assert list(judge_budget([known(position=UNKNOWN)], settings(instances=100))) == []


def test_notes_are_well() -> None:
    """They change no exit code."""
    assert status_of([note("a", "b", "c", "d")]) == "well"


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 bytes"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5120.0 TiB")]
)
def test_sizes_are_read_easily(count: int, text: str) -> None:
    """One digit behind the point."""
    assert size(count) == text


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("10m", 600), ("2h", 7200), ("1.5h", 5400), ("1d", 86_400)])
def test_durations_have_units(text: str, seconds: float) -> None:
    """A number and its unit."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "10", "m", "10 minutes", "-1s", "0s", "10M", "1e3s", "inf", "400d", "99999999999h"]
)
def test_bad_durations_are_refused(text: str) -> None:
    """The sentence repeats what was given."""
    with pytest.raises(ValueError, match="is not"):
        parse_duration(text)
