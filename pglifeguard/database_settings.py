"""The settings of one database and of the pool in front of it, with their units, bounds and reasons."""

import getpass
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    model_validator,
)

from pglifeguard.credentials import NO_FUNCTION, PasswordSource, from_file, read_password
from pglifeguard.database_url import SHAPE, ConnectionParameters, Host, parse_url
from pglifeguard.tls import fault_of_files


def _checked_url(secret: SecretStr) -> SecretStr:
    """Accept what pglifeguard/database_url.py accepts; never repeat the URL, it holds a password."""
    text = secret.get_secret_value().strip()
    parameters = parse_url(text)
    if fault := fault_of_files(parameters.tls):
        raise ValueError(fault)
    if parameters.passfile is not None:
        _check_passfile(Path(parameters.passfile))
    if parameters.user is None and not _has_user():
        raise ValueError(f"names no user, and the system has no name for this account; write {SHAPE}")
    return SecretStr(f"postgresql+asyncpg://{text.partition('://')[2]}")


def _has_user() -> bool:
    try:
        return bool(os.environ.get("PGUSER") or getpass.getuser())
    except (KeyError, OSError):  # A container runs under a number that has no name.
        return False


def _check_passfile(path: Path) -> None:
    # The driver would log in without a password, and the server would be said to refuse it.
    if not os.access(path, os.R_OK):
        raise ValueError(f"names {path} as passfile, which is not there or cannot be read")
    if path.stat().st_mode & 0o077:
        raise ValueError(f"names {path} as passfile, which others may read, so it does not count: chmod 600 it")


def _checked_password_file(path: Path) -> Path:
    """Find a wrong path at the start. Later the file may be gone for a moment: then the next login reads it.

    The path is not repeated: it is the password where somebody wrote that itself.
    """
    try:
        password = read_password(path)
    except OSError as error:
        raise ValueError(f"names a file that cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"names a file that cannot be read: {error}") from None
    if not password:
        raise ValueError("names a file that is empty")
    return path


# What the profile "sleeping" chooses in place of the defaults. Each second that a connection is open may be on the
# bill. While the database wakes up, the requests of many seconds wait in the queue, and not those of half a second.
SLEEPING = {"pool_idle_seconds": 60, "pool_max_waiting": 1000}

# The most connections in each of the two sizes of a pool.
MOST = 500

DatabaseUrl = Annotated[SecretStr, AfterValidator(_checked_url)]
PasswordFile = Annotated[Path, AfterValidator(_checked_password_file)]


class DatabaseSettings(BaseModel):
    """One database and the pool in front of it. All times are seconds, all sizes are per process."""

    # The first use builds the validators: those of the settings around it hold them as well.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True)

    url: DatabaseUrl = Field(
        description="postgresql://user:password@host:port/database; several hosts as ?host=a:5432&host=b:5432."
    )
    password_file: PasswordFile | None = Field(
        None, description="File of the password, read at each connect; the URL has no password then."
    )
    profile: Literal["always_on", "sleeping"] = Field(
        "always_on",
        description="sleeping: the server stops when nobody asks, so nothing is asked of it meanwhile "
        "(docs/sleeping.md).",
    )
    wake_seconds: float = Field(
        30,
        gt=0,
        le=300,
        description="Seconds to wait for a sleeping database to wake up, before a 503; otherwise not used.",
    )
    pool_size: int = Field(10, ge=1, le=MOST, description="Connections kept open.")
    max_overflow: int = Field(5, ge=0, le=MOST, description="Connections beyond pool_size under a burst.")
    pool_timeout: float = Field(
        0.5, gt=0, le=60, description="Seconds to wait, connect and check, all together, before a 503."
    )
    pool_recycle: float = Field(
        1800, gt=0, description="Seconds until a connection is replaced, shortened by up to a tenth at random."
    )
    pool_min_size: int | None = Field(
        None,
        ge=0,
        description="Connections opened at start and kept while idle; unset: pool_size, at most 5. Sleeping: 0.",
    )
    pool_max_waiting: int = Field(
        200, ge=0, description="Requests in the queue; the next one is a 503 at once. Sleeping: 1000."
    )
    pool_queue_target_seconds: float = Field(
        0.02,
        ge=0,
        le=60,
        description="Seconds to wait while more requests come than can be served; 0: plain first come, first served.",
    )
    pool_max_uses: int = Field(50_000, ge=1, description="Checkouts after which a connection is replaced.")
    pool_idle_seconds: float = Field(
        300, gt=0, description="Seconds of idling before a connection is closed. Sleeping: 60."
    )
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
        description="Seconds after which a host that has not let the service in is tried again, doubled up to 2 where "
        "it is the only one; its login goes on for eight times as long.",
    )
    command_timeout_seconds: float = Field(
        35, gt=0, description="Net for a dead peer; longer than the server's statement_timeout."
    )
    statement_cache_size: int = Field(
        500, ge=0, description="Prepared statements kept per connection; 0 for poolers that lack them."
    )
    pooler_check: bool = Field(
        True,
        description="Find out at the first login what pooler stands in front, adapt to it, or refuse it.",
    )
    application_name: str = Field("lifeguard", min_length=1, max_length=63, description="As pg_stat_activity shows it.")
    echo: bool = Field(False, description="Log every statement; never in production.")

    _password: PasswordSource | None = PrivateAttr(None)
    # Where the server of the URL's name was found; None where the driver is to look.
    _found: Host | None = PrivateAttr(None)

    @property
    def user(self) -> str:
        """The role that logs in: the URL's, else PGUSER, else the account of this process."""
        return self.parameters.user or os.environ.get("PGUSER") or getpass.getuser()

    @property
    def password_source(self) -> PasswordSource | None:
        """What is asked for the password at each connect; None where the URL, PGPASSWORD or libpq's file has it."""
        if self._password is None and self.password_file is not None:
            return from_file(self.password_file)
        return self._password

    @property
    def first_password(self) -> str:
        """The password in the URL or the file, for checks at the start; empty where neither has one."""
        if self.password_file is not None:
            return read_password(self.password_file)
        return self.parameters.password or ""

    @property
    def password_may_change(self) -> bool:
        """Whether the next login may have another password than the last one."""
        return self.parameters.password is None

    def asking(self, source: PasswordSource) -> Self:
        """Return these settings with a function that gives the password at each connect.

        Raises: ValueError when the URL or a file has one already; TypeError when it is no function.
        """
        if not callable(source):
            raise TypeError(NO_FUNCTION)
        if self.parameters.holds_password:
            raise ValueError("URL holds a password or a passfile, and password= gives one too: keep one of them")
        if self.password_file is not None:
            raise ValueError("PASSWORD_FILE is set, and password= gives a password too: keep one of them")
        asking = self.model_copy()
        asking._password = source  # noqa: SLF001  # Of the same class.
        return asking

    def at(self, host: Host | None) -> Self:
        """Return these settings for the one server of the URL's name that was found at an address; None: for any."""
        found = self.model_copy()
        found._found = host  # noqa: SLF001  # Of the same class.
        return found

    @property
    def found(self) -> Host | None:
        """Where the server was found; None for whatever the URL leads to."""
        return self._found

    @property
    def hosts_to_try(self) -> tuple[Host, ...]:
        """The hosts of the URL, in the order in which they are tried; of a replica that was found, its address."""
        return self.parameters.hosts_to_try if self._found is None else (self._found,)

    def resized(self, pool_size: int, max_overflow: int) -> Self:
        """Return these settings with another size; of a smaller pool no more connections are kept warm than it keeps.

        Raises: ValueError when a size is out of its bounds.
        """
        whole = all(type(number) is int for number in (pool_size, max_overflow))
        if not (whole and 1 <= pool_size <= MOST and 0 <= max_overflow <= MOST):
            raise ValueError(f"pool_size is a whole number from 1 to {MOST}, and max_overflow from 0 to {MOST}")
        warm = None if self.pool_min_size is None else min(self.pool_min_size, pool_size)
        return self.model_copy(
            update={"pool_size": pool_size, "max_overflow": max_overflow, "pool_min_size": warm},
        )

    @property
    def capacity(self) -> int:
        """The most connections that are checked out at once."""
        return self.pool_size + self.max_overflow

    @property
    def sleeps(self) -> bool:
        """Whether the server stops when nobody asks it."""
        return self.profile == "sleeping"

    def seconds_of_a_job(self, seconds: float) -> float:
        """Seconds that an operator or a job waits for a login: `seconds`, or for a sleeping database to wake up."""
        return max(seconds, self.wake_seconds) if self.sleeps else seconds

    @property
    def waking_login_seconds(self) -> float:
        """Seconds after which a login that wakes the database is tried again beside.

        Long, since one login is enough. A sixth of the whole, since a proxy may forget a login that came too early.
        """
        return max(self.connect_timeout_seconds, self.wake_seconds / 6)

    @property
    def warm_size(self) -> int:
        """Connections opened at start and kept while idle."""
        if self.sleeps:
            return 0
        return min(self.pool_size, 5) if self.pool_min_size is None else self.pool_min_size

    @cached_property
    def parameters(self) -> ConnectionParameters:
        """The parts of the URL; they hold the password."""
        return parse_url(self.url.get_secret_value())

    @property
    def server(self) -> str:
        """Host and port, by which databases on one server are grouped."""
        return self.parameters.server

    @property
    def location(self) -> str:
        """Host, port and database, without user and password, for logs and answers."""
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
        return {**parameters.settings, **given}

    @model_validator(mode="before")
    @classmethod
    def _from_the_profile(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Let the profile choose what is not set."""
        return SLEEPING | given if given.get("profile") == "sleeping" else given

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.sleeps and self.pool_min_size:
            raise ValueError(
                f"PROFILE sleeping with POOL_MIN_SIZE {self.pool_min_size}: connections that are kept open keep the "
                "database awake; leave out one of the two"
            )
        if self.warm_size > self.pool_size:
            raise ValueError(
                f"POOL_MIN_SIZE {self.warm_size} > POOL_SIZE {self.pool_size}: the pool cannot keep more "
                "connections warm than it keeps; lower the first or raise the second"
            )
        if self.password_file is not None and self.parameters.holds_password:
            raise ValueError(
                "holds a password or a passfile, and PASSWORD_FILE of this database is set: keep one of them"
            )
        return self
