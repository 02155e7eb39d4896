"""What operators look at when it is slow."""

import os
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.metrics import Metrics
from tests.conftest import Database
from tests.service import Service, serving

POOL_STATS = {
    "pool_size",
    "max_overflow",
    "total",
    "checked_out",
    "checked_in",
    "connecting",
    "overflow",
    "available",
    "waiting",
}


async def test_pool_stats_count_what_is_held(service: Service) -> None:
    """One connection at work is one checked out and one less available, of that pool alone."""
    before = (await service.client.get("/debug/pool-stats")).json()
    async with service.databases.primary.engine.connect():
        during = (await service.client.get("/debug/pool-stats")).json()
    after = (await service.client.get("/debug/pool-stats")).json()

    assert list(before) == ["primary", "replica", "analytics"]
    assert set(before["primary"]) == POOL_STATS
    assert (before["primary"]["checked_out"], before["primary"]["available"]) == (0, 15)
    assert (during["primary"]["checked_out"], during["primary"]["available"]) == (1, 14)
    assert after == before
    assert during["replica"] == before["replica"]


async def test_connections_are_counted_by_application_and_state(service: Service) -> None:
    """The server's own view, and who holds what in this process."""
    async with service.databases.primary.engine.connect():
        body = (await service.client.get("/debug/connections")).json()

    assert list(body) == ["primary", "replica", "analytics"]
    (held,) = body["primary"]["held"]
    assert held["holder"] == "background"
    assert held["held_seconds"] >= held["idle_seconds"] >= 0
    mine = [row for row in body["primary"]["server"] if row["application"] == "lifeguard"]
    assert sum(row["connections"] for row in mine) >= 6
    assert set(mine[0]) == {"application", "state", "connections", "longest_seconds"}


async def test_metrics_are_exposed_with_the_pools_of_now(service: Service) -> None:
    """Every figure of app/metrics.py has its help, and the gauges are those of the moment of the scrape."""
    async with service.databases.primary.engine.connect():
        answer = await service.client.get("/metrics")

    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    declared = {family.name for family in Metrics().registry.collect()}
    assert set(families) == declared
    gauges = {
        name: {sample.labels["pool"]: sample.value for sample in families[name].samples}
        for name in ("db_pool_connections_total", "db_pool_connections_available", "db_pool_connections_checked_out")
    }
    assert gauges["db_pool_connections_total"] == {"primary": 15, "replica": 15, "analytics": 2}
    assert gauges["db_pool_connections_available"]["primary"] == 14
    assert gauges["db_pool_connections_checked_out"]["primary"] == 1


async def test_metrics_of_several_workers_come_from_their_directory(database: Database, tmp_path: Path) -> None:
    """With PROMETHEUS_MULTIPROC_DIR the exposition is what the workers left there, not this process's registry."""
    async with serving(database.settings(prometheus_multiproc_dir=tmp_path)) as service:
        answer = await service.client.get("/metrics")

    assert answer.status_code == 200
    assert "http_requests" not in answer.text


@pytest.mark.parametrize("path", ["/debug/pool-stats", "/debug/connections"])
async def test_operators_need_their_scope(database: Database, path: str) -> None:
    """With AUTH_SECRET set, nobody looks without a token; probes stay open."""
    async with serving(database.settings(auth_secret="x" * 32)) as service:
        refused = await service.client.get(path)
        probe = await service.client.get("/health/live")

    assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    assert probe.status_code == 200


def test_this_process_is_not_in_multiprocess_mode() -> None:
    """The tests above measure the registry of one process."""
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
