"""The settings of the edge: tighter than the library's, and refused where they would do nothing."""

from pathlib import Path

import pytest

from app.main import create_app
from app.settings import Settings
from local.setup import PROJECT
from pglifeguard import DatabasesSettings, SettingsError
from tests.app.test_cli import MODULE, served
from tests.conftest import Database

URL = "postgresql://app:hunter2@primary:5432/lifeguard"
SECRET = "0123456789abcdef0123456789abcdef"
EVERY_ADDRESS = "0.0.0.0"  # noqa: S104  # What the image listens on.


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start from an empty directory, so that no .env is there, and from DATABASE_URL alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", URL)


def load(monkeypatch: pytest.MonkeyPatch, **variables: object) -> Settings:
    """Load the settings with these variables."""
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return Settings()


def test_service_is_tighter_than_the_library() -> None:
    """Whoever installs the library keeps the room that it had; whoever copies the service has that of its bodies."""
    library, service = DatabasesSettings(), Settings()

    assert (library.request_body_bytes, library.request_url_bytes) == (1_048_576, library.request_head_bytes)
    assert (service.request_body_bytes, service.request_url_bytes) == (65_536, 8192)
    assert (service.hosts, service.rate_limit_per_second) == (None, None)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ALLOWED_HOSTS": "*"}, "ALLOWED_HOSTS has '*', which is no host: write names or addresses"),
        ({"ALLOWED_HOSTS": "https://clinic.example"}, "ALLOWED_HOSTS has 'https://clinic.example', which is no host"),
        ({"ALLOWED_HOST": "clinic.example"}, "Did you mean ALLOWED_HOSTS?"),
        ({"RATE_LIMIT_PER_SECOND": "5"}, "nothing tells one client from another; set one of these"),
        ({"RATE_LIMIT_BURST": "5"}, "RATE_LIMIT_BURST without RATE_LIMIT_PER_SECOND"),
        ({"RATE_LIMIT_PER_SECOND": "0", "AUTH_SECRET": SECRET}, "RATE_LIMIT_PER_SECOND: "),
        ({"RATE_LIMIT_PER_SECONDS": "5"}, "Did you mean RATE_LIMIT_PER_SECOND?"),
        ({"HSTS_SECONDS": "-1"}, "HSTS_SECONDS: "),
        ({"REQUEST_URL_BYTES": "10"}, "REQUEST_URL_BYTES: "),
        ({"REQUEST_BODY_DEPTH": "1000"}, "REQUEST_BODY_DEPTH: "),
    ],
)
def test_wrong_setting_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str) -> None:
    """The sentence names the variable and the cure."""
    with pytest.raises(SettingsError) as refused:
        load(monkeypatch, **variables)

    assert said in str(refused.value)


@pytest.mark.parametrize("variables", [{"AUTH_SECRET": SECRET}, {"CLIENTS_BY_ADDRESS": "true"}])
def test_clients_that_are_told_apart_are_limited(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """By their tokens, or by the addresses that a proxy reports."""
    settings = load(monkeypatch, RATE_LIMIT_PER_SECOND="0.5", RATE_LIMIT_BURST="5", **variables)

    assert (settings.rate_limit_per_second, settings.rate_limit_burst) == (0.5, 5)


@pytest.mark.parametrize("host", [EVERY_ADDRESS, "::", "0", "192.0.2.1", "fe80::1", "clinic.example"])
def test_open_service_that_strangers_reach_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    """Every address but the loopback's, in one loud line with the cure; a secret silences it."""
    load(monkeypatch, HOST=host, PORT="8123", LOG_FORMAT="console")
    create_app()
    _, said = capsys.readouterr()
    load(monkeypatch, AUTH_SECRET=SECRET)
    create_app()
    _, silent = capsys.readouterr()

    (line,) = [line for line in said.splitlines() if "THIS SERVICE IS OPEN" in line]
    assert " WARNING " in line
    assert f"it listens on {host} without asking for tokens" in line
    assert "port 8123" in line
    assert "openssl rand -hex 32" in line
    assert "IS OPEN" not in silent


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_open_service_of_this_machine_is_quiet(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """`make run` is for whoever sits here."""
    assert load(monkeypatch, HOST=host).exposure is None


async def test_serve_says_that_it_is_open(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of the image, without a secret: the line is in the log before a request is."""
    arguments = (*MODULE, "--host", EVERY_ADDRESS)
    monkeypatch.chdir(PROJECT)
    async with served(tmp_path, {"DATABASE_URL": database.url(), "LOG_FORMAT": "console"}, *arguments) as server:
        log = server.log.read_text(encoding="utf-8")

    assert log.count("THIS SERVICE IS OPEN: it listens on 0.0.0.0 without asking for tokens") == 1
