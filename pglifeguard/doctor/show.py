"""The report as a person reads it: tables as wide as the terminal, nothing cut off, then findings with their cures."""

import shutil
from collections import Counter

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pglifeguard import budget
from pglifeguard.doctor.cluster_rules import lag_of
from pglifeguard.doctor.facts import Facts, size
from pglifeguard.doctor.findings import Severity
from pglifeguard.doctor.report import ORDER, Report

COLOURS: dict[Severity, str] = {"error": "red", "warning": "yellow", "note": "cyan"}
# Of an output that is no terminal: a file or a pipe.
WIDE = (160, 50)
NONE = "–"  # noqa: RUF001  # A dash, as people write one.


def wide_console(*, stderr: bool = False) -> Console:
    """Make a console as wide as COLUMNS says, or else the terminal, or else 160 columns."""
    return Console(stderr=stderr, width=shutil.get_terminal_size(WIDE).columns)


def show(report: Report, console: Console) -> None:
    """Print a report."""
    primary = next(facts for facts in report.databases if facts.target.purpose == "primary")
    console.print(_databases(report.databases))
    if servers := [facts for facts in report.databases if facts.role is not None]:
        console.print(_servers(servers, primary))
    console.print(_budget(report))
    console.print(_sizes(report), _presets())
    for finding in report.findings:
        colour = COLOURS[finding.severity]
        text = f"[{colour}]{finding.severity}[/{colour}] {escape(finding.subject)}: {escape(finding.text)}"
        console.print(f"{text} \\[{finding.code}]", soft_wrap=True, highlight=False)
        console.print(f"    {escape(finding.cure)}", soft_wrap=True, highlight=False)
    console.print(_summary(report), highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        # Folded where the terminal is too narrow: rich would cut it off.
        table.add_column(column, overflow="fold")
    return table


def _databases(examined: list[Facts]) -> Table:
    table = _table(
        "Databases", "variable", "at", "state", "role", "version", "login", "round trip", "encryption", "pooler"
    )
    for facts in examined:
        state = "[green]answers[/green]" if facts.answers else "[red]does not answer[/red]"
        version = facts.settings.get("server_version", "").partition(" ")[0]
        table.add_row(
            facts.variable,
            escape(facts.target.settings.location),
            state,
            facts.role or NONE,
            version or NONE,
            _milliseconds(facts.login_ms),
            _milliseconds(facts.round_trip_ms),
            NONE if facts.encryption is None else str(facts.encryption),
            _pooler(facts),
        )
    return table


def _pooler(facts: Facts) -> str:
    if not facts.answers:
        return NONE
    if facts.target.purpose == "console":
        return "PgBouncer's console"
    return "none" if not facts.pooled else str(facts.pooler or "not looked at")


def _servers(examined: list[Facts], primary: Facts) -> Table:
    table = _table(
        "Servers",
        *("variable", "user", "statement", "lock", "idle in transaction", "transaction"),
        *("connections", "timeline", "lag", "slots"),
    )
    for facts in examined:
        timeouts = [_seconds(value) for value in facts.timeouts.values()] or [NONE] * 4
        taken, usable = facts.activity.get("connections"), facts.usable_connections
        behind, seconds = lag_of(facts, primary) if facts.role == "standby" else (None, None)
        lag = NONE if behind is None else f"{size(behind)}, {'?' if seconds is None else f'{seconds:.1f}'} s"
        table.add_row(
            facts.variable,
            escape(str(facts.identity.get("role", NONE))),
            *timeouts,
            f"{NONE if taken is None else taken} of {NONE if usable is None else usable}",
            NONE if facts.position.timeline is None else str(facts.position.timeline),
            lag,
            ", ".join(f"{escape(slot['name'])}{'' if slot['active'] else ' (inactive)'}" for slot in facts.slots)
            or NONE,
        )
    return table


def _budget(report: Report) -> Table:
    table = _table("Connections, all instances together", "server", "at most", "granted", "the sum")
    for line in report.budget:
        unknown = "the pooler's to say" if line.pooled else NONE
        granted = unknown if line.granted is None else str(line.granted)
        table.add_row(escape(line.server), str(line.wanted), granted, line.arithmetic)
    return table


def _sizes(report: Report) -> Table:
    table = _table("Sizes, connections on the server", "rule", "for", "connections")
    sizes = report.sizes
    if sizes is None or (sizes.by_cores is None and sizes.by_load is None):
        table.caption = "Examples. For yours: --cores, or --rate and --latency-ms."
        table.caption_justify = "left"
        for rule, by in (("cores x 2 + 1", budget.by_cores), ("cores x 2 + 4", budget.for_production)):
            table.add_row(rule, "8 cores", str(by(8)))
        table.add_row("requests/s x seconds x 1.2, at least 5", "500/s, 10 ms", str(budget.by_load(500, 0.010)))
        table.add_row("requests/s x seconds x 1.2, at least 5", "2,000/s, 5 ms", str(budget.by_load(2000, 0.005)))
        return table
    if sizes.by_cores is not None:
        table.add_row("cores x 2 + 1", f"{sizes.cores} cores", str(sizes.by_cores))
        table.add_row("cores x 2 + 4", f"{sizes.cores} cores", str(sizes.for_production))
    if sizes.by_load is not None:
        load = f"{sizes.rate:,g}/s, {sizes.latency_ms:g} ms"
        table.add_row("requests/s x seconds x 1.2, at least 5", load, str(sizes.by_load))
    table.add_row("recommended", "the server", str(sizes.recommended))
    table.add_row("recommended", "each process: pool_size + max_overflow", str(sizes.per_process))
    return table


def _presets() -> Table:
    table = _table("Presets, per process", "preset", "pool_size", "max_overflow")
    for preset in budget.PRESETS:
        table.add_row(preset.name, str(preset.pool_size), str(preset.max_overflow))
    return table


def _summary(report: Report) -> str:
    counted = Counter(finding.severity for finding in report.findings)
    parts = [_counted(counted[severity], severity) for severity in ORDER if counted[severity]]
    return f"{report.status}: {', '.join(parts) or 'nothing to say'}"


def _milliseconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f} ms"


def _seconds(value: float | None) -> str:
    return NONE if value is None else "off" if value == 0 else f"{value:g} s"


def _counted(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"
