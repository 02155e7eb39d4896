"""`doctor`: what an operator has to know about the databases of a service, with a cure for each finding.

`diagnose` asks all of them at the same time, each with bounds, and returns a report; it changes nothing. A service adds
databases and checks of its own by `database_commands(Settings, further=…, checks=[…])`.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import UTC, date, datetime
from itertools import chain
from typing import Any

from pglifeguard.connector import Connector
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.discovery import Finder, Found
from pglifeguard.doctor.budget_rules import Load, Sizes, budget_lines, judge_budget, judge_sizes, recommended
from pglifeguard.doctor.cluster_rules import judge_cluster
from pglifeguard.doctor.examination import Interview, examine
from pglifeguard.doctor.facts import WRITING, Facts, Purpose, Target
from pglifeguard.doctor.findings import EXIT_CODES, Finding, Severity, error, note, warning
from pglifeguard.doctor.report import Report, merged
from pglifeguard.doctor.server_rules import judge_server
from pglifeguard.settings import DatabasesSettings

__all__ = [
    "EXIT_CODES",
    "Check",
    "Finding",
    "Inquiry",
    "Load",
    "Purpose",
    "Report",
    "Severity",
    "Sizes",
    "Target",
    "diagnose",
    "error",
    "note",
    "warning",
]


class Inquiry:
    """What a check of a service's own may use: the settings, and questions to the databases that answered."""

    def __init__(self, settings: DatabasesSettings, examined: Sequence[Facts]) -> None:
        self.settings = settings
        self._answering = {facts.variable: facts.target for facts in examined if facts.answers}

    def answers(self, variable: str) -> bool:
        """Whether the database that this variable names was examined and answered."""
        return variable in self._answering

    async def rows(self, variable: str, sql: str, *arguments: Any) -> list[dict[str, Any]] | None:
        """Ask the database of a variable, by a connection of its own; HEALTH_TIMEOUT_SECONDS for login and answer.

        Returns None when the server refuses the question: a missing table or right.

        Raises: KeyError for a database that does not answer; DatabaseUnavailable, OSError or the driver's errors when
        it stops to.
        """
        target, seconds = self._answering[variable], self.settings.health_timeout_seconds
        connector = Connector(target.settings, writable=target.purpose in WRITING)
        try:
            deadline = asyncio.get_running_loop().time() + target.settings.seconds_of_a_job(seconds)
            connection = await connector.open(deadline, waking=target.settings.sleeps)
            try:
                return await Interview(connection, seconds, []).rows("check", sql, *arguments)
            finally:
                connection.terminate()
        finally:
            await connector.close()


Check = Callable[[Inquiry], Awaitable[Iterable[Finding]]]


async def diagnose(
    settings: DatabasesSettings,
    *,
    further: Iterable[Target] = (),
    checks: Iterable[Check] = (),
    load: Load | None = None,
    today: date | None = None,
) -> Report:
    """Examine every database of the settings and `further` ones, all at once, and judge what was found.

    Logins to one address follow each other. A login and each question have HEALTH_TIMEOUT_SECONDS, each of `checks`
    three times as long. A database that does not answer, and a check that fails, is a finding.
    """
    seconds = settings.health_timeout_seconds
    now = datetime.now(UTC).date() if today is None else today
    replicas, missing = await _replicas(settings, seconds)
    targets = [*targets_of(settings, replicas), *further]
    turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
    examined = list(
        await asyncio.gather(
            *(examine(target, seconds=seconds, turn=turns[target.settings.server]) for target in targets)
        )
    )
    inquiry = Inquiry(settings, examined)
    own = await asyncio.gather(*(_checked(check, inquiry, 3 * seconds) for check in checks))
    sizes = None if load is None else recommended(load, settings)
    findings = chain(
        *(judge_server(facts, settings, now, repeated=again) for facts, again in _with_repetitions(examined)),
        judge_cluster(examined, settings),
        judge_budget(examined, settings),
        () if sizes is None else judge_sizes(sizes),
        missing,
        *own,
        (
            note("ignored_variable", "environment", sentence, "Unset it, or correct its name.")
            for sentence in settings.ignored_variables
        ),
    )
    return Report(examined, budget_lines(examined, settings), sizes, merged(findings))


def targets_of(settings: DatabasesSettings, replicas: Sequence[DatabaseSettings]) -> list[Target]:
    """List the databases of the settings, each with the variable that names it; several replicas are told apart."""
    targets = [Target("DATABASE_URL", "primary", settings.primary)]
    for number, replica in enumerate(replicas, 1):
        numbered = f" ({number})" if len(replicas) > 1 else ""
        mark = numbered if replica.found is None else f" ({Found(replica.found).key})"
        targets.append(Target(f"DATABASE_REPLICA_URL{mark}", "replica", replica))
    targets.append(Target("DATABASE_ANALYTICS_URL", "analytics", settings.analytics))
    if settings.listening is not None:
        targets.append(Target("LISTEN_URL", "listen", settings.listening))
    return targets


async def _replicas(settings: DatabasesSettings, seconds: float) -> tuple[Sequence[DatabaseSettings], list[Finding]]:
    """Return the replicas of the settings, looked up where DNS names them, and what is wrong about that."""
    records = settings.database_replica_discovery
    if records == "off":
        return settings.replicas, []
    (replica,) = settings.replicas
    (host,) = replica.parameters.hosts
    try:
        found = await Finder(host, records).find(seconds)
    except OSError as failure:
        sentence = f"DNS names no replica: {failure}."
        cure = "Correct the name in DATABASE_REPLICA_URL, or its records."
        return [], [error("replicas_not_found", "DATABASE_REPLICA_URL", sentence, cure)]
    return [replica.at(one.host) for one in sorted(found, key=lambda one: one.key)], []


def _with_repetitions(examined: list[Facts]) -> Iterator[tuple[Facts, bool]]:
    """Say of each database whether its server was examined before: a server's health is told once."""
    seen = set[tuple[int | None, float | None]]()
    for facts in examined:
        server = (facts.position.system, facts.position.started)
        yield facts, server in seen and server != (None, None)
        seen.add(server)


async def _checked(check: Check, inquiry: Inquiry, seconds: float) -> Iterable[Finding]:
    name = getattr(check, "__name__", repr(check))
    try:
        async with asyncio.timeout(seconds):
            return list(await check(inquiry))
    except TimeoutError:
        reason = f"no answer within {seconds:g} s"
    except Exception as failure:  # noqa: BLE001  # It is somebody's own code, and must not hide what the rest has found.
        reason = f"{type(failure).__name__}: {failure}"
    return [error("check_failed", name, f"The check could not be made: {reason}.", "Mend it, and try again.")]
