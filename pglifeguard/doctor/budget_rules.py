"""Whether the servers have as many connections as the service may open, and which sizes are to be recommended."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from pglifeguard import budget
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.doctor.facts import Facts
from pglifeguard.doctor.findings import Finding, error, note, warning
from pglifeguard.settings import DatabasesSettings


@dataclass(frozen=True, slots=True)
class BudgetLine:
    """The sum for one server, and what that grants; `granted` is None where nobody says, as behind a pooler."""

    server: str
    wanted: int
    per_instance: int
    granted: int | None
    pooled: bool
    arithmetic: str


@dataclass(frozen=True, slots=True)
class Load:
    """What the service has to carry: requests per second, milliseconds for which each holds a connection, cores."""

    rate: float | None = None
    latency_ms: float | None = None
    cores: int | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Connections by the published formulas, `recommended` the least of them, and what that leaves each process."""

    rate: float | None
    latency_ms: float | None
    cores: int | None
    by_cores: int | None
    for_production: int | None
    by_load: int | None
    recommended: int | None
    per_process: int | None


def budget_lines(examined: list[Facts], settings: DatabasesSettings) -> list[BudgetLine]:
    """Put what the service may open on each server beside what that has for it."""
    lines = []
    for demand in budget.demands(settings, _on_one_server(examined, settings)):
        on_it = [facts for facts in examined if facts.target.settings.server == demand.server and facts.answers]
        pooled = any(facts.pooled for facts in on_it)
        said = [facts.usable_connections for facts in on_it if facts.usable_connections is not None]
        allowed = budget.granted(settings, None if pooled else min(said, default=None))
        lines.append(BudgetLine(demand.server, demand.wanted, demand.per_instance, allowed, pooled, demand.arithmetic))
    return lines


def judge_budget(examined: list[Facts], settings: DatabasesSettings) -> Iterator[Finding]:
    """Find what may open more than is granted: by the server, to the role, to the database."""
    one_server = budget.demands(settings, _on_one_server(examined, settings))
    for everything, demand in zip(budget.demands(settings), one_server, strict=True):
        on_it = [facts for facts in examined if facts.target.settings.server == demand.server and facts.answers]
        limit = settings.connection_limit
        if limit is not None and (sentence := everything.exceeds(limit, settings.connection_reserve)):
            yield error("over_connection_limit", demand.server, *_said("CONNECTION_LIMIT", sentence))
        if any(facts.pooled for facts in on_it):
            if limit is None:
                yield note(
                    "poolers_limit_unknown",
                    demand.server,
                    f"The pooler gets {everything.wanted} clients at most ({everything.arithmetic}); its limit is not "
                    "known.",
                    "Set CONNECTION_LIMIT to what the pooler takes (PgBouncer: max_client_conn), and it is checked.",
                )
            continue
        for facts in on_it[:1]:
            most, usable = facts.integer("max_connections"), facts.usable_connections
            if most is None or usable is None:
                continue
            reserve = max(most - usable, settings.connection_reserve)
            if sentence := demand.exceeds(most, reserve):
                yield error("over_max_connections", demand.server, *_said("Too many for max_connections", sentence))
    surplus = [facts for facts in examined if facts.target.settings.found is not None][_addresses(examined) :]
    direct = [facts for facts in examined if facts.answers and not facts.pooled and facts not in surplus]
    yield from _limits(
        "over_role_limit",
        "role",
        "ALTER ROLE",
        "role_limit",
        direct,
        settings,
        lambda facts: (facts.target.settings.server, facts.identity.get("role")),
    )
    yield from _limits(
        "over_database_limit",
        "database",
        "ALTER DATABASE",
        "database_limit",
        direct,
        settings,
        lambda facts: (facts.target.settings.server, facts.identity.get("database")),
    )


def recommended(load: Load, settings: DatabasesSettings) -> Sizes:
    """Work out sizes by the formulas of budget.py, as far as the load is known."""
    cores = load.cores
    by_load = None
    if load.rate is not None and load.latency_ms is not None:
        by_load = budget.by_load(load.rate, load.latency_ms / 1000)
    by_cores, most = (None, None) if cores is None else (budget.by_cores(cores), budget.for_production(cores))
    total = min((each for each in (by_load, most) if each is not None), default=None)
    processes = settings.workers * settings.instances
    # What the load needs is rounded up; what the server can use, down.
    rounded = math.ceil if total == by_load else math.floor
    per_process = None if total is None else max(1, rounded(total / processes))
    return Sizes(load.rate, load.latency_ms, cores, by_cores, most, by_load, total, per_process)


def judge_sizes(sizes: Sizes) -> Iterator[Finding]:
    """Find a load that more connections would not carry."""
    if sizes.by_load is not None and sizes.for_production is not None and sizes.by_load > sizes.for_production:
        yield warning(
            "load_exceeds_server",
            "DATABASE_POOL_SIZE",
            f"The load needs {sizes.by_load} connections at work; {sizes.cores} cores can use {sizes.for_production}.",
            "Connections are not what is missing: hold them for less time, or take more cores or a replica.",
        )


def _addresses(examined: list[Facts]) -> int:
    """Return how many of the addresses that DNS has found lead to one server, at most."""
    found = (facts.position.started for facts in examined if facts.target.settings.found is not None)
    return max(Counter(started for started in found if started is not None).values(), default=1)


def _on_one_server(examined: list[Facts], settings: DatabasesSettings) -> dict[str, DatabaseSettings]:
    return budget.on_one_server(settings, settings.pools, _addresses(examined))


def _limits(  # noqa: PLR0913, PLR0917  # One limit and its words.
    code: str,
    what: str,
    command: str,
    key: str,
    direct: list[Facts],
    settings: DatabasesSettings,
    group: Callable[[Facts], Hashable],
) -> Iterator[Finding]:
    """Compare a limit that is set on a role or a database with the pools that it holds."""
    groups: dict[Hashable, list[Facts]] = {}
    for facts in direct:
        if facts.target.purpose in {"primary", "replica", "analytics", "listen"}:
            groups.setdefault(group(facts), []).append(facts)
    processes = settings.workers * (settings.instances + settings.surge_instances)
    for members in groups.values():
        limit = members[0].identity.get(key, -1)
        sizes = [1 if facts.target.purpose == "listen" else facts.target.settings.capacity + 1 for facts in members]
        wanted = sum(sizes) * processes
        if 0 <= limit < wanted:
            name = members[0].identity.get(what)
            yield error(
                code,
                members[0].variable,
                f"The {what} {name} may have {limit} connections, and the pools may open {wanted}: "
                f"{processes} processes x {' + '.join(map(str, sizes))}.",
                f"{command} {name} CONNECTION LIMIT {wanted}, or lower the pools.",
            )


def _said(what: str, sentence: str) -> tuple[str, str]:
    """Split the sentence of the budget into what is so and what to do."""
    text, _, cure = sentence.partition(" Lower ")
    return f"{what}: {text}", f"Lower {cure}"
