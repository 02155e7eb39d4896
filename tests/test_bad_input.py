"""A wrong value ends each command with the name of its variable and the cure, and never with the password."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.main import create_app
from app.settings import Settings
from migrations.__main__ import main as migrate
from pglifeguard.cli import database_commands
from pglifeguard.embedded.postgres import free_port
from pglifeguard.environment import SettingsError
from pglifeguard.settings import DatabasesSettings

PASSWORD = "hunter2"
PLAIN = "postgresql://app@127.0.0.1:1/orders"
ROOT = Path(__file__).parent.parent


def _typer(commands: object, *arguments: str) -> Callable[[], tuple[int, str]]:
    def run() -> tuple[int, str]:
        result = CliRunner().invoke(commands, list(arguments))  # type: ignore[arg-type]  # A Typer, of either kind.
        assert not isinstance(result.exception, SettingsError), "a traceback, and not a sentence"
        return result.exit_code, result.output

    return run


def _migrate() -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        migrate()
    return 1, str(ended.value.code)


def _uvicorn() -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        create_app()
    return 1, str(ended.value.code).removeprefix("lifeguard cannot start.\n")


# `serve` comes last: it would serve where a mistake is not seen.
SERVICE = {
    "python -m app doctor": _typer(cli, "doctor"),
    "python -m app connections": _typer(cli, "connections"),
    "python -m app token": _typer(cli, "token", "--scope", "ops"),
    "python -m pglifeguard doctor": _typer(database_commands(DatabasesSettings), "doctor"),
    "uvicorn --factory app.main:create_app": _uvicorn,
    "python -m app serve": _typer(cli, "serve"),
}
JOB = {"python -m migrations": _migrate}
BOTH = JOB | SERVICE
# Every way to write a URL wrong, with a word of the cure.
WRONG = {
    f"mysql://app:{PASSWORD}@db/orders": "speaks to postgresql:// only",
    f"postgresql://app:{PASSWORD}@db/orders x": "a space, a line break",
    f"postgresql://app:{PASSWORD}\n@db/orders": "a space, a line break",
    f"postgresql://app:@{PASSWORD}@db/orders": "write them as %2F and %40",
    f"postgresql://app:{PASSWORD}@db:54321234/orders": "a port is a number from 1 to 65535",
    f"postgresql://app:%{PASSWORD}@db/orders": "write %25 for a % itself",
    f"postgresql://app:/{PASSWORD}@db/orders": "write them as %2F and %40",
    f"postgresql://app:{PASSWORD}@db": "end it with /database",
    f"postgresql://app@db/orders?sslmode={PASSWORD}": "sslmode, which is one of",
    f"postgresql://app@db/orders?{PASSWORD}=x": "docs/settings.md lists those that are taken",
    f"postgresql://app@db/orders?connect_timeout={PASSWORD}": "a whole number up to 60",
    f"postgresql://app@db/orders?sslmode=require&sslmdoe={PASSWORD}": "Did you mean sslmode?",
    f"host=db password={PASSWORD}": "is not a URL",
    PASSWORD: "is not a URL",
}
READ_BY = {
    "DATABASE_URL": BOTH,
    "DATABASE_REPLICA_URL": BOTH,
    "DATABASE_ANALYTICS_URL": SERVICE,
    "LISTEN_URL": SERVICE,
    "MIGRATIONS_URL": JOB,
    "PGBOUNCER_ADMIN_URL": JOB,
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start from an empty directory and from nothing but a primary's URL."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATABASE_URL", PLAIN)


def refused(command: Callable[[], tuple[int, str]], captured: pytest.CaptureFixture[str]) -> str:
    """Run a command that has to end, and return what it said anywhere."""
    code, said = command()
    out, err = captured.readouterr()
    everything = said + out + err

    assert code != 0
    assert PASSWORD not in everything
    assert "Traceback" not in everything
    return everything


@pytest.mark.parametrize("variable", READ_BY)
def test_wrong_url_names_its_variable_and_the_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    """Every mistake in every variable, in every command that reads it."""
    for url, cure in WRONG.items():
        monkeypatch.setenv(variable, url)
        for name, command in READ_BY[variable].items():
            said = refused(command, capsys)

            assert said.startswith(f"{variable}: "), name
            assert cure in said, name
            assert not said.rstrip().endswith(("?.", "..")), name


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"database_url": f"postgresql://app:{PASSWORD}@db/x"}, "DATABASE_URL is set 2 times in the environment"),
        ({"DATABASE_URL_FILE": PASSWORD}, "Both DATABASE_URL and DATABASE_URL_FILE are set; keep one."),
        (
            {"DATABASE_URL": "", "DATABASE_URL_FILE": f"postgresql://app:{PASSWORD}@db/x"},
            "DATABASE_URL_FILE names a file that cannot be read: No such file or directory.",
        ),
        ({"DATABASE_REPLICA_URL_FILE": f"/{PASSWORD}"}, "DATABASE_REPLICA_URL_FILE names a file that cannot be read"),
        ({"DATABASE_PASSWORD_FILE": PASSWORD}, "DATABASE_PASSWORD_FILE: names a file that cannot be read"),
        ({"DATABASE_URL": f"postgresql://app:{PASSWORD}@db/x", "DATABASE_PASSWORD_FILE": __file__}, "keep one of them"),
    ],
)
def test_wrong_variable_is_named_by_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], said: str
) -> None:
    """A value that is written twice, or into the wrong one of two variables."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    for name, command in BOTH.items():
        assert said in refused(command, capsys), name


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"DATABASE_URL": "", "DATABSE_URL": f"postgresql://app:{PASSWORD}@db/x"}, "Did you mean DATABASE_URL?"),
        ({"DATABASE_POOL_SIZE": PASSWORD}, "DATABASE_POOL_SIZE: "),
        ({"DATABASE_PASWORD_FILE": PASSWORD}, "Did you mean DATABASE_PASSWORD_FILE?"),
        ({"LISTEN_PASSWORD_FILE": PASSWORD, "LISTEN_URL": PLAIN}, "LISTEN_PASSWORD_FILE: names a file"),
    ],
)
def test_wrong_setting_of_the_service_is_named_by_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], said: str
) -> None:
    """What the migration job does not read."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    for name, command in SERVICE.items():
        assert said in refused(command, capsys), name


@pytest.mark.parametrize(
    "variables",
    [
        {"AUTH_SECRET": PASSWORD},
        {"AUTH_SECRET_FILE": PASSWORD},
        {"ENVIRONMENT": PASSWORD},
        {"LOG_LEVEL": PASSWORD},
        {"DIRECTORY_URL": f"ldap://app:{PASSWORD}@directory"},
    ],
)
def test_wrong_setting_of_the_application_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str]
) -> None:
    """What only `python -m app` reads."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    for name, command in SERVICE.items():
        if name.startswith("python -m app "):
            assert refused(command, capsys).startswith(next(iter(variables))), name


def test_database_that_is_away_is_said_without_the_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A right URL of a server that is not there."""
    url = f"postgresql://app:{PASSWORD}@127.0.0.1:{free_port()}/orders"
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.chdir(ROOT)

    for name in ("python -m app doctor", "python -m app connections", "python -m migrations"):
        assert "127.0.0.1" in refused(BOTH[name], capsys), name


def test_what_a_platform_adds_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says which variables it does not read, and nothing of what is in them."""
    monkeypatch.setenv("DATABASE_PASSWORD", PASSWORD)

    assert Settings().ignored_variables == (
        "DATABASE_PASSWORD is not a setting of this service. It looks like a platform's, and is ignored.",
    )


async def test_commands_say_it_as_processes(tmp_path: Path) -> None:
    """Standard output and error of each command as it is typed, with the URL that MySQL would take."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DATABASE_")}
    environment |= {"DATABASE_URL": f"mysql://app:{PASSWORD}@db/orders", "PYTHONPATH": str(ROOT)}

    async def said_by(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, cwd=tmp_path, env=environment,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        assert process.returncode != 0, arguments
        return output.decode()

    said = await asyncio.gather(
        said_by("-m", "app", "serve"),
        said_by("-m", "pglifeguard", "connections"),
        said_by("-m", "migrations"),
        said_by("-m", "uvicorn", "--factory", "app.main:create_app", "--port", str(free_port())),
    )

    for one in said:
        assert "DATABASE_URL: has the scheme 'mysql'" in one
        assert PASSWORD not in one
