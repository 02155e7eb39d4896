"""`python -m app …`, from the outside where a process is the point, else through Typer's own runner."""

import asyncio
import errno
import functools
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import jwt
import pytest
import uvicorn
from sqlalchemy.engine import make_url
from typer.testing import CliRunner, Result, _NamedTextIOWrapper

from app.cli import _cannot_listen, cli
from local import new_domain
from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.serving.protocol import LimitedProtocol
from tests.conftest import Database

ROOT = Path(__file__).parents[2]
SECRET = "0123456789abcdef0123456789abcdef"
# Long, for a machine that is busy: whoever is ready is not waited for.
START_SECONDS = 60
NAME = "told-apart"
# A single process of uvicorn sends itself the signal again once it has ended in good order.
ENDED = {0, -signal.SIGTERM}
MODULE = ("-m", "app", "serve")
FACTORY = ("-m", "uvicorn", "--factory", "app.main:create_app")


@dataclass
class Process:
    """A server as a process of its own."""

    url: str
    client: httpx.AsyncClient
    process: asyncio.subprocess.Process
    log: Path

    async def stop(self) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 15)


@asynccontextmanager
async def served(
    directory: Path,
    environment: dict[str, str],
    *arguments: str,
    path: str = "/health/ready",
    verify: ssl.SSLContext | None = None,
    port: int | None = None,
) -> AsyncIterator[Process]:
    """Run `python …` with a port, wait until it is ready, or `path` succeeds, and make sure that it ends.

    With `verify` it is asked by HTTPS.
    """
    port, log = free_port() if port is None else port, directory / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, "--port", str(port),
            env=os.environ | environment | {"DATABASE_APPLICATION_NAME": NAME}, stdout=output, stderr=output,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}" if verify is None else f"https://localhost:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=10, trust_env=False, verify=verify or False) as client:

        async def ready_or_ended() -> bool:
            try:
                return (await client.get(path)).is_success
            except httpx.TransportError:
                return process.returncode is not None

        try:
            ready = await eventually(ready_or_ended, START_SECONDS)
            assert ready, log.read_text(encoding="utf-8")
            assert process.returncode is None, log.read_text(encoding="utf-8")
            yield Process(url, client, process, log)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def sessions(database: Database) -> int:
    """Count the sessions that a served process holds."""
    connection = await asyncpg.connect(database.url("postgres"))
    try:
        return int(await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", NAME))
    finally:
        await connection.close()


async def run(*arguments: str, **environment: str) -> Result:
    """Run a command in a thread, for it has an event loop of its own."""
    return await asyncio.to_thread(CliRunner().invoke, cli, arguments, env=environment | {"COLUMNS": "200"})


async def test_serve_refuses_to_reload_several_processes() -> None:
    """Otherwise uvicorn would quietly serve with one process, and the budget was counted for three."""
    result = await run("serve", "--reload", "--workers", "3", DATABASE_URL="postgresql://a@b/c", WORKERS="1")

    assert result.exit_code == 2
    assert "--reload serves with one process, and WORKERS is 3: take one of the two." in result.stderr


@pytest.mark.parametrize(
    ("host", "reason"),
    [("127.0.0.1", os.strerror(errno.EADDRINUSE)), ("192.0.2.1", os.strerror(errno.EADDRNOTAVAIL)), ("no.invalid", "")],
)
async def test_serve_says_why_it_cannot_listen(host: str, reason: str) -> None:
    """A port that is taken, an address of another machine and a name that nobody knows are a sentence at once."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = await run("serve", DATABASE_URL="postgresql://a@b/c", HOST=host, PORT=str(port), WORKERS="1")

    assert result.exit_code == 2
    assert f"HOST is {host} and PORT {port}: the service cannot listen there: {reason}" in result.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", ""])  # noqa: S104  # For a moment.
def test_place_that_can_be_listened_at(host: str) -> None:
    """What asyncio listens at is not refused; the port is free again afterwards."""
    port = free_port()

    assert _cannot_listen(host, port) is None
    assert _cannot_listen(host, port) is None


async def test_serve_finishes_what_is_in_flight_on_sigterm(database: Database, tmp_path: Path) -> None:
    """A request that waits for a lock when SIGTERM comes is answered; then no session is left on the server."""
    blocker = await asyncpg.connect(database.url("postgres"))
    only_primary = {"DATABASE_URL": database.url()}
    async with served(tmp_path, only_primary, *MODULE) as server:
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("LOCK TABLE patients")
        slow = asyncio.create_task(server.client.get("/patients/1"))

        async def waits() -> bool:
            asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND wait_event_type = 'Lock'"
            return bool(await blocker.fetchval(asked, NAME))

        assert await eventually(waits, 5)
        server.process.send_signal(signal.SIGTERM)

        async def refuses() -> bool:
            async with httpx.AsyncClient(trust_env=False) as client:
                try:
                    await client.get(f"{server.url}/health/live")
                except httpx.ConnectError:
                    return True
                except (httpx.ReadError, httpx.RemoteProtocolError):
                    return False  # It stood in the listener's queue when that was closed; the next one is refused.
                return False

        assert await eventually(refuses, 5)
        await transaction.rollback()
        answer = await slow

        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
        assert await asyncio.wait_for(server.process.wait(), 15) in ENDED
    await blocker.close()
    assert await sessions(database) == 0


async def test_serve_tells_nothing_about_itself(database: Database, tmp_path: Path) -> None:
    """There is no Server header, no access log by default, and log lines are JSON when nobody looks."""
    async with served(tmp_path, database.environment(), *MODULE) as server:
        answer = await server.client.get("/patients")

        assert answer.status_code == 200
        assert "server" not in answer.headers
        assert await server.stop() in ENDED
        lines = server.log.read_text(encoding="utf-8").splitlines()
        assert all(line.startswith("{") for line in lines), lines
        assert not [line for line in lines if "GET /patients" in line]


async def test_access_log_can_be_had(database: Database, tmp_path: Path) -> None:
    """ACCESS_LOG=true writes a line for each request."""
    async with served(tmp_path, database.environment() | {"ACCESS_LOG": "true"}, *MODULE) as server:
        await server.client.get("/patients")
        await server.stop()

        assert "GET /patients" in server.log.read_text(encoding="utf-8")


async def test_workers_share_a_port_and_end_together(database: Database, tmp_path: Path) -> None:
    """Two workers serve, and SIGTERM to their parent leaves neither process nor session."""
    async with served(tmp_path, database.environment(), *MODULE, "--workers", "2") as server:
        started = server.log.read_text(encoding="utf-8").count("Started server process")

        assert started >= 1
        assert (await server.client.get("/patients")).status_code == 200
        assert await server.stop() == 0
    assert await sessions(database) == 0


async def test_worker_may_take_its_time_to_start(database: Database, tmp_path: Path) -> None:
    """On a machine on which importing takes longer than uvicorn waits by itself, workers start all the same."""
    slow = "import sys, time\nif '--multiprocessing-fork' in sys.argv:\n    time.sleep(7)\n"
    (tmp_path / "sitecustomize.py").write_text(slow, encoding="utf-8")
    environment = database.environment() | {"PYTHONPATH": str(tmp_path)}

    async with served(tmp_path, environment, *MODULE, "--workers", "2") as server:
        assert (await server.client.get("/patients")).status_code == 200
        assert "died" not in server.log.read_text(encoding="utf-8")
        assert await server.stop() == 0


async def test_uvicorn_serves_the_factory(database: Database, tmp_path: Path) -> None:
    """`uvicorn --factory app.main:create_app` works with a plain DATABASE_URL and nothing else."""
    async with served(tmp_path, {"DATABASE_URL": database.url()}, *FACTORY) as server:
        answer = await server.client.post(
            "/patients", json={"mrn": "A-1", "full_name": "Ada", "birth_date": "1980-01-01"}
        )

        assert answer.status_code == 201


@pytest.mark.parametrize("arguments", [MODULE, FACTORY])
def test_wrong_settings_end_the_start_with_a_sentence(arguments: tuple[str, ...]) -> None:
    """A mistake in the environment is a sentence and a status, no traceback."""
    environment = os.environ | {"DATABASE_URL": "mysql://x/y"}

    ended = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=20, check=False
    )

    assert ended.returncode != 0
    assert "DATABASE_URL: has the scheme 'mysql'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_serve_gives_uvicorn_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies are believed by address only, and the graceful timeout is longer than any statement."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: given.update(options, app=app))
    port = free_port()
    for name, value in {"HOST": "127.0.0.1", "PORT": "1", "WORKERS": "1"}.items():
        monkeypatch.setenv(name, value)  # Restored afterwards: the command sets them for its workers.
    environment = {
        "DATABASE_URL": "postgresql://a@b/c",
        "TRUSTED_PROXIES": "10.0.0.1",
        "STATEMENT_TIMEOUT_SECONDS": "5",
    }

    result = CliRunner().invoke(cli, ["serve", "--port", str(port), "--workers", "3"], env=environment)

    assert result.exit_code == 0, result.output
    assert (given["app"], given["factory"]) == ("app.main:create_app", True)
    assert (given["port"], given["workers"], given["host"]) == (port, 3, "127.0.0.1")
    assert (given["loop"], given["http"], given["lifespan"]) == ("uvloop", LimitedProtocol, "on")
    assert (given["forwarded_allow_ips"], given["access_log"]) == ("10.0.0.1", False)
    assert given["timeout_graceful_shutdown"] > 5


async def test_doctor_reaches_every_database(database: Database) -> None:
    """Each database is named with its place and state; the arithmetic and the formulas are shown."""
    result = await run("doctor", **database.environment())

    assert result.exit_code == 1, result.output  # The servers of the tests do without fsync, and it says so.
    for expected in ("DATABASE_URL", "DATABASE_REPLICA_URL", "DATABASE_ANALYTICS_URL", "background worker"):
        assert expected in result.output
    assert result.output.count("answers") == 4
    assert "1 workers x 1 instances x (10 + 5 + 1) + 1 for migrations" in result.output
    assert "1 workers x 1 instances x ((10 + 5 + 1) + (2 + 2 + 1))" in result.output
    assert not [password for password in database.cluster.passwords.values() if password in result.output]


async def test_doctor_warns_of_more_than_the_server_takes(database: Database) -> None:
    """Three instances of fifty meet a server of one hundred: the arithmetic is shown before it happens."""
    sizes = {"DATABASE_POOL_SIZE": "40", "DATABASE_MAX_OVERFLOW": "10", "INSTANCES": "3"}

    calm = await run("doctor", DATABASE_URL=database.url())
    result = await run("doctor", DATABASE_URL=database.url(), **sizes)

    assert "Too many" not in calm.output
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert "Too many for max_connections" in said
    assert (
        "1 workers x 3 instances x ((40 + 10 + 1) + (2 + 2 + 1)) + 1 for migrations = 169 connections > 100 - 3" in said
    )


async def test_platforms_variables_are_told_once(database: Database, tmp_path: Path) -> None:
    """What looks like a setting and is none is a line of the service's log, and of what doctor says."""
    environment = database.environment() | {"DATABASE_SERVICE_HOST": "10.0.0.1"}
    sentence = "DATABASE_SERVICE_HOST is not a setting of this service."

    examined = await run("doctor", **environment)
    async with served(tmp_path, environment, *MODULE) as server:
        log = server.log.read_text(encoding="utf-8")

    assert examined.exit_code == 1, examined.output
    assert " ".join(examined.output.split()).count(sentence) == 1
    assert log.count(sentence) == 1


async def test_doctor_fails_when_a_database_does_not_answer(database: Database) -> None:
    """A database that is down is said, and is the exit status; the others are examined all the same."""
    down = f"postgresql://a:hunter2@127.0.0.1:{free_port()}/x"

    result = await run("doctor", DATABASE_URL=database.url(), DATABASE_REPLICA_URL=down)

    assert result.exit_code == 2
    assert "error DATABASE_REPLICA_URL, DATABASE_ANALYTICS_URL: The database cannot be reached" in result.output
    assert result.output.count("does not answer") == 2
    assert " primary " in result.output
    assert "hunter2" not in result.output


async def test_doctor_fails_when_the_primary_takes_no_writes(database: Database) -> None:
    """A standby answers every question, and no write of the service would succeed there."""
    result = await run("doctor", DATABASE_URL=database.replica_url("app_rw"))

    assert result.exit_code == 2
    assert "takes no writes: it is a standby" in result.output


@pytest.mark.parametrize("command", ["doctor", "connections"])
async def test_of_several_hosts_the_primary_is_asked(database: Database, command: str) -> None:
    """The standby comes first in the URL, and is passed by as the service passes it by."""
    standby, primary = (make_url(url) for url in (database.replica_url("app_rw"), database.url()))
    hosts = f"{standby.host}:{standby.port},{primary.host}:{primary.port}"
    url = database.url().replace(f"{primary.host}:{primary.port}", hosts)
    here = await asyncpg.connect(database.url(), server_settings={"application_name": "on-the-primary"})

    result = await run(command, DATABASE_URL=url)
    await here.close()

    assert result.exit_code == (1 if command == "doctor" else 0), result.output
    assert "no writes" not in result.output
    if command == "connections":
        assert "on-the-primary" in result.output


async def test_connections_are_listed_and_closed_when_idle(database: Database) -> None:
    """The list shows who is there; --close-idle ends this service's own sessions that idle, and no others."""
    mine = await asyncpg.connect(database.url(), server_settings={"application_name": NAME})
    other = await asyncpg.connect(database.url(), server_settings={"application_name": "another"})
    await mine.execute("SELECT 'forgotten'")
    environment = {"DATABASE_URL": database.url(), "DATABASE_APPLICATION_NAME": NAME}

    async def idle_for_a_second() -> bool:
        asked = "SELECT bool_and(state_change < clock_timestamp() - interval '1.1 s') FROM pg_stat_activity "
        return bool(await other.fetchval(asked + "WHERE application_name = $1", NAME))

    listed = await run("connections", **environment)
    assert await eventually(idle_for_a_second, 5)
    closing = await run("connections", "--close-idle", "--idle-seconds", "1", **environment)

    assert listed.exit_code == 0, listed.output
    assert NAME in listed.output
    assert "forgotten" in listed.output
    assert "Closed 1 connections idle for 1 s." in closing.output
    assert await other.fetchval("SELECT 1") == 1

    async def gone() -> bool:
        return mine.is_closed()

    assert await eventually(gone, 5)
    await other.close()


async def test_idle_connections_are_ended_after_a_question(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preview, a question, and what was ended; not those of others, in a transaction, at work or listening."""
    connect = functools.partial(asyncpg.connect, server_settings={"application_name": NAME})
    mine, working, listening = [await connect(database.url()) for _ in range(3)]
    other = await asyncpg.connect(database.url(), server_settings={"application_name": "another"})
    owner = await connect(database.url("app_owner"))
    await working.execute("BEGIN; SELECT 1")
    await listening.add_listener("news", print)
    environment = {"DATABASE_URL": database.url(), "DATABASE_APPLICATION_NAME": NAME, "COLUMNS": "200"}

    def answer(text: str) -> Result:
        return CliRunner().invoke(cli, ["connections", "--terminate-idle", "0.1s"], env=environment, input=text)

    await asyncio.sleep(0.2)  # They have to have idled.
    refused = await asyncio.to_thread(answer, "")
    monkeypatch.setattr(_NamedTextIOWrapper, "isatty", lambda _: True)
    no = await asyncio.to_thread(answer, "n\n")
    assert not mine.is_closed()
    yes = await asyncio.to_thread(answer, "y\n")
    late = await connect(database.url())
    loop = asyncio.get_running_loop()

    def begins(stream: _NamedTextIOWrapper) -> bool:
        if stream.name == "<stdin>":  # It is asked for a terminal between the preview and the question.
            asyncio.run_coroutine_threadsafe(late.execute("BEGIN"), loop).result(10)
        return True

    await asyncio.sleep(0.2)
    monkeypatch.setattr(_NamedTextIOWrapper, "isatty", begins)
    spared = await asyncio.to_thread(answer, "y\n")
    await late.execute("COMMIT")
    monkeypatch.undo()
    await asyncio.sleep(0.2)
    scripted = await run("connections", "--terminate-idle", "0.1s", "--yes", **environment)
    none = await run("connections", "--terminate-idle", "1h", "--yes", **environment)

    assert (refused.exit_code, "--yes ends them without a question" in refused.stderr) == (2, True)
    assert (no.exit_code, "Nothing was ended." in no.stderr) == (2, True)
    assert "End 1 connection?" in yes.stdout
    assert f"Ended 1 connection: {mine.get_server_pid()}." in yes.stdout
    assert f"Left alone, for they were at work or gone by then: {late.get_server_pid()}." in spared.stdout
    assert f"Ended 1 connection: {late.get_server_pid()}." in scripted.stdout
    assert (none.exit_code, "has idled for more than 3600 s" in none.stdout) == (0, True)
    for untouched in (working, listening, other, owner):
        assert await untouched.fetchval("SELECT 1") == 1
        await untouched.close()

    async def gone() -> bool:
        return mine.is_closed()

    assert await eventually(gone, 5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--terminate-idle", "10"], "write a number and its unit"),
        (["--terminate-idle", "0s"], "not between nothing and a year"),
        (["--terminate-idle", "10m", "--close-idle"], "two ways to the same"),
        (["--terminate-idle", "10m", "--force"], "--force"),
        (["--terminate-idle", "10m", "--yes"], "cannot be reached"),
    ],
)
async def test_wrong_ways_to_end_connections_are_refused(arguments: list[str], named: str) -> None:
    """A sentence and the exit code 2."""
    result = await run("connections", *arguments, DATABASE_URL=f"postgresql://a@127.0.0.1:{free_port()}/x")

    assert result.exit_code == 2
    assert named in " ".join(result.stderr.replace("│", " ").split())


async def test_connections_show_who_blocks_whom(database: Database) -> None:
    """A session of another role that holds a lock is listed, and named beside the one that waits for it."""
    owner = await asyncpg.connect(database.url("app_owner"), server_settings={"application_name": "migration"})
    waiter = await asyncpg.connect(database.url(), server_settings={"application_name": NAME})
    calm = await run("connections", DATABASE_URL=database.url())
    await owner.execute("BEGIN; LOCK TABLE patients; SELECT 'quoted'")
    waiting = asyncio.create_task(waiter.execute("SELECT count(*) FROM patients"))

    async def waits() -> bool:
        asked = "SELECT true FROM pg_locks WHERE NOT granted AND pid = $1"
        return bool(await owner.fetchval(asked, waiter.get_server_pid()))

    assert await eventually(waits, 5)
    result = await run("connections", DATABASE_URL=database.url())
    await owner.execute("ROLLBACK")
    await waiting

    assert "Blocked" not in calm.output
    assert result.exit_code == 0, result.output
    (row,) = [line for line in result.output.splitlines() if "AccessShareLock on relation patients" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:2] == [str(waiter.get_server_pid()), NAME]
    assert cells[4:8] == [str(owner.get_server_pid()), "app_owner", "migration", "idle in transaction"]
    assert [line for line in result.output.splitlines() if "migration" in line and line != row]
    assert "quoted" not in result.output
    assert "SELECT count(*) FROM patients" in result.output
    await owner.close()
    await waiter.close()


async def test_connections_say_when_the_database_is_down() -> None:
    """No traceback: a sentence and a status."""
    result = await run("connections", DATABASE_URL=f"postgresql://a@127.0.0.1:{free_port()}/x")

    assert result.exit_code == 2
    assert "cannot be reached" in result.stderr


async def test_token_is_signed_with_the_secret() -> None:
    """The token names subject, scopes and an end, and stands alone on its line."""
    result = await run(
        "token", "--scope", "patients:read", "--scope", "ops", "--subject", "me", "--hours", "1",
        DATABASE_URL="postgresql://a@b/c", AUTH_SECRET=SECRET,
    )  # fmt: skip

    claims = jwt.decode(result.stdout.strip(), SECRET, algorithms=["HS256"])
    assert (claims["sub"], claims["scope"]) == ("me", "patients:read ops")
    assert claims["exp"] - claims["iat"] == timedelta(hours=1).total_seconds()


async def test_token_needs_a_secret_and_a_known_scope() -> None:
    """Without AUTH_SECRET there is nothing to sign with; a scope that no route asks for is refused."""
    open_service = await run("token", "--scope", "ops", DATABASE_URL="postgresql://a@b/c")
    unknown = await run("token", "--scope", "admin", DATABASE_URL="postgresql://a@b/c", AUTH_SECRET=SECRET)

    assert (open_service.exit_code, "Set AUTH_SECRET to the one of the service" in open_service.stderr) == (2, True)
    # A domain of the owner's has scopes too, wherever they stand among these.
    offered = re.search(r"There is no scope admin; choose from (.+)\.\n", unknown.stderr)
    assert (unknown.exit_code, offered is None) == (2, False), unknown.stderr
    assert offered is not None
    assert {"ops", "patients:read", "patients:write"} <= set(offered[1].split(", "))


@pytest.mark.parametrize("subject", ["", "a" * 256, "a\nb"])
async def test_token_for_a_subject_that_is_refused(subject: str) -> None:
    """The service would answer 401 to it, so it is not printed."""
    result = await run(
        "token", "--scope", "ops", "--subject", subject, DATABASE_URL="postgresql://a@b/c", AUTH_SECRET=SECRET
    )

    assert (result.exit_code, result.stdout) == (2, "")
    assert "--subject is not 1 to 255 printable characters" in result.stderr


async def test_token_fits_the_settings() -> None:
    """Issuer, audience and claim of the scopes are those that the service demands; a provider alone signs for it."""
    demands = {"AUTH_ISSUER": "https://login.example", "AUTH_AUDIENCE": "clinic", "AUTH_SCOPE_CLAIM": "scp"}
    own = await run("token", "--scope", "ops", DATABASE_URL="postgresql://a@b/c", AUTH_SECRET=SECRET, **demands)
    provider = {"DATABASE_URL": "postgresql://a@b/c", "AUTH_JWKS_URL": "https://login.example/keys", **demands}
    alone = await run("token", "--scope", "ops", **provider)

    claims = jwt.decode(
        own.stdout.strip(), SECRET, algorithms=["HS256"], issuer="https://login.example", audience="clinic"
    )
    assert (claims["scp"], "scope" in claims) == ("ops", False)
    assert (alone.exit_code, "the identity provider alone gives tokens" in alone.stderr) == (2, True)


async def test_budget_is_checked_before_serving() -> None:
    """Settings that can open more connections than the server grants start nothing, and show the arithmetic."""
    result = await run("serve", DATABASE_URL="postgresql://a@b/c", CONNECTION_LIMIT="10", WORKERS="2")

    assert result.exit_code == 2
    assert (
        "2 workers x 1 instances x ((10 + 5 + 1) + (2 + 2 + 1)) + 1 for migrations = 43 connections > 10 - 3"
        in result.stderr
    )


async def test_new_domain_is_refused_with_a_sentence() -> None:
    """A name that will not do ends with status 2 and changes nothing; tests/local/test_new_domain.py has them all."""
    result = await run("new-domain", "patients")

    assert result.exit_code == 2
    assert result.stderr == "app/main.py names 'patients' already. Nothing was changed.\n"


async def test_new_domain_prints_what_was_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each file on a line of its own, by its path in the tree; beside them a guessed word and the way to the table."""
    for name in ("app", "migrations", "tests/app"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("alembic.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(new_domain, "ROOT", tmp_path)

    guessed = await run("new-domain", "told_aparts")
    said = await run("new-domain", "told_people", "--singular", "told_person")

    assert (guessed.exit_code, said.exit_code) == (0, 0)
    assert "app/told_people/queries.py" in said.stdout.splitlines()
    assert all((tmp_path / line).is_file() for line in (guessed.stdout + said.stdout).splitlines())
    assert guessed.stderr == f"One of them is called told_apart; --singular says another.\n{said.stderr}"
    assert ". .local/env && .venv/bin/python -m migrations" in said.stderr


async def test_new_domain_needs_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the service is alone, as in its image, the command says so."""
    monkeypatch.setitem(sys.modules, "local.new_domain", None)

    result = await run("new-domain", "orders")

    assert result.exit_code == 2
    assert "here is the service alone" in result.stderr
