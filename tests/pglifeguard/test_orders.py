"""`pause`, `resume`, `drain` and `resize` as commands: what they say, how they end, and what they do to a service."""

import asyncio
import getpass
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from typer.testing import CliRunner, Result

from app.cli import cli
from pglifeguard.cli import database_commands
from pglifeguard.embedded.postgres import free_port
from pglifeguard.fastapi import Lifeguard
from pglifeguard.orders import OrderFailedError, post
from pglifeguard.settings import DatabasesSettings
from pglifeguard.testing.serving import Running, listening
from tests.conftest import Database
from tests.service import Service, serving

SECRET = "0123456789abcdef" * 4


@asynccontextmanager
async def running(database: Database, **changes: Any) -> AsyncIterator[tuple[Service, str]]:
    """Give a service that a token opens, and its URL."""
    settings = database.settings(replica=False, auth_secret=SECRET, **changes)
    async with serving(settings) as service, listening(Running(service.app)) as url:
        yield service, url


@pytest.fixture
def environment(database: Database) -> dict[str, str]:
    """Give the environment of somebody who is logged in where the service runs."""
    return {"DATABASE_URL": database.url(), "AUTH_SECRET": SECRET, "HOST": "0.0.0.0"}  # noqa: S104  # As in a container.


async def run(*arguments: str, **environment: str) -> Result:
    """Run a command in a thread: it waits for the service in this one's event loop."""
    return await asyncio.to_thread(CliRunner().invoke, cli, arguments, env=environment)


async def test_operator_pauses_and_resumes(
    database: Database, environment: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """The settings say where and by which secret; who must not go on yet is told by exit code 1."""
    async with running(database) as (service, url):
        near = environment | {"PORT": url.rpartition(":")[2]}
        async with service.databases.primary.engine.connect():
            busy = await run("pause", "--seconds", "30", "--wait", "0.1", **near)
        quiet = await run("pause", **near)
        paused = service.databases.paused
        with caplog.at_level(logging.WARNING, "pglifeguard.fastapi.debug"):
            caplog.clear()
            resumed = await run("resume", **near)

        assert (paused, service.databases.paused) == (True, False)
    assert (busy.exit_code, busy.stdout) == (1, f"{url}: 1 of 1 workers paused for 30 s. Still at work: primary 1.\n")
    calm = "Nothing is at work: switch over now, then resume."
    assert (quiet.exit_code, quiet.stdout) == (0, f"{url}: 1 of 1 workers paused for 20 s. {calm}\n")
    assert (resumed.exit_code, resumed.stdout) == (0, f"{url}: 1 of 1 workers resumed.\n")
    (line,) = [vars(record) for record in caplog.records if record.message == "operator's order"]
    assert (line["operation"], line["by"], line["address"]) == ("resume", getpass.getuser(), "127.0.0.1")


async def test_operator_drains_and_resizes(database: Database, environment: dict[str, str]) -> None:
    """What is at work is told and fails nothing; a size beyond the budget is refused with the sum."""
    async with running(database, pool_size=3, max_overflow=1) as (service, url):
        near = environment | {"PORT": url.rpartition(":")[2]}
        async with service.databases.primary.engine.connect():
            drained = await run("drain", "--pool", "primary", **near)
        settled = await run("drain", "--wait", "10", **near)
        grown = await run("resize", "primary", "--pool-size", "7", "--max-overflow", "2", **near)
        total = service.databases.primary.pool.figures().total
        refused = await run("resize", "primary", "--pool-size", "400", **near)
        back = await run("resize", "primary", **near)
        unknown = await run("resize", "secondary", **near)
        wrong = await run("resize", "primary", "--pool-size", "0", **near)

    at_work = "At work, and renewed at their release: primary 1."
    assert (drained.exit_code, drained.stdout) == (0, f"{url}: 1 of 1 workers renewed the connections. {at_work}\n")
    assert settled.stdout == f"{url}: 1 of 1 workers renewed the connections.\n"
    note = "A restart goes back to the settings: pool_size 3, max_overflow 1."
    said = f"{url}: 1 of 1 workers resized primary. It has pool_size {{}} and max_overflow {{}} now. {note}\n"
    assert (grown.exit_code, grown.stdout, total) == (0, said.format(7, 2), 9)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"{url} answered 409: " in refused.stderr
    assert "= 409 connections, and grants this service 97. Choose a smaller size" in refused.stderr
    assert back.stdout == said.format(3, 1)
    assert unknown.stderr == f"{url} answered 404: There is no pool 'secondary'; there are primary, analytics.\n"
    assert wrong.exit_code == 2


async def test_several_instances_are_told_at_once(database: Database, environment: dict[str, str]) -> None:
    """One that is away does not keep the others from obeying, and the exit code says that not all did."""
    away = f"http://127.0.0.1:{free_port()}"
    async with running(database) as (service, url):
        told = await run("pause", "--url", away, "--url", f"{url}/", **environment)
        paused = service.databases.paused

    assert (paused, told.exit_code) == (True, 2)
    assert told.stdout.startswith(f"{url}: 1 of 1 workers paused")
    assert told.stderr == f"{away} cannot be asked: [Errno 111] Connection refused.\n"


async def test_token_may_be_given(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the settings of the service are not at hand; without a good one, the answer says what to do."""
    monkeypatch.chdir(tmp_path)
    token = await run("token", "--scope", "ops", DATABASE_URL=database.url(), AUTH_SECRET=SECRET)
    reader = await run("token", "--scope", "patients:read", DATABASE_URL=database.url(), AUTH_SECRET=SECRET)
    async with running(database) as (_, url):
        obeyed = await run("resume", "--url", url, OPERATOR_TOKEN=token.stdout)
        without = await run("resume", "--url", url)
        lacking = await run("resume", "--url", url, "--token", reader.stdout)
        garbled = await run("resume", "--url", url, "--token", "a\nb")
        nowhere = await run("resume")

    assert obeyed.exit_code == 0
    give = "Give a token that may do this by --token or OPERATOR_TOKEN."
    assert without.stderr == f"{url} answered 401: This route needs a bearer token. {give}\n"
    assert lacking.stderr == f"{url} answered 403: The bearer token lacks the scope 'ops'. {give}\n"
    assert garbled.stderr == "The token holds characters that no header may hold.\n"
    assert (nowhere.exit_code, nowhere.stderr.splitlines()[0]) == (
        2,
        "Without --url the settings say where the service is, and they are wrong.",
    )


async def test_doctor_tells_what_was_resized(database: Database, environment: dict[str, str]) -> None:
    """With the URL of an instance; one that cannot be asked is an error, and changes nothing else in the report."""
    sizes = {"DATABASE_POOL_SIZE": "3", "DATABASE_MAX_OVERFLOW": "1"}
    async with running(database, pool_size=3, max_overflow=1) as (service, url):
        service.databases.resize("primary", pool_size=7)
        examined = await run("doctor", "--json", "--url", url, **environment | sizes)
        refused = await run("doctor", "--json", "--url", url, "--token", "wrong", **environment | sizes)
        mistaken = await run("doctor", "--json", "--url", f"{url}/health/live", **environment | sizes)

    def found(report: Result, code: str) -> dict[str, dict[str, str]]:
        findings = json.loads(report.stdout)["findings"]
        return {each["subject"]: each for each in findings if each["code"] == code}

    resized = found(examined, "pool_resized")[f"{url} primary"]
    assert (resized["severity"], "pool_size 7 and max_overflow 1" in resized["text"]) == ("warning", True)
    assert "say 3 and 1" in resized["text"]
    for report, status in ((refused, 401), (mistaken, 404)):
        assert f"answered {status}: " in found(report, "instance_not_asked")["--url"]["text"]
        assert not found(report, "pool_resized")


async def test_what_is_no_such_service_is_told(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong addresses, other programs, and services that have not guarded these routes."""
    monkeypatch.setattr("pglifeguard.orders.ANSWER_SECONDS", 0.2)
    other, unguarded = FastAPI(), FastAPI()
    other.post("/debug/resume")(lambda: PlainTextResponse("resumed"))
    other.post("/there/debug/pause")(lambda: PlainTextResponse("[1]"))
    Lifeguard(database.settings(replica=False)).install(unguarded)

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def garble(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.org\r\n")
        writer.close()

    async def refusal(url: str, operation: str = "resume", **arguments: Any) -> str:
        with pytest.raises(OrderFailedError) as refused:
            await asyncio.to_thread(post, url, operation, arguments, None)
        return str(refused.value)

    mute = await asyncio.start_server(say_nothing, "127.0.0.1")
    mail = await asyncio.start_server(garble, "127.0.0.1")
    to_mute, to_mail = (f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in (mute, mail))
    async with mute, mail, listening(other) as elsewhere, listening(Running(unguarded)) as open_one:
        said = {
            "not as this service does": [await refusal(elsewhere), await refusal(f"{elsewhere}/there", "pause")],
            "answered 404: Not Found. A service has": [await refusal(open_one)],
            "did not answer within 0.2 s; it may have obeyed": [await refusal(to_mute)],
            "cannot be asked": [await refusal(to_mail), await refusal(f"https{elsewhere[4:]}")],
            "is no address of a service": [
                await refusal(url) for url in ("127.0.0.1:8000", "ftp://db", "http://db:port", "http://[db", "http://")
            ],
        }

    for sentence, refusals in said.items():
        for each in refusals:
            assert sentence in each
    assert "secret" not in await refusal(f"http://operator:secret@127.0.0.1:{free_port()}")


async def test_mistakes_in_an_order_are_named(database: Database) -> None:
    """As the service answers them, for whoever calls the routes with figures of his own."""
    async with serving(database.settings(replica=False)) as service, listening(Running(service.app)) as url:
        with pytest.raises(OrderFailedError, match=r"422: .* query.seconds: Input should be less than or equal to 120"):
            await asyncio.to_thread(post, url, "pause", {"seconds": 500}, None)


def test_worker_that_did_not_obey_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code is 1, and each reason is a line; the library's own command needs no settings."""
    failure = "Worker 12 did not answer."
    answer = {"workers": 2, "obeyed": 1, "pending": {"primary": 0}, "failures": [failure]}
    asked: list[str] = []

    def answered(url: str, *_: Any) -> tuple[str, dict[str, Any]]:
        asked.append(url)
        return url, answer

    monkeypatch.setattr("pglifeguard.orders.post", answered)

    told = CliRunner().invoke(database_commands(DatabasesSettings), ["resume"], env={"DATABASE_URL": ""})

    assert (told.exit_code, told.stdout) == (1, "http://127.0.0.1:8000: 1 of 2 workers resumed.\n")
    assert (told.stderr, asked) == (f"  {failure}\n", ["http://127.0.0.1:8000"])


async def test_account_without_a_name_is_the_operator(
    database: Database, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A container runs under a number, and a service may listen on one address alone, by IPv6 too."""

    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(getpass, "getuser", nameless)
    async with running(database) as (_, url):
        told = await run("resume", "--url", url, **environment)
        away = await run("resume", **environment | {"HOST": "::1", "PORT": "1"})

    assert told.exit_code == 0
    assert "operator" in {vars(record).get("by") for record in caplog.records}
    assert away.stderr.startswith("http://[::1]:1 cannot be asked")
