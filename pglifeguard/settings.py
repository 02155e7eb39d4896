"""Every setting of the library, with its unit, its bounds and the reason for its default.

`DatabasesSettings()` reads the environment over `.env` and answers a mistake with `SettingsError`, one sentence for
each, naming the variable. A service that has settings of its own makes them a subclass. The three databases share one
class: `DATABASE_*` describes the primary; `DATABASE_REPLICA_*` and `DATABASE_ANALYTICS_*` inherit whatever they do not
set.
"""

import os
from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from pglifeguard.credentials import PasswordSource
from pglifeguard.database_settings import DatabaseSettings, DatabaseUrl, PasswordFile
from pglifeguard.database_url import holds_password, parse_url
from pglifeguard.discovery import read_zones
from pglifeguard.environment import (
    SettingsError,
    Variables,
    grouped,
    names_by_database,
    reading,
    sentences,
    split_urls,
)
from pglifeguard.lookup import is_address
from pglifeguard.sealing import SECRET_CHARACTERS, Seal, split_secrets
from pglifeguard.variables import inspect


class DatabasesSettings(BaseSettings):
    """Primary, replicas and analytics, and how they are used. Each field says its unit and its reason.

    Raises, when made: SettingsError, with one sentence for each mistake.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        env_file=".env",
        env_ignore_empty=True,
        # The first use builds the validators: a service uses its subclass, and these would be built for nothing.
        defer_build=True,
    )
    # Settings whose default leaves a service open: a typing error in them ends the start.
    guards: ClassVar[frozenset[str]] = frozenset()
    # Variables of the same environment that something else reads, by lower-case name.
    read_elsewhere: ClassVar[frozenset[str]] = frozenset()
    # What else there is to do when DATABASE_URL is not set.
    without_database: ClassVar[str] = ""

    primary: DatabaseSettings
    replicas: tuple[DatabaseSettings, ...] = ()
    analytics: DatabaseSettings

    listen_url: DatabaseUrl | None = Field(
        None,
        description="URL of the primary, past any pooler, for databases.listen(): one connection more per process.",
    )
    listen_password_file: PasswordFile | None = Field(
        None, description="File of that URL's password, read at each connect; unset: DATABASE_PASSWORD_FILE."
    )
    max_clients: int = Field(
        12_000,
        ge=1,
        description="Clients connected to a process; fewer where it may open fewer files. More are closed.",
    )
    request_head_bytes: int = Field(
        32_768, ge=1024, description="Bytes of a request's URL and headers; more is a 431. A balancer may allow less."
    )
    request_head_seconds: float = Field(
        10, gt=0, le=3600, description="Seconds from the connection, or a request's first byte, to its last header."
    )
    request_url_bytes: int = Field(
        32_768, ge=1024, description="Bytes of a request's URL alone; more is a 414, as are more than 1,000 parameters."
    )
    request_body_bytes: int = Field(
        1_048_576, ge=0, description="Bytes of a body; more is a 413 before it is read on. A route may name its own."
    )
    request_body_values: int = Field(
        1000, ge=1, description="Values in a JSON body, counted by its commas; more is a 413 before it is parsed."
    )
    request_body_depth: int = Field(
        100,
        ge=1,
        le=200,
        description="Arrays and objects of a JSON body in each other; more is a 413 before it is parsed.",
    )
    request_body_seconds: float = Field(
        30, gt=0, le=3600, description="Seconds for the whole body to arrive; later is a 408."
    )
    answer_stall_seconds: float = Field(
        30, gt=0, le=3600, description="Seconds for which a client may read nothing of its answer."
    )
    clients_by_address: bool = Field(
        False,
        description="Let clients take turns for connections by their address; only where a proxy in front reports it.",
    )
    workers: int = Field(1, ge=1, le=64, description="Processes of one instance.")
    instances: int = Field(1, ge=1, le=10_000, description="Instances of the service; only the budget uses it.")
    surge_instances: int = Field(
        0,
        ge=0,
        le=10_000,
        description="Instances that a rollout starts before it stops the old ones; the budget adds them.",
    )
    migration_connections: int = Field(
        1, ge=0, le=1000, description="Connections of the migration job; the budget adds them to the primary's server."
    )
    job_connections: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Connections of workers, scripts and exporters beside the service; added there too.",
    )
    connection_limit: int | None = Field(
        None,
        ge=1,
        description="Connections that the server (or pooler) grants this service; unset skips the check.",
    )
    connection_reserve: int = Field(
        3, ge=0, description="Of these, kept for others: PostgreSQL's superuser_reserved_connections is 3."
    )
    statement_timeout_seconds: float = Field(
        30,
        gt=0,
        description="What the roles have as statement_timeout (postgres/roles.sql); the checks rely on it.",
    )
    graceful_timeout_seconds: int = Field(
        40, ge=1, description="Seconds for requests in flight after SIGTERM; longer than any statement."
    )
    drain_delay_seconds: float = Field(
        0,
        ge=0,
        le=120,
        description="Seconds between readiness saying no and the listener closing, for balancers.",
    )
    idempotency_hours: float = Field(24, gt=0, le=720, description="Hours for which an Idempotency-Key is remembered.")
    idempotency_bodies: Literal["plain", "encrypted", "none"] = Field(
        "plain",
        description="How answers are kept with their key: as they are, encrypted, or without headers and body.",
    )
    idempotency_secret: SecretStr | None = Field(
        None,
        description="Secrets of 32 characters or more, by commas: the first encrypts answers, each decrypts them.",
    )
    consistency_cookie_name: str = Field(
        "consistency_token",
        pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$",
        description="Name of the cookie that holds the consistency token; one for each service of a domain.",
    )
    consistency_cookie_path: str | None = Field(
        None,
        pattern=r"^/[!-:<-~]*$",
        description="Path of that cookie; unset: where the service is (its root_path), else /.",
    )
    consistency_cookie_domain: str | None = Field(
        None,
        pattern=r"^\.?[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*$",
        description="Domain of that cookie, for hosts beneath it too; unset: the host that answered.",
    )
    consistency_cookie_secure: bool = Field(
        False,
        description="Mark that cookie for HTTPS also where clients come by HTTP; by HTTPS it is anyway.",
    )
    retry_after_seconds: int = Field(1, ge=1, le=3600, description="Retry-After of a 503, at least.")
    retry_after_spread_seconds: int = Field(
        2, ge=0, le=3600, description="Up to so many more, at random: clients that were refused do not return together."
    )
    health_timeout_seconds: float = Field(5, gt=0, le=60, description="Seconds for one database in /health/db.")
    monitor_interval_seconds: float = Field(
        0.5,
        gt=0,
        le=60,
        description="Seconds between two probes of each database; readiness follows within two probes.",
    )
    pool_log_interval_seconds: float = Field(60, gt=0, description="Seconds between two log lines of pool figures.")
    slow_query_seconds: float = Field(0.1, gt=0, description="Statements slower than this are logged and counted.")
    blocked_after_seconds: float = Field(
        0.25, gt=0, description="The event loop standing still for longer is logged in development, with the line."
    )
    idle_hold_seconds: float = Field(
        1, gt=0, description="A checkout that idled for longer, between its statements, is logged with its route."
    )
    leak_after_seconds: float = Field(
        60, gt=0, description="A checkout held longer is logged once, with the route that holds it."
    )
    database_replica_discovery: Literal["off", "dns", "srv"] = Field(
        "off",
        description="Ask DNS for the replicas that DATABASE_REPLICA_URL names: by its addresses, or its SRV records.",
    )
    database_replica_discovery_seconds: float = Field(
        5, gt=0, le=3600, description="Seconds between two of these lookups, give or take a tenth."
    )
    database_replica_max_pools: int = Field(
        3,
        ge=1,
        le=100,
        description="Replicas that a process uses at most of those found, each with a pool; the budget counts all.",
    )
    database_zone: str | None = Field(
        None, description="The zone of this instance: replicas in it come first. Unset: all are alike."
    )
    database_replica_zones: str | None = Field(
        None, description="Zones of the replicas found, by network or name: 10.0.1.0/24=zone-a,*.b.example=zone-b."
    )
    replica_max_lag_seconds: float = Field(10, gt=0, description="A replica behind by more seconds AND more bytes …")
    replica_max_lag_bytes: int = Field(8_388_608, ge=0, description="… than this serves no reads.")
    replica_wait_milliseconds: int = Field(
        15,
        ge=0,
        le=1000,
        description="Milliseconds that a read waits for a replica to replay its client's write; 0: asks no replica.",
    )
    replica_fallback: bool = Field(
        True,
        description="Reads that the replica cannot serve go to the primary; off: 503 instead, and its 404 stands.",
    )
    ready_without_primary: bool = Field(
        False,
        description="Be ready while a replica serves reads and the primary is away; writes get 503. Off: not ready.",
    )
    prometheus_multiproc_dir: Path | None = Field(
        None,
        description="Where several workers gather their metrics. `serve` makes it; others name an empty directory.",
    )
    trace_checkouts: bool = Field(
        False,
        description="Remember the line that took each connection, name the one that blocks the loop; for development.",
    )

    warn_unencrypted: bool = Field(
        False,
        description="Log once for each database that its connections leave the machine without TLS. On in production.",
    )

    # Sentences about variables of the environment that look like settings and are none.
    ignored_variables: tuple[str, ...] = Field((), exclude=True)

    def __init__(self, **values: Any) -> None:
        try:
            with reading(values.get("_env_file", self.model_config.get("env_file"))):
                super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(sentences(error, hint=self.without_database)) from None

    @property
    def databases(self) -> list[tuple[str, DatabaseSettings]]:
        """Primary, replicas, analytics, each with the prefix of its variables."""
        replicas = [("DATABASE_REPLICA_", replica) for replica in self.replicas]
        return [("DATABASE_", self.primary), *replicas, ("DATABASE_ANALYTICS_", self.analytics)]

    @property
    def pools(self) -> dict[str, DatabaseSettings]:
        """Primary, replicas, analytics by the names of their pools. One replica is plainly "replica".

        Of replicas that DNS finds these are the places: at most as many pools are open.
        """
        places = self.replicas * self.database_replica_max_pools if self.finds_replicas else self.replicas
        several = len(places) > 1
        replicas = {f"replica-{number}" if several else "replica": replica for number, replica in enumerate(places, 1)}
        return {"primary": self.primary, **replicas, "analytics": self.analytics}

    @property
    def finds_replicas(self) -> bool:
        """Whether DNS says which replicas there are."""
        return self.database_replica_discovery != "off"

    @cached_property
    def zones(self) -> dict[str, str]:
        """The zones of replicas, by network or name."""
        return {} if self.database_replica_zones is None else read_zones(self.database_replica_zones)

    @cached_property
    def idempotency_seal(self) -> Seal | None:
        """What encrypts the answers that are kept, and decrypts them; None without a secret."""
        return None if self.idempotency_secret is None else Seal(split_secrets(self.idempotency_secret))

    @cached_property
    def listening(self) -> DatabaseSettings | None:
        """The primary as LISTEN_URL leads to it; None where LISTEN_URL is not set."""
        if self.listen_url is None:
            return None
        said = parse_url(self.listen_url.get_secret_value()).settings
        own: dict[str, Any] = {**said, "url": self.listen_url}
        if self.listen_password_file is not None or holds_password(self.listen_url.get_secret_value()):
            own["password_file"] = self.listen_password_file
        listening = DatabaseSettings(**self.primary.model_dump() | own)
        source = self.primary._password  # noqa: SLF001  # Of a class of this module.
        return listening if source is None else listening.asking(source)

    def asking(self, source: PasswordSource) -> Self:
        """Return these settings with a function that gives every database's password, asked at each connect.

        Raises: SettingsError when a URL or a file has a password already; TypeError when it is no function.
        """

        def ask(prefix: str, database: DatabaseSettings) -> DatabaseSettings:
            try:
                return database.asking(source)
            except ValueError as error:
                raise SettingsError(f"{prefix}{error}.") from None

        databases = iter([ask(prefix, database) for prefix, database in self.databases])
        if self.listening is not None:
            ask("LISTEN_", self.listening)
        update = {
            "primary": next(databases),
            "replicas": tuple(next(databases) for _ in self.replicas),
            "analytics": next(databases),
        }
        asking = self.model_copy(update=update)
        vars(asking).pop("listening", None)
        return asking

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.graceful_timeout_seconds <= self.statement_timeout_seconds:
            raise ValueError(
                f"GRACEFUL_TIMEOUT_SECONDS {self.graceful_timeout_seconds} <= STATEMENT_TIMEOUT_SECONDS "
                f"{self.statement_timeout_seconds:g}: a statement in flight would be cut at shutdown; raise the first"
            )
        if self.listen_url is not None and self.primary.sleeps:
            raise ValueError(
                "LISTEN_URL with DATABASE_PROFILE=sleeping: the connection that listens keeps the database awake; "
                "leave out one of the two"
            )
        for replica in self.replicas:
            if len(replica.parameters.hosts) > 1:
                raise ValueError(
                    "DATABASE_REPLICA_URL names several hosts in one URL: what one of them has replayed would be "
                    "believed of the other; write a URL for each, separated by commas"
                )
        listen_url = "" if self.listen_url is None else self.listen_url.get_secret_value()
        if self.listen_password_file is not None and holds_password(listen_url):
            raise ValueError("LISTEN_URL holds a password or a passfile, and LISTEN_PASSWORD_FILE is set: keep one")
        listens_at = None if self.listen_url is None else parse_url(listen_url).target_session_attrs
        if listens_at not in {None, "any", "read-write", "primary"}:
            raise ValueError(
                f"LISTEN_URL has target_session_attrs={listens_at}: it listens at the primary; leave it out"
            )
        for prefix, database in self.databases:
            if wrong := self._wrong_session_attrs(prefix, database):
                raise ValueError(f"{prefix}URL has target_session_attrs={wrong}")
            if database.command_timeout_seconds <= self.statement_timeout_seconds:
                raise ValueError(
                    f"{prefix}COMMAND_TIMEOUT_SECONDS {database.command_timeout_seconds:g} <= "
                    f"STATEMENT_TIMEOUT_SECONDS {self.statement_timeout_seconds:g}: the client would give up, and "
                    "throw the connection away, before the server answers; raise the first"
                )
        return self

    def _wrong_session_attrs(self, prefix: str, database: DatabaseSettings) -> str | None:
        """Say why a URL demands a kind of server that its pool does not look for; None when it does not."""
        wanted = database.parameters.target_session_attrs
        if wanted is None or wanted == "any":
            return None
        writes = wanted in {"read-write", "primary"}
        if prefix == "DATABASE_":
            return None if writes else f"{wanted}: the service writes there; leave it out, or write read-write"
        if prefix == "DATABASE_REPLICA_":
            return f"{wanted}: a replica is a standby; leave it out" if writes else None
        elsewhere = [self.primary.url, *(replica.url for replica in self.replicas)]
        if database.url in elsewhere or (wanted == "prefer-standby" and len(database.parameters.hosts) == 1):
            return None
        return f"{wanted}: reports run on whichever host answers; leave it out, and name only hosts that may be asked"

    @model_validator(mode="after")
    def _fit_for_discovery(self) -> Self:
        if not self.finds_replicas:
            for name in ("database_replica_discovery_seconds", "database_replica_max_pools", "database_replica_zones"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name.upper()} is about replicas that DNS finds: set DATABASE_REPLICA_DISCOVERY too, or "
                        "leave it out"
                    )
            return self
        discovery = f"DATABASE_REPLICA_DISCOVERY={self.database_replica_discovery}"
        if len(self.replicas) != 1:
            raise ValueError(f"{discovery} takes one DATABASE_REPLICA_URL, whose host is the name that is looked up")
        (replica,) = self.replicas
        (host,) = replica.parameters.hosts
        if host.is_socket or is_address(host.name):
            raise ValueError(f"{discovery}: DATABASE_REPLICA_URL has {host.name} for its host; write a name instead")
        if replica.sleeps:
            raise ValueError(
                f"{discovery} with DATABASE_REPLICA_PROFILE=sleeping: replicas that are found are probed all the "
                "time, which keeps them awake; leave out one of the two"
            )
        if self.database_replica_discovery == "srv" and self.analytics.server == replica.server:
            raise ValueError(
                f"{discovery}: DATABASE_REPLICA_URL names records, to which reports cannot connect; set "
                "DATABASE_ANALYTICS_URL"
            )
        if self.database_replica_discovery == "srv" and find_spec("dns") is None:
            raise ValueError(f"{discovery} needs dnspython: pip install 'pglifeguard[dns]'")
        return self

    @model_validator(mode="after")
    def _fit_for_zones(self) -> Self:
        if not self.finds_replicas:
            return self
        try:
            zones = self.zones
        except ValueError as error:
            raise ValueError(f"DATABASE_REPLICA_ZONES: {error}") from None
        if self.database_zone is None and zones:
            raise ValueError("DATABASE_REPLICA_ZONES without DATABASE_ZONE: say which zone this instance is in")
        if self.database_zone is not None and self.database_zone not in zones.values():
            raise ValueError(
                f"DATABASE_ZONE {self.database_zone} is the zone of no entry of DATABASE_REPLICA_ZONES: say there "
                "which networks or names are in it"
            )
        return self

    @model_validator(mode="after")
    def _fit_for_encryption(self) -> Self:
        if self.idempotency_secret is None:
            if self.idempotency_bodies == "encrypted":
                raise ValueError(
                    "IDEMPOTENCY_BODIES=encrypted needs IDEMPOTENCY_SECRET: `openssl rand -hex 32` makes a good one"
                )
            return self
        secrets = split_secrets(self.idempotency_secret)
        if not secrets or min(map(len, secrets)) < SECRET_CHARACTERS:
            raise ValueError(
                f"IDEMPOTENCY_SECRET has a secret of fewer than {SECRET_CHARACTERS} characters; `openssl rand -hex 32` "
                "makes a good one, and commas separate several"
            )
        if find_spec("cryptography") is None:
            raise ValueError("IDEMPOTENCY_SECRET needs cryptography: pip install 'pglifeguard[encryption]'")
        return self

    @model_validator(mode="after")
    def _fit_for_browsers(self) -> Self:
        name = self.consistency_cookie_name
        if name.startswith(("__Host-", "__Secure-")) and not self.consistency_cookie_secure:
            raise ValueError(
                f"CONSISTENCY_COOKIE_NAME {name} without CONSISTENCY_COOKIE_SECURE=true: browsers refuse such a cookie"
            )
        if name.startswith("__Host-") and (self.consistency_cookie_path != "/" or self.consistency_cookie_domain):
            raise ValueError(
                f"CONSISTENCY_COOKIE_NAME {name} needs CONSISTENCY_COOKIE_PATH=/ and no CONSISTENCY_COOKIE_DOMAIN: "
                "browsers refuse such a cookie otherwise"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the grouped variables where pydantic-settings has its own three sources."""
        del file_secret_settings
        return init_settings, _DatabaseVariables(settings_cls, env_settings, dotenv_settings)


def _inheriting(primary: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Take from the primary what a database does not say itself; a password in its URL stands for the file too."""
    if "password_file" not in own and holds_password(own.get("url", "")):
        primary = {**primary, "password_file": ""}
    return {name: value for name, value in {**primary, **own}.items() if value}


class _DatabaseVariables(Variables):
    """The variables of a service, those of its databases put together for each of them."""

    def __call__(self) -> dict[str, Any]:
        settings_cls = cast("type[DatabasesSettings]", self.settings_cls)
        known = {*self._of_databases, *self._of_service, *settings_cls.read_elsewhere}
        findings = inspect(self.variables, known, guarding=settings_cls.guards)
        if findings.refused:
            raise SettingsError("\n".join(findings.refused))
        variables = self.read(lambda name: name in self._of_service or name in self._of_databases)
        if "prometheus_multiproc_dir" in variables and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            raise SettingsError(
                "PROMETHEUS_MULTIPROC_DIR: is set in .env, where prometheus-client does not look, and /metrics would "
                "be empty; export it to the environment of the process"
            )
        folder = variables.get("prometheus_multiproc_dir")
        if folder is not None and not Path(folder).is_dir():
            raise SettingsError(
                f"PROMETHEUS_MULTIPROC_DIR: there is no directory {folder}; make it, or unset the variable"
            )
        groups = grouped(variables, DatabaseSettings.model_fields)
        found: dict[str, Any] = {n: variables[n] for n in self._of_service if n in variables}
        found["ignored_variables"] = findings.ignored
        if "url" not in groups["primary"]:
            return found
        primary, replica = groups["primary"], groups["replicas"]
        urls = split_urls(replica.pop("url", ""))
        # The analytics pool is a bulkhead: it exists in every shape, where it harms least, and it stays small.
        analytics = {"pool_size": "2", "max_overflow": "2", "pool_min_size": "0"}
        replicas = tuple(_inheriting(primary, {**replica, "url": url}) for url in urls)
        near = dict(primary)
        if replicas:
            near = {**primary, "url": replicas[0]["url"], "password_file": replicas[0].get("password_file", "")}
        return found | {
            "primary": primary,
            "replicas": replicas,
            "analytics": _inheriting(near, {**analytics, **groups["analytics"]}),
        }

    @cached_property
    def _of_databases(self) -> set[str]:
        return names_by_database(DatabaseSettings.model_fields)

    @cached_property
    def _of_service(self) -> set[str]:
        return self.settings_cls.model_fields.keys() - {"primary", "replicas", "analytics", "ignored_variables"}
