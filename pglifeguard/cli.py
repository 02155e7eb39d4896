"""The operator's commands for a service's databases: `python -m pglifeguard doctor | connections`."""

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pglifeguard import budget
from pglifeguard.activity import BLOCKED, CAPACITY, CLOSE_IDLE, EACH
from pglifeguard.connector import Connector
from pglifeguard.credentials import PasswordSource
from pglifeguard.environment import SettingsError
from pglifeguard.errors import DatabaseUnavailable
from pglifeguard.metrics import Metrics
from pglifeguard.monitor import Monitor
from pglifeguard.settings import DatabaseSettings, DatabasesSettings

SettingsT = TypeVar("SettingsT", bound=DatabasesSettings)
console = Console()

# Twice what a pool lets a connection idle (DATABASE_POOL_IDLE_SECONDS), its warm ones excepted.
IDLE_SECONDS = 600
# Characters of a statement in a table: enough to recognise it.
QUERY_CHARACTERS = 60
# Sessions that wait for a lock, shown at most.
MAX_BLOCKED = 50
CloseIdle = Annotated[bool, typer.Option(help="Close this service's own connections idle for long.")]
IdleSeconds = Annotated[int, typer.Option(help="Seconds that count as long.", min=1)]


def database_commands(settings_cls: type[DatabasesSettings], *, password: PasswordSource | None = None) -> typer.Typer:
    """Make the commands `doctor` and `connections`, which read these settings.

    A service adds them to its own: `cli.add_typer(database_commands(Settings))`; with the function that gives its
    passwords, if it has one.
    """

    def read() -> DatabasesSettings:
        settings = checked(settings_cls)
        try:
            return settings if password is None else settings.asking(password)
        except SettingsError as error:
            raise stop(str(error)) from None

    commands = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

    @commands.command("doctor")
    def _doctor() -> None:
        """Check the settings, reach each database, and do the arithmetic of connections."""
        doctor(read())

    @commands.command("connections")
    def _connections(*, close_idle: CloseIdle = False, idle_seconds: IdleSeconds = IDLE_SECONDS) -> None:
        """Show the primary's connections and who blocks whom; close forgotten ones on request."""
        connections(read(), close_idle=close_idle, idle_seconds=idle_seconds)

    return commands


def checked(settings_cls: type[SettingsT]) -> SettingsT:
    """Read the settings and check the budget; end with status 2 and a sentence when they are wrong."""
    try:
        settings = settings_cls()
        budget.check_budget(settings)
    except SettingsError as error:
        raise stop(str(error)) from None
    return settings


def stop(sentence: str) -> typer.Exit:
    """Say on standard error why a command ends; the caller raises what this returns."""
    Console(stderr=True, soft_wrap=True).print(sentence, markup=False, highlight=False)
    return typer.Exit(2)


def doctor(settings: DatabasesSettings) -> None:
    """Check the settings, reach each database, and do the arithmetic of connections."""
    table = Table("database", "at", "status", "first answer", "pool", "max_connections", title="Databases")
    ok = True
    demands, warnings = {each.server: each for each in budget.demands(settings)}, dict[str, str]()
    for prefix, database in settings.databases:
        started, granted = time.perf_counter(), None
        try:
            (said,) = _ask(settings, database, CAPACITY)
        except DatabaseUnavailable as error:
            ok = False
            status, latency, limit = f"[red]{escape(str(error))}[/red]", "", ""
        else:
            granted, latency = said["granted"], f"{(time.perf_counter() - started) * 1000:.0f} ms"
            status, limit = "[green]healthy[/green]", str(granted)
            if database is settings.primary and said["read_only"]:
                # A standby, a server that was demoted, or a role that may only read.
                ok, status = False, "[red]The server takes no writes.[/red]"
        pool = f"{database.pool_size} + {database.max_overflow}"
        table.add_row(f"{prefix}URL", escape(database.location), status, latency, pool, limit)
        if granted is not None and (sentence := demands[database.server].exceeds(granted, settings.connection_reserve)):
            # Behind a pooler it is the pooler's business, so this warns and does not fail.
            warnings[database.server] = sentence
    console.print(table)
    for server, sentence in warnings.items():
        console.print(f"[yellow]Too many for max_connections of {escape(server)}:[/yellow] {escape(sentence)}")
    for demand in demands.values():
        console.print(f"{demand.server}: {demand.arithmetic} = at most {demand.wanted} connections.")
    console.print(_sizing(os.cpu_count() or 1), _presets())
    for sentence in settings.ignored_variables:
        console.print(f"[yellow]{escape(sentence)}[/yellow]")
    if not ok:
        raise typer.Exit(1)


def connections(settings: DatabasesSettings, *, close_idle: bool, idle_seconds: int) -> None:
    """Show the primary's connections, and who blocks whom; close forgotten ones on request."""
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
        "",
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
            *(pair["blocker_state"], state, transaction, "waits itself" if pair["blocker_waits"] else ""),
        )
    return table


def _sizing(cores: int) -> Table:
    sizes = Table("rule", "8 cores", "this machine", title="Sizing, connections on the server")
    for rule, by in (("cores x 2 + 1", budget.by_cores), ("cores x 2 + 4", budget.for_production)):
        sizes.add_row(rule, str(by(8)), str(by(cores)))
    sizes.add_row("500/s x 10 ms x 1.2", str(budget.by_load(500, 0.010)), "")
    sizes.add_row("2,000/s x 5 ms x 1.2", str(budget.by_load(2000, 0.005)), "")
    return sizes


def _presets() -> Table:
    presets = Table("preset", "pool_size", "max_overflow", title="Presets, per process")
    for preset in budget.PRESETS:
        presets.add_row(preset.name, str(preset.pool_size), str(preset.max_overflow))
    return presets


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
