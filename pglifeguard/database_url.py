"""What a database's URL says: the one place that takes a URL apart.

The service, its migrations, `doctor` and PgBouncer's console all read their URLs here. What becomes of each parameter
is decided in `url_parameters`. Everything else is as libpq has it, or refused with a sentence that says what to write
instead and repeats nothing that may be a piece of the password.

Source: PostgreSQL 18 manual, "Connection URIs" (34.1.1.2).
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv6Address
from typing import Any, Literal, NamedTuple, cast
from urllib.parse import quote, urlencode

from pglifeguard import url_parameters
from pglifeguard.service_file import parameters_of_service
from pglifeguard.tls import SYSTEM_AUTHORITIES, system_context
from pglifeguard.url_parameters import decoded

SHAPE = "postgresql://user:password@host:5432/database"
# What SQLAlchemy, Django and Rails call a URL of PostgreSQL; a driver's name is not for the server.
_SCHEMES = {"postgresql", "postgres", "postgis"}
_DRIVERS = {"asyncpg", "psycopg", "psycopg_async", "psycopg2", "psycopg2cffi", "pg8000"}
DEFAULT_PORT = 5432
# PostgreSQL cuts a longer name off.
NAME_CHARACTERS = 63
MAX_CONNECT_SECONDS = 60

SessionKind = Literal["any", "read-write", "read-only", "primary", "standby", "prefer-standby"]

# What Linux takes for a socket: with more, every login would fail after it had succeeded.
_LARGEST = {
    "keepalives_idle": 32_767,
    "keepalives_interval": 32_767,
    "keepalives_count": 127,
    "tcp_user_timeout": 2**31 - 1,
}
# What consoles show where the password belongs: [YOUR-PASSWORD], <password>, ${PASSWORD}, ********.
_PLACEHOLDER = re.compile(r"[\[<{][\w -]*pass(word|wd)?[\w -]*[\]>}]|\$\{[^}]*\}|\*{4,}", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,19}")
_QUOTES = "\"'`\u201c\u201d\u2018\u2019"

# As libpq splits it: credentials end at an @ that comes before the first slash.
_URL = re.compile(
    r"(?P<scheme>[^:/?#]+)://"
    r"(?:(?P<user>[^:@/]*)(?::(?P<password>[^@/]*))?@)?"
    r"(?P<hosts>[^/?]*)"
    r"(?:/(?P<database>[^?]*))?"
    r"(?:\?(?P<query>.*))?"
)
# A socket's directory, an IPv6 address in its brackets, or a name; and perhaps a port.
_HOST_AND_PORT = re.compile(r"(?:\[(?P<bracketed>[^\]]*)\]|(?P<name>/.*?|[^/:\[]*))(?::(?P<port>\d*))?")


class Host(NamedTuple):
    """One address of a database: a name, an IP address, or the directory of a Unix socket.

    `address` is where the server of that name was found (see discovery.py); certificates are compared with the name.
    """

    name: str
    port: int
    address: str | None = None

    def __str__(self) -> str:
        shown = f"[{self.name}]:{self.port}" if ":" in self.name and not self.is_socket else f"{self.name}:{self.port}"
        return shown if self.address is None else f"{shown} at {self.address}"

    @property
    def dialled(self) -> str:
        """What a connection is opened to: the address where one was found, else the name."""
        return self.name if self.address is None else self.address

    @property
    def is_socket(self) -> bool:
        """Whether it is a Unix socket, which knows no TLS."""
        return self.name.startswith("/")


class KeepAlive(NamedTuple):
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
    # What the URL says of settings of the database, by their names; it counts where their variables are not set.
    settings: Mapping[str, str | float]
    target_session_attrs: SessionKind | None
    # Whether the order of the hosts is to be drawn by lot.
    by_lot: bool
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
    def hosts_to_try(self) -> tuple[Host, ...]:
        """The hosts in the URL's order, or in one drawn by lot at each call (`load_balance_hosts=random`)."""
        return tuple(random.sample(self.hosts, len(self.hosts))) if self.by_lot else self.hosts

    @property
    def holds_password(self) -> bool:
        """Whether the URL says where the password is, by itself or by a passfile."""
        return self.password is not None or self.passfile is not None

    @property
    def passfile(self) -> str | None:
        """The file of passwords that the URL names."""
        return self._of_the_driver.get("passfile")

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
    """Take a URL apart as libpq does, and read the service file that it names.

    Raises: ValueError, whose text follows the variable's name and repeats no value that may be secret.
    """
    part = _split(text.strip())
    given = url_parameters.parameters_of(part["query"] or "")
    for name in ("user", "password"):
        if part[name]:
            given.setdefault(name, decoded(part[name], secret=name == "password"))
    if part["database"]:
        given.setdefault("dbname", decoded(part["database"]))
    given = _with_service(given, part["hosts"])
    url_parameters.check(given)
    hosts = _hosts(part["hosts"], given)
    if "dbname" not in given:
        raise ValueError("names no database; end it with /database")
    if _PLACEHOLDER.fullmatch(given.get("password", "")):
        raise ValueError("has a placeholder where the password belongs; write the password there")
    given = url_parameters.meet_demands_of_tls(
        url_parameters.from_environment() | given, by_socket=all(host.is_socket for host in hosts)
    )
    options = url_parameters.server_options(given)
    return ConnectionParameters(
        hosts=hosts,
        user=given.get("user"),
        password=given.get("password"),
        database=given["dbname"],
        settings=_settings(given),
        target_session_attrs=cast("SessionKind | None", given.get("target_session_attrs")),
        by_lot=given.get("load_balance_hosts") == "random",
        keepalive=_keepalive(given),
        server_settings={} if options is None else {"options": options},
        _of_the_driver={name: given[name] for name in given if name in url_parameters.OF_THE_DRIVER},
    )


def holds_password(url: str) -> bool:
    """Tell whether a URL has a password in it, or names a file of passwords; one that is wrong has none."""
    try:
        return parse_url(url).holds_password
    except ValueError:
        return False


def _split(text: str) -> dict[str, str]:
    """Split a URL into its parts, each of them still percent-encoded; "" where one is not there."""
    if text[:1] and text[0] in _QUOTES:
        # Docker's env files keep quotation marks, and consoles show some.
        raise ValueError("is not a URL: it begins with a quotation mark; write it without")
    if any(letter.isspace() or not letter.isprintable() for letter in text):
        raise ValueError(
            f"is not a URL: it holds a space, a line break or an invisible character; write {SHAPE} and nothing else, "
            "and %20 for a space of a password"
        )
    if text.startswith("jdbc:"):
        raise ValueError(f"is a URL of JDBC, whose parameters mean other things; write {SHAPE}")
    match = _URL.fullmatch(text)
    if match is None:
        raise ValueError(f"is not a URL; write {SHAPE}")
    part = match.groupdict(default="")
    scheme, _, driver = part["scheme"].partition("+")
    if scheme not in _SCHEMES or (driver and driver not in _DRIVERS):
        shown = f"the scheme {part['scheme']!r}" if _SCHEME.fullmatch(part["scheme"]) else "an unknown scheme"
        raise ValueError(f"has {shown}; this service speaks to postgresql:// only")
    if "@" in part["hosts"][1:] or "@" in part["database"]:
        # libpq takes a database of such a name. It is more often the end of a password, and would be shown as a name.
        raise ValueError(
            "is not a URL: its user or password holds a / or an @; write them as %2F and %40 there, and an @ in the "
            "name of a database as %40"
        )
    return part


def _with_service(given: Mapping[str, str], authority: str) -> dict[str, str]:
    """Add what the service file says; the URL is stronger, word by word. Raises: ValueError."""
    service = given.get("service")
    if service is None:
        return dict(given)
    described = parameters_of_service(service, file=given.get("servicefile"))
    of_the_file = url_parameters.parameters_of(urlencode(described, quote_via=quote))
    said = [_host_and_port(decoded(entry)) for entry in authority.split(",")]
    if any(name for name, _ in said) or "host" in given or "hostaddr" in given:
        of_the_file.pop("host", None)
        of_the_file.pop("hostaddr", None)
    if any(port for _, port in said):
        of_the_file.pop("port", None)
    return {**of_the_file, **given}


def _hosts(authority: str, given: Mapping[str, str]) -> tuple[Host, ...]:
    """List the hosts in their order: `//a:1,b:2/`, `?host=a:1&host=b:2` or `?host=a,b&port=1,2`."""
    if "host" in given and "hostaddr" in given:
        raise ValueError(
            "has both host and hostaddr: the driver would check the certificate against the address; keep host, or "
            "hostaddr alone"
        )
    listed = given.get("host") or given.get("hostaddr")
    from_authority = [_host_and_port(decoded(entry)) for entry in authority.split(",")] if authority else []
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
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) < 65_536):  # noqa: PLR2004  # TCP's ports.
        raise ValueError("is not a URL: a port is a number from 1 to 65535")
    return int(text)


def _settings(given: Mapping[str, str]) -> dict[str, str | float]:
    """Return what the URL says of the settings of its database. Raises: ValueError."""
    said: dict[str, str | float] = {name: int(given[name]) for name in url_parameters.SETTINGS if name in given}
    name = given.get("application_name") or given.get("fallback_application_name")
    if name is not None:
        if len(name) > NAME_CHARACTERS:
            raise ValueError(f"has an application_name of {len(name)} characters; PostgreSQL keeps {NAME_CHARACTERS}")
        said["application_name"] = name
    if "connect_timeout" in given:
        seconds = url_parameters.whole(given, "connect_timeout", MAX_CONNECT_SECONDS)
        if seconds == 0:
            raise ValueError("has connect_timeout=0, and libpq would wait for ever: write 1 or more seconds")
        said["connect_timeout_seconds"] = float(seconds)
    return said


def _keepalive(given: Mapping[str, str]) -> KeepAlive:
    # As libpq, where 0 is the system's default: here it is the service's.
    idle, interval, probes, unacknowledged = (
        url_parameters.whole(given, name, largest) or None for name, largest in _LARGEST.items()
    )
    return KeepAlive(given.get("keepalives") != "0", idle, interval, probes, unacknowledged)
