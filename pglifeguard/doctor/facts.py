"""What is known of one database after `doctor` has asked it."""

from dataclasses import dataclass, field
from datetime import MAXYEAR, datetime
from typing import Any, Literal

from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.pooler import Pooler
from pglifeguard.server_position import UNKNOWN, Position
from pglifeguard.tls import Encryption

Purpose = Literal["primary", "replica", "analytics", "listen", "migrations", "console"]
# These have to lead to a server that takes writes.
WRITING: frozenset[Purpose] = frozenset({"primary", "listen", "migrations"})


@dataclass(frozen=True, slots=True)
class Target:
    """A database that is to be examined, and the variable that names it."""

    variable: str
    purpose: Purpose
    settings: DatabaseSettings


@dataclass(slots=True)
class Facts:
    """The answers of one database. What was not answered, or is hidden from the role, is None or empty.

    Times are in seconds, sizes in bytes. `timeouts` are those in force on the connection; 0 is none.
    """

    target: Target
    # Why it could not be asked, or stopped answering.
    failure: str | None = None
    login_ms: float | None = None
    round_trip_ms: float | None = None
    encryption: Encryption | None = None
    pooled: bool = False
    # What the look at a pooler found; None without one, or when it was not looked at.
    pooler: Pooler | None = None
    # Why the service would not work behind that pooler, as the end of a sentence about the URL.
    refusal: str | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    position: Position = UNKNOWN
    settings: dict[str, str] = field(default_factory=dict)
    pending_restart: list[str] = field(default_factory=list)
    timeouts: dict[str, float | None] = field(default_factory=dict)
    clock_difference_seconds: float | None = None
    collation_actual: str | None = None
    activity: dict[str, Any] = field(default_factory=dict)
    slots: list[dict[str, Any]] = field(default_factory=list)
    standbys: list[dict[str, Any]] | None = None
    prepared: dict[str, Any] = field(default_factory=dict)
    oldest: dict[str, Any] = field(default_factory=dict)
    invalid_indexes: list[str] = field(default_factory=list)
    unarchived: str | None = None
    may_create: bool | None = None
    # Questions that the server or the role has no answer for.
    unseen: list[str] = field(default_factory=list)

    @property
    def variable(self) -> str:
        """The variable that names it."""
        return self.target.variable

    @property
    def answers(self) -> bool:
        """Whether it let the service in and answered to the end."""
        return self.failure is None

    @property
    def role(self) -> Literal["primary", "standby"] | None:
        """What the server is; a console is neither."""
        recovering = self.identity.get("in_recovery")
        return None if recovering is None else "standby" if recovering else "primary"

    @property
    def version_number(self) -> int | None:
        """As 180004; None where it does not say."""
        return self.integer("server_version_num")

    @property
    def usable_connections(self) -> int | None:
        """Connections that the server has for ordinary roles."""
        return self.position.granted

    @property
    def password_ends(self) -> datetime | None:
        """When the role's password expires; None for never."""
        ends = self.identity.get("password_ends")
        # asyncpg reads 'infinity' as the last moment that Python knows.
        return ends if isinstance(ends, datetime) and ends.year < MAXYEAR else None

    def integer(self, setting: str) -> int | None:
        """Return a setting of the server as a number."""
        text = self.settings.get(setting)
        return None if text is None else int(text)


def size(count: float) -> str:
    """Write a number of bytes: "1.5 GiB"."""
    units = iter(("bytes", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while count >= 1024 and unit != "TiB":  # noqa: PLR2004
        count, unit = count / 1024, next(units)
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
