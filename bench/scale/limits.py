"""What grows with the number of instances, and the limits in the order in which they come: arithmetic.

Connections are counted by `pglifeguard.budget`, as the service's start, `doctor` and the chart count them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil

from pglifeguard.budget import Demand, demands
from pglifeguard.host_search import LATE_FACTOR, LONGEST_PATIENCE_SECONDS
from pglifeguard.settings import DatabasesSettings

# As many as INSTANCES may say.
MOST_INSTANCES = 10_000
SURGE_SHARE = 0.1
# Where the logins that all instances need take more of the time that one may take, they may be given up and begun again
# without an end: simulated by storm.py.
SAFE_SHARE = 0.75
# The primary's, the replica's and that of the reports, each with a monitor.
POOLS = 3
# By Prometheus's documentation a sample takes one to two bytes on disk.
SAMPLE_BYTES = 1.5
SECONDS_A_DAY = 86_400
# Two backends of haproxy.cfg ask each instance once a second.
CHECKS_PER_SECOND = 2


def figure(default: float, meaning: str) -> float:
    """Declare a figure that the command takes as an option."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Figures:
    """What the arithmetic needs to know. The defaults are the compose stack's, and what was measured on two cores."""

    workers: float = figure(1, "processes of an instance")
    pool_size: float = figure(5, "connections of the primary's pool, and of the replica's, with overflow")
    analytics_size: float = figure(4, "connections of the pool for reports, with overflow")
    monitor_interval: float = figure(0.5, "MONITOR_INTERVAL_SECONDS")
    connect_timeout: float = figure(0.5, "DATABASE_CONNECT_TIMEOUT_SECONDS")
    pool_timeout: float = figure(0.5, "DATABASE_POOL_TIMEOUT, in seconds")
    hold: float = figure(0.005, "seconds for which a request holds a connection")
    places: float = figure(10, "instances that the balancer has places for")
    granted: float = figure(97, "connections that a server grants, less those reserved")
    logins: float = figure(400, "logins a second that a server can do when it does nothing else")
    poolers: float = figure(1, "poolers that share the clients")
    pooler_clients: float = figure(1000, "max_client_conn of a pooler")
    pooler_files: float = figure(4096, "files that a pooler may open")
    pooler_connections: float = figure(30, "connections that all poolers may open on a server")
    pooler_logins: float = figure(2500, "logins a second of a pooler; with plain passwords in its file a tenth of it")
    probe: float = figure(0.2, "milliseconds that a probe costs a pooler's only thread")
    server_probe: float = figure(
        1.2, "milliseconds that a probe costs the server, behind a pooler that keeps no statements"
    )
    cores: float = figure(4, "cores of all servers together")
    series: float = figure(967, "series of an instance all of whose routes were used")
    scrape_interval: float = figure(5, "seconds between two scrapes")
    history_days: float = figure(15, "days that Prometheus is to keep")
    history_gigabytes: float = figure(5, "disk that it may take for them")


@dataclass(frozen=True)
class Limit:
    """Something that grows with the instances, how far it may, and what moves that; without `most` nothing stops it."""

    name: str
    grows: Callable[[int], float]
    most: float | None
    remedy: str

    @property
    def reached(self) -> int | None:
        """The most instances with which it is kept; None where that are more than MOST_INSTANCES, or any number."""
        if self.most is None or self.grows(MOST_INSTANCES) <= self.most:
            return None
        few, many = 0, MOST_INSTANCES
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (middle, many) if self.grows(middle) <= self.most else (few, middle)
        return few


def surge(instances: int) -> int:
    """Return how many instances a rollout starts before it ends as many."""
    return ceil(instances * SURGE_SHARE)


def demand(figures: Figures, instances: int, *, pooled: bool) -> Demand:
    """Count the connections on the primary's server, or on all poolers together, by the service's own arithmetic."""
    pool = {"pool_size": int(figures.pool_size), "max_overflow": 0}
    primary, replica = ("pooler.example", "pooler.example") if pooled else ("primary.example", "replica.example")
    reading = {"url": f"postgresql://app_ro:secret@{replica}/lifeguard"}
    settings = DatabasesSettings.model_validate(
        {
            "primary": {"url": f"postgresql://app_rw:secret@{primary}/lifeguard"} | pool,
            "replicas": (reading | pool,),
            "analytics": reading | {"pool_size": int(figures.analytics_size), "max_overflow": 0},
            "workers": int(figures.workers),
            "instances": max(1, instances),
            "surge_instances": surge(instances),
            "migration_connections": 0 if pooled else 1,
        }
    )
    return demands(settings)[0]


def limits(figures: Figures) -> list[Limit]:
    """List what grows, the limit that comes first at the front, and what has none at the end."""
    f = figures
    processes = f.workers
    several_hosts = SAFE_SHARE * LATE_FACTOR * f.connect_timeout
    one_address = SAFE_SHARE * LATE_FACTOR * max(f.connect_timeout, LONGEST_PATIENCE_SECONDS)

    def clients(n: int) -> float:
        return demand(f, n, pooled=True).wanted / f.poolers

    def logins(n: int) -> float:
        return n * processes * (f.pool_size + 1) / f.logins

    def probes(n: int) -> float:
        return n * processes * POOLS / f.monitor_interval

    def samples(n: int) -> float:
        return n * processes * f.series / f.scrape_interval

    found = [
        Limit(
            "instances behind the balancer, with the surge",
            lambda n: n + surge(n),
            f.places,
            "`server-template` of haproxy.cfg",
        ),
        Limit(
            f"GB of {f.history_days:g} days of history in Prometheus",
            lambda n: samples(n) * SAMPLE_BYTES * f.history_days * SECONDS_A_DAY / 1e9,
            f.history_gigabytes,
            "a larger disk, fewer days, or a scrape each 15 s",
        ),
        Limit(
            "connections on the primary, without a pooler",
            lambda n: demand(f, n, pooled=False).wanted,
            f.granted,
            "a pooler",
        ),
        Limit("clients of a pooler", clients, f.pooler_clients, "`max_client_conn`, then more poolers"),
        Limit(
            "files that a pooler opens",
            lambda n: clients(n) + f.pooler_connections,
            f.pooler_files,
            "its `nofile`, then more poolers",
        ),
        Limit(
            "seconds of logins after a failover, several hosts in the URL",
            logins,
            several_hosts,
            "one address, `DATABASE_CONNECT_TIMEOUT_SECONDS`, a pooler",
        ),
        Limit(
            "seconds of logins after a failover, one address",
            logins,
            one_address,
            "`DATABASE_CONNECT_TIMEOUT_SECONDS`, a pooler",
        ),
        Limit(
            "seconds of logins after a pooler's restart",
            lambda n: clients(n) / f.pooler_logins,
            one_address,
            "more poolers; no plain passwords in their file",
        ),
        Limit(
            "seconds that a request waits in the pooler when all pools are full",
            lambda n: n * processes * f.pool_size * f.hold / f.pooler_connections,
            f.pool_timeout,
            "smaller pools: past this the queue is the pooler's, and our shedding no longer keeps it short",
        ),
        Limit(
            "share of the servers' cores that probes take",
            lambda n: probes(n) * f.server_probe / 1000 / f.cores,
            0.2,
            "`MONITOR_INTERVAL_SECONDS`, a pooler that keeps prepared statements",
        ),
        Limit(
            "share of a pooler's thread that probes take",
            lambda n: probes(n) * f.probe / 1000 / f.poolers,
            0.5,
            "`MONITOR_INTERVAL_SECONDS`, more poolers",
        ),
        Limit("probes a second", probes, None, "`MONITOR_INTERVAL_SECONDS`"),
        Limit("checks of the balancer a second", lambda n: n * CHECKS_PER_SECOND, None, "`inter` of haproxy.cfg"),
        Limit(
            "series in Prometheus, thousands",
            lambda n: n * processes * f.series / 1000,
            None,
            "several Prometheus, or recorded sums",
        ),
        Limit("samples a second", samples, None, "a scrape each 15 s"),
    ]
    return sorted(found, key=lambda limit: (limit.most is None, limit.reached or MOST_INSTANCES + 1))
