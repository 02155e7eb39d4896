"""Every knob, with its unit, its bounds and the reason for its default.

Nothing else reads the environment: `load_settings()` reads it over `.env` and answers a mistake with
`SettingsError`, one sentence for each, naming the variable. The three databases share one class: `DATABASE_*`
describes the primary; `DATABASE_REPLICA_*` and `DATABASE_ANALYTICS_*` inherit whatever they do not set.
"""

import getpass
import os
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from app.database_url import SHAPE, ConnectionParameters, parse_url
from app.variables import PREFIX, Findings, inspect

# The shortest prefix comes last, so that DATABASE_REPLICA_URL is the replica's and not the primary's REPLICA_URL.
PREFIXES = {"replicas": f"{PREFIX}replica_", "analytics": f"{PREFIX}analytics_", "primary": PREFIX}
# HS256 wants a key as long as its hash (RFC 7518, section 3.2).
SECRET_CHARACTERS = 32
# What docker-compose.yml's default passwords begin with.
DEVELOPMENT_SECRET = "development-"  # noqa: S105  # It is what a secret must not look like.
# Their defaults leave the service open: a typing error in them ends the start.
GUARDS = frozenset({"auth_secret", "environment"})
# The migration job has nobody waiting for it.
JOB_CONNECT_SECONDS = 5.0
JOB_COMMAND_SECONDS = 7 * 86_400.0


class SettingsError(ValueError):
    """A setting is missing, unknown, out of bounds or at odds with another; the text says which and what to do."""


def _checked_url(secret: SecretStr) -> SecretStr:
    """Accept what app/database_url.py accepts; never repeat the URL, it holds a password."""
    text = secret.get_secret_value().strip()
    parameters = parse_url(text)
    for name, path in parameters.files.items():
        # The driver would say so at each connect, and that looks like a database that is away.
        if not os.access(path, os.R_OK):
            raise ValueError(f"names {path} as {name}, which is not there or cannot be read")
    if parameters.lacks_root_certificate and not _has_root_certificate():
        raise ValueError(
            "has a sslmode that verifies the server's certificate, and does not say against what: add "
            "sslrootcert=/path/to/authority.crt, or sslmode=verify-full&sslrootcert=system for a public authority"
        )
    if parameters.user is None and not _has_user():
        raise ValueError(f"names no user, and the system has no name for this account; write {SHAPE}")
    return SecretStr(f"postgresql+asyncpg://{text.partition('://')[2]}")


def _has_user() -> bool:
    try:
        return bool(os.environ.get("PGUSER") or getpass.getuser())
    except (KeyError, OSError):  # A container runs under a number that has no name.
        return False


def _has_root_certificate() -> bool:
    # Where libpq and asyncpg look when the URL names none.
    named = os.environ.get("PGSSLROOTCERT") or Path("~/.postgresql/root.crt").expanduser()
    return os.access(named, os.R_OK)


def _checked_secret(secret: SecretStr) -> SecretStr:
    if len(secret.get_secret_value()) < SECRET_CHARACTERS:
        raise ValueError(f"has fewer than {SECRET_CHARACTERS} characters; `openssl rand -hex 32` makes a good one")
    return secret


DatabaseUrl = Annotated[SecretStr, AfterValidator(_checked_url)]


class DatabaseSettings(BaseModel):
    """One database and the pool in front of it. All times are seconds, all sizes are per process."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    url: DatabaseUrl = Field(
        description="postgresql://user:password@host:port/database; several hosts as ?host=a:5432&host=b:5432."
    )
    pool_size: int = Field(10, ge=1, le=500, description="Connections kept open.")
    max_overflow: int = Field(5, ge=0, le=500, description="Connections beyond pool_size under a burst.")
    pool_timeout: float = Field(
        0.5, gt=0, le=60, description="Seconds to wait, connect and check, all together, before a 503."
    )
    pool_recycle: float = Field(
        1800, gt=0, description="Seconds that a connection lives, shortened by up to a tenth at random."
    )
    pool_min_size: int | None = Field(
        None, ge=0, description="Connections opened at start and kept while idle; unset: pool_size, at most 5."
    )
    pool_max_waiting: int = Field(200, ge=0, description="Requests in the queue; the next one is a 503 at once.")
    pool_max_uses: int = Field(50_000, ge=1, description="Checkouts after which a connection is replaced.")
    pool_idle_seconds: float = Field(300, gt=0, description="Seconds of idling before a connection is closed.")
    pool_overflow_idle_seconds: float = Field(
        5, gt=0, description="The same for connections beyond pool_size, so that a burst does not churn them."
    )
    pool_check_after_seconds: float = Field(
        30, ge=0, description="Seconds of idling after which a connection proves itself by SELECT 1."
    )
    connect_timeout_seconds: float = Field(
        0.5,
        gt=0,
        le=60,
        description="Seconds after which a host that has not let the service in is tried again; "
        "its login goes on for eight times as long.",
    )
    command_timeout_seconds: float = Field(
        35, gt=0, description="Net for a dead peer; longer than the server's statement_timeout."
    )
    statement_cache_size: int = Field(
        500, ge=0, description="Prepared statements kept per connection; 0 for poolers that lack them."
    )
    application_name: str = Field("lifeguard", min_length=1, max_length=63, description="As pg_stat_activity shows it.")
    echo: bool = Field(False, description="Log every statement; never in production.")

    @property
    def capacity(self) -> int:
        """Connections at work at most."""
        return self.pool_size + self.max_overflow

    @property
    def warm_size(self) -> int:
        """Connections opened at start and kept while idle."""
        return min(self.pool_size, 5) if self.pool_min_size is None else self.pool_min_size

    @cached_property
    def parameters(self) -> ConnectionParameters:
        """The URL, taken apart; it holds the password."""
        return parse_url(self.url.get_secret_value())

    @property
    def server(self) -> str:
        """Host and port: what databases share that share a server."""
        return self.parameters.server

    @property
    def location(self) -> str:
        """Host, port and database: what may be shown."""
        return self.parameters.location

    @model_validator(mode="before")
    @classmethod
    def _from_the_url(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Let the URL say what has a variable too, where that variable is not set."""
        url = given.get("url")
        try:
            parameters = parse_url(url.get_secret_value() if isinstance(url, SecretStr) else str(url))
        except ValueError:
            return given  # The field's own check says what is wrong.
        said = {
            "application_name": parameters.application_name,
            "connect_timeout_seconds": parameters.connect_timeout_seconds,
        }
        return {name: value for name, value in said.items() if value is not None} | given

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.warm_size > self.pool_size:
            raise ValueError(
                f"POOL_MIN_SIZE {self.warm_size} > POOL_SIZE {self.pool_size}: the pool cannot keep more "
                "connections warm than it keeps; lower the first or raise the second"
            )
        return self


class Settings(BaseSettings):
    """The whole service. Each field says its unit and its reason; `docs/settings.md` is compared with them."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, env_file=".env", env_ignore_empty=True
    )

    primary: DatabaseSettings
    replicas: tuple[DatabaseSettings, ...] = ()
    analytics: DatabaseSettings

    environment: Literal["development", "test", "production"] = Field(
        "development", description="production refuses development secrets and an open service."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least severe line logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: readable on a terminal, JSON lines elsewhere."
    )
    auth_secret: Annotated[SecretStr, AfterValidator(_checked_secret)] | None = Field(
        None, description="Signs bearer tokens (HS256), at least 32 characters; unset leaves the routes open."
    )
    directory_url: str | None = Field(
        None,
        pattern="^https?://",
        description="Base URL of the user directory; POST /users/{id}/sync exists only if set.",
    )
    directory_timeout_seconds: float = Field(5, gt=0, le=60, description="Seconds for one answer of the directory.")

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 in a container.")
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on.")
    trusted_proxies: str = Field(
        "127.0.0.1", description="Addresses whose X-Forwarded-* headers are believed, separated by commas."
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
    request_body_bytes: int = Field(
        1_048_576, ge=0, description="Bytes of a body; more is a 413 before it is read on. A route may name its own."
    )
    request_body_values: int = Field(
        1000, ge=1, description="Values in a JSON body, counted by its commas; more is a 413 before it is parsed."
    )
    request_body_seconds: float = Field(
        30, gt=0, le=3600, description="Seconds for the whole body to arrive; later is a 408."
    )
    answer_stall_seconds: float = Field(
        30, gt=0, le=3600, description="Seconds for which a client may read nothing of its answer."
    )
    access_log: bool = Field(False, description="A log line for each request; the metrics count them anyway.")
    workers: int = Field(1, ge=1, le=64, description="Processes of one instance.")
    instances: int = Field(1, ge=1, le=10_000, description="Instances of the service; only the budget uses it.")
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
        False, description="Browsers send that cookie by HTTPS only; needed for names with __Host- or __Secure-."
    )
    retry_after_seconds: int = Field(1, ge=1, le=3600, description="Retry-After of a 503.")
    health_timeout_seconds: float = Field(5, gt=0, le=60, description="Seconds for one database in /health/db.")
    monitor_interval_seconds: float = Field(
        0.5,
        gt=0,
        le=60,
        description="Seconds between two looks at each database; readiness follows within two looks.",
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
    replica_max_lag_seconds: float = Field(10, gt=0, description="A replica behind by more seconds AND more bytes …")
    replica_max_lag_bytes: int = Field(8_388_608, ge=0, description="… than this serves no reads.")
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

    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def ignored_variables(self) -> tuple[str, ...]:
        """Sentences about variables of the environment that look like settings and are none."""
        return self._ignored

    @property
    def databases(self) -> list[tuple[str, DatabaseSettings]]:
        """Primary, replicas, analytics, each with the prefix of its variables."""
        replicas = [("DATABASE_REPLICA_", replica) for replica in self.replicas]
        return [("DATABASE_", self.primary), *replicas, ("DATABASE_ANALYTICS_", self.analytics)]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.graceful_timeout_seconds <= self.statement_timeout_seconds:
            raise ValueError(
                f"GRACEFUL_TIMEOUT_SECONDS {self.graceful_timeout_seconds} <= STATEMENT_TIMEOUT_SECONDS "
                f"{self.statement_timeout_seconds:g}: a statement in flight would be cut at shutdown; raise the first"
            )
        for replica in self.replicas:
            if len(replica.parameters.hosts) > 1:
                raise ValueError(
                    "DATABASE_REPLICA_URL names several hosts in one URL: what one of them has replayed would be "
                    "believed of the other; write a URL for each, separated by commas"
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

    @model_validator(mode="after")
    def _fit_for_production(self) -> Self:
        if self.environment != "production":
            return self
        refused = {
            f"{prefix}URL holds a development password": None
            for prefix, database in self.databases
            if (database.parameters.password or "").startswith(DEVELOPMENT_SECRET)
        }
        if self.auth_secret is None:
            refused["AUTH_SECRET is not set, and every route would be open"] = None
        elif self.auth_secret.get_secret_value().startswith(DEVELOPMENT_SECRET):
            refused["AUTH_SECRET is a development secret"] = None
        if refused:
            raise ValueError(f"ENVIRONMENT=production refuses to start: {'; '.join(refused)}")
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
        return init_settings, _Variables(settings_cls, env_settings, dotenv_settings)


class MigrationSettings(BaseSettings):
    """Where migrations go: direct to the primary, past any pooler; and who must hear of them afterwards."""

    model_config = SettingsConfigDict(
        frozen=True, env_file=".env", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True
    )

    # Looked at when they are used: a job that has a MIGRATIONS_URL does not care about the others.
    migrations_url: SecretStr | None = None
    database_url: SecretStr | None = None
    database_replica_url: SecretStr | None = None
    # PgBouncer's admin console: its server connections are replaced once the schema is new.
    pgbouncer_admin_url: SecretStr | None = None
    # An index of a large table takes longer than a deployment should hang.
    migrations_wait_seconds: float = Field(900, ge=0, le=86_400)

    @property
    def primary(self) -> DatabaseSettings:
        """MIGRATIONS_URL, else DATABASE_URL.

        Raises: SettingsError when neither is set, or it is wrong.
        """
        if self.migrations_url is not None:
            return _of_a_job("MIGRATIONS_URL", self.migrations_url, ("primary", "read-write"))
        if self.database_url is not None:
            return _of_a_job("DATABASE_URL", self.database_url, ("primary", "read-write"))
        raise SettingsError(
            "Neither MIGRATIONS_URL nor DATABASE_URL is set: say where to migrate, past any pooler, as "
            "postgresql://app_owner:password@host:5432/database."
        )

    @property
    def replicas(self) -> list[DatabaseSettings]:
        """The replicas that a migration has to reach before it is over. Raises: SettingsError."""
        urls = "" if self.database_replica_url is None else self.database_replica_url.get_secret_value()
        kinds = ("standby", "read-only", "prefer-standby")
        return [_of_a_job("DATABASE_REPLICA_URL", SecretStr(url), kinds) for url in _split_urls(urls)]

    @property
    def console(self) -> DatabaseSettings | None:
        """PgBouncer's admin console. Raises: SettingsError."""
        url = self.pgbouncer_admin_url
        return None if url is None else _of_a_job("PGBOUNCER_ADMIN_URL", url, ())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read NAME_FILE here as well."""
        del file_secret_settings
        return init_settings, _MigrationVariables(settings_cls, env_settings, dotenv_settings)


def _of_a_job(variable: str, url: SecretStr, kinds: tuple[str, ...]) -> DatabaseSettings:
    """Read a URL of the migration job. A statement of a migration takes as long as its table is large."""
    try:
        # Nothing is asked twice, and a pooler that loses prepared statements may still be the way to a console.
        found = DatabaseSettings(url=url, command_timeout_seconds=JOB_COMMAND_SECONDS, statement_cache_size=0)
    except ValidationError as error:
        raise SettingsError(_sentences(error).replace("URL: ", f"{variable}: ", 1)) from None
    said = found.parameters
    if said.target_session_attrs not in {None, "any", *kinds}:
        raise SettingsError(f"{variable}: has target_session_attrs={said.target_session_attrs}; leave it out.")
    return found.model_copy(
        update={
            "application_name": said.application_name or "lifeguard-migrations",
            "connect_timeout_seconds": said.connect_timeout_seconds or JOB_CONNECT_SECONDS,
        }
    )


def load_migration_settings() -> MigrationSettings:
    """Read the environment of the migration job, and check each of its URLs before anything is changed.

    Raises: SettingsError, with a sentence.
    """
    try:
        settings = MigrationSettings()
    except ValidationError as error:
        raise SettingsError(_sentences(error)) from None
    others = [name for name in _read_variables(MigrationSettings).variables if not name.startswith(PREFIX)]
    names = MigrationSettings.model_fields.keys()
    # MIGRATION_URL would send the schema's changes where DATABASE_URL leads, through a pooler as a role without DDL.
    if refused := inspect(others, names, guarding=names).refused:
        raise SettingsError("\n".join(refused))
    _ = settings.primary, settings.replicas, settings.console
    return settings


def load_settings() -> Settings:
    """Read and check the environment.

    Raises: SettingsError, with one line for each mistake.
    """
    try:
        settings = Settings()
    except ValidationError as error:
        raise SettingsError(_sentences(error)) from None
    if settings.prometheus_multiproc_dir is not None and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        raise SettingsError(
            "PROMETHEUS_MULTIPROC_DIR: is set in .env, where prometheus-client does not look, and /metrics would be "
            "empty; export it to the environment of the process"
        )
    settings._ignored = _read_variables(Settings).inspect().ignored  # noqa: SLF001  # Frozen for everybody else.
    return settings


class _Variables(PydanticBaseSettingsSource):
    """The environment over `.env`, with NAME_FILE read from its file and DATABASE_* sorted by database."""

    def __init__(
        self,
        settings_cls: type[BaseSettings],
        environment: PydanticBaseSettingsSource,
        dotenv: PydanticBaseSettingsSource,
    ) -> None:
        super().__init__(settings_cls)
        self.variables: dict[str, str] = {}
        for source in cast("tuple[EnvSettingsSource, ...]", (dotenv, environment)):
            self.variables |= {name.lower(): value for name, value in source.env_vars.items() if value}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not called: the fields are not looked up one by one."""
        raise NotImplementedError

    def inspect(self) -> Findings:
        """Tell which variables are not read, and why."""
        known = {*_known_names(), *_service_names(), *MigrationSettings.model_fields}
        return inspect(self.variables, known, guarding=GUARDS)

    def __call__(self) -> dict[str, Any]:
        if refused := self.inspect().refused:
            raise SettingsError("\n".join(refused))
        variables = _with_secret_files(self.variables, _is_known)
        groups = _grouped(variables)
        found: dict[str, Any] = {n: variables[n] for n in _service_names() if n in variables}
        if "url" not in groups["primary"]:
            return found
        primary, replica = groups["primary"], groups["replicas"]
        urls = _split_urls(replica.pop("url", ""))
        # The analytics pool is a bulkhead: it exists in every shape, where it harms least, and it stays small.
        analytics = {"url": urls[0] if urls else primary["url"], "pool_size": "2", "max_overflow": "2"}
        return found | {
            "primary": primary,
            "replicas": tuple({**primary, **replica, "url": url} for url in urls),
            "analytics": {**primary, **analytics, "pool_min_size": "0"} | groups["analytics"],
        }


def _read_variables(settings_cls: type[BaseSettings]) -> _Variables:
    return _Variables(settings_cls, EnvSettingsSource(settings_cls), DotEnvSettingsSource(settings_cls))


class _MigrationVariables(_Variables):
    """The same for migrations, which have no groups."""

    def __call__(self) -> dict[str, Any]:
        names = MigrationSettings.model_fields
        variables = _with_secret_files(self.variables, lambda name: name in names)
        return {name: variables[name] for name in names if name in variables}


def _with_secret_files(variables: Mapping[str, str], is_known: Callable[[str], bool]) -> dict[str, str]:
    resolved = dict(variables)
    for name, value in variables.items():
        target = name.removesuffix("_file")
        if target == name or not is_known(target):
            continue
        if target in variables:
            raise SettingsError(f"Both {target.upper()} and {name.upper()} are set; keep one.")
        try:
            resolved[target] = Path(value).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SettingsError(f"{name.upper()} names {value}, which cannot be read: {error.strerror}.") from None
        del resolved[name]
    return resolved


def _grouped(variables: Mapping[str, str]) -> dict[str, dict[str, str]]:
    groups: dict[str, dict[str, str]] = {group: {} for group in PREFIXES}
    for name in variables.keys() & _known_names():
        group = next(g for g, prefix in PREFIXES.items() if name.startswith(prefix))
        groups[group][name.removeprefix(PREFIXES[group])] = variables[name]
    return groups


def _known_names() -> set[str]:
    return {f"{prefix}{name}" for prefix in PREFIXES.values() for name in DatabaseSettings.model_fields}


def _service_names() -> set[str]:
    return Settings.model_fields.keys() - {"primary", "replicas", "analytics"}


def _is_known(name: str) -> bool:
    return name in _service_names() or name in _known_names()


def _split_urls(text: str) -> list[str]:
    """Split "postgresql://a/x, postgresql://b/x" without splitting a comma inside one URL's query."""
    return [url for url in re.split(r"\s*,\s*(?=[\w+.-]+://|$)", text.strip()) if url]


def _sentences(error: ValidationError) -> str:
    lines: dict[tuple[str, str], str] = {}
    for mistake in error.errors(include_url=False, include_input=False, include_context=False):
        group, *path = [part for part in mistake["loc"] if isinstance(part, str)] or [""]
        field = path[-1] if path else "url" if group in PREFIXES else group
        name, text = f"{PREFIXES.get(group, '')}{field}".upper(), mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "missing":
            name = "DATABASE_URL"
            text = (
                "is not set: the service needs its primary database. Set it to "
                "postgresql://user:password@host:5432/database, or run `make run` for an embedded one"
            )
        # What the others inherit is wrong once, under the name by which it was set.
        lines.setdefault((field, text), f"{name}: {text}.".removeprefix(": "))
    return "\n".join(lines.values())
