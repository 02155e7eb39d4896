"""The environment becomes settings, or one sentence for each mistake."""

import re
import shutil
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import certifi
import pytest
from dotenv import dotenv_values
from pydantic import SecretStr

from app.settings import Settings
from migrations.settings import MigrationSettings, load_migration_settings
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.environment import SettingsError

URL = "postgresql://app:hunter2@primary:5432/lifeguard"
REPLICA = "postgresql://app:hunter2@replica:5432/lifeguard"
SECRET = "0123456789abcdef0123456789abcdef"


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


def refusal(monkeypatch: pytest.MonkeyPatch, **variables: object) -> str:
    """Load the settings with these variables, and return why they are refused."""
    with pytest.raises(SettingsError) as refused:
        load(monkeypatch, **variables)
    return str(refused.value)


def test_profile_of_a_database_that_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps no connection, and chooses what is not set; replicas and analytics inherit it, and what is set wins."""
    settings = load(
        monkeypatch,
        DATABASE_PROFILE="sleeping",
        DATABASE_REPLICA_URL=REPLICA,
        DATABASE_REPLICA_POOL_IDLE_SECONDS=5,
        DATABASE_ANALYTICS_PROFILE="always_on",
    )

    (replica,) = settings.replicas
    chosen = [(each.warm_size, each.pool_idle_seconds, each.pool_max_waiting) for each in (settings.primary, replica)]
    assert chosen == [(0, 60, 1000), (0, 5, 1000)]
    assert (settings.analytics.sleeps, settings.analytics.pool_idle_seconds) == (False, 300)


def test_one_url_is_enough() -> None:
    """DATABASE_URL alone gives a primary, no replica, and a small analytics pool on the primary."""
    settings = Settings()

    assert settings.primary.url.get_secret_value() == "postgresql+asyncpg://app:hunter2@primary:5432/lifeguard"
    assert settings.replicas == ()
    assert settings.analytics.url == settings.primary.url
    assert (settings.analytics.pool_size, settings.analytics.max_overflow, settings.analytics.warm_size) == (2, 2, 0)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+asyncpg"])
def test_every_usual_scheme_is_understood(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """What other tools call a PostgreSQL URL is one here."""
    settings = load(monkeypatch, DATABASE_URL=f"{scheme}://app:p%40ss@db:1234/x")

    assert settings.primary.url.get_secret_value() == "postgresql+asyncpg://app:p%40ss@db:1234/x"
    assert settings.primary.parameters.password == "p@ss"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("not a url", "is not a URL"),
        ("mysql://a:hunter2@b/c", "has the scheme 'mysql'"),
        ("postgresql://a:hunter2@b", "names no database"),
        ("postgresql://a:hunter2@b:port/c", "is not a URL"),
        ("postgresql://a@b:hunter2/c", "is not a URL"),
    ],
)
def test_wrong_url_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch, url: str, reason: str) -> None:
    """The sentence names the variable and the reason, and holds no password."""
    sentence = refusal(monkeypatch, DATABASE_URL=url)

    assert sentence.startswith("DATABASE_URL: ")
    assert reason in sentence
    assert "\n" not in sentence, "what analytics inherits is not wrong a second time"
    assert "hunter2" not in sentence


def test_missing_primary_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without DATABASE_URL there is one sentence, not one for each database that would inherit it."""
    monkeypatch.delenv("DATABASE_URL")

    sentence = refusal(monkeypatch)

    assert sentence.startswith("DATABASE_URL: is not set")
    assert sentence.endswith("or run `make run` for an embedded one; beside a running `make run`: `. .local/env`.")
    assert "\n" not in sentence


def test_replica_and_analytics_inherit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DATABASE_REPLICA_* and DATABASE_ANALYTICS_* leave out is the primary's, but for analytics' small pool."""
    settings = load(
        monkeypatch,
        DATABASE_POOL_SIZE=7,
        DATABASE_POOL_TIMEOUT=2,
        DATABASE_REPLICA_URL=REPLICA,
        DATABASE_REPLICA_POOL_SIZE=9,
        DATABASE_ANALYTICS_MAX_OVERFLOW=1,
    )

    (replica,) = settings.replicas
    assert (settings.primary.pool_size, replica.pool_size, settings.analytics.pool_size) == (7, 9, 2)
    assert (replica.pool_timeout, settings.analytics.pool_timeout) == (2, 2)
    assert settings.analytics.max_overflow == 1
    assert settings.analytics.url == replica.url


def test_several_replicas_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """DATABASE_REPLICA_URL takes URLs with commas between them, and leaves a comma inside a URL alone."""
    second = "postgresql://app:x@/lifeguard?host=b:5433&application_name=a,b"

    settings = load(monkeypatch, DATABASE_REPLICA_URL=f"{REPLICA},{second}")

    assert [replica.location for replica in settings.replicas] == ["replica:5432/lifeguard", "b:5433/lifeguard"]
    assert [prefix for prefix, _ in settings.databases] == [
        "DATABASE_",
        "DATABASE_REPLICA_",
        "DATABASE_REPLICA_",
        "DATABASE_ANALYTICS_",
    ]


def test_location_shows_every_host_and_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several `host=` parts of a URL are all shown."""
    settings = load(monkeypatch, DATABASE_URL="postgresql://app:hunter2@/x?host=a:1&host=b:2")

    assert settings.primary.location == "a:1,b:2/x"


def test_url_sets_what_its_variable_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name and a timeout in a URL are that database's own; a variable is stronger, and is inherited."""
    url = f"{URL}?application_name=told&connect_timeout=7"
    alone = load(monkeypatch, DATABASE_URL=url, DATABASE_REPLICA_URL=REPLICA)
    both = load(monkeypatch, DATABASE_APPLICATION_NAME="set", DATABASE_CONNECT_TIMEOUT_SECONDS=2)

    assert (alone.primary.application_name, alone.primary.connect_timeout_seconds) == ("told", 7)
    assert (alone.replicas[0].application_name, alone.replicas[0].connect_timeout_seconds) == ("lifeguard", 0.5)
    assert (both.primary.application_name, both.primary.connect_timeout_seconds) == ("set", 2)


def test_settings_that_are_made_are_taken_as_they_are() -> None:
    """Whoever makes one database's settings in code may hand them on."""
    made = DatabaseSettings(url=SecretStr(f"{URL}?connect_timeout=7"), pool_size=3)

    settings = Settings(primary=made, analytics=made)

    assert settings.primary is made
    assert made.connect_timeout_seconds == 7


def test_parameter_of_a_url_is_refused_under_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says which URL it is, and what to write instead."""
    sentence = refusal(monkeypatch, DATABASE_REPLICA_URL=f"{REPLICA}?require_auth=scram-sha-256")

    assert sentence.startswith("DATABASE_REPLICA_URL: has the parameter require_auth, which is not taken")


@pytest.mark.parametrize("name", ["sslrootcert", "sslcert", "sslkey", "sslcrl"])
def test_file_of_a_url_has_to_be_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A certificate that cannot be read is a mistake at the start, and no database that is away."""
    sentence = refusal(monkeypatch, DATABASE_URL=f"{URL}?sslmode=require&{name}=/nowhere")

    assert sentence == f"DATABASE_URL: names /nowhere as {name}, which is not there or cannot be read."


def test_certificate_is_verified_against_something(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A sslmode that verifies needs an authority: in the URL, in the environment, or where libpq looks."""
    monkeypatch.setenv("HOME", str(tmp_path))
    url = f"{URL}?sslmode=verify-full"

    refused = refusal(monkeypatch, DATABASE_URL=url)
    shutil.copyfile(certifi.where(), tmp_path / "authority")
    named = load(monkeypatch, DATABASE_URL=f"{url}&sslrootcert={tmp_path}/authority")
    of_the_system = load(monkeypatch, DATABASE_URL=f"{url}&sslrootcert=system")
    found = load(monkeypatch, DATABASE_URL=url, PGSSLROOTCERT=tmp_path / "authority")

    assert "sslrootcert=/path/to/authority.crt" in refused
    assert {named.primary.server, of_the_system.primary.server, found.primary.server} == {"primary:5432"}


def test_https_takes_a_certificate_and_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One without the other, and what cannot be opened, ends the start."""
    certificate, key = tmp_path / "server.crt", tmp_path / "server.key"
    certificate.touch()

    alone = refusal(monkeypatch, TLS_CERTIFICATE=certificate)
    missing = refusal(monkeypatch, TLS_CERTIFICATE=certificate, TLS_KEY=key)

    assert "TLS_CERTIFICATE and TLS_KEY belong together: set both, or none" in alone
    assert f"TLS_CERTIFICATE {certificate} and TLS_KEY {key} cannot be used" in missing


def test_user_of_a_nameless_account_has_to_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a user the account's name is taken, as by libpq; a container's number may have none."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "PGUSER"):
        monkeypatch.delenv(name, raising=False)
    nobody: dict[int, object] = {}
    monkeypatch.setattr("pwd.getpwuid", nobody.__getitem__)

    refused = refusal(monkeypatch, DATABASE_URL="postgresql://db/x")
    named = load(monkeypatch, PGUSER="app", DATABASE_URL="postgresql://db/x")

    assert "names no user" in refused
    assert named.primary.parameters.user is None


ATTRS = "target_session_attrs"
TWO = "postgresql://app:hunter2@a,b/x"


@pytest.mark.parametrize(
    ("name", "url", "taken"),
    [
        ("DATABASE_URL", f"{TWO}?{ATTRS}=any", True),
        ("DATABASE_URL", f"{TWO}?{ATTRS}=read-write", True),
        ("DATABASE_URL", f"{TWO}?{ATTRS}=primary", True),
        ("DATABASE_URL", f"{TWO}?{ATTRS}=standby", False),
        ("DATABASE_URL", f"{TWO}?{ATTRS}=prefer-standby", False),
        ("LISTEN_URL", f"{TWO}?{ATTRS}=read-write", True),
        ("LISTEN_URL", f"{TWO}?{ATTRS}=standby", False),
        ("DATABASE_REPLICA_URL", f"{REPLICA}?{ATTRS}=prefer-standby", True),
        ("DATABASE_REPLICA_URL", f"{REPLICA}?{ATTRS}=read-only", True),
        ("DATABASE_REPLICA_URL", f"{REPLICA}?{ATTRS}=primary", False),
        ("DATABASE_ANALYTICS_URL", f"{REPLICA}?{ATTRS}=prefer-standby", True),
        ("DATABASE_ANALYTICS_URL", f"{TWO}?{ATTRS}=prefer-standby", False),
        ("DATABASE_ANALYTICS_URL", f"{REPLICA}?{ATTRS}=standby", False),
    ],
)
def test_kind_of_server_is_the_one_that_the_pool_looks_for(
    monkeypatch: pytest.MonkeyPatch, name: str, url: str, *, taken: bool
) -> None:
    """A demand for a primary or a standby is kept, or refused: no pool goes elsewhere in silence."""
    if taken:
        load(monkeypatch, **{name: url})
    else:
        assert f"{name} has {ATTRS}={url.rpartition('=')[2]}" in refusal(monkeypatch, **{name: url})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_POOL_SIZE", 0),
        ("DATABASE_POOL_SIZE", "ten"),
        ("DATABASE_MAX_OVERFLOW", -1),
        ("DATABASE_POOL_TIMEOUT", 0),
        ("DATABASE_REPLICA_POOL_SIZE", 501),
        ("DATABASE_ANALYTICS_CONNECT_TIMEOUT_SECONDS", 61),
        ("PORT", 65_536),
        ("LOG_LEVEL", "LOUD"),
        ("ENVIRONMENT", "staging"),
        ("RETRY_AFTER_SECONDS", 0),
        ("DIRECTORY_URL", "directory.example.com"),
    ],
)
def test_value_out_of_bounds_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """The sentence begins with the variable as one would set it."""
    assert refusal(monkeypatch, DATABASE_REPLICA_URL=REPLICA, **{name: value}).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("DATABASE_POOL_SIZE", "ten", "DATABASE_POOL_SIZE: has to be a whole number."),
        ("DATABASE_POOL_TIMEOUT", "soon", "DATABASE_POOL_TIMEOUT: has to be a number."),
        ("ACCESS_LOG", "perhaps", "ACCESS_LOG: has to be true or false."),
        ("DATABASE_POOL_SIZE", "0", "DATABASE_POOL_SIZE: has to be greater than or equal to 1."),
    ],
)
def test_mistake_is_said_in_words_of_settings(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    """Not in those of a parser of input."""
    assert refusal(monkeypatch, **{name: value}) == sentence


def test_every_mistake_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two mistakes are two lines, so that one start is enough to see both."""
    lines = refusal(monkeypatch, WORKERS=0, INSTANCES=0).splitlines()

    assert [line.partition(":")[0] for line in lines] == ["WORKERS", "INSTANCES"]


def test_unknown_database_variable_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error does not silently leave a default in place."""
    sentence = refusal(monkeypatch, DATABASE_POOLSIZE=5)

    assert sentence.startswith("DATABASE_POOLSIZE is not a setting")
    assert "Did you mean DATABASE_POOL_SIZE?" in sentence


def test_unknown_database_variable_far_from_any_has_no_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resembles nothing gets no guess."""
    assert "Did you mean" not in refusal(monkeypatch, DATABASE_ZZQQXXWWVVKKJJ=5)


def test_foreign_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only DATABASE_* is ours to be strict about; an empty variable is an unset one."""
    settings = load(monkeypatch, POSTGRES_PASSWORD="x", DATABASE_POOL_SIZE="")

    assert settings.primary.pool_size == 10


@pytest.mark.parametrize(
    ("variables", "arithmetic"),
    [
        (
            {"DATABASE_POOL_SIZE": 2, "DATABASE_POOL_MIN_SIZE": 3},
            "DATABASE_URL: POOL_MIN_SIZE 3 > POOL_SIZE 2",
        ),
        (
            {"DATABASE_REPLICA_URL": REPLICA, "DATABASE_REPLICA_POOL_SIZE": 2, "DATABASE_REPLICA_POOL_MIN_SIZE": 3},
            "DATABASE_REPLICA_URL: POOL_MIN_SIZE 3 > POOL_SIZE 2",
        ),
        (
            {"DATABASE_PROFILE": "sleeping", "DATABASE_POOL_MIN_SIZE": 1},
            "DATABASE_URL: PROFILE sleeping with POOL_MIN_SIZE 1: connections that are kept open keep the database",
        ),
        (
            {"DATABASE_PROFILE": "sleeping", "LISTEN_URL": REPLICA},
            "LISTEN_URL with DATABASE_PROFILE=sleeping: the connection that listens keeps the database awake",
        ),
        (
            {"GRACEFUL_TIMEOUT_SECONDS": 30, "STATEMENT_TIMEOUT_SECONDS": 30},
            "GRACEFUL_TIMEOUT_SECONDS 30 <= STATEMENT_TIMEOUT_SECONDS 30",
        ),
        (
            {"DATABASE_COMMAND_TIMEOUT_SECONDS": 10},
            "DATABASE_COMMAND_TIMEOUT_SECONDS 10 <= STATEMENT_TIMEOUT_SECONDS 30",
        ),
        (
            {"DATABASE_REPLICA_URL": REPLICA, "DATABASE_REPLICA_COMMAND_TIMEOUT_SECONDS": 10},
            "DATABASE_REPLICA_COMMAND_TIMEOUT_SECONDS 10 <= STATEMENT_TIMEOUT_SECONDS 30",
        ),
    ],
)
def test_settings_that_must_agree_show_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, object], arithmetic: str
) -> None:
    """Two settings that are each fine and together wrong are refused with both figures."""
    assert arithmetic in refusal(monkeypatch, **variables)


def test_secrets_are_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither repr nor str nor JSON of the settings holds a password or the secret."""
    settings = load(monkeypatch, AUTH_SECRET=SECRET, DATABASE_REPLICA_URL=REPLICA)

    for text in (repr(settings), str(settings), settings.model_dump_json()):
        assert "hunter2" not in text
        assert SECRET not in text


def test_secret_is_read_from_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NAME_FILE gives the content of a file without its newline, for secrets that are mounted."""
    (tmp_path / "secret").write_text(f"{SECRET}\n", encoding="utf-8")
    (tmp_path / "url").write_text(URL, encoding="utf-8")
    monkeypatch.delenv("DATABASE_URL")

    settings = load(monkeypatch, AUTH_SECRET_FILE=tmp_path / "secret", DATABASE_URL_FILE=tmp_path / "url")

    assert settings.auth_secret is not None
    assert settings.auth_secret.get_secret_value() == SECRET
    assert settings.primary.location == "primary:5432/lifeguard"


def test_unreadable_secret_file_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is named, with the reason; where somebody wrote the secret itself, it is not repeated."""
    sentence = refusal(monkeypatch, AUTH_SECRET_FILE=SECRET)

    assert sentence == "AUTH_SECRET_FILE names a file that cannot be read: No such file or directory."


@pytest.mark.parametrize(("content", "reason"), [(b"\xff\xfe", "is no text in UTF-8"), (b" \n", "is empty")])
def test_secret_file_without_a_secret_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, reason: str
) -> None:
    """A file of bytes, or one that nobody has written yet, is no secret."""
    (tmp_path / "secret").write_bytes(content)

    assert reason in refusal(monkeypatch, AUTH_SECRET_FILE=tmp_path / "secret")


def test_variable_that_is_set_twice_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In capitals and not, or on two lines of .env: which of them counts would be chance."""
    monkeypatch.setenv("database_url", REPLICA)
    of_the_process = refusal(monkeypatch)
    monkeypatch.setenv("database_url", URL)
    (tmp_path / ".env").write_text(f"# One.\nLISTEN_URL={URL}\n\nexport LISTEN_URL='{REPLICA}'\nOTHER=1\nOTHER=2\n")
    of_the_file = refusal(monkeypatch)
    (tmp_path / ".env").write_text(f"LISTEN_URL={URL}\nLISTEN_URL={URL}\n")

    assert "DATABASE_URL is set 2 times in the environment, in capitals and not, and differs" in of_the_process
    assert "LISTEN_URL is set 2 times in .env, and differs" in of_the_file
    assert "hunter2" not in of_the_process + of_the_file
    assert load(monkeypatch).listen_url is not None


@pytest.mark.parametrize(
    "line", [f"AUTH_SECRET: {SECRET}", "AUTH_SECRET", f"AUTH_SECRET='{SECRET}", f"set AUTH_SECRET={SECRET}"]
)
def test_line_that_sets_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str) -> None:
    """With its number, and without what it holds: left out, it would leave the service open."""
    (tmp_path / ".env").write_text(f"# One.\nexport SOMEBODY_ELSES\n{line}\n")

    sentence = refusal(monkeypatch)
    assert sentence == "Line 3 of .env sets nothing: it is no NAME=value, or its quotes are not closed."


def test_sentence_is_all_that_is_said_of_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The parser, which logs such a line too, is silent meanwhile, and has its say about other files."""
    (tmp_path / ".env").write_text("AUTH_SECRET: secret\n")
    refusal(monkeypatch)
    with pytest.raises(SettingsError, match=r"Line 1 of \.env sets nothing"):
        load_migration_settings()
    meanwhile = list(caplog.messages)
    dotenv_values(stream=StringIO("AUTH_SECRET: secret\n"))

    assert (meanwhile, len(caplog.messages)) == ([], 1)


@pytest.mark.parametrize(("comment", "encoding"), [("A", "utf-16"), ("A", "utf-16-le"), ("Ä", "latin-1")])
def test_file_that_is_not_utf8_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, comment: str, encoding: str
) -> None:
    """PowerShell's `echo` writes UTF-16; without its mark that is UTF-8, of names that nobody knows."""
    (tmp_path / ".env").write_text(f"# {comment}\nAUTH_SECRET={SECRET}\n", encoding=encoding)

    sentence = refusal(monkeypatch)
    with pytest.raises(SettingsError) as of_the_job:
        load_migration_settings()

    assert sentence == str(of_the_job.value) == ".env is not UTF-8 text; save it as UTF-8."


def test_file_of_another_name_is_named(tmp_path: Path) -> None:
    """The sentence names the file that was read."""
    (tmp_path / "service.env").write_text(f"AUTH_SECRET={SECRET}\n", encoding="utf-16")

    with pytest.raises(SettingsError, match=r"^service\.env is not UTF-8 text"):
        Settings(_env_file="service.env")


def test_file_that_is_not_read_is_not_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Settings that are made without a `.env` are not held up by one."""
    (tmp_path / ".env").write_text("no line of it\n")
    monkeypatch.setenv("DATABASE_URL", URL)

    assert Settings(_env_file=None).auth_secret is None


def test_secret_and_file_together_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody has to guess which of the two counts."""
    sentence = refusal(monkeypatch, AUTH_SECRET=SECRET, AUTH_SECRET_FILE=tmp_path / "x")

    assert sentence == "Both AUTH_SECRET and AUTH_SECRET_FILE are set; keep one."


def test_environment_wins_over_dotenv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """.env is read, and what is set outside is stronger."""
    (tmp_path / ".env").write_text("DATABASE_POOL_SIZE=3\nDATABASE_MAX_OVERFLOW=4\nAPP_PORT=1\n", encoding="utf-8")

    settings = load(monkeypatch, DATABASE_POOL_SIZE=6)

    assert (settings.primary.pool_size, settings.primary.max_overflow) == (6, 4)


def found_by_dns(monkeypatch: pytest.MonkeyPatch, **variables: Any) -> dict[str, Any]:
    """Return variables by which DNS finds the replicas."""
    monkeypatch.setenv("DATABASE_REPLICA_URL", "postgresql://app_ro:hunter2@replicas.example:5432/lifeguard")
    return {"DATABASE_REPLICA_DISCOVERY": "dns"} | variables


def test_replicas_that_dns_finds_have_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place has a pool of the replica's settings; their number is a setting, and one is plainly "replica"."""
    three = load(monkeypatch, **found_by_dns(monkeypatch, DATABASE_REPLICA_POOL_SIZE=4))
    one = load(monkeypatch, DATABASE_REPLICA_MAX_POOLS=1)

    assert list(three.pools) == ["primary", "replica-1", "replica-2", "replica-3", "analytics"]
    assert {three.pools[f"replica-{number}"].pool_size for number in (1, 2, 3)} == {4}
    assert list(one.pools) == ["primary", "replica", "analytics"]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        (
            {"DATABASE_REPLICA_DISCOVERY": "off", "DATABASE_REPLICA_MAX_POOLS": 2},
            "MAX_POOLS is about replicas that DNS",
        ),
        ({"DATABASE_REPLICA_DISCOVERY": "off", "DATABASE_REPLICA_ZONES": "a=b"}, "ZONES is about replicas that DNS"),
        ({"DATABASE_REPLICA_URL": f"{REPLICA},{REPLICA}"}, "takes one DATABASE_REPLICA_URL"),
        ({"DATABASE_REPLICA_URL": ""}, "takes one DATABASE_REPLICA_URL"),
        ({"DATABASE_REPLICA_URL": "postgresql://a:b@127.0.0.1/x"}, r"has 127\.0\.0\.1 for its host; write a name"),
        ({"DATABASE_REPLICA_URL": "postgresql://a:b@/x?host=/run"}, "has /run for its host; write a name"),
        ({"DATABASE_REPLICA_PROFILE": "sleeping"}, "keeps them awake"),
        ({"DATABASE_REPLICA_DISCOVERY": "srv"}, "set DATABASE_ANALYTICS_URL"),
        ({"DATABASE_REPLICA_ZONES": "10.0.0.0/8=a"}, "without DATABASE_ZONE"),
        ({"DATABASE_ZONE": "a"}, "DATABASE_ZONE a is the zone of no entry"),
        (
            {"DATABASE_ZONE": "a", "DATABASE_REPLICA_ZONES": "nonsense"},
            "DATABASE_REPLICA_ZONES: 'nonsense' is no network",
        ),
    ],
)
def test_discovery_that_cannot_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, Any], reason: str
) -> None:
    """What contradicts the lookup of replicas ends the start, with a sentence that says what to do."""
    sentence = refusal(monkeypatch, **found_by_dns(monkeypatch, **variables))

    assert re.search(reason, sentence), sentence
    assert "hunter2" not in sentence


def test_records_take_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dnspython the sentence says how to get it; with it, SRV records are looked up."""
    url = "postgresql://app_ro:hunter2@_postgresql._tcp.orders.example/lifeguard"
    variables = {
        "DATABASE_REPLICA_URL": url,
        "DATABASE_REPLICA_DISCOVERY": "srv",
        "DATABASE_ANALYTICS_URL": REPLICA,
        "DATABASE_ZONE": "a",
        "DATABASE_REPLICA_ZONES": "*.a.example=a",
    }
    settings = load(monkeypatch, **variables)
    monkeypatch.setitem(sys.modules, "dns", None)

    assert settings.zones == {"*.a.example": "a"}
    assert "pip install 'pglifeguard[dns]'" in refusal(monkeypatch)


def test_short_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret that could be guessed does not sign tokens; it is not repeated either."""
    sentence = refusal(monkeypatch, AUTH_SECRET="short-one")

    assert sentence.startswith("AUTH_SECRET: has fewer than 32 characters")
    assert "short-one" not in sentence


def test_production_lists_everything_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENVIRONMENT=production refuses an open service and development passwords, all of them at once."""
    sentence = refusal(
        monkeypatch,
        ENVIRONMENT="production",
        DATABASE_URL="postgresql://app_rw:development-app-rw@primary/x",
        DATABASE_REPLICA_URL="postgresql://app_ro:development-app-ro@replica/x",
        LISTEN_URL="postgresql://app_rw:development-app-rw@primary/x",
    )

    assert sentence == (
        "ENVIRONMENT=production refuses to start: DATABASE_URL holds a development password; DATABASE_REPLICA_URL "
        "holds a development password; DATABASE_ANALYTICS_URL holds a development password; LISTEN_URL holds a "
        "development password; AUTH_SECRET is not set, "
        "and every route would be open."
    )


def test_production_refuses_a_development_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret from an example signs nothing in production."""
    assert "AUTH_SECRET is a development secret" in refusal(
        monkeypatch, ENVIRONMENT="production", AUTH_SECRET="development-" + SECRET
    )


def test_production_starts_with_real_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real passwords and a real secret are let through."""
    assert load(monkeypatch, ENVIRONMENT="production", AUTH_SECRET=SECRET).environment == "production"


def test_migrations_go_to_their_own_url_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """MIGRATIONS_URL, else DATABASE_URL, else a sentence."""
    fallback = MigrationSettings().primary
    monkeypatch.setenv("MIGRATIONS_URL", "postgres://owner:x@direct/x")

    assert fallback.location == "primary:5432/lifeguard"
    assert MigrationSettings().primary.location == "direct:5432/x"
    monkeypatch.delenv("MIGRATIONS_URL")
    monkeypatch.delenv("DATABASE_URL")
    with pytest.raises(SettingsError, match="Neither MIGRATIONS_URL nor DATABASE_URL"):
        load_migration_settings()


def test_migrations_read_secret_files_and_replicas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The migration job takes the same secrets in the same forms as the service."""
    (tmp_path / "url").write_text("postgres://owner:x@direct/x\n", encoding="utf-8")
    monkeypatch.setenv("MIGRATIONS_URL_FILE", str(tmp_path / "url"))
    alone = load_migration_settings().replicas
    monkeypatch.setenv("DATABASE_REPLICA_URL", f"{REPLICA},{REPLICA}")

    settings = load_migration_settings()

    assert settings.primary.parameters.user == "owner"
    assert (alone, [replica.server for replica in settings.replicas]) == ([], ["replica:5432"] * 2)
    assert settings.console is None


def test_migrations_are_patient_and_have_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A statement takes as long as a table is large; what the URL says of name and timeout counts."""
    plain = load_migration_settings().primary
    monkeypatch.setenv("MIGRATIONS_URL", f"{URL}?connect_timeout=9&application_name=job")
    told = load_migration_settings().primary

    assert (plain.application_name, plain.connect_timeout_seconds) == ("lifeguard-migrations", 5)
    assert (told.application_name, told.connect_timeout_seconds) == ("job", 9)
    assert plain.command_timeout_seconds > 86_400


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("MIGRATIONS_URL", "mysql://a:hunter2@b/c", "has the scheme 'mysql'"),
        ("DATABASE_URL", "postgresql://a:hunter2@b/c?require_auth=none", "sslmode=verify-full"),
        ("DATABASE_URL", "postgresql://a:hunter2@b/c?target_session_attrs=standby", "target_session_attrs=standby"),
        ("DATABASE_REPLICA_URL", f"{REPLICA},postgresql://a:hunter2@b", "names no database"),
        ("DATABASE_REPLICA_URL", f"{REPLICA}?target_session_attrs=primary", "target_session_attrs=primary"),
        ("PGBOUNCER_ADMIN_URL", "postgresql:///hunter2", "names no host"),
        ("MIGRATIONS_WAIT_SECONDS", "-1", "greater than or equal to 0"),
    ],
)
def test_what_is_wrong_for_migrations_is_said_before_they_run(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    """Each URL of the job is checked before the schema changes, and no sentence holds a password."""
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError, match=reason) as refused:
        load_migration_settings()

    assert str(refused.value).startswith(f"{name}: ")
    assert "hunter2" not in str(refused.value)


def test_replicas_may_be_written_with_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A space after a comma and a comma at the end are no part of a URL."""
    settings = load(monkeypatch, DATABASE_REPLICA_URL=f"{REPLICA}, {REPLICA} ,")

    assert len(settings.replicas) == 2
    assert settings.replicas[0] == settings.replicas[1]


def test_replica_with_a_wrong_scheme_is_quoted_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is wrong is named, and not one that nobody wrote."""
    assert "'mysql'" in refusal(monkeypatch, DATABASE_REPLICA_URL=f"{REPLICA},mysql://a/x")


def test_replica_of_several_hosts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The LSN of one host says nothing of the rows of another, so each replica is a URL of its own."""
    sentence = refusal(monkeypatch, DATABASE_REPLICA_URL="postgresql://app:hunter2@/x?host=a:1&host=b:2")

    assert "DATABASE_REPLICA_URL names several hosts in one URL" in sentence
    assert "hunter2" not in sentence


def test_folder_of_metrics_must_be_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """prometheus-client does not read .env: it would count for one process, and /metrics would show an empty folder."""
    (tmp_path / ".env").write_text(f"PROMETHEUS_MULTIPROC_DIR={tmp_path}\n", encoding="utf-8")

    assert "export it to the environment" in refusal(monkeypatch)
    assert load(monkeypatch, PROMETHEUS_MULTIPROC_DIR=tmp_path).prometheus_multiproc_dir == tmp_path
    assert "there is no directory" in refusal(monkeypatch, PROMETHEUS_MULTIPROC_DIR=tmp_path / "absent")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"NAME": "a b"}, "CONSISTENCY_COOKIE_NAME"),
        ({"PATH": "billing"}, "CONSISTENCY_COOKIE_PATH"),
        ({"PATH": "/;x"}, "CONSISTENCY_COOKIE_PATH"),
        ({"DOMAIN": "a;b"}, "CONSISTENCY_COOKIE_DOMAIN"),
        ({"NAME": "__Secure-a"}, "CONSISTENCY_COOKIE_SECURE=true"),
        ({"NAME": "__Host-a", "SECURE": "true"}, "CONSISTENCY_COOKIE_PATH=/"),
        ({"NAME": "__Host-a", "SECURE": "true", "PATH": "/", "DOMAIN": "a.b"}, "no CONSISTENCY_COOKIE_DOMAIN"),
        ({"NAME": "__Host-a", "SECURE": "true", "PATH": "/"}, None),
    ],
)
def test_cookie_that_browsers_refuse_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sentence: str | None
) -> None:
    """A cookie that no browser would keep is a mistake at the start."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://a@b/c")
    for name, value in variables.items():
        monkeypatch.setenv(f"CONSISTENCY_COOKIE_{name}", value)

    if sentence is None:
        assert Settings().consistency_cookie_path == "/"
        return
    with pytest.raises(SettingsError, match=sentence):
        Settings()
