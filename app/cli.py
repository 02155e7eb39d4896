"""The commands `python -m app serve | doctor | connections | token | pause | resume | drain | resize | new-domain`."""

import errno
import getpass
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

import app
import pglifeguard
from app.logs import log_config, wants_json
from app.security import SUBJECT, is_subject, issue_token, scopes_of
from app.settings import Settings
from migrations.doctor import changed_role_settings, migration_targets, pending_migrations
from pglifeguard import serving
from pglifeguard.cli import checked, database_commands, stop

HELP = "Serve, ask the databases what is wrong, and give orders to a service that runs."
# Markdown is filled to the terminal's width; otherwise the lines of this file stay lines.
cli = typer.Typer(help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
HostOption = Annotated[str | None, typer.Option(help="Address to listen on; HOST.")]
PortOption = Annotated[int | None, typer.Option(help="Port to listen on; PORT.", min=0, max=65_535)]
WorkersOption = Annotated[int | None, typer.Option(help="Processes; WORKERS. One for each container.", min=1)]
ReloadOption = Annotated[
    bool, typer.Option("--reload", help="Start anew when a file of the code is saved; for development.")
]
# After `new-domain`: the files are served by `make dev` at once, and their table is not there yet.
NEXT = (
    "Next, its table: `make run` and `make dev` make it when they start; while one of them runs, in another terminal: "
    "`. .local/env && .venv/bin/python -m migrations`"
)
# What --reload watches: the service and the library beside it.
CODE = [str(Path(package).parent) for package in (app.__file__, pglifeguard.__file__)]


def _reach(settings: Settings) -> tuple[str, str | None]:
    """Return where this machine reaches the service, and a token for one order, in the name of who is logged in."""
    scheme = "http" if settings.tls_certificate is None else "https"
    host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host  # noqa: S104  # It is compared only.
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}"
    if settings.auth_secret is None:
        return url, None
    return url, _signed(settings, subject=_account(), scopes=["ops"], lifetime=timedelta(minutes=5))


def _signed(settings: Settings, *, subject: str, scopes: list[str], lifetime: timedelta) -> str:
    return issue_token(
        settings.auth_secrets[0],
        subject=subject,
        scopes=scopes,
        lifetime=lifetime,
        issuer=settings.auth_issuer,
        audience=settings.auth_audience,
        scope_claim=settings.auth_scope_claim,
    )


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container runs under a number that has no name.
        return "operator"


def _cannot_listen(host: str, port: int) -> str | None:
    """Return why nobody can listen there, before databases are opened for it; None if somebody can."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        return str(error.strerror)
    failures: list[OSError] = []
    for family, _, _, _, address in found:
        try:
            with socket.create_server(address[:2], family=family):
                pass
        except OSError as error:
            failures.append(error)
    # A machine without IPv6 has only one of the two addresses of `localhost`.
    telling = [e for e in failures if len(failures) == len(found) or e.errno in {errno.EADDRINUSE, errno.EACCES}]
    return os.strerror(telling[0].errno or 0) if telling else None


cli.add_typer(
    database_commands(
        Settings, further=migration_targets, checks=[pending_migrations, changed_role_settings], reach=_reach
    )
)


@cli.command()
def serve(
    *, host: HostOption = None, port: PortOption = None, workers: WorkersOption = None, reload: ReloadOption = False
) -> None:
    """Serve HTTP until SIGTERM or Ctrl-C; requests in flight are finished first."""
    for name, value in (("HOST", host), ("PORT", port), ("WORKERS", workers)):
        if value is not None:
            # Worker processes read the environment too, and the budget counts them.
            os.environ[name] = str(value)
    settings = checked(Settings)
    if reload and settings.workers > 1:
        raise stop(f"--reload serves with one process, and WORKERS is {settings.workers}: take one of the two.")
    if (reason := _cannot_listen(settings.host, settings.port)) is not None:
        raise stop(
            f"HOST is {settings.host} and PORT {settings.port}: the service cannot listen there: {reason}. Stop what "
            "listens there, or choose another place by --host and --port, or by these variables."
        )
    as_json = wants_json(settings.log_format)
    serving.serve(
        "app.main:create_app",
        settings,
        host=settings.host,
        port=settings.port,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        forwarded_allow_ips=settings.trusted_proxies,
        access_log=settings.access_log,
        reload=reload,
        reload_dirs=CODE if reload else None,
        log_config=log_config(settings.log_level, as_json=as_json, access_log=settings.access_log),
    )


@cli.command()
def token(
    scope: Annotated[list[str], typer.Option(help="Such as patients:read, users:write or ops; repeat it for several.")],
    subject: Annotated[str, typer.Option(help="Whom it is for.")] = "operator",
    hours: Annotated[float, typer.Option(help="How long it is valid.", min=0.01, max=8760)] = 8,
) -> None:
    """Print a bearer token signed with AUTH_SECRET."""
    settings = checked(Settings)
    if not settings.guarded:
        raise stop(
            "Set AUTH_SECRET to the one of the service, which signs its tokens. A service that has none needs no token."
        )
    if settings.auth_secret is None:
        raise stop("AUTH_SECRET is not set: the identity provider alone gives tokens.")
    if not is_subject(subject):
        raise stop(f"--subject is not {SUBJECT}: the service would refuse the token.")
    from app.main import create_app  # noqa: PLC0415  # The other commands need no routes.

    known = scopes_of(create_app(settings))
    if wrong := set(scope) - set(known):
        raise stop(f"There is no scope {', '.join(sorted(wrong))}; choose from {', '.join(known)}.")
    print(_signed(settings, subject=subject, scopes=scope, lifetime=timedelta(hours=hours)))  # noqa: T201  # For a pipe: no colours, no wrapping.


@cli.command("new-domain")
def new_domain(
    name: Annotated[str, typer.Argument(help="Its folder, its table and its path: a plural, as in `appointments`.")],
    singular: Annotated[str | None, typer.Option(help="What one of them is called, if not NAME without its s.")] = None,
) -> None:
    """Make a domain to begin with: app/NAME, tests/app/NAME and a migration; app/main.py names it."""
    try:
        from local.new_domain import ROOT, Refused, make, singular_of  # noqa: PLC0415  # The image holds the service alone.
    except ModuleNotFoundError:
        raise stop("A domain is made in the project's tree, and here is the service alone.") from None
    try:
        made = make(name, singular, root=ROOT)
    except Refused as refusal:
        raise stop(f"{refusal} Nothing was changed.") from None
    print(*made, sep="\n")  # noqa: T201  # For a pipe.
    if singular is None:
        typer.echo(f"One of them is called {singular_of(name)}; --singular says another.", err=True)
    typer.echo(NEXT, err=True)
