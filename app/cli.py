"""The operator's commands: `python -m app serve | doctor | connections | token`."""

import asyncio
import os
import resource
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Annotated, Any, cast, get_args

import typer
import uvicorn
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.db import budget
from app.db.activity import BLOCKED, CAPACITY, CLOSE_IDLE, EACH
from app.db.connector import Connector
from app.db.sentinel import Sentinel
from app.errors import DatabaseUnavailable
from app.logs import log_config, wants_json
from app.metrics import Metrics
from app.ops.protocol import LimitedProtocol
from app.ops.workers import shared_figures
from app.security import Scope, issue_token
from app.settings import DatabaseSettings, Settings, SettingsError, load_settings

cli = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()

HostOption = Annotated[str | None, typer.Option(help="Address to listen on; HOST.")]
PortOption = Annotated[int | None, typer.Option(help="Port to listen on; PORT.", min=0, max=65_535)]
WorkersOption = Annotated[int | None, typer.Option(help="Processes; WORKERS. One for each container.", min=1)]

# Twice what a pool lets a connection idle (DATABASE_POOL_IDLE_SECONDS), its warm ones excepted.
IDLE_SECONDS = 600
# Characters of a statement in a table: enough to recognise it.
QUERY_CHARACTERS = 60
# Sessions that wait for a lock, shown at most.
MAX_BLOCKED = 50
# A worker answers its parent once it has imported the service, and is replaced if it does not. On a busy machine none
# would get through within uvicorn's own 5 s.
WORKER_ANSWERS_SECONDS = 60


@cli.command()
def serve(host: HostOption = None, port: PortOption = None, workers: WorkersOption = None) -> None:
    """Serve HTTP until SIGTERM or Ctrl-C; requests in flight are finished first."""
    for name, value in (("HOST", host), ("PORT", port), ("WORKERS", workers)):
        if value is not None:
            # Worker processes read the environment too, and the budget counts them.
            os.environ[name] = str(value)
    settings = _settings()
    as_json = wants_json(settings.log_format)
    # The usual soft limit, 1,024, is a few hundred clients away from a pool that cannot open a connection any more.
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    with shared_figures() if settings.workers > 1 else nullcontext():
        uvicorn.run(
            "app.main:create_app",
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            loop="uvloop",
            http=LimitedProtocol,
            lifespan="on",
            proxy_headers=True,
            forwarded_allow_ips=settings.trusted_proxies,
            # Longer than any statement, so that none in flight is cut; the pools are drained after that.
            timeout_graceful_shutdown=settings.graceful_timeout_seconds,
            timeout_worker_healthcheck=WORKER_ANSWERS_SECONDS,
            access_log=settings.access_log,
            server_header=False,
            log_config=log_config(settings.log_level, as_json=as_json, access_log=settings.access_log),
        )


@cli.command()
def doctor() -> None:
    """Check the settings, reach each database, and do the arithmetic of connections."""
    settings = _settings()
    table = Table("database", "at", "status", "first answer", "pool", "max_connections", title="Databases")
    ok = True
    servers, warnings = budget.by_server(settings), dict[str, str]()
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
        if granted is not None and (sentence := budget.over_budget(settings, servers[database.server], granted)):
            # Behind a pooler it is the pooler's business, so this warns and does not fail.
            warnings[database.server] = sentence
    console.print(table)
    for server, sentence in warnings.items():
        console.print(f"[yellow]Too many for max_connections of {escape(server)}:[/yellow] {escape(sentence)}")
    total = budget.connections_of(settings, [database for _, database in settings.databases])
    console.print(
        f"All pools: {settings.workers} workers x {settings.instances} instances = at most {total} connections."
    )
    console.print(_sizing(os.cpu_count() or 1), _presets())
    for sentence in settings.ignored_variables:
        console.print(f"[yellow]{escape(sentence)}[/yellow]")
    if not ok:
        raise typer.Exit(1)


@cli.command()
def connections(
    *,
    close_idle: Annotated[bool, typer.Option(help="Close this service's own connections idle for long.")] = False,
    idle_seconds: Annotated[int, typer.Option(help="Seconds that count as long.", min=1)] = IDLE_SECONDS,
) -> None:
    """Show the primary's connections, and who blocks whom; close forgotten ones on request."""
    settings = _settings()
    try:
        if close_idle:
            closed = _ask(settings, settings.primary, CLOSE_IDLE, idle_seconds, settings.primary.application_name)
            console.print(f"Closed {sum(row['closed'] for row in closed)} connections idle for {idle_seconds} s.")
        rows = _ask(settings, settings.primary, EACH, QUERY_CHARACTERS)
        pairs = _ask(settings, settings.primary, BLOCKED, MAX_BLOCKED)
    except DatabaseUnavailable as error:
        raise _stop(str(error)) from None
    table = Table("pid", "role", "application", "state", "seconds", "query", title=settings.primary.location)
    for row in rows:
        texts = (escape(row[name]) for name in ("role", "application", "state"))
        table.add_row(str(row["pid"]), *texts, f"{row['seconds']:.0f}", escape(" ".join(row["query"].split())))
    console.print(table)
    if pairs:
        console.print(_blocked(pairs))


@cli.command()
def token(
    scope: Annotated[list[str], typer.Option(help="read, write or ops; repeat it for several.")],
    subject: Annotated[str, typer.Option(help="Whom it is for.")] = "operator",
    hours: Annotated[float, typer.Option(help="How long it is valid.", min=0.01, max=8760)] = 8,
) -> None:
    """Print a bearer token signed with AUTH_SECRET."""
    settings = _settings()
    if settings.auth_secret is None:
        raise _stop("AUTH_SECRET is not set: the routes are open and need no token.")
    if wrong := set(scope) - set(get_args(Scope)):
        raise _stop(f"There is no scope {', '.join(sorted(wrong))}; choose from {', '.join(get_args(Scope))}.")
    scopes = cast("list[Scope]", scope)
    print(issue_token(settings.auth_secret, subject=subject, scopes=scopes, lifetime=timedelta(hours=hours)))  # noqa: T201  # For a pipe: no colours, no wrapping.


def _settings() -> Settings:
    try:
        settings = load_settings()
        budget.check_budget(settings)
    except SettingsError as error:
        raise _stop(str(error)) from None
    return settings


def _stop(sentence: str) -> typer.Exit:
    Console(stderr=True, soft_wrap=True).print(sentence, markup=False, highlight=False)
    return typer.Exit(2)


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


def _ask(settings: Settings, database: DatabaseSettings, sql: str, *arguments: Any) -> Sequence[Any]:
    async def ask() -> Sequence[Any]:
        # As the service does: of several hosts the primary is the one that takes writes.
        connector = Connector(database, writable=database is settings.primary)
        sentinel = Sentinel("cli", connector, settings, Metrics())
        try:
            return await sentinel.ask(sql, *arguments, timeout_seconds=settings.health_timeout_seconds)
        finally:
            await sentinel.close()

    return asyncio.run(ask())
