"""What `doctor` reports: findings, each with its severity and its cure, and the exit code that follows."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["note", "warning", "error"]
Status = Literal["well", "warnings", "errors"]
EXIT_CODES: dict[Status, int] = {"well": 0, "warnings": 1, "errors": 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that an operator should know.

    `code` is stable, for scripts. `subject` is the variable or the server that it is about. `text` says what is so, and
    `cure` in one sentence what to do. An error means that the service would not work as configured; a warning, that it
    may stop working; a note changes no exit code.
    """

    severity: Severity
    code: str
    subject: str
    text: str
    cure: str


def error(code: str, subject: str, text: str, cure: str) -> Finding:
    """Make a finding of severity error."""
    return Finding("error", code, subject, text, cure)


def warning(code: str, subject: str, text: str, cure: str) -> Finding:
    """Make a finding of severity warning."""
    return Finding("warning", code, subject, text, cure)


def note(code: str, subject: str, text: str, cure: str) -> Finding:
    """Make a finding of severity note."""
    return Finding("note", code, subject, text, cure)


def status_of(findings: Iterable[Finding]) -> Status:
    """Return the worst that was found; notes are well."""
    severities = {finding.severity for finding in findings}
    return "errors" if "error" in severities else "warnings" if "warning" in severities else "well"
