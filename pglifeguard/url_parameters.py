"""Every parameter that may follow the `?` of a URL, and what becomes of it: libpq's, and those of other clients.

A parameter is taken, translated into another one or into a setting, or refused with a sentence that says what to write
instead. The driver would send an unknown one to the server, which refuses the connection, and a demand that is dropped
in silence would not be met. No sentence repeats a value: of a URL that was split at the wrong place, a value may be a
piece of the password.

Source: PostgreSQL 18 manual, "Parameter Key Words" (34.1.2). Other clients: the documentation of Prisma, pgjdbc, pgx,
Active Record, node-postgres and SQLAlchemy.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote

from pglifeguard.tls import SYSTEM_AUTHORITIES

# Handed to the driver as they are.
OF_THE_DRIVER = frozenset({
    "passfile", "sslmode", "sslnegotiation", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslpassword",
    "ssl_min_protocol_version", "ssl_max_protocol_version",
})  # fmt: skip
_OWN = frozenset({
    "host", "hostaddr", "port", "dbname", "user", "password", "application_name", "fallback_application_name",
    "connect_timeout", "options", "target_session_attrs", "keepalives", "keepalives_idle", "keepalives_interval",
    "keepalives_count", "tcp_user_timeout", "load_balance_hosts", "channel_binding", "service", "servicefile",
})  # fmt: skip
# Each says what a setting of the database says too, and counts where the variable of that setting is not set: the
# setting, and its bounds in a URL.
SETTINGS: Mapping[str, tuple[int, int]] = {
    "pool_size": (1, 500),
    "max_overflow": (0, 500),
    "pool_timeout": (1, 60),
    "statement_cache_size": (0, 1_000_000),
}
_TLS_VERSIONS = frozenset({"TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"})
_VERIFYING = frozenset({"verify-ca", "verify-full"})
_CHOICES: Mapping[str, frozenset[str]] = {
    "sslmode": frozenset({"disable", "allow", "prefer", "require"}) | _VERIFYING,
    "sslnegotiation": frozenset({"postgres", "direct"}),
    "ssl_min_protocol_version": _TLS_VERSIONS,
    "ssl_max_protocol_version": _TLS_VERSIONS,
    "target_session_attrs": frozenset({"any", "read-write", "read-only", "primary", "standby", "prefer-standby"}),
    "load_balance_hosts": frozenset({"disable", "random"}),
    "channel_binding": frozenset({"disable", "prefer", "require"}),
    "keepalives": frozenset({"0", "1"}),
    "sslaccept": frozenset({"strict", "accept_invalid_certs"}),
}
# The values that say what happens anyway, and what to do about every other.
_GRANTED: Mapping[str, tuple[frozenset[str], str]] = {
    "gssencmode": (
        frozenset({"disable", "prefer"}),
        "the driver does not encrypt by Kerberos; write sslmode=verify-full",
    ),
    "gssdelegation": (frozenset({"0"}), "the driver does not delegate Kerberos credentials; leave it out"),
    "krbsrvname": (
        frozenset({"postgres"}),
        "logging in by Kerberos is not built in; use a password or sslcert and sslkey",
    ),
    "client_encoding": (frozenset({"auto", "utf8", "utf-8", "unicode"}), "the driver speaks UTF8 alone; leave it out"),
    "sslcompression": (frozenset({"0"}), "TLS is not compressed; leave it out"),
    "sslsni": (frozenset({"1"}), "the driver always names the host when it opens TLS; leave it out"),
    "sslcertmode": (
        frozenset({"allow"}),
        "the driver sends a certificate when the server asks for one; leave it out",
    ),
    "min_protocol_version": (frozenset({"3.0"}), "the driver speaks protocol 3.0; leave it out"),
    "max_protocol_version": (frozenset({"3.0", "3.2", "latest"}), "the driver speaks protocol 3.0; leave it out"),
    "replication": (frozenset({"false", "off", "no", "0"}), "the service does not replicate; leave it out"),
    # Other clients'.
    "prepareThreshold": (frozenset(), "set DATABASE_STATEMENT_CACHE_SIZE; 0 is translated into it"),
    "pgbouncer": (frozenset({"false"}), "it is true or false"),
    "prepared_statements": (frozenset({"true"}), "it is true or false"),
}
# What tells another client how to behave, and demands nothing of the connection.
_OF_OTHER_CLIENTS = frozenset({"supa", "workaround", "uselibpqcompat", "serverVersion"})
_KERBEROS = "logging in by Kerberos is not built in; use a password or sslcert and sslkey"
_KEY = "write the password; the driver computes the key"
_OAUTH = "the driver does not log in by OAuth; use a password"
_OF_ROLES = "ALTER ROLE … SET {name} holds through poolers too (postgres/roles.sql)"
_REFUSED: Mapping[str, str] = {
    "require_auth": "the driver answers whichever way of logging in the server asks for; sslmode=verify-full proves "
    "which server asks",
    "requirepeer": "the driver does not look at the owner of a socket; leave it out",
    "requiressl": "write sslmode=require",
    "sslcrldir": "the driver reads revoked certificates from one file: write sslcrl",
    "sslkeylogfile": "set SSLKEYLOGFILE in the environment",
    "gsslib": _KERBEROS,
    "scram_client_key": _KEY,
    "scram_server_key": _KEY,
    "oauth_issuer": _OAUTH,
    "oauth_client_id": _OAUTH,
    "oauth_client_secret": _OAUTH,
    "oauth_scope": _OAUTH,
    # Other clients'.
    "ssl": "write sslmode=require, sslmode=verify-full or sslmode=disable",
    "sslidentity": "write sslcert and sslkey, with the certificate and the key in PEM",
    "sslfactory": "write sslmode=verify-full and sslrootcert",
    "database": "write dbname, or end the URL's path with the name",
    "default_query_exec_mode": "set DATABASE_STATEMENT_CACHE_SIZE=0 for poolers that lose prepared statements",
    "preparedStatementCacheQueries": "set DATABASE_STATEMENT_CACHE_SIZE",
    "pool_min_conns": "set DATABASE_POOL_MIN_SIZE",
    "pool_max_conn_lifetime": "set DATABASE_POOL_RECYCLE",
    "pool_max_conn_idle_time": "set DATABASE_POOL_IDLE_SECONDS",
    "max_idle_connection_lifetime": "set DATABASE_POOL_IDLE_SECONDS",
    "max_connection_lifetime": "set DATABASE_POOL_RECYCLE",
    "conn_max_age": "set DATABASE_POOL_RECYCLE",
    "command_timeout": "set DATABASE_COMMAND_TIMEOUT_SECONDS",
    "socket_timeout": "set DATABASE_COMMAND_TIMEOUT_SECONDS",
    "socketTimeout": "set DATABASE_COMMAND_TIMEOUT_SECONDS",
    "timeout": "write connect_timeout",
    "connectTimeout": "write connect_timeout",
    "loginTimeout": "write connect_timeout",
    "direct_tls": "write sslnegotiation=direct",
    "tcpKeepAlive": "write keepalives=1",
    "targetServerType": "write target_session_attrs",
    "loadBalanceHosts": "write load_balance_hosts=random",
    "load_balance": "write load_balance_hosts=random",
    "topology_keys": "name the hosts that are near, in their order",
    **{name: _OF_ROLES.format(name=name) for name in ("statement_timeout", "lock_timeout", "timezone")},
}
_SCHEMAS = ("schema", "currentSchema", "search_path")
# A name that PostgreSQL reads the same with quotes and without.
_PLAIN_SCHEMAS = re.compile(r"[a-z_][a-z0-9_]*(,[a-z_][a-z0-9_]*)*")
_CACHE_SIZES = ("statement_cache_size", "prepared_statement_cache_size", "statement_cache_capacity")
_POOL_SIZES = ("connection_limit", "pool", "pool_max_conns")
_SETTING_OF = {
    **dict.fromkeys(_CACHE_SIZES, "statement_cache_size"),
    **dict.fromkeys(_POOL_SIZES, "pool_size"),
    **{name: name for name in SETTINGS},
}
# What one value of another client's parameter says in libpq's words, or in a setting's.
_SAME_AS = {
    # libpq reads `ssl=true` so, for URLs that were written for JDBC; asyncpg takes the modes, and node-postgres has a
    # word for encryption without verification.
    **{("ssl", mode): ("sslmode", mode) for mode in _CHOICES["sslmode"]},
    **dict.fromkeys((("ssl", "true"), ("ssl", "1"), ("ssl", "no-verify")), ("sslmode", "require")),
    ("sslmode", "no-verify"): ("sslmode", "require"),
    # Prisma's, Active Record's and pgjdbc's words for a pooler that loses prepared statements.
    ("pgbouncer", "true"): ("statement_cache_size", "0"),
    ("prepared_statements", "false"): ("statement_cache_size", "0"),
    ("prepareThreshold", "0"): ("statement_cache_size", "0"),
}
_RENAMED = {"encoding": "client_encoding", "charset": "client_encoding", "ApplicationName": "application_name"}
PARAMETERS = frozenset({
    *_OWN, *OF_THE_DRIVER, *_CHOICES, *_GRANTED, *_OF_OTHER_CLIENTS, *_REFUSED, *_SCHEMAS, *_SETTING_OF, *_RENAMED,
})  # fmt: skip
# What libpq demands by its environment, and asyncpg would read in its own way or not at all.
_ENVIRONMENT = {
    "sslmode": "PGSSLMODE",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslcrl": "PGSSLCRL",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "sslcertmode": "PGSSLCERTMODE",
    "channel_binding": "PGCHANNELBINDING",
    "gssencmode": "PGGSSENCMODE",
    "require_auth": "PGREQUIREAUTH",
    "requirepeer": "PGREQUIREPEER",
}
_BROKEN_ENCODING = re.compile(r"%(?![0-9A-Fa-f]{2})")


def decoded(text: str, *, secret: bool = False) -> str:
    """Undo percent-encoding as libpq does: what is not encoded rightly is an error, and no NUL is let through.

    Of what is no `secret`, line breaks and the like are refused too: it is shown in logs.

    Raises: ValueError.
    """
    if _BROKEN_ENCODING.search(text):
        raise ValueError("is not a URL: it holds a % that is not followed by two digits; write %25 for a % itself")
    try:
        plain = unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("is not a URL: what it percent-encodes is not UTF-8") from None
    if "\0" in plain or not (secret or plain.isprintable()):
        raise ValueError("is not a URL: it percent-encodes a control character")
    return plain


def parameters_of(query: str) -> dict[str, str]:
    """Read `name=value&…` into libpq's parameters and into SETTINGS.

    An empty value is an absent one, of two the last counts, and `host` may be a list.

    Raises: ValueError.
    """
    given: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        raw_name, equals, raw_value = pair.partition("=")
        name = decoded(raw_name)
        if not equals:
            raise ValueError(
                "is not a URL: a parameter after its ? has no value; write name=value&name=value, and %3F for a ? of "
                "a password"
            )
        value = decoded(raw_value, secret=name.endswith("password"))
        if value == "":
            continue
        for own_name, own_value in _translated(name, value):
            given[own_name] = f"{given[own_name]},{own_value}" if own_name == "host" and "host" in given else own_value
    return given


def from_environment() -> dict[str, str]:
    """Return the demands that libpq's variables make. Raises: ValueError, with the name of the variable."""
    given: dict[str, str] = {}
    for name, variable in _ENVIRONMENT.items():
        if value := os.environ.get(variable):
            try:
                given.update(_translated(name, value))
                check(given)
            except ValueError as error:
                raise ValueError(f"is completed by {variable} of the environment, which {error}") from None
    return given


def check(given: Mapping[str, str]) -> None:
    """Refuse what is not known, or has a value that cannot be kept. Raises: ValueError."""
    for name, value in given.items():
        if name in _REFUSED:
            raise ValueError(f"has the parameter {name}, which is not taken: {_REFUSED[name]}")
        if name not in PARAMETERS:
            raise ValueError(_unknown(name))
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"has the parameter {name}, which is one of {', '.join(sorted(_CHOICES[name]))}")
        if name in _GRANTED:
            granted, reason = _GRANTED[name]
            if value.lower() not in granted:
                raise ValueError(f"has the parameter {name} with a value that is not taken: {reason}")


def meet_demands_of_tls(given: Mapping[str, str], *, by_socket: bool) -> dict[str, str]:
    """Return the parameters as the driver can keep them: none weaker than it was, two of them stronger.

    `channel_binding=require` makes the password useless to anybody between client and server. The driver cannot bind a
    login to its channel; `verify-full` keeps everybody out of that place, so it is what such a URL gets.
    `sslaccept=strict` is Prisma's word for it. Without `sslrootcert` both believe the system's authorities.

    Raises: ValueError when the parameters contradict each other.
    """
    kept = {name: value for name, value in given.items() if name not in {"channel_binding", "sslaccept"}}
    strict = _stricter_demand(given, by_socket=by_socket)
    if by_socket:
        # As libpq: a socket does not leave the machine, and sslmode says nothing about it.
        return {name: value for name, value in kept.items() if not name.startswith("ssl")}
    if strict:
        kept["sslmode"] = "verify-full"
        if not _has_root_certificate():
            kept.setdefault("sslrootcert", SYSTEM_AUTHORITIES)
    if kept.get("sslrootcert") == SYSTEM_AUTHORITIES and kept.setdefault("sslmode", "verify-full") != "verify-full":
        # As libpq: anybody can have a certificate from a public authority, for another name.
        raise ValueError(
            "has sslrootcert=system, which says nothing without the host's name: write sslmode=verify-full"
        )
    mode = kept.get("sslmode")
    if kept.get("sslnegotiation") == "direct" and mode not in {"require", *_VERIFYING}:
        raise ValueError("has sslnegotiation=direct, which takes sslmode=require, verify-ca or verify-full")
    if mode in _VERIFYING and "sslrootcert" not in kept and not _has_root_certificate():
        raise ValueError(
            "has a sslmode that verifies the server's certificate, and does not say against what: add "
            "sslrootcert=/path/to/authority.crt, or sslmode=verify-full&sslrootcert=system for a public authority"
        )
    return kept


def _stricter_demand(given: Mapping[str, str], *, by_socket: bool) -> bool:
    """Say whether `verify-full` has to stand for a demand that the driver cannot meet. Raises: ValueError."""
    mode, accept = given.get("sslmode"), given.get("sslaccept")
    binding = given.get("channel_binding") == "require"
    if binding and by_socket:
        raise ValueError("has channel_binding=require and a Unix socket, which has no TLS to bind to; leave it out")
    if accept is not None and "sslcert" in given and "sslkey" not in given:
        raise ValueError("has Prisma's sslcert, which is the authority's certificate; write sslrootcert")
    if accept == "accept_invalid_certs" and mode in _VERIFYING:
        raise ValueError("has sslaccept=accept_invalid_certs and a sslmode that verifies; leave one out")
    if (binding or accept == "strict") and mode == "disable":
        raise ValueError(
            f"has {'channel_binding=require' if binding else 'sslaccept=strict'} and sslmode=disable; write "
            "sslmode=verify-full&sslrootcert=system"
        )
    return binding or accept == "strict"


def _translated(name: str, value: str) -> Iterator[tuple[str, str]]:
    """Say in libpq's words, or in a setting's, what a parameter says; what is not known stays as it is."""
    if (name, value) in _SAME_AS:
        yield _SAME_AS[name, value]
    elif name in _SETTING_OF:
        low, high = SETTINGS[_SETTING_OF[name]]
        if not _is_whole(value) or not low <= int(value) <= high:
            raise ValueError(f"has the parameter {name}, which is a whole number from {low} to {high}")
        yield _SETTING_OF[name], value
        if name in _POOL_SIZES:  # The other client opens no more than that.
            yield "max_overflow", "0"
    elif name in _SCHEMAS:
        if not _PLAIN_SCHEMAS.fullmatch(value):
            raise ValueError(
                f"has the parameter {name}, and its value is no plain name of a schema: set it by ALTER ROLE … SET "
                "search_path, which holds through poolers too, and leave it out"
            )
        yield "search_path", value
    elif name not in _OF_OTHER_CLIENTS:
        yield _RENAMED.get(name, name), value


def server_options(given: Mapping[str, str]) -> str | None:
    """Return what is sent to the server as `options`: the URL's own, and the search path of other clients.

    Raises: ValueError when a pooler would not take it.
    """
    options, path = given.get("options"), given.get("search_path")
    if path is None:
        return options
    if given.get("statement_cache_size") == "0":
        raise ValueError(
            "names a schema and goes through a pooler, which keeps no search path of a client: set it by ALTER ROLE … "
            "SET search_path, and leave it out"
        )
    return f"-csearch_path={path}" if options is None else f"{options} -csearch_path={path}"


def whole(given: Mapping[str, str], name: str, largest: int) -> int:
    """Return a number of a parameter, 0 where it is not given. Raises: ValueError."""
    text = given.get(name, "0")
    if not _is_whole(text) or int(text) > largest:
        raise ValueError(f"has the parameter {name}, which is a whole number up to {largest}")
    return int(text)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= len(str(2**31))


def _has_root_certificate() -> bool:
    # The default of libpq and asyncpg where neither the URL nor PGSSLROOTCERT names one.
    return os.access(Path("~/.postgresql/root.crt").expanduser(), os.R_OK)


def _unknown(name: str) -> str:
    from difflib import get_close_matches  # noqa: PLC0415  # Only for who has misspelt something.

    # A piece of a password that was not percent-encoded may end up here: only a likely name is repeated.
    near = get_close_matches(name, sorted(PARAMETERS), n=1, cutoff=0.75)
    if not near:
        return "has a parameter that libpq does not know; docs/settings.md lists those that are taken"
    return f"has the parameter {name}, which libpq does not know. Did you mean {near[0]}?"
