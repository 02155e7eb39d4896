"""The arithmetic of connections: how many a service needs, and how many it may take.

    workers x instances x (pool_size + max_overflow + 1)  <=  limit - reserve

The 1 is the pool's monitor. Pools on one server are added up, and LISTEN_URL adds 1 for each process. Sizes are per
process, and each worker and each instance multiplies them: three instances with pools of 50 need more than a server
with 100 connections has. `check_budget` refuses that at start; `python -m app doctor` shows the sum of a running
server.
"""

import math
from dataclasses import dataclass

from pglifeguard.environment import SettingsError
from pglifeguard.settings import DatabaseSettings, DatabasesSettings


@dataclass(frozen=True, slots=True)
class Preset:
    """A pool's size for a kind of service: pool_size and max_overflow per process."""

    name: str
    pool_size: int
    max_overflow: int


PRESETS = (
    Preset("development", 5, 5),
    Preset("small", 10, 10),
    Preset("medium", 20, 10),
    Preset("high traffic", 20, 30),
    Preset("very high traffic", 50, 20),
    Preset("background worker", 5, 5),
)


def by_spindles(cores: int, spindles: int) -> int:
    """Size by the server's hardware: cores x 2 + effective spindles."""
    return cores * 2 + spindles


def by_cores(cores: int) -> int:
    """Size by the server's cores, for one SSD: 8 cores give 17."""
    return by_spindles(cores, 1)


def for_production(cores: int) -> int:
    """Size by the server's cores with some headroom: cores x 2 + 4."""
    return cores * 2 + 4


def by_load(requests_per_second: float, query_seconds: float) -> int:
    """Size by Little's law and a fifth more, at least 5: 500/s of 10 ms give 6, 2,000/s of 5 ms give 12."""
    # Rounded first: 500 x 0.010 x 1.2 is 6, and binary fractions would make it 7.
    return max(5, math.ceil(round(requests_per_second * query_seconds * 1.2, 6)))


def connections_of(settings: DatabasesSettings, databases: list[DatabaseSettings]) -> int:
    """Count what all instances and workers may open to these databases, monitors included."""
    per_process = sum(1 if database is settings.listening else database.capacity + 1 for database in databases)
    return per_process * settings.workers * settings.instances


def by_server(settings: DatabasesSettings) -> dict[str, list[DatabaseSettings]]:
    """Sort the databases by host and port, and LISTEN_URL with them: those that share them share a budget."""
    servers: dict[str, list[DatabaseSettings]] = {}
    listening = [] if settings.listening is None else [settings.listening]
    for database in [*(database for _, database in settings.databases), *listening]:
        servers.setdefault(database.server, []).append(database)
    return servers


def over_budget(settings: DatabasesSettings, databases: list[DatabaseSettings], limit: int) -> str | None:
    """Show the arithmetic when these databases can open more than `limit` less the reserve; None when they cannot."""
    wanted = connections_of(settings, databases)
    if wanted <= limit - settings.connection_reserve:
        return None
    pools = " + ".join(
        "1 that listens" if each is settings.listening else f"({each.pool_size} + {each.max_overflow} + 1)"
        for each in databases
    )
    return (
        f"{settings.workers} workers x {settings.instances} instances x {pools} = {wanted} connections > "
        f"{limit} - {settings.connection_reserve} reserved. Lower DATABASE_POOL_SIZE, DATABASE_MAX_OVERFLOW, WORKERS "
        "or INSTANCES, or put PgBouncer in between. (The 1 is the connection that watches the database.)"
    )


def check_budget(settings: DatabasesSettings) -> None:
    """Refuse settings that can open more connections than CONNECTION_LIMIT grants on each server.

    Raises: SettingsError, with the arithmetic.
    """
    if settings.connection_limit is None:
        return
    for server, databases in by_server(settings).items():
        if sentence := over_budget(settings, databases, settings.connection_limit):
            raise SettingsError(f"CONNECTION_LIMIT: {server} would get {sentence}")
