"""A typing error in a variable's name ends the start, and what a platform has put into the environment does not."""

import re
from pathlib import Path

import pytest

from app.settings import Settings
from migrations.settings import load_migration_settings
from pglifeguard.environment import SettingsError

URL = "postgresql://app:hunter2@primary:5432/lifeguard"
# What Kubernetes writes for a service called "database", "database-replica" or "database-pool", Docker for a link, and
# Railway, Neon, Vercel, Heroku, Render, Fly and others for a database.
INJECTED = """
    DATABASE_PORT DATABASE_HOST DATABASE_NAME DATABASE_USER DATABASE_USERNAME DATABASE_PASSWORD DATABASE_USER_FILE
    DATABASE_SERVICE_HOST DATABASE_SERVICE_PORT DATABASE_SERVICE_PORT_POSTGRES DATABASE_PORT_5432_TCP
    DATABASE_PORT_5432_TCP_ADDR DATABASE_PORT_5432_TCP_PORT DATABASE_PORT_5432_TCP_PROTO DATABASE_REPLICA_SERVICE_HOST
    DATABASE_REPLICA_PORT_5432_TCP_ADDR DATABASE_REPLICA_HOST DATABASE_ANALYTICS_SERVICE_PORT DATABASE_POOL_SERVICE_HOST
    DATABASE_POOL_PORT_6432_TCP_ADDR DATABASE_URL_UNPOOLED DATABASE_UNPOOLED_URL DATABASE_PRIVATE_URL
    DATABASE_PUBLIC_URL DATABASE_POSTGRES_URL DATABASE_BACKUP_URL DATABASE_2_URL DATABASE_URL_2
    DATABASE_DIRECT_URL DATABASE_URL_NON_POOLING DATABASE_PRISMA_URL DATABASE_JDBC_URL DATABASE_URI DATABASE_DSN
    DATABASE_CA_CERT DATABASE_SSL_MODE DATABASE_SCHEMA DATABASE_ENGINE DATABASE_TYPE DATABASE_REGION
    DATABASE_SECRET_ARN DATABASE_CONNECTION_STRING DATABASE_INSTANCE_UNIX_SOCKET DATABASE_SHADOW_URL DATABASE_DB
    database_port
""".split()  # noqa: SIM905  # A list of quoted words is four times as long.
TYPING_ERRORS = {
    "DATABASE_POOLSIZE": "DATABASE_POOL_SIZE",
    "DATABASE_POOL_SIZES": "DATABASE_POOL_SIZE",
    "DATABASE_POOL_SZIE": "DATABASE_POOL_SIZE",
    "DATABASE_SIZE_POOL": "DATABASE_POOL_SIZE",
    "database_poolsize": "DATABASE_POOL_SIZE",
    "DATABASE__POOL_SIZE": "DATABASE_POOL_SIZE",
    "DATABASE_POOL_REPLICA_SIZE": "DATABASE_REPLICA_POOL_SIZE",
    "DATABASE_MAXOVERFLOW": "DATABASE_MAX_OVERFLOW",
    "DATABASE_OVERFLOW_MAX": "DATABASE_MAX_OVERFLOW",
    "DATABASE_POOL_MAX_OVERFLOW": "DATABASE_MAX_OVERFLOW",
    "DATABASE_CONNECT_TIMEOUT": "DATABASE_CONNECT_TIMEOUT_SECONDS",
    "DATABASE_POOL_IDLE_SECOND": "DATABASE_POOL_IDLE_SECONDS",
    "DATABASE_POOL_TIMEOUT_SECONDS": "DATABASE_POOL_TIMEOUT",
    "DATABASE_STATEMENT_TIMEOUT_SECONDS": "STATEMENT_TIMEOUT_SECONDS",
    "DATABASE_REPLICA_URLS": "DATABASE_REPLICA_URL",
    "DATABASE_REPLICA_URI": "DATABASE_REPLICA_URL",
    "DATABASE_REPLCIA_URL": "DATABASE_REPLICA_URL",
    "DATABASE_URL_REPLICA": "DATABASE_REPLICA_URL",
    "DATABASE_REPLICAS_URL": "DATABASE_REPLICA_URL",
    "DATABASE_ANALYTIC_URL": "DATABASE_ANALYTICS_URL",
    "DATABSE_REPLICA_URL": "DATABASE_REPLICA_URL",
    "DATABASES_POOL_SIZE": "DATABASE_POOL_SIZE",
    "DATABASE_URL_FIEL": "DATABASE_URL_FILE",
    "DATABASE_POOLSIZE_FILE": "DATABASE_POOL_SIZE_FILE",
    "AUTH_SECRT": "AUTH_SECRET",
    "AUTH_SECRETS": "AUTH_SECRET",
    "AUTHSECRET": "AUTH_SECRET",
    "AUTH_SECRT_FILE": "AUTH_SECRET_FILE",
    "ENVIROMENT": "ENVIRONMENT",
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start from an empty directory, so that no .env is there, and from DATABASE_URL alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", URL)


@pytest.mark.parametrize("name", INJECTED)
def test_platforms_variable_is_told_and_ignored(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The service starts, and one sentence names what it has not read; there is no guess in it."""
    monkeypatch.setenv(name, "tcp://10.0.0.1:5432")

    (sentence,) = Settings().ignored_variables

    assert sentence.startswith(f"{name.upper()} is not a setting of this service.")
    assert "Did you mean" not in sentence
    assert "10.0.0.1" not in sentence


@pytest.mark.parametrize(("name", "meant"), TYPING_ERRORS.items())
def test_typing_error_ends_the_start(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    """A setting that would stay at its default in silence is named, as it should be written."""
    monkeypatch.setenv(name, "5")

    with pytest.raises(SettingsError, match=rf"^{name.upper()} is not a setting .* Did you mean {meant}\?"):
        Settings()


@pytest.mark.parametrize("name", ["DATABASE_POOLSIZE", "AUTH_SECRT"])
def test_typing_error_in_dotenv_is_one(tmp_path: Path, name: str) -> None:
    """The file is read as the environment is."""
    (tmp_path / ".env").write_text(f"{name}=5\n", encoding="utf-8")

    with pytest.raises(SettingsError, match=f"{name} is not a setting"):
        Settings()


def test_every_typing_error_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start is enough to see them all."""
    monkeypatch.setenv("DATABASE_POOLSIZE", "5")
    monkeypatch.setenv("DATABASE_MAXOVERFLOW", "5")

    with pytest.raises(SettingsError) as refused:
        Settings()

    assert [line.partition(" ")[0] for line in str(refused.value).splitlines()] == [
        "DATABASE_MAXOVERFLOW",
        "DATABASE_POOLSIZE",
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("LOG_LEVL", "LOG_LEVEL"), ("LOGLEVEL", "LOG_LEVEL"), ("WORKER", "WORKERS"), ("TRUSTED_PROXY", "TRUSTED_PROXIES")],
)
def test_others_variables_are_not_refused(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    """Outside DATABASE_* the environment is everybody's: what looks like an error of ours is told, no more."""
    monkeypatch.setenv(name, "x")

    (sentence,) = Settings().ignored_variables

    assert f"{name} is not a setting of this service. Did you mean {meant}?" in sentence


def test_variable_beside_the_setting_that_it_resembles_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has set AUTH_SECRET did not mistype it, and AUTHSECRET is somebody else's."""
    monkeypatch.setenv("AUTH_SECRET", "0123456789abcdef0123456789abcdef")
    monkeypatch.setenv("AUTHSECRET", "x")

    assert Settings().ignored_variables == ()


@pytest.mark.parametrize(
    "name", ["AUTH0_SECRET", "OAUTH_SECRET", "HOSTNAME", "HOSTTYPE", "LOGNAME", "POSTGRES_PASSWORD"]
)
def test_neighbours_are_not_mentioned(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Names that other programs use are not taken for ours."""
    monkeypatch.setenv(name, "x")

    assert Settings().ignored_variables == ()


def test_nothing_in_the_example_is_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose's own variables, which lie in the same .env, are no typing errors."""
    example = (Path(__file__).parents[2] / ".env.example").read_text(encoding="utf-8")
    for name in re.findall(r"^# ([A-Z_]+)=", example, re.MULTILINE):
        if name.lower() not in Settings.model_fields and not name.startswith(("DATABASE_", "MIGRATIONS_WAIT")):
            monkeypatch.setenv(name, "x")

    assert Settings().ignored_variables == ()


@pytest.mark.parametrize(
    ("name", "meant"), [("MIGRATION_URL", "MIGRATIONS_URL"), ("PGBOUNCER_ADMIN_URI", "PGBOUNCER_ADMIN_URL")]
)
def test_migrations_go_nowhere_else_by_a_typing_error(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    """DATABASE_URL is not migrated because somebody mistyped where to go."""
    monkeypatch.setenv(name, URL)

    with pytest.raises(SettingsError, match=f"Did you mean {meant}"):
        load_migration_settings()
