"""The report as a whole, and its JSON. docs/doctor.md describes each field; new ones may be added within a version."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from pglifeguard.doctor.budget_rules import BudgetLine, Sizes
from pglifeguard.doctor.cluster_rules import lag_of
from pglifeguard.doctor.facts import Facts
from pglifeguard.doctor.findings import EXIT_CODES, Finding, Severity, Status, status_of
from pglifeguard.doctor.server_rules import END_OF_LIFE

VERSION = 1
ORDER: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Report:
    """What was found: findings are the worst first, each once, with all that it is about."""

    databases: list[Facts]
    budget: list[BudgetLine]
    sizes: Sizes | None
    findings: list[Finding]

    @property
    def status(self) -> Status:
        """The worst that was found."""
        return status_of(self.findings)

    @property
    def exit_code(self) -> int:
        """0 when all is well, 1 with warnings, 2 with errors."""
        return EXIT_CODES[self.status]

    def as_json(self) -> dict[str, Any]:
        """Return what `doctor --json` prints."""
        primary = next((facts for facts in self.databases if facts.target.purpose == "primary"), None)
        return {
            "version": VERSION,
            "status": self.status,
            "exit_code": self.exit_code,
            "databases": [_database(facts, primary) for facts in self.databases],
            "budget": [asdict(line) for line in self.budget],
            "sizes": None if self.sizes is None else asdict(self.sizes),
            "findings": [asdict(finding) for finding in self.findings],
        }


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings by severity; what is said of several databases becomes one, with all of them as its subject."""
    once: dict[tuple[str, str, str], Finding] = {}
    for finding in findings:
        key = (finding.severity, finding.code, finding.text)
        before = once.get(key)
        subject = finding.subject if before is None else f"{before.subject}, {finding.subject}"
        once[key] = replace(finding, subject=subject)
    return sorted(once.values(), key=lambda finding: ORDER.index(finding.severity))


def _database(facts: Facts, primary: Facts | None) -> dict[str, Any]:
    identity, position, used = facts.identity, facts.position, facts.encryption
    major = None if facts.version_number is None else facts.version_number // 10_000
    ends = None if major is None else END_OF_LIFE.get(major)
    bytes_behind, seconds_behind = (None, None)
    if primary is not None and facts.role == "standby":
        bytes_behind, seconds_behind = lag_of(facts, primary)
    return {
        "variable": facts.variable,
        "purpose": facts.target.purpose,
        "at": facts.target.settings.location,
        "answers": facts.answers,
        "failure": facts.failure,
        "login_ms": _rounded(facts.login_ms),
        "round_trip_ms": _rounded(facts.round_trip_ms),
        "role": facts.role,
        "user": identity.get("role"),
        "server_version": facts.settings.get("server_version"),
        "end_of_life": None if ends is None else ends.isoformat(),
        "encryption": None if used is None else used.version,
        "verified": None if used is None else used.verified,
        "pooled": facts.pooled,
        "pooler": None if facts.pooler is None else str(facts.pooler),
        "pooler_mode": None if facts.pooler is None else facts.pooler.mode,
        "prepared_statements": _statements(facts),
        "timeouts_seconds": facts.timeouts,
        "connections": {
            "max": facts.integer("max_connections"),
            "usable": position.granted,
            "taken": facts.activity.get("connections"),
            "role_limit": _limit(identity.get("role_limit")),
            "database_limit": _limit(identity.get("database_limit")),
        },
        "system": None if position.system is None else str(position.system),
        "timeline": position.timeline,
        "lag_bytes": bytes_behind,
        "lag_seconds": _rounded(seconds_behind),
        "slots": facts.slots,
        "standbys": None if facts.standbys is None else len(facts.standbys),
        "clock_difference_seconds": _rounded(facts.clock_difference_seconds),
    }


def _statements(facts: Facts) -> str | None:
    if not facts.answers or facts.target.purpose == "console":
        return None
    if not facts.pooled:
        return "kept"
    return {True: "kept", False: "lost", None: None}[None if facts.pooler is None else facts.pooler.keeps_statements]


def _limit(limit: int | None) -> int | None:
    return None if limit is None or limit < 0 else limit


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 3)
