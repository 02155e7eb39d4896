"""`python -m local`: the service on an embedded primary and streaming replica, from nothing to a curl in seconds."""

import asyncio
import errno
import os
import shlex
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import asyncpg
import typer
from dotenv import dotenv_values
from rich.console import Console

from local.cluster import Cluster
from local.runs import Place, alone_in
from local.seed import seed
from local.serve import Service, environment
from local.setup import DIRECTORY, PROJECT
from local.stopping import stop_on_signals
from pglifeguard.embedded.account import EmbeddedError
from pglifeguard.embedded.postgres import Server
from pglifeguard.embedded.programs import DISK_FULL

console = Console(highlight=False, soft_wrap=True)
complaints = Console(highlight=False, soft_wrap=True, stderr=True)
SESSION = """
[bold]Lifeguard answers at {url}[/bold] after {seconds:.1f} s. Interactive documentation: {url}/docs
The pools, live: {url}/debug/pools · to see them at work, in another terminal: {load}

  curl -s {url}/patients/1
  curl -s '{url}/patients?name=Ada'
  curl -si {url}/patients -H 'content-type: application/json' \\
       -d '{{"mrn": "MRN-900001", "full_name": "Ada Example", "birth_date": "1980-05-17"}}'
  curl -s {url}/health/db
  curl -s {url}/debug/pool-stats

primary 127.0.0.1:{primary} · replica 127.0.0.1:{replica} · settings with passwords: {variables} · Ctrl-C stops all
"""
NOT_YOURS = """\
DATABASE_URL is set, and not used here: make run serves databases of its own, `python -m app serve` yours.
"""
BY_OPTION = """\
{name}={value} is set, and not used here: make {command} takes it by ARGS="--{option} {value}".
"""
PRIMARY_ENDED = """\
The primary has ended; {log} may say why.
Writes answer 503 until it is back: Ctrl-C, and `make {command}` again, starts it with its data.
"""
REPLICA_ENDED = """\
The replica has ended; {log} may say why.
The primary serves its reads until it is back: Ctrl-C, and `make {command}` again, starts it.
"""
KILLED = """\
The service was ended by {signal}; the kernel sends SIGKILL when memory is short.
`make {command}` starts it again, with its data.
"""
TOKENS = """\
The routes want a token: AUTH_SECRET or an identity provider is set. Where that secret is set, too, one is made so:

  TOKEN=$(. {variables} && .venv/bin/python -m app token --scope patients:read --scope patients:write --scope ops)
  curl -s {url}/patients/1 -H "authorization: Bearer $TOKEN"
"""


@dataclass(frozen=True)
class Options:
    """What the command line asked for; `seed` is a number of patients, 0 for none."""

    directory: Path
    service: Service
    seed: int
    keep: bool


def main(  # noqa: PLR0913  # A command line has as many parameters as options.
    *,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on.", min=1, max=65535)] = 8000,
    workers: Annotated[int, typer.Option(help="Processes of the service.", min=1, max=64)] = 1,
    reload: Annotated[bool, typer.Option("--reload", help="Start the service anew when a file is saved.")] = False,
    seed: Annotated[int, typer.Option(help="Made-up patients, and as many users, for an empty database.", min=1)] = 300,
    no_seed: Annotated[bool, typer.Option("--no-seed", help="Leave an empty database empty.")] = False,
    keep: Annotated[bool, typer.Option("--keep/--fresh", help="Keep the data of the last run, or start anew.")] = True,
    directory: Annotated[Path, typer.Option(help="Where the databases live.")] = DIRECTORY,
) -> None:
    """Serve on an embedded PostgreSQL primary and streaming replica; no Docker, no server to install."""
    if reload and workers > 1:
        raise typer.BadParameter("--reload serves with one process: leave --workers out.")
    service = Service(directory, host=host, port=port, workers=workers, reload=reload)
    options = Options(directory, service, seed=0 if no_seed else seed, keep=keep)
    try:
        with alone_in(directory.absolute()) as place:
            status = asyncio.run(_run(options, place))
    except (EmbeddedError, OSError, asyncpg.DiskFullError) as error:
        complaints.print(_sentence(error), style="red", markup=False)
        raise typer.Exit(1) from None
    raise typer.Exit(status)


async def _run(options: Options, place: Place) -> int:
    """Bring everything up, serve until told to stop, and take everything down in the opposite order."""
    stop_on_signals()
    started = time.monotonic()
    cluster: Cluster | None = None
    try:
        await options.service.take_port()
        guarded = await options.service.check_settings()
        _tell_unused(options.service)
        with console.status("Starting") as status:

            def progress(step: str) -> None:
                status.update(step)
                console.print(f"[dim]{time.monotonic() - started:5.1f} s  {step} …[/dim]")

            if not options.keep:
                progress("Removing the data of earlier runs")
                earlier = Cluster(options.directory)
                await earlier.end_leftovers()
                earlier.remove()
            # People keep this data and measure writes on it: both want what production has, fsync.
            cluster = Cluster(options.directory, durable=True)
            await cluster.start(progress)
            progress("Migrating")
            await cluster.migrate()
            if options.seed and await seed(cluster.url("app_rw"), options.seed):
                progress(f"Seeded {options.seed} rows of each table")
            progress("Starting the service")
            variables = _write_variables(options.directory, environment(cluster) | options.service.place)
            await options.service.start(environment(cluster))
        place.keep()
        console.print(
            SESSION.format(
                url=options.service.url,
                seconds=time.monotonic() - started,
                primary=cluster.primary.port,
                replica=cluster.replica.port,
                variables=variables,
                load=_load(options.directory),
            )
        )
        if guarded:
            console.print(TOKENS.format(url=options.service.url, variables=shlex.quote(str(variables))), markup=False)
        if options.service.reload:
            console.print(
                "A file that is saved in app/ or pglifeguard/ starts the service anew; the databases stay up.\n"
                "While one does not import, its traceback stands below, and requests wait until it is mended.\n"
            )
        return await _wait(options.service, cluster)
    except asyncio.CancelledError:
        console.print("Stopping the service, the replica and the primary …")
        return 0
    finally:
        with console.status("Stopping"):
            await options.service.stop()
            if cluster is not None:
                await cluster.stop()


def _tell_unused(service: Service) -> None:
    """Name the settings that are for `python -m app serve` alone, so that nobody waits for what they say."""
    said = dotenv_values(PROJECT / ".env") | os.environ
    if "DATABASE_URL" in said:
        complaints.print(NOT_YOURS, style="yellow", markup=False, end="")
    taken = {"host": service.host, "port": service.port}
    if not service.reload:  # Which serves with one process.
        taken["workers"] = service.workers
    for option, chosen in taken.items():
        if (value := said.get(option.upper())) is not None and value != str(chosen):
            command = "dev" if service.reload else "run"
            sentence = BY_OPTION.format(name=option.upper(), option=option, value=value, command=command)
            complaints.print(sentence, style="yellow", markup=False, end="")


async def _wait(service: Service, cluster: Cluster) -> int:
    """Wait until the service ends by itself, say what ends meanwhile, and return its exit status as a shell does."""
    command = "dev" if service.reload else "run"
    servers = {PRIMARY_ENDED: cluster.primary, REPLICA_ENDED: cluster.replica}
    watching = [asyncio.create_task(_tell_end(server, words, command)) for words, server in servers.items()]
    try:
        status = await service.wait()
    finally:
        for watch in watching:
            watch.cancel()
    if status >= 0:
        return status
    told = KILLED.format(signal=signal.Signals(-status).name, command=command)
    complaints.print(told, style="red", markup=False, end="")
    return 128 - status


async def _tell_end(server: Server, sentences: str, command: str) -> None:
    """Say it when a server ends: the service knows only that it gets no answer."""
    await server.ended()
    complaints.print(sentences.format(log=server.log, command=command), style="red", markup=False, end="")


def _sentence(error: Exception) -> str:
    if isinstance(error, asyncpg.DiskFullError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return DISK_FULL
    return str(error) or f"{type(error).__name__} in what the databases were asked; their logs are in .local/."


def _load(directory: Path) -> str:
    """Return the command that loads the service of this directory."""
    return "make load" if directory == DIRECTORY else f'make load ARGS="--directory {shlex.quote(str(directory))}"'


def _write_variables(directory: Path, variables: dict[str, str]) -> Path:
    """Write what the service was given where a person can source it, for that person alone."""
    path = directory / "env"
    path.touch(mode=0o600)
    path.write_text("".join(f"export {name}={value}\n" for name, value in variables.items()), encoding="utf-8")
    return path


if __name__ == "__main__":
    typer.run(main)
