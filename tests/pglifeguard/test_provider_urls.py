"""URLs as providers and tools hand them out lead where they say, in every place that takes one, and as libpq has it."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs

import certifi
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from typer.testing import CliRunner

from app.cli import cli
from app.settings import Settings
from migrations.settings import load_migration_settings
from pglifeguard.cli import checked
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.database_url import ConnectionParameters
from pglifeguard.environment import SettingsError
from pglifeguard.tls import FILES
from tests import tls
from tests.pglifeguard.test_database_url import LIBPQ
from tests.provider_urls import REFUSED, TAKEN, Refused, Taken

PLAIN = "postgresql://somebody@elsewhere/x"
SERVICES = """
# Not this one.
[archive]
host=archive.internal

[orders]
# Nor this line.
host=pg1.internal
port=5433
user=app
password=hunter2
dbname=orders
sslmode=require

[last]
host=last.internal
"""
# Pieces of the password, and of what it is split into.
SECRET = ("hunter2", "ter2", "t?er2", "hun")
# Where a URL is written, and what reads it there.
READERS: dict[str, Callable[[], DatabaseSettings | None]] = {
    "DATABASE_URL": lambda: Settings().primary,
    "DATABASE_ANALYTICS_URL": lambda: Settings().analytics,
    "DATABASE_REPLICA_URL": lambda: Settings().replicas[0],
    "LISTEN_URL": lambda: Settings().listening,
    "DATABASE_URL, by doctor": lambda: checked(Settings).primary,
    "MIGRATIONS_URL": lambda: load_migration_settings().primary,
    "DATABASE_REPLICA_URL, by migrations": lambda: load_migration_settings().replicas[0],
    "PGBOUNCER_ADMIN_URL": lambda: load_migration_settings().console,
}
OF_STANDBYS = {"DATABASE_REPLICA_URL", "DATABASE_REPLICA_URL, by migrations"}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Give what is in the files of certificates, by name; without openssl there is none of a client."""
    first, end, _ = Path(certifi.where()).read_text(encoding="utf-8").partition("-----END CERTIFICATE-----\n")
    files = dict.fromkeys(("global-bundle.pem", "ca.pem", "root.crt"), first + end)
    if tls.program() is not None:
        own = tls.Authority(tmp_path_factory.mktemp("urls") / "authority").issue("app")
        files |= {"app.crt": own.certificate.read_text(encoding="ascii"), "app.key": own.key.read_text("ascii")}
    return files


@pytest.fixture(autouse=True)
def certs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certificates: dict[str, str]) -> Path:
    """Start from an empty directory and home, and give the folder that stands for /certs/."""
    folder = tmp_path / "certs"
    folder.mkdir()
    for name, content in certificates.items():
        (folder / name).write_text(content, encoding="ascii")
    (folder / "open").touch(mode=0o644)
    (folder / "pgpass").touch(mode=0o600)
    (folder / "pg_service.conf").write_text(SERVICES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PGSYSCONFDIR", str(tmp_path))
    for name in {name for name in os.environ if name.startswith("PG") and name != "PGSYSCONFDIR"}:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DATABASE_URL", PLAIN)
    return folder


def home_certificate(case: Taken, home: Path) -> None:
    """Put the authority where libpq looks for it, for a URL that relies on that."""
    if case.tls == "verify-full root.crt":
        (home / ".postgresql").mkdir()
        (home / ".postgresql/root.crt").touch()


def told_of_tls(parameters: ConnectionParameters) -> str:
    """Say what the driver is told of TLS, as the table does."""
    arguments = parameters.arguments()
    if arguments["ssl"] is not None:
        return "verify-full system"
    if all(host.is_socket for host in parameters.hosts):
        assert arguments["dsn"] == "postgresql://"
        return "none"
    told = {name: values[-1] for name, values in parse_qs(arguments["dsn"].partition("?")[2]).items()}
    mode = told.get("sslmode", "prefer")
    authority = told.get("sslrootcert", "root.crt" if mode.startswith("verify") else "")
    return f"{mode} {authority}".strip()


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.of)
def test_url_leads_where_it_says_in_every_place(
    monkeypatch: pytest.MonkeyPatch, certs: Path, tmp_path: Path, case: Taken
) -> None:
    """The service, `doctor`, migrations, LISTEN and PgBouncer's console read a URL alike, and send nothing else."""
    home_certificate(case, tmp_path)
    if "app.crt" in case.url and not (certs / "app.crt").exists():
        pytest.skip("openssl is not installed: apt-get install openssl")
    several = case.hosts.count(",") > 0
    for place, read in READERS.items():
        if (case.kind == "standby") != (place in OF_STANDBYS) and case.kind is not None:
            continue  # A kind of server is wanted where there is one.
        if place in OF_STANDBYS and several and "migrations" not in place:
            continue  # A replica is one host.
        variable = place.partition(",")[0]
        with monkeypatch.context() as environment:
            environment.setenv(variable, case.url.replace("/certs", str(certs)))
            if place == "PGBOUNCER_ADMIN_URL" and case.kind is not None:
                with pytest.raises(SettingsError, match="PGBOUNCER_ADMIN_URL: has target_session_attrs"):
                    read()
                continue
            if place == "DATABASE_ANALYTICS_URL" and case.kind is not None:
                continue
            settings = read()

        assert settings is not None
        read_as = settings.parameters
        assert (read_as.server, read_as.database) == (case.hosts, case.database), place
        assert (read_as.user, read_as.password) == (case.user, case.password), place
        assert told_of_tls(read_as).replace(str(certs), "/certs") == case.tls, place
        assert read_as.server_settings == ({} if case.sent is None else {"options": case.sent}), place
        assert read_as.settings == case.settings, place
        assert read_as.target_session_attrs == case.kind, place


def test_there_are_enough_of_them() -> None:
    """Each URL and each name is in the table once."""
    urls, names = {case.url for case in (*TAKEN, *REFUSED)}, [case.of for case in (*TAKEN, *REFUSED)]

    assert len(urls) == len(set(names)) == len(names) >= 110


def test_urls_of_the_page_are_in_the_table() -> None:
    """docs/providers.md shows no URL that is not read here, and each of its lines is one that is taken."""
    page = (Path(__file__).parents[2] / "docs/providers.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\bpostgres(?:ql)?://\S+", page))

    assert len(shown) > 20
    assert shown <= {case.url.replace("hunter2", "password") for case in TAKEN}


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.of)
def test_url_is_read_as_libpq_reads_it(case: Taken) -> None:
    """What libpq takes leads to the same place; what it does not is another client's word."""
    # Not `urlsplit`: from Python 3.13 on, it refuses two addresses of IPv6.
    names = [pair.partition("=")[0] for pair in case.url.partition("?")[2].split("&")]
    try:
        theirs = conninfo_to_dict(case.url)
    except psycopg.ProgrammingError:
        others = case.url.partition(":")[0] not in {"postgres", "postgresql"}
        # `servicefile` is a parameter in a URL from version 19 on.
        assert others or not set(names) <= {*LIBPQ, ""} or "servicefile" in names
        return
    if "service" in theirs:  # libpq reads the file when it connects.
        return
    addresses = str(theirs.get("host") or theirs.get("hostaddr")).split(",")
    ports = str(theirs.get("port") or "").split(",")
    ports = ports * len(addresses) if len(ports) == 1 else ports
    hosts = ",".join(
        f"{f'[{name}]' if ':' in name and name[0] != '/' else name}:{port or 5432}"
        for name, port in zip(addresses, ports, strict=True)
    )
    said = {
        "application_name": theirs.get("application_name") or theirs.get("fallback_application_name"),
        "connect_timeout_seconds": theirs.get("connect_timeout") and float(str(theirs["connect_timeout"])),
    }

    assert (hosts, theirs["dbname"]) == (case.hosts, case.database)
    assert (theirs.get("user"), theirs.get("password")) == (case.user, case.password)
    assert (theirs.get("options"), theirs.get("target_session_attrs")) == (case.sent, case.kind)
    assert {name: value for name, value in said.items() if value is not None} == case.settings
    if case.tls == "none":
        return
    mode, _, authority = case.tls.partition(" ")
    if theirs.get("channel_binding") == "require":  # Met by more.
        assert mode == "verify-full"
    elif theirs.get("sslrootcert") == "system":  # libpq's default is stronger then.
        assert (mode, authority) == ("verify-full", "system")
    else:
        # libpq takes node-postgres's mode apart, and refuses it when it connects.
        mode_of_theirs = str(theirs.get("sslmode", "prefer")).replace("no-verify", "require")
        authority_of_theirs = theirs.get("sslrootcert") or ("root.crt" if "verify" in mode else "")
        assert (mode_of_theirs, authority_of_theirs) == (mode, authority)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.of)
def test_url_that_is_refused_says_what_to_write(monkeypatch: pytest.MonkeyPatch, certs: Path, case: Refused) -> None:
    """Every place says the same sentence, with the name of its own variable and without a piece of the password."""
    url = case.url.replace("/certs", str(certs))
    sentences = set()
    for place, read in READERS.items():
        if place == "DATABASE_URL, by doctor":
            result = CliRunner().invoke(cli, ["doctor"], env={"DATABASE_URL": url})
            assert result.exit_code == 2
            said = result.output
        else:
            with monkeypatch.context() as environment:
                environment.setenv(place.partition(",")[0], url)
                with pytest.raises(SettingsError) as refused:
                    read()
            said = str(refused.value)
        variable, _, sentence = said.strip().partition(": ")

        assert variable == place.partition(",")[0]
        sentences.add(sentence)
        assert not [piece for piece in SECRET if piece in said], said

    assert len(sentences) == 1, sentences
    assert case.sentence in sentences.pop()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"PGSSLMODE": "require"}, "require"),
        ({"PGSSLMODE": "no-verify"}, "require"),
        ({"PGSSLROOTCERT": "system"}, "verify-full system"),
        ({"PGSSLMODE": "require", "PGCHANNELBINDING": "require"}, "verify-full system"),
    ],
)
def test_environment_of_libpq_demands_the_same(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], told: str
) -> None:
    """What libpq's variables demand of TLS and of the login counts like a parameter."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert told_of_tls(DatabaseSettings(url="postgresql://app@db/x").parameters) == told


def test_url_is_stronger_than_the_environment_of_libpq(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in libpq."""
    monkeypatch.setenv("PGSSLMODE", "require")

    assert told_of_tls(DatabaseSettings(url="postgresql://app@db/x?sslmode=disable").parameters) == "disable"


@pytest.mark.parametrize(
    ("name", "value"),
    [("PGREQUIREAUTH", "scram-sha-256"), ("PGGSSENCMODE", "require"), ("PGSSLMODE", "hunter2")],
)
def test_environment_of_libpq_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A demand that cannot be met is not forgotten because it stands in another variable."""
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError, match=f"DATABASE_URL: is completed by {name} of the environment, which") as told:
        Settings()
    assert "hunter2" not in str(told.value)


def test_files_are_asked_for_at_the_start(certs: Path) -> None:
    """Each file that a URL may name is looked at, so that a login does not fail for it later."""
    for name in (*FILES, "passfile"):
        with pytest.raises(ValueError, match=f"as {name}, which is not there or cannot be read"):
            DatabaseSettings(url=f"postgresql://app@db/x?sslmode=require&{name}={certs}/nowhere")


def test_variable_is_stronger_than_what_a_url_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL's word for a setting counts where the variable is not set; LISTEN_URL's is its own."""
    said = "pgbouncer=true&connection_limit=7&pool_timeout=9&connect_timeout=8&application_name=told"
    monkeypatch.setenv("DATABASE_URL", f"{PLAIN}?{said}")
    monkeypatch.setenv("LISTEN_URL", f"{PLAIN}?application_name=listener&connect_timeout=6")
    alone = Settings()
    monkeypatch.setenv("DATABASE_POOL_SIZE", "3")
    monkeypatch.setenv("DATABASE_STATEMENT_CACHE_SIZE", "30")
    both = Settings()

    assert (alone.primary.pool_size, alone.primary.max_overflow, alone.primary.pool_timeout) == (7, 0, 9)
    assert (alone.primary.statement_cache_size, both.primary.statement_cache_size) == (0, 30)
    assert both.primary.pool_size == 3
    assert alone.listening is not None
    assert (alone.listening.application_name, alone.listening.connect_timeout_seconds) == ("listener", 6)
    assert alone.listening.pool_size == 7


def test_service_is_looked_up_where_libpq_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The user's own file, that of PGSERVICEFILE, and the system's for what these do not describe."""

    def server() -> str:
        return DatabaseSettings(url="postgresql:///x?service=one").server

    def write(name: str) -> None:
        (tmp_path / name).write_text(f"[one]\nhost={name.strip('.')}\nuser=a\n", encoding="utf-8")

    write("pg_service.conf")
    of_the_system = server()
    write(".pg_service.conf")
    own = server()
    write("third")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "third"))

    assert (of_the_system, own, server()) == ("pg_service.conf:5432", "pg_service.conf:5432", "third:5432")


def test_line_of_a_service_that_cannot_be_read_is_said_by_its_number(tmp_path: Path) -> None:
    """The line itself may hold the password."""
    (tmp_path / "services").write_text("[one]\nhost=db\npassword hunter2\n", encoding="utf-8")

    with pytest.raises(ValueError, match=r"line 3 of .* is not name=value") as refused:
        DatabaseSettings(url=f"postgresql:///x?service=one&servicefile={tmp_path}/services")
    assert "hunter2" not in str(refused.value)


def test_order_of_hosts_is_drawn_by_lot() -> None:
    """Of many services each begins somewhere else, and the place is shown as the URL has it."""
    url = "postgresql://app@a,b,c/x?load_balance_hosts="
    drawn, kept = DatabaseSettings(url=f"{url}random").parameters, DatabaseSettings(url=f"{url}disable").parameters

    first = {drawn.hosts_to_try[0].name for _ in range(200)}

    assert first == {"a", "b", "c"}
    assert kept.hosts_to_try == drawn.hosts
    assert drawn.server == "a:5432,b:5432,c:5432"
