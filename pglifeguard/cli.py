"""The operator's commands: `python -m pglifeguard doctor | connections | pause | resume | drain | resize`."""

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, TypeVar

from pglifeguard import budget
from pglifeguard.activity import BLOCKED, CLOSE_IDLE, EACH, END_IDLE, IDLE
from pglifeguard.connector import Connector
from pglifeguard.credentials import PasswordSource
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.doctor import Check, Finding, Inquiry, Load, Target, diagnose, error, warning
from pglifeguard.doctor.findings import EXIT_CODES
from pglifeguard.duration import parse_duration
from pglifeguard.environment import SettingsError
from pglifeguard.errors import DatabaseUnavailable
from pglifeguard.extras import not_installed
from pglifeguard.metrics import Metrics
from pglifeguard.monitor import Monitor
from pglifeguard.settings import DatabasesSettings

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pglifeguard.doctor.show import show, wide_console
    from pglifeguard.orders import LOCAL, OrderFailedError, Token, order_commands, pool_sizes
except ModuleNotFoundError as missing:
    raise not_installed(missing, "cli", __name__) from None

SettingsT = TypeVar("SettingsT", bound=DatabasesSettings)
Further = Callable[[Any], Iterable[Target]]

HELP = "Ask the databases of a service what is wrong, and give orders to one that runs."
# Twice what a pool lets a connection idle (DATABASE_POOL_IDLE_SECONDS), its warm ones excepted.
IDLE_SECONDS = 600
# Characters of a statement in a table: enough to recognise it.
QUERY_CHARACTERS = 60
# Sessions that wait for a lock, shown at most.
MAX_BLOCKED = 50


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


CloseIdle = Annotated[bool, typer.Option("--close-idle", help="Close this service's own connections idle for long.")]
IdleSeconds = Annotated[int, typer.Option(help="Seconds that count as long for --close-idle.", min=1)]
TerminateIdle = Annotated[
    float | None,
    typer.Option(
        parser=_duration,
        metavar="DURATION",
        help="End this service's own connections that idle for longer (30s, 10m, 2h), after a preview and a question.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; for scripts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as docs/doctor.md describes it.")]
Instances = Annotated[int | None, typer.Option(help="Reckon with so many instances; INSTANCES.", min=1, max=10_000)]
Surge = Annotated[int | None, typer.Option(help="Instances that a rollout adds; SURGE_INSTANCES.", min=0, max=10_000)]
Workers = Annotated[int | None, typer.Option(help="Processes of one instance; WORKERS.", min=1, max=64)]
Rate = Annotated[
    float | None,
    typer.Option(help="Requests per second to size for; with --latency-ms.", min=0.001, max=1e7),
]
LatencyMs = Annotated[
    float | None,
    typer.Option(help="Milliseconds for which a request holds its connection.", min=0.001, max=3_600_000),
]
Running = Annotated[
    list[str] | None,
    typer.Option("--url", help="An instance whose pools are compared with the settings; repeat it for several."),
]
Cores = Annotated[int | None, typer.Option(help="Cores of the database server to size for.", min=1, max=4096)]


def database_commands(
    settings_cls: type[DatabasesSettings],
    *,
    password: PasswordSource | None = None,
    further: Further | None = None,
    checks: Iterable[Check] = (),
    reach: Callable[[Any], tuple[str, str | None]] | None = None,
) -> typer.Typer:
    """Make the commands `doctor` and `connections`, which read these settings, and the orders to a running service.

    A service adds them to its own: `cli.add_typer(database_commands(Settings))`; with the function that gives its
    passwords, if it has one. `further(settings)` lists databases that the settings do not name, `checks` are the
    service's own; both are for `doctor`, see `pglifeguard.doctor`. `reach(settings)` returns the URL at which this
    machine reaches the service, and an operator's token or None: the orders ask it when they are given none.
    """

    def read(**chosen: Any) -> DatabasesSettings:
        settings = settings_cls(**chosen)
        return settings if password is None else settings.asking(password)

    # Markdown is filled to the terminal's width; otherwise the lines of this file stay lines.
    commands = typer.Typer(help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    commands.add_typer(order_commands(lambda: (LOCAL, None) if reach is None else reach(read())))

    @commands.command("doctor")
    def _doctor(  # noqa: PLR0913  # One parameter for each option.
        *,
        instances: Instances = None,
        surge: Surge = None,
        workers: Workers = None,
        rate: Rate = None,
        latency_ms: LatencyMs = None,
        cores: Cores = None,
        url: Running = None,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """Ask each database what an operator should know, and say what is wrong and what cures it.

        Changes nothing. Each login and each question has HEALTH_TIMEOUT_SECONDS. The exit code is 0 when all is well, 1
        with warnings, and 2 with errors: the service would not work so.
        """
        if (rate is None) != (latency_ms is None):
            missing, given = ("--latency-ms", "--rate") if latency_ms is None else ("--rate", "--latency-ms")
            raise typer.BadParameter(f"{given} says nothing without {missing}", param_hint=missing)
        given_sizes = {"instances": instances, "surge_instances": surge, "workers": workers}
        chosen = {name: value for name, value in given_sizes.items() if value is not None}
        load = None if (rate, latency_ms, cores) == (None, None, None) else Load(rate, latency_ms, cores)
        try:
            settings = read(**chosen)
            targets = [] if further is None else list(further(settings))
            if url and token is None and reach is not None:
                token = reach(settings)[1]
        except SettingsError as error:
            raise _refuse(str(error), as_json=as_json) from None
        # What the connections log is in the report; without a handler Python would write it to standard error.
        logging.getLogger("pglifeguard").addHandler(logging.NullHandler())
        of_instances = [_sizes_of(each, token) for each in url or ()]
        report = asyncio.run(diagnose(settings, further=targets, checks=[*checks, *of_instances], load=load))
        if as_json:
            print(json.dumps(report.as_json(), ensure_ascii=False, indent=2))  # noqa: T201  # For a pipe: no colours, no wrapping.
        else:
            show(report, wide_console())
        raise typer.Exit(report.exit_code)

    @commands.command("connections")
    def _connections(
        *,
        close_idle: CloseIdle = False,
        idle_seconds: IdleSeconds = IDLE_SECONDS,
        terminate_idle: TerminateIdle = None,
        yes: Yes = False,
    ) -> None:
        """Show the primary's connections and who blocks whom; end forgotten ones on request.

        Only connections with this service's application_name and role are ended, and none that is at work, has a
        transaction open or listens.
        """
        if terminate_idle is not None:
            if close_idle:
                raise typer.BadParameter("--close-idle and --terminate-idle are two ways to the same; give one")
            end_idle(checked(read), terminate_idle, yes=yes)
        else:
            connections(checked(read), close_idle=close_idle, idle_seconds=idle_seconds)

    return commands


def _sizes_of(url: str, token: str | None) -> Check:
    """Make a check that compares the sizes of a running instance's pools, which `resize` changes, with the settings."""

    async def sizes(inquiry: Inquiry) -> list[Finding]:
        try:
            shown, pools = await asyncio.to_thread(pool_sizes, url, token)
        except OrderFailedError as failure:
            cure = "Name an instance that runs, past the balancer, and a token for its operations routes."
            return [error("instance_not_asked", "--url", str(failure), cure)]
        return [
            warning(
                "pool_resized",
                f"{shown} {name}",
                f"The pool has pool_size {pools[name][0]} and max_overflow {pools[name][1]} there, and the settings "
                f"say {settings.pool_size} and {settings.max_overflow}.",
                "Change the settings if that size is to stay: a restart goes back to them.",
            )
            for name, settings in inquiry.settings.pools.items()
            if pools.get(name, (settings.pool_size, settings.max_overflow))
            != (settings.pool_size, settings.max_overflow)
        ]

    return sizes


def checked(read: Callable[[], SettingsT]) -> SettingsT:
    """Read the settings and check the budget; end with status 2 and a sentence when they are wrong."""
    try:
        settings = read()
        budget.check_budget(settings)
    except SettingsError as error:
        raise stop(str(error)) from None
    return settings


def stop(sentence: str) -> typer.Exit:
    """Say on standard error why a command ends; the caller raises what this returns."""
    Console(stderr=True, soft_wrap=True).print(sentence, markup=False, highlight=False)
    return typer.Exit(2)


def connections(settings: DatabasesSettings, *, close_idle: bool, idle_seconds: int) -> None:
    """Show the primary's connections, and who blocks whom; close forgotten ones on request."""
    console = wide_console()
    try:
        if close_idle:
            closed = _ask(settings, settings.primary, CLOSE_IDLE, idle_seconds, settings.primary.application_name)
            console.print(f"Closed {sum(row['closed'] for row in closed)} connections idle for {idle_seconds} s.")
        rows = _ask(settings, settings.primary, EACH, QUERY_CHARACTERS)
        pairs = _ask(settings, settings.primary, BLOCKED, MAX_BLOCKED)
    except DatabaseUnavailable as error:
        raise stop(str(error)) from None
    table = Table("pid", "role", "application", "state", "seconds", "query", title=settings.primary.location)
    for row in rows:
        texts = (escape(row[name]) for name in ("role", "application", "state"))
        table.add_row(str(row["pid"]), *texts, f"{row['seconds']:.0f}", escape(" ".join(row["query"].split())))
    console.print(table)
    if pairs:
        console.print(_blocked(pairs))


def end_idle(settings: DatabasesSettings, seconds: float, *, yes: bool) -> None:
    """Show which connections of this service idle for longer, ask, end them, and say which were ended."""
    console, primary = wide_console(), settings.primary
    try:
        idle = _ask(settings, primary, IDLE, seconds, primary.application_name)
        if not idle:
            console.print(f"No connection of {primary.application_name} has idled for more than {seconds:g} s.")
            return
        table = Table("pid", "role", "application", "client", "idle for s", title=primary.location)
        for row in idle:
            texts = (escape(row[name]) for name in ("role", "application", "client"))
            table.add_row(str(row["pid"]), *texts, f"{row['seconds']:.0f}")
        console.print(table)
        if not yes:
            if not sys.stdin.isatty():
                raise stop("Nothing was ended: there is no terminal to ask at. --yes ends them without a question.")
            if not typer.confirm(f"End {_counted(len(idle))}?"):
                raise stop("Nothing was ended.")
        wanted = [row["pid"] for row in idle]
        ended = _ask(settings, primary, END_IDLE, seconds, primary.application_name, wanted)
    except DatabaseUnavailable as error:
        raise stop(str(error)) from None
    gone = [row["pid"] for row in ended if row["ended"]]
    console.print(f"Ended {_counted(len(gone))}{': ' if gone else ''}{', '.join(map(str, gone))}.", highlight=False)
    if left := sorted(set(wanted) - set(gone)):
        said = f"Left alone, for they were at work or gone by then: {', '.join(map(str, left))}."
        console.print(said, highlight=False)


def _counted(connections: int) -> str:
    return "1 connection" if connections == 1 else f"{connections} connections"


def _refuse(sentence: str, *, as_json: bool) -> typer.Exit:
    """End `doctor` for settings that are wrong; as JSON it is a report with that finding alone."""
    if not as_json:
        return stop(sentence)
    finding = {
        "severity": "error",
        "code": "settings",
        "subject": "environment",
        "text": sentence,
        "cure": "Correct what it names; docs/settings.md has every variable.",
    }
    code = EXIT_CODES["errors"]
    nothing = {"version": 1, "status": "errors", "exit_code": code, "databases": [], "budget": [], "sizes": None}
    print(json.dumps({**nothing, "findings": [finding]}, ensure_ascii=False, indent=2))  # noqa: T201  # As above.
    return typer.Exit(code)


def _blocked(pairs: Sequence[Any]) -> Table:
    """Show each session that waits for a lock beside each that it waits for."""
    names = (
        "pid",
        "application",
        "waited s",
        "for",
        "blocked by",
        "role",
        "application",
        "state",
        "for s",
        "open s",
        "waits itself",
    )
    table = Table(*names, title="Blocked: end the one that does not wait itself, by pg_terminate_backend(blocked by)")
    for pair in pairs:
        waited, state, transaction = (
            "" if pair[name] is None else f"{pair[name]:.0f}"
            for name in ("waited_seconds", "blocker_state_seconds", "blocker_transaction_seconds")
        )
        application, lock, role, blocker = (
            escape(pair[name]) for name in ("application", "lock", "blocker_role", "blocker_application")
        )
        table.add_row(
            *(str(pair["pid"]), application, waited, lock, str(pair["blocker_pid"]), role, blocker),
            *(pair["blocker_state"], state, transaction, "yes" if pair["blocker_waits"] else "no"),
        )
    return table


def _ask(settings: DatabasesSettings, database: DatabaseSettings, sql: str, *arguments: Any) -> Sequence[Any]:
    async def ask() -> Sequence[Any]:
        # As the service does: of several hosts the primary is the one that takes writes.
        connector = Connector(database, writable=database is settings.primary)
        monitor = Monitor("cli", connector, settings, Metrics())
        try:
            seconds = database.seconds_of_a_job(settings.health_timeout_seconds)
            return await monitor.ask(sql, *arguments, timeout_seconds=seconds)
        finally:
            await monitor.close()

    return asyncio.run(ask())
