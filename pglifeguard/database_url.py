"""What a database's URL says: the one place that decides about every parameter that libpq knows.

The service, its migrations, `doctor` and PgBouncer's console all read their URLs here. A parameter is taken, or the
URL is refused with a sentence that says what to write instead: the driver would send an unknown one to the server,
which refuses the connection, and a demand that is dropped in silence would not be met.

Source: PostgreSQL 18 manual, "Connection URIs" and "Parameter Key Words" (34.1).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from ipaddress import AddressValueError, IPv6Address
from typing import Any, Literal, cast
from urllib.parse import unquote, urlencode

from pglifeguard.tls import SYSTEM_AUTHORITIES, system_context

SHAPE = "postgresql://user:password@host:5432/database"
SCHEMES = {"postgresql", "postgres", "postgresql+asyncpg"}
DEFAULT_PORT = 5432
# PostgreSQL cuts a longer name off.
NAME_CHARACTERS = 63
MAX_CONNECT_SECONDS = 60

SessionKind = Literal["any", "read-write", "read-only", "primary", "standby", "prefer-standby"]

# Handed to the driver as they are.
_OF_THE_DRIVER = {
    "passfile", "sslmode", "sslnegotiation", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslpassword",
    "ssl_min_protocol_version", "ssl_max_protocol_version",
}  # fmt: skip
# What Linux takes for a socket: with more, every login would fail after it had succeeded.
_LARGEST = {
    "keepalives_idle": 32_767,
    "keepalives_interval": 32_767,
    "keepalives_count": 127,
    "tcp_user_timeout": 2**31 - 1,
}
_TLS_VERSIONS = {"TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"}
_CHOICES: Mapping[str, set[str]] = {
    "sslmode": {"disable", "allow", "prefer", "require", "verify-ca", "verify-full"},
    "sslnegotiation": {"postgres", "direct"},
    "ssl_min_protocol_version": _TLS_VERSIONS,
    "ssl_max_protocol_version": _TLS_VERSIONS,
    "target_session_attrs": {"any", "read-write", "read-only", "primary", "standby", "prefer-standby"},
    "keepalives": {"0", "1"},
}
# The values that say what happens anyway, and what to do about every other.
_GRANTED: Mapping[str, tuple[set[str], str]] = {
    "channel_binding": (
        {"disable", "prefer"},
        "the driver cannot bind a login to its TLS channel; write sslmode=verify-full&sslrootcert=system instead",
    ),
    "gssencmode": ({"disable", "prefer"}, "the driver does not encrypt by Kerberos; write sslmode=verify-full"),
    "gssdelegation": ({"0"}, "the driver does not delegate Kerberos credentials"),
    "load_balance_hosts": (
        {"disable"},
        "hosts are not drawn by lot here: the one that worked last is tried first; leave it out",
    ),
    "client_encoding": ({"utf8", "utf-8", "unicode"}, "the driver speaks UTF8 alone"),
    "sslcompression": ({"0"}, "TLS is not compressed; leave it out"),
    "sslsni": ({"1"}, "the driver always names the host when it opens TLS; leave it out"),
    "sslcertmode": ({"allow"}, "the driver sends a certificate when the server asks for one; leave it out"),
    "min_protocol_version": ({"3.0"}, "the driver speaks protocol 3.0; leave it out"),
    "max_protocol_version": ({"3.0", "3.2", "latest"}, "the driver speaks protocol 3.0; leave it out"),
    "replication": ({"false", "off", "no", "0"}, "the service does not replicate; leave it out"),
}
_REFUSED: Mapping[str, str] = {
    "service": "write host, port, user and database into the URL: service files are not read",
    "servicefile": "write host, port, user and database into the URL: service files are not read",
    "require_auth": "the driver answers whichever way of logging in the server asks for; pg_hba.conf decides which",
    "requirepeer": "the driver does not look at the owner of a socket; leave it out",
    "requiressl": "write sslmode=require",
    "sslcrldir": "the driver reads revoked certificates from one file: write sslcrl",
    "sslkeylogfile": "set SSLKEYLOGFILE in the environment",
    "krbsrvname": "logging in by Kerberos is not built in; use a password or sslcert and sslkey",
    "gsslib": "logging in by Kerberos is not built in; use a password or sslcert and sslkey",
    "scram_client_key": "write the password; the driver computes the key",
    "scram_server_key": "write the password; the driver computes the key",
    "oauth_issuer": "the driver does not log in by OAuth; use a password",
    "oauth_client_id": "the driver does not log in by OAuth; use a password",
    "oauth_client_secret": "the driver does not log in by OAuth; use a password",
    "oauth_scope": "the driver does not log in by OAuth; use a password",
    # Other drivers' and tools'.
    "ssl": "write sslmode=require, or verify-full",
    "sslaccept": "write sslmode=require, or verify-full",
    "database": "write dbname, or end the URL's path with the name",
    "pgbouncer": "leave it out; DATABASE_STATEMENT_CACHE_SIZE=0 is for poolers that lose prepared statements",
    "prepared_statement_cache_size": "set DATABASE_STATEMENT_CACHE_SIZE",
    "statement_cache_size": "set DATABASE_STATEMENT_CACHE_SIZE",
    "prepareThreshold": "set DATABASE_STATEMENT_CACHE_SIZE",
    "connection_limit": "set DATABASE_POOL_SIZE and DATABASE_MAX_OVERFLOW",
    "pool_size": "set DATABASE_POOL_SIZE",
    "max_overflow": "set DATABASE_MAX_OVERFLOW",
    "pool_timeout": "set DATABASE_POOL_TIMEOUT",
    "command_timeout": "set DATABASE_COMMAND_TIMEOUT_SECONDS",
    "timeout": "write connect_timeout",
    "ApplicationName": "write application_name",
    "schema": "ALTER ROLE … SET search_path holds through poolers too; directly, options=-csearch_path%3D… does",
    "currentSchema": "ALTER ROLE … SET search_path holds through poolers too; directly, options=-csearch_path%3D… does",
    "search_path": "ALTER ROLE … SET search_path holds through poolers too; directly, options=-csearch_path%3D… does",
    "statement_timeout": "ALTER ROLE … SET statement_timeout holds through poolers too (postgres/roles.sql)",
}
_OWN = {
    "host", "hostaddr", "port", "dbname", "user", "password", "application_name", "fallback_application_name",
    "connect_timeout", "options", "target_session_attrs", "keepalives", "keepalives_idle", "keepalives_interval",
    "keepalives_count", "tcp_user_timeout",
}  # fmt: skip
PARAMETERS = frozenset({*_OWN, *_OF_THE_DRIVER, *_GRANTED, *_REFUSED})

# As libpq splits it: credentials end at an @ that comes before the first slash.
_URL = re.compile(
    r"(?P<scheme>[^:/?#]+)://"
    r"(?:(?P<user>[^:@/]*)(?::(?P<password>[^@/]*))?@)?"
    r"(?P<hosts>[^/?]*)"
    r"(?:/(?P<database>[^?]*))?"
    r"(?:\?(?P<query>.*))?"
)
# A socket's directory, an IPv6 address in its brackets, or a name; and perhaps a port.
_HOST_AND_PORT = re.compile(r"(?:\[(?P<bracketed>[^\]]*)\]|(?P<name>/[^:]*|[^/:\[]*))(?::(?P<port>\d*))?")


@dataclass(frozen=True, slots=True)
class Host:
    """One address of a database: a name, an IP address, or the directory of a Unix socket."""

    name: str
    port: int

    def __str__(self) -> str:
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"

    @property
    def is_socket(self) -> bool:
        """Whether it is a Unix socket, which knows no TLS."""
        return self.name.startswith("/")


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """What a URL says about TCP; None leaves the connector's own choice. Seconds, but for the last one."""

    enabled: bool = True
    idle_seconds: int | None = None
    interval_seconds: int | None = None
    probes: int | None = None
    unacknowledged_milliseconds: int | None = None


@dataclass(frozen=True, slots=True)
class ConnectionParameters:
    """A URL, taken apart and checked."""

    hosts: tuple[Host, ...]
    user: str | None
    password: str | None = field(repr=False)
    database: str
    application_name: str | None
    connect_timeout_seconds: float | None
    target_session_attrs: SessionKind | None
    keepalive: KeepAlive
    # Sent to the server when the connection opens.
    server_settings: Mapping[str, str]
    _of_the_driver: Mapping[str, str] = field(repr=False)

    @property
    def location(self) -> str:
        """Hosts, ports and database: what may be shown."""
        return f"{self.server}/{self.database}"

    @property
    def server(self) -> str:
        """Hosts and ports."""
        return ",".join(map(str, self.hosts))

    @property
    def lacks_root_certificate(self) -> bool:
        """Whether the certificate is to be verified, and the URL does not say against what."""
        mode = self._of_the_driver.get("sslmode", "")
        return mode.startswith("verify-") and "sslrootcert" not in self._of_the_driver

    @property
    def tls(self) -> Mapping[str, str]:
        """The parameters about TLS, as they are written; `sslpassword` is among them."""
        return {name: value for name, value in self._of_the_driver.items() if name.startswith("ssl")}

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `asyncpg.connect`, but for the host and what the settings say."""
        read, context = dict(self._of_the_driver), None
        if read.get("sslrootcert") == SYSTEM_AUTHORITIES:
            context = system_context(read)
            read = {name: read[name] for name in ("passfile", "sslnegotiation") if name in read}
        return {
            # asyncpg reads these from a URL only; user, password and database need no quoting as arguments.
            "dsn": f"postgresql://?{urlencode(read)}" if read else "postgresql://",
            "user": self.user,
            "password": self.password,
            "database": self.database,
            "ssl": context,
            # The connector looks for the host itself; without this PGTARGETSESSIONATTRS would.
            "target_session_attrs": "any",
        }


def parse_url(text: str) -> ConnectionParameters:
    """Take a URL apart as libpq does.

    Raises: ValueError, whose text follows the variable's name and repeats no value that may be secret.
    """
    match = _URL.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"is not a URL; write {SHAPE}")
    part = match.groupdict()
    if part["scheme"] not in SCHEMES:
        raise ValueError(f"has the scheme {part['scheme']!r}; this service speaks to postgresql:// only")
    if "@" in part["hosts"][1:] or (part["user"] is None and "@" in (part["database"] or "")):
        raise ValueError("is not a URL: its user or password holds a / or an @; write them as %2F and %40 there")
    given = _parameters(part["query"] or "")
    _check(given)
    hosts = _hosts(part["hosts"], given)
    database = given.get("dbname") or unquote(part["database"] or "")
    if not database:
        raise ValueError("names no database; end it with /database")
    of_the_driver = {name: value for name, value in given.items() if name in _OF_THE_DRIVER}
    if all(host.is_socket for host in hosts):
        # As libpq: a socket does not leave the machine, and sslmode says nothing about it.
        of_the_driver = {name: value for name, value in of_the_driver.items() if not name.startswith("ssl")}
    return ConnectionParameters(
        hosts=hosts,
        user=given.get("user") or unquote(part["user"] or "") or None,
        password=given.get("password") or unquote(part["password"] or "") or None,
        database=database,
        application_name=_application_name(given),
        connect_timeout_seconds=_connect_timeout(given.get("connect_timeout")),
        target_session_attrs=cast("SessionKind | None", given.get("target_session_attrs")),
        keepalive=_keepalive(given),
        server_settings={"options": given["options"]} if "options" in given else {},
        _of_the_driver=of_the_driver,
    )


def holds_password(url: str) -> bool:
    """Tell whether a URL has a password in it; one that is wrong has none."""
    try:
        return parse_url(url).password is not None
    except ValueError:
        return False


def _parameters(query: str) -> dict[str, str]:
    """Read `name=value&…`; an empty value is an absent one, of two the last counts, and `host` may be a list."""
    given: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        name, equals, value = (unquote(part) for part in pair.partition("="))
        if not equals:
            raise ValueError("is not a URL: a parameter after its ? has no value; write name=value&name=value")
        if value == "":
            continue
        if (name, value) == ("ssl", "true"):  # As libpq, for URLs that were written for JDBC.
            name, value = "sslmode", "require"
        given[name] = f"{given[name]},{value}" if name == "host" and name in given else value
    return given


def _check(given: Mapping[str, str]) -> None:
    for name, value in given.items():
        if name in _REFUSED:
            raise ValueError(f"has the parameter {name}, which is not taken: {_REFUSED[name]}")
        if name not in PARAMETERS:
            raise ValueError(_unknown(name))
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"has {name}={value}; it is one of {', '.join(sorted(_CHOICES[name]))}")
        if name in _GRANTED:
            granted, reason = _GRANTED[name]
            if value.lower() not in granted:
                raise ValueError(f"has {name}={value}, which is not taken: {reason}")
    mode = given.get("sslmode")
    if given.get("sslrootcert") == SYSTEM_AUTHORITIES and mode != "verify-full":
        # As libpq: anybody can have a certificate from a public authority, for another name.
        raise ValueError(
            "has sslrootcert=system, which says nothing without the host's name: write sslmode=verify-full"
        )
    if given.get("sslnegotiation") == "direct" and mode not in {"require", "verify-ca", "verify-full"}:
        raise ValueError("has sslnegotiation=direct, which takes sslmode=require, verify-ca or verify-full")


def _unknown(name: str) -> str:
    # A piece of a password that was not percent-encoded may end up here: only a likely name is repeated.
    near = get_close_matches(name, sorted(PARAMETERS), n=1, cutoff=0.75)
    if not near:
        return "has a parameter that libpq does not know; docs/settings.md lists those that are taken"
    return f"has the parameter {name}, which libpq does not know. Did you mean {near[0]}?"


def _hosts(authority: str, given: Mapping[str, str]) -> tuple[Host, ...]:
    """List the hosts in their order: `//a:1,b:2/`, `?host=a:1&host=b:2` or `?host=a,b&port=1,2`."""
    if "host" in given and "hostaddr" in given:
        raise ValueError(
            "has both host and hostaddr: the driver would check the certificate against the address; keep host, or "
            "hostaddr alone"
        )
    listed = given.get("host") or given.get("hostaddr")
    from_authority = [_host_and_port(unquote(entry)) for entry in authority.split(",")] if authority else []
    entries = [_host_and_port(entry) for entry in listed.split(",")] if listed else from_authority
    names = [name for name, _ in entries]
    if not all(names) or not names:
        raise ValueError(f"names no host; write {SHAPE}, or ?host=/var/run/postgresql for a Unix socket")
    if any(name.startswith("@") for name in names):
        raise ValueError("names an abstract socket, which the driver cannot open; write the directory of a socket")
    # libpq reads `//:6432/x?host=/run/postgresql` so: the port stays when the host is given below.
    ports = [port for _, port in entries]
    if "port" in given:
        ports = [_port(port) for port in given["port"].split(",")]
    elif listed and from_authority and ports == [None] * len(ports):
        ports = [port for _, port in from_authority]
    if len(ports) == 1:
        ports = ports * len(names)
    if len(ports) != len(names):
        raise ValueError(f"has {len(ports)} ports for {len(names)} hosts; write one for each, or one for all")
    return tuple(Host(name, DEFAULT_PORT if port is None else port) for name, port in zip(names, ports, strict=True))


def _host_and_port(entry: str) -> tuple[str, int | None]:
    if _is_ipv6(entry):  # libpq takes one without brackets in `host=`.
        return entry, None
    match = _HOST_AND_PORT.fullmatch(entry)
    if (
        match is None
        or (match["bracketed"] is not None and not _is_ipv6(match["bracketed"]))
        or (match["name"] and not _can_be_looked_up(match["name"]))
    ):
        raise ValueError(
            f"is not a URL: one of its hosts is no name and no address, or its port no number; write {SHAPE}"
        )
    return match["bracketed"] or match["name"], _port(match["port"])


def _can_be_looked_up(name: str) -> bool:
    """Tell a name that a resolver may be asked for: "db..example" would fail in Python, and not as a name unknown."""
    try:
        name.encode("idna")
    except UnicodeError:
        return name.startswith("/")  # A directory has no labels.
    return True


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except AddressValueError:
        return False
    return True


def _port(text: str | None) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or not 0 < int(text) < 65_536:  # noqa: PLR2004  # TCP's ports.
        raise ValueError("is not a URL: a port is a number from 1 to 65535")
    return int(text)


def _application_name(given: Mapping[str, str]) -> str | None:
    name = given.get("application_name") or given.get("fallback_application_name")
    if name is not None and len(name) > NAME_CHARACTERS:
        raise ValueError(f"has an application_name of {len(name)} characters; PostgreSQL keeps {NAME_CHARACTERS}")
    return name


def _connect_timeout(text: str | None) -> float | None:
    if text is None:
        return None
    if not text.isdecimal() or not 0 < int(text) <= MAX_CONNECT_SECONDS:
        # libpq waits for ever when it is 0 or less.
        raise ValueError(f"has connect_timeout={text}; it is from 1 to {MAX_CONNECT_SECONDS} seconds, for each host")
    return float(text)


def _keepalive(given: Mapping[str, str]) -> KeepAlive:
    def number(name: str) -> int | None:
        text = given.get(name, "0")
        if not text.isdecimal() or int(text) > _LARGEST[name]:
            raise ValueError(f"has {name}={text}; it is a whole number up to {_LARGEST[name]}")
        # As libpq, where 0 is the system's default: here it is the service's.
        return int(text) or None

    return KeepAlive(
        enabled=given.get("keepalives") != "0",
        idle_seconds=number("keepalives_idle"),
        interval_seconds=number("keepalives_interval"),
        probes=number("keepalives_count"),
        unacknowledged_milliseconds=number("tcp_user_timeout"),
    )
