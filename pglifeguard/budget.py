"""The arithmetic of connections: how many a service needs, and how many it may take.

    workers x (instances + surge) x (pool_size + max_overflow + 1) + migrations + jobs  <=  granted - reserved

The 1 is the pool's monitor. Pools on one server are added up, and LISTEN_URL adds 1 for each process. Sizes are per
process, and each worker and each instance multiplies them: three instances with pools of 50 need more than a server
with 100 connections has. The surge is the instances that a rollout starts before it stops the old ones. Migrations and
jobs run beside the service, on the primary's server. `check_budget` refuses more than CONNECTION_LIMIT at start,
`python -m app doctor` compares with the running server, and so does the alert ConnectionBudgetExceeded.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.environment import SettingsError
from pglifeguard.settings import DatabasesSettings


class Preset(NamedTuple):
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


class Demand(NamedTuple):
    """What the service may open on one server.

    `per_instance` is one instance's part, `wanted` the sum for all of them with migrations and jobs, and `arithmetic`
    is that sum written out.
    """

    server: str
    databases: tuple[DatabaseSettings, ...]
    per_instance: int
    wanted: int
    arithmetic: str

    def exceeds(self, limit: int, reserve: int) -> str | None:
        """Show the arithmetic when it is more than `limit` less the reserve; None when it is not."""
        if self.wanted <= limit - reserve:
            return None
        return (
            f"{self.arithmetic} = {self.wanted} connections > {limit} - {reserve} reserved. Lower DATABASE_POOL_SIZE, "
            "DATABASE_MAX_OVERFLOW, WORKERS, INSTANCES or SURGE_INSTANCES, or put PgBouncer in between. (The 1 is the "
            "connection that watches the database.)"
        )


def demands(settings: DatabasesSettings, pools: Mapping[str, DatabaseSettings] | None = None) -> list[Demand]:
    """Work out what each server has to grant. Databases on the same host and port share one budget.

    `pools` are those of `settings`, unless others are given. Of replicas that DNS finds all places count for their one
    name: two addresses may be one server.
    """
    servers: dict[str, list[DatabaseSettings]] = {}
    listening = [] if settings.listening is None else [settings.listening]
    for database in [*(settings.pools if pools is None else pools).values(), *listening]:
        servers.setdefault(database.server, []).append(database)
    return [_demand(settings, server, databases) for server, databases in servers.items()]


def on_one_server(
    settings: DatabasesSettings, pools: Mapping[str, DatabaseSettings], addresses: int
) -> dict[str, DatabaseSettings]:
    """Leave, of the places of replicas that DNS finds, as many as lead to one server: one for each address of it."""
    if not settings.finds_replicas:
        return dict(pools)
    fixed = {name: pools[name] for name in ("primary", "analytics")}
    places = sorted(pools.keys() - fixed.keys(), key=lambda name: (-pools[name].capacity, name))
    return fixed | {name: pools[name] for name in places[:addresses]}


def _demand(settings: DatabasesSettings, server: str, databases: list[DatabaseSettings]) -> Demand:
    sizes = [1 if database is settings.listening else database.capacity + 1 for database in databases]
    terms = [
        "1 that listens"
        if each is settings.listening
        else f"({each.pool_size} + {each.max_overflow} + 1{', or 0 asleep' if each.sleeps else ''})"
        for each in databases
    ]
    if settings.finds_replicas:
        terms = [f"{count} pools x {term}" if count > 1 else term for term, count in Counter(terms).items()]
    pools = terms[0] if len(terms) == 1 else f"({' + '.join(terms)})"
    surge = settings.surge_instances
    instances = f"({settings.instances} + {surge} surge)" if surge else str(settings.instances)
    arithmetic = f"{settings.workers} workers x {instances} instances x {pools}"
    per_instance = sum(sizes) * settings.workers
    wanted = per_instance * (settings.instances + surge)
    if server == settings.primary.server:
        for count, purpose in ((settings.migration_connections, "migrations"), (settings.job_connections, "jobs")):
            if count:
                arithmetic += f" + {count} for {purpose}"
                wanted += count
    return Demand(server, tuple(databases), per_instance, wanted, arithmetic)


def granted(settings: DatabasesSettings, by_server: int | None) -> int | None:
    """Return how many connections this service may have on a server; None where nobody says.

    `by_server` is what the server grants to ordinary roles, None where it is not known or a pooler stands in front:
    what a pooler's clients may open is the pooler's to say, and CONNECTION_LIMIT says it here.
    """
    said = [] if by_server is None else [by_server]
    if settings.connection_limit is not None:
        said.append(settings.connection_limit - settings.connection_reserve)
    return min(said, default=None)


def check_budget(settings: DatabasesSettings) -> None:
    """Refuse settings that can open more connections than CONNECTION_LIMIT grants on each server.

    Raises: SettingsError, with the arithmetic.
    """
    if settings.connection_limit is None:
        return
    for demand in demands(settings):
        if sentence := demand.exceeds(settings.connection_limit, settings.connection_reserve):
            raise SettingsError(f"CONNECTION_LIMIT: {demand.server} would get {sentence}")
