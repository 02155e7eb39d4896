"""The last five minutes of a process, one sample a second, for the live page; all of it from the process's own memory.

Each sample is kept as the JSON that the page is sent. So five minutes of four pools take 100 kB, and a page that opens
costs no more than to join them. A sample costs a fraction of a millisecond (decision 0042), so it is taken whether
somebody looks or not: who opens the page after an alert sees what led to it.
"""

import asyncio
import json
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Sequence
from itertools import islice
from operator import add, sub
from secrets import token_hex
from typing import Any

from prometheus_client import Histogram
from prometheus_client.metrics import MetricWrapperBase

from pglifeguard.budget import Demand
from pglifeguard.database import Database
from pglifeguard.databases import Databases
from pglifeguard.metrics import ACQUIRE_BUCKETS, SECONDS_BUCKETS
from pglifeguard.replica import Replica

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

SAMPLE_SECONDS = 1.0
KEPT_SECONDS = 300
# Checkouts shown for each pool, those held for longest.
HELD_SHOWN = 50
# What a sample has of each pool, in this order. Times of acquisitions and idle holds are milliseconds, of those that
# ended in this second, None without any; `idle_now` is the longest idle hold that goes on, in seconds. `shed` and
# `acquired` count within this second. `state` is a replica's, or how the last probe of another database ended.
FIELDS = (
    "total", "checked_out", "checked_in", "connecting", "waiting", "shed", "acquired", "acquire_p50", "acquire_p95",
    "idle_p95", "idle_now", "state", "lag_seconds", "timeline",
)  # fmt: skip


def quantile(share: float, bounds: Sequence[float], counts: Sequence[float]) -> float | None:
    """Return the value below which this share of the observations lies, as Prometheus's histogram_quantile.

    `counts` has one number for each of the ascending `bounds`, and one for what is above the last. None without any.
    """
    rank, below, lower = share * sum(counts), 0.0, 0.0
    if not rank:
        return None
    for bound, count in zip(bounds, counts, strict=False):
        if below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        below, lower = below + count, bound
    return lower


class History:
    """Samples of one process's pools. `key` names the process, and this run of it, among those behind one address."""

    def __init__(self, databases: Databases) -> None:
        self.key = token_hex(4)
        self._databases = databases
        self._samples: deque[str] = deque(maxlen=round(KEPT_SECONDS / SAMPLE_SECONDS))
        self._taken = 0
        metrics = databases.metrics
        self._acquired, self._idle = _Observed(metrics.acquire_seconds), _Observed(metrics.idle_hold_seconds)
        self._shed, self._reads = _Counted(metrics.rejected), _Counted(metrics.reads_routed)

    async def keep(self) -> None:
        """Take a sample every second, until cancelled."""
        while True:
            self.take()
            await asyncio.sleep(SAMPLE_SECONDS)

    def take(self) -> None:
        """Take a sample."""
        self._taken += 1
        shed: Counter[str] = Counter()
        for (pool, _), count in self._shed.increases().items():
            shed[pool] += count
        acquired, idle = self._acquired.increases(), self._idle.increases()
        pools = {}
        for database, replica in self._pools():
            name = database.name
            pools[name] = _figures(database, replica, shed[name], acquired.get(name, ()), idle.get(name, ()))
        reads = [[*labels, count] for labels, count in self._reads.increases().items() if count]
        self._samples.append(_encode([self._taken, round(time.time(), 1), pools, reads]))

    def since(self, number: int) -> str:
        """Return what is kept of the samples after this number, oldest first, as a JSON array.

        A sample is `[number, seconds since 1970, {pool: its FIELDS}, [[target, reason, reads], …]]`.
        """
        missing = min(max(0, self._taken - number), len(self._samples))
        return f"[{','.join(islice(self._samples, len(self._samples) - missing, None))}]"

    def now(self) -> dict[str, Any]:
        """Describe the process as it is: its pools, who holds their connections, and what all may open."""
        settings = self._databases.settings
        return {
            "key": self.key,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "workers": settings.workers,
            "paused_seconds": round(self._databases.paused_seconds, 1),
            "max_lag_seconds": settings.replica_max_lag_seconds,
            "fields": FIELDS,
            "pools": [_describe(database, replica) for database, replica in self._pools()],
            "budget": [self._budget(demand, granted) for demand, granted in self._databases.budget()],
        }

    def _pools(self) -> list[tuple[Database, Replica | None]]:
        return [(database, self._databases.router.judge_of(database)) for database in self._databases.all()]

    def _budget(self, demand: Demand, granted: int | None) -> dict[str, Any]:
        # Replicas that DNS finds count for the name that it was asked for.
        sizes = self._databases.sizes
        pools = [each.pool for each in self._databases.all() if sizes[each.name].server == demand.server]
        return {
            "server": demand.server,
            "wanted": demand.wanted,
            "per_instance": demand.per_instance,
            "granted": granted,
            "arithmetic": demand.arithmetic,
            "open": sum(pool.figures().checked_out + pool.figures().checked_in for pool in pools),
        }


def _figures(
    database: Database, replica: Replica | None, shed: int, acquired: Sequence[float], idle: Sequence[float]
) -> list[Any]:
    figures, holdings = database.pool.figures(), database.pool.holdings()
    return [
        figures.total,
        figures.checked_out,
        figures.checked_in,
        figures.connecting,
        figures.waiting,
        shed,
        round(sum(acquired)),
        _milliseconds(quantile(0.5, ACQUIRE_BUCKETS, acquired)),
        _milliseconds(quantile(0.95, ACQUIRE_BUCKETS, acquired)),
        _milliseconds(quantile(0.95, SECONDS_BUCKETS, idle)),
        round(max((holding.idle_seconds for holding in holdings), default=0.0), 2),
        _status(database) if replica is None else replica.state,
        None if replica is None else replica.lag_seconds,
        database.monitor.position.timeline,
    ]


def _describe(database: Database, replica: Replica | None) -> dict[str, Any]:
    settings, probe, pool = database.settings, database.monitor.last, database.pool
    figures = pool.figures()
    described = {
        "name": database.name,
        "role": database.role,
        "server": settings.server,
        **figures._asdict(),
        "timeout_seconds": settings.pool_timeout,
        "status": _status(database),
        "latency_ms": _milliseconds(probe.latency_seconds),
        "error": probe.error,
        "timeline": database.monitor.position.timeline,
        "held": [holding._asdict() for holding in pool.holdings()[:HELD_SHOWN]],
    }
    if replica is not None:
        described |= {
            "state": replica.state,
            "stage": database.stage,
            "lag_seconds": replica.lag_seconds,
            "lag_bytes": replica.lag_bytes,
        }
    return described


def _status(database: Database) -> str:
    return "healthy" if database.monitor.healthy else database.monitor.last.status


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


class _Counted:
    """What the series of a counter have counted since the last look.

    A series counts from its second look on: a worker may have inherited the counts of one that has ended.
    """

    def __init__(self, counter: MetricWrapperBase) -> None:
        self._counter = counter
        self._seen: dict[tuple[str, ...], float] = {}

    def increases(self) -> dict[tuple[str, ...], int]:
        """Return the increase of each series, by its labels."""
        found: dict[tuple[str, ...], int] = {}
        for labels, series in _series(self._counter):
            count = series._value.get()  # noqa: SLF001  # See `_Observed`.
            before = self._seen.get(labels, count)
            self._seen[labels] = count
            found[labels] = round(count - before)
        return found


class _Observed:
    """What the series of a histogram have observed since the last look, added up for each pool.

    prometheus-client's own `collect` makes an object of each bucket of each series, with its labels: that is 20 times
    the work, every second. So the values are read where they are, and only those of series that have changed.
    """

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._seen: dict[tuple[str, ...], tuple[float, list[float]]] = {}

    def increases(self) -> dict[str, list[float]]:
        """Return the observations in each bucket, by the first label, the pool; only of pools that have any."""
        found: dict[str, list[float]] = {}
        for labels, series in _series(self._histogram):
            total = series._sum.get()  # noqa: SLF001  # As above.
            known = self._seen.get(labels)
            if known is not None and known[0] == total:
                continue
            counts = [bucket.get() for bucket in series._buckets]  # noqa: SLF001  # As above.
            self._seen[labels] = total, counts
            if known is not None:
                new = map(sub, counts, known[1])
                pool = labels[0]
                found[pool] = list(map(add, found[pool], new)) if pool in found else list(new)
        return found


def _series(metric: MetricWrapperBase) -> list[tuple[tuple[str, ...], Any]]:
    """List the series of a metric with their labels."""
    return [(tuple(labels), series) for labels, series in metric._metrics.items()]  # noqa: SLF001  # See `_Observed`.
