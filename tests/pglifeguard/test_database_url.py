"""Every parameter of libpq in a URL is taken, or refused with a sentence; none reaches the server by accident."""

import ssl
from pathlib import Path

import certifi
import pytest

from pglifeguard.database_url import ConnectionParameters, Host, KeepAlive, parse_url
from pglifeguard.url_parameters import PARAMETERS

URL = "postgresql://app:hunter2@db/x"
# `PQconndefaults()` of PostgreSQL 18, and `servicefile` of 19.
LIBPQ = [
    "application_name",
    "channel_binding",
    "client_encoding",
    "connect_timeout",
    "dbname",
    "fallback_application_name",
    "gssdelegation",
    "gssencmode",
    "gsslib",
    "host",
    "hostaddr",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "krbsrvname",
    "load_balance_hosts",
    "max_protocol_version",
    "min_protocol_version",
    "oauth_client_id",
    "oauth_client_secret",
    "oauth_issuer",
    "oauth_scope",
    "options",
    "passfile",
    "password",
    "port",
    "replication",
    "require_auth",
    "requirepeer",
    "requiressl",
    "scram_client_key",
    "scram_server_key",
    "service",
    "servicefile",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslcert",
    "sslcertmode",
    "sslcompression",
    "sslcrl",
    "sslcrldir",
    "sslkey",
    "sslkeylogfile",
    "sslmode",
    "sslnegotiation",
    "sslpassword",
    "sslrootcert",
    "sslsni",
    "target_session_attrs",
    "tcp_user_timeout",
    "user",
]


def refusal(url: str) -> str:
    """Return why a URL is refused."""
    with pytest.raises(ValueError, match=r"\w") as refused:
        parse_url(url)
    assert "hunter2" not in str(refused.value)
    return str(refused.value)


def with_(parameters: str) -> ConnectionParameters:
    """Parse a URL with these parameters."""
    return parse_url(f"{URL}?{parameters}")


def test_every_parameter_of_libpq_is_decided_about() -> None:
    """None is left to the driver, which would send it to the server."""
    assert set(LIBPQ) <= PARAMETERS


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_nothing_but_options_is_sent_to_the_server(name: str) -> None:
    """Whatever a parameter's value, it is taken and understood, or refused by its name."""
    said, sent = "", set[str]()
    try:
        sent = set(with_(f"{name}=1").server_settings)
    except ValueError as refused:
        said = str(refused)

    assert f"has the parameter {name}" in said or f"{name}=1" in said or sent == {"options"} & {name}


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"])
def test_driver_gets_what_concerns_tls(mode: str) -> None:
    """The driver reads TLS's parameters from the URL that it is given, which holds nothing else."""
    arguments = with_(f"sslmode={mode}&sslrootcert=/a%20b.crt&application_name=x").arguments()

    assert arguments["dsn"] == f"postgresql://?sslmode={mode}&sslrootcert=%2Fa+b.crt"
    assert (arguments["user"], arguments["password"], arguments["database"]) == ("app", "hunter2", "x")
    assert arguments["ssl"] is None


def test_authorities_of_the_system_are_a_context() -> None:
    """`sslrootcert=system` is no file: the name and the certificate are checked against the system's authorities."""
    arguments = with_("sslmode=verify-full&sslrootcert=system&ssl_max_protocol_version=TLSv1.3").arguments()

    context = arguments["ssl"]
    assert isinstance(context, ssl.SSLContext)
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)
    assert (context.minimum_version, context.maximum_version) == (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
    assert arguments["dsn"] == "postgresql://"


def test_revoked_certificates_are_refused_with_the_authorities_of_the_system() -> None:
    """The list that `sslcrl` names is checked for every certificate of the chain."""
    context = with_(f"sslmode=verify-full&sslrootcert=system&sslcrl={certifi.where()}").arguments()["ssl"]

    assert context.verify_flags & ssl.VERIFY_CRL_CHECK_CHAIN


@pytest.mark.parametrize("name", ["sslcert", "sslcrl"])
def test_authorities_of_the_system_go_with_files_of_ones_own(name: str, tmp_path: Path) -> None:
    """A client's certificate and a list of revoked ones are read beside the system's authorities."""
    (tmp_path / "file").write_text("no certificate", encoding="utf-8")

    with pytest.raises(ssl.SSLError):
        with_(f"sslmode=verify-full&sslrootcert=system&{name}={tmp_path}/file").arguments()


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ("sslmode=require&sslrootcert=system", "write sslmode=verify-full"),
        ("sslnegotiation=direct", "sslmode=require"),
        ("gssencmode=require", "sslmode=verify-full"),
        ("load_balance_hosts=always", "which is one of disable, random"),
        ("client_encoding=latin1", "UTF8"),
        ("target_session_attrs=master", "which is one of any, prefer-standby, primary"),
        ("connect_timeout=soon", "a whole number up to 60"),
        ("connect_timeout=61", "a whole number up to 60"),
        ("keepalives=2", "which is one of 0, 1"),
        ("keepalives_idle=long", "which is a whole number"),
        ("keepalives_idle=32768", "up to 32767"),
        ("keepalives_count=128", "up to 127"),
        ("tcp_user_timeout=2147483648", "up to 2147483647"),
        (f"application_name={'n' * 64}", "64 characters; PostgreSQL keeps 63"),
        ("host=a&hostaddr=127.0.0.1", "has both host and hostaddr"),
        ("host=a,b&port=1,2,3", "has 3 ports for 2 hosts"),
        ("host=@socket", "abstract socket"),
        ("port=0", "from 1 to 65535"),
        ("host=[::x]", "is not a URL"),
        ("sslmod=require", "Did you mean sslmode?"),
        ("hunter2=secret", "has a parameter that libpq does not know"),
        ("hunter2", "write name=value"),
        ("prepareThreshold=5", "set DATABASE_STATEMENT_CACHE_SIZE"),
        ("pgbouncer=yes", "it is true or false"),
        ("schema=My+Own", "ALTER ROLE"),
        ("connection_limit=many", "a whole number from 1 to 500"),
        ("ssl=false", "sslmode=disable"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_what_to_write(parameters: str, reason: str) -> None:
    """The sentence names the parameter and the way that works, and repeats nothing unknown."""
    assert reason in refusal(f"{URL}?{parameters}")


@pytest.mark.parametrize(
    "parameters",
    [
        "channel_binding=prefer", "gssencmode=prefer", "gssencmode=disable", "load_balance_hosts=disable",
        "client_encoding=UTF8", "sslcompression=0", "sslsni=1", "sslcertmode=allow", "max_protocol_version=latest",
        "sslmode=", "",
    ],
)  # fmt: skip
def test_what_happens_anyway_is_taken(parameters: str) -> None:
    """A parameter that asks for what the driver does changes nothing."""
    assert with_(parameters) == parse_url(URL)


def test_later_parameter_counts_and_wins_over_the_path() -> None:
    """As in libpq: of two the last, and the part after ? over the part before it."""
    taken = with_("user=other&password=p%26w&dbname=one&dbname=two")

    assert (taken.user, taken.password, taken.database) == ("other", "p&w", "two")


def test_ssl_true_is_sslmode_require() -> None:
    """URLs that were written for JDBC mean that, to libpq too."""
    assert with_("ssl=true").arguments()["dsn"] == "postgresql://?sslmode=require"


def test_socket_knows_no_tls(tmp_path: Path) -> None:
    """A Unix socket has no TLS, whatever sslmode says, as in libpq, and no root certificate is missed."""
    taken = parse_url(f"postgresql://app@/x?host={tmp_path}&sslmode=verify-full")

    assert taken.hosts == (Host(str(tmp_path), 5432),)
    assert taken.hosts[0].is_socket
    assert taken.arguments()["dsn"] == "postgresql://"


def test_what_is_said_about_tcp_is_understood() -> None:
    """The parameters of keepalive are figures for the socket; 0 leaves the service's own."""
    taken = with_("keepalives=0&keepalives_idle=7&keepalives_interval=0&keepalives_count=2&tcp_user_timeout=9000")

    assert taken.keepalive == KeepAlive(
        enabled=False, idle_seconds=7, interval_seconds=None, probes=2, unacknowledged_milliseconds=9000
    )


@pytest.mark.parametrize(
    ("url", "user", "password"),
    [
        ("postgresql://db/x", None, None),
        ("postgresql://app@db/x", "app", None),
        ("postgresql://app:@db/x", "app", None),
        ("postgresql://app:p%40ss%2Fw%3F%23@db/x", "app", "p@ss/w?#"),
        ("postgresql://app:p?w#d+%41%20@db/x", "app", "p?w#d+A "),
        ("postgresql://a%40tenant:p@db/x", "a@tenant", "p"),
    ],
)
def test_credentials_are_decoded_once(url: str, user: str | None, password: str | None) -> None:
    """A plus stays a plus, and an empty password is none, so that PGPASSWORD and a password file are asked."""
    taken = parse_url(url)

    assert (taken.user, taken.password) == (user, password)
    assert "p@ss" not in repr(taken)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://app:hunter2/x@db/x", "write them as %2F and %40"),
        ("postgresql://app:p@hunter2@db/x", "write them as %2F and %40"),
        ("postgresql://app:p@host/hunter2@db/x", "in the name of a database as %40"),
        ("postgresql:///x", "names no host"),
        ("postgresql://app:hunter2@/x", "names no host"),
        ("postgresql://:5432/x", "names no host"),
        ("postgresql://a,,b/x", "names no host"),
        ("postgresql://db", "names no database"),
        ("postgresql://db/", "names no database"),
        ("postgresql://db:99999/x", "from 1 to 65535"),
        ("host=db dbname=x password=hunter2", "is not a URL"),
        ("postgresql://db..example/x", "one of its hosts is no name"),
        (f"postgresql://db,{'a' * 64}.example/x", "one of its hosts is no name"),
        ("postgresql+mypg://db/x", "has the scheme 'postgresql+mypg'"),
    ],
)
def test_what_is_no_url_is_said(url: str, reason: str) -> None:
    """Nothing is guessed: neither a host nor a database nor where a password ends."""
    assert reason in refusal(url)


def test_location_is_a_url_again() -> None:
    """An IPv6 address keeps its brackets where it is shown."""
    assert parse_url("postgresql://app:hunter2@[::1]:6432,db/x").location == "[::1]:6432,db:5432/x"
