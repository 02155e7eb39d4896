"""The five minutes that a process remembers of its pools, and what it says of itself now."""

import asyncio
import json
import math
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram

from pglifeguard import history
from pglifeguard.databases import Databases
from pglifeguard.embedded.waiting import eventually
from pglifeguard.history import FIELDS, History, quantile
from pglifeguard.metrics import ACQUIRE_BUCKETS
from pglifeguard.testing.faults import exhausted
from tests.conftest import Database
from tests.service import Service, serving


def taken(kept: History, after: int = 0) -> list[Any]:
    """Return the samples after this number."""
    samples: list[Any] = json.loads(kept.since(after))
    return samples


def figures(sample: list[Any], pool: str = "primary") -> dict[str, Any]:
    """Return what a sample has of a pool, by name."""
    return dict(zip(FIELDS, sample[2][pool], strict=True))


def sample(kept: History) -> list[Any]:
    """Take a sample, and return it."""
    kept.take()
    last: list[Any] = taken(kept)[-1]
    return last


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_quantile_is_that_of_prometheus(share: float) -> None:
    """Between two bounds it is interpolated; beyond the last bound it is that bound."""
    bounds = (1.0, 2.0, 4.0)

    assert quantile(share, bounds, [0, 0, 0, 0]) is None
    assert quantile(share, bounds, []) is None
    assert quantile(share, bounds, [10, 0, 0, 0]) == share
    assert quantile(share, bounds, [0, 0, 10, 0]) == 2 + 2 * share
    assert quantile(share, bounds, [0, 0, 0, 5]) == 4
    assert quantile(0.5, bounds, [5, 0, 0, 5]) == 1


def test_bounds_are_those_of_the_histogram() -> None:
    """prometheus-client adds the infinite one."""
    made = Histogram("seconds", "Seconds.", buckets=ACQUIRE_BUCKETS, registry=CollectorRegistry())

    assert tuple(made._upper_bounds) == (*ACQUIRE_BUCKETS, math.inf)


async def test_sample_has_the_pool_and_what_happened_since_the_last(service: Service) -> None:
    """Connections of now; acquisitions, idle holds and reads of the time since the last sample."""
    kept = History(service.databases)
    assert (await service.client.get("/patients")).status_code == 200
    before = sample(kept)
    assert (await service.client.get("/patients")).status_code == 200
    async with service.databases.primary.engine.connect():
        during = sample(kept)
    after = sample(kept)

    read, held, idle = figures(during, "replica"), figures(during), figures(after)
    assert [one[0] for one in (before, during, after)] == [1, 2, 3]
    assert (held["total"], held["checked_out"], held["acquired"], read["acquired"]) == (15, 1, 1, 1)
    assert 0 < held["acquire_p50"] < held["acquire_p95"]
    assert (held["state"], read["state"], held["lag_seconds"]) == ("healthy", "usable", None)
    assert read["lag_seconds"] >= 0
    assert held["timeline"] == read["timeline"] >= 1
    assert (held["idle_now"] >= 0, idle["idle_p95"] > 0) == (True, True)
    assert (idle["checked_out"], idle["acquired"], idle["acquire_p50"], idle["idle_now"]) == (0, 0, None, 0)
    assert (during[3], after[3]) == ([["replica", "replica", 1]], [])


async def test_what_is_shed_is_counted(database: Database) -> None:
    """Requests that wait and those that were refused, each in its second."""
    settings = database.settings(replica=False, pool_size=1, max_overflow=0, pool_max_waiting=1, pool_timeout=20)
    async with serving(settings) as service:
        kept = History(service.databases)
        kept.take()
        async with exhausted(service.databases.primary):
            waiting = asyncio.create_task(service.client.get("/patients"))
            assert await eventually(lambda: _waits(service.databases), 5)
            refused = await service.client.get("/patients")
            full = figures(sample(kept))
        assert (await waiting).status_code == 200

    assert refused.status_code == 503
    assert (full["checked_out"], full["waiting"], full["shed"]) == (1, 1, 1)
    assert figures(sample(kept))["shed"] == 0


async def _waits(databases: Databases) -> bool:
    return databases.primary.pool.figures().waiting == 1


async def test_oldest_samples_are_forgotten(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks gets what is new, and what is left of it."""
    monkeypatch.setattr(history, "KEPT_SECONDS", 3)
    kept = History(service.databases)

    assert taken(kept) == []
    for _ in range(5):
        kept.take()

    assert [one[0] for one in taken(kept)] == [3, 4, 5]
    assert [one[0] for one in taken(kept, 4)] == [5]
    assert taken(kept, 5) == taken(kept, 9) == []


async def test_samples_are_taken_while_the_service_runs(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every SAMPLE_SECONDS, whether somebody looks or not."""
    monkeypatch.setattr(history, "SAMPLE_SECONDS", 0.01)
    kept = History(service.databases)
    keeping = asyncio.create_task(kept.keep())

    async def two() -> bool:
        return len(taken(kept)) >= 2

    assert await eventually(two, 5)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert len(taken(service.app.state.history)) >= 1


async def test_process_says_who_it_is_and_what_it_may_open(database: Database) -> None:
    """The budget is that of the settings, by server; the server grants what is left for ordinary roles."""
    async with serving(database.settings()) as service, service.databases.primary.engine.connect():
        now = History(service.databases).now()

    primary, replica, analytics = now["pools"]
    of_primary, of_replica = now["budget"]
    assert len(now["key"]) == 8
    assert [pool["name"] for pool in now["pools"]] == ["primary", "replica", "analytics"]
    assert (primary["status"], primary["error"], primary["checked_out"]) == ("healthy", None, 1)
    assert ("state" in primary, replica["state"], "state" in analytics) == (False, "usable", False)
    # The server itself writes a record now and then.
    assert 0 <= replica["lag_bytes"] < 1000
    assert primary["held"][0]["holder"] == "background"
    assert (of_primary["wanted"], of_primary["per_instance"], of_primary["granted"]) == (17, 16, 97)
    assert (of_primary["server"], of_primary["open"]) == (primary["server"], 1)
    assert (of_replica["server"], of_replica["per_instance"]) == (replica["server"], 19)


async def test_holder_is_told_with_the_session_of_the_server(service: Service) -> None:
    """Behind a pooler each transaction may have another one, and a closed connection has none."""
    pool = service.databases.primary.pool
    async with service.databases.primary.engine.connect():
        (held,) = pool._out.values()
        direct = pool.holdings()[0].pid
        held.connection.pooled = True
        pooled = pool.holdings()[0].pid
        held.connection.pooled = False
        pid = held.connection.get_server_pid()
    async with service.databases.primary.engine.connect():
        (held,) = pool._out.values()
        held.connection.terminate()
        closed = pool.holdings()[0].pid

    assert (direct, pooled, closed) == (pid, None, None)
