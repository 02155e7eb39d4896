"""What was found, and the summary: each finding with what repeats it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console

from fuzz.wire import Case, Exchange

# Of one fault so many cases are told; a thousand alike say no more.
TOLD = 10
# The service may write of a client that has left already.
BEHIND = timedelta(seconds=0.05)


@dataclass
class Report:
    """Counts what was sent and what came, and keeps the findings; `directory` gets the bytes of each case in them."""

    directory: Path
    port: int
    console: Console
    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    _told: Counter[str] = field(default_factory=Counter)
    _times: list[tuple[datetime, datetime, str]] = field(default_factory=list)
    _known: set[tuple[str, str]] = field(default_factory=set)

    def count(self, exchange: Exchange, *, begun: datetime) -> None:
        """Count a case and its answers, and note when it was sent."""
        self.sent += 1
        self._times.append((begun, datetime.now(UTC), exchange.case.name))
        self.statuses.update(str(answer.status) for answer in exchange.answers)
        if not exchange.answers:
            self.statuses["none"] += 1

    def found(self, fault: str, case: Case | None = None) -> None:
        """Note a fault, with the case that showed it, once."""
        if case is not None and (fault, case.name) in self._known:
            return
        self._known.add((fault, "" if case is None else case.name))
        self._told[fault] += 1
        if case is None:
            self.findings.append(fault)
        elif self._told[fault] <= TOLD:
            path = self.directory / f"{len(self.findings):03d}.http"
            path.write_bytes(b"".join(case.pieces))
            self.findings.append(
                f"{case.name}: {fault}\n      sent in {len(case.pieces)} pieces, then {case.end}; to repeat it on what "
                f"`make run` serves:\n      curl --max-time 5 telnet://127.0.0.1:8000 <{path}"
            )
        elif self._told[fault] == TOLD + 1:
            self.findings.append(f"more of: {fault}")

    def sent_at(self, moment: datetime) -> str:
        """Name the cases that were on their way then, for a line of the log, which names none."""
        names = [name for begun, ended, name in self._times if begun <= moment <= ended + BEHIND]
        return ", ".join(map(repr, names)) or "none of the corpus"

    def summarise(self, figures: Iterable[str]) -> None:
        """Print the whole."""
        by_status = ", ".join(f"{count} × {status}" for status, count in sorted(self.statuses.items()))  # noqa: RUF001
        self.console.print(f"\n{self.sent} connections; answers: {by_status}", markup=False)
        for line in figures:
            self.console.print(line, markup=False)
        for number, finding in enumerate(self.findings, 1):
            self.console.print(f"  {number}. {finding}", markup=False)
        self.console.print(f"{len(self.findings)} findings")
