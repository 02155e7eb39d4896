"""Health answers at once and truly, while a pool is exhausted and while a database is down."""

import asyncio
import time
from typing import Any

import pytest
from anyio import to_thread

from app.settings import Settings
from local.cluster import Cluster
from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing.faults import exhausted
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database
from tests.service import Service, quiet, serving
from tests.stopwatch import Stopwatch

OPERATORS = ("/health/live", "/health/ready", "/health/db", "/debug/pool-stats", "/debug/connections", "/metrics")


def down(**changes: Any) -> Settings:
    """Give settings that lead to a port where nobody listens."""
    url = f"postgresql://a:hunter2@127.0.0.1:{free_port()}/x"
    fields: dict[str, Any] = {"primary": {"url": url}, "analytics": {"url": url}, "monitor_interval_seconds": 0.05}
    fields["retry_after_spread_seconds"] = 0
    return Settings(_env_file=None, **(fields | changes))


async def test_all_is_well(service: Service) -> None:
    """Three databases are healthy, with their pools' figures, and the replica with its lag."""
    answer = await service.client.get("/health/db")

    assert answer.status_code == 200
    body = answer.json()
    assert body["status"] == "healthy"
    assert list(body["databases"]) == ["primary", "replica", "analytics"]
    for name, described in body["databases"].items():
        assert described["status"] == "healthy"
        assert 0 < described["latency_ms"] < 1000
        expected = {"pool_size": 2 if name == "analytics" else 10, "checked_out": 0, "overflow": 0}
        assert described.items() >= expected.items()
        assert described.items() >= {"tls": "none", "tls_verified": "nothing", "hop": "server"}.items()
    assert body["databases"]["primary"]["checked_in"] == 1
    assert body["databases"]["replica"]["state"] == "usable"
    assert body["databases"]["replica"]["lag_bytes"] is not None
    assert "lag_seconds" not in body["databases"]["primary"]
    assert (await service.client.get("/health/live")).json() == {"status": "alive"}
    assert (await service.client.get("/health/ready")).json() == {"status": "ready"}


async def test_operators_are_answered_while_every_pool_is_exhausted(database: Database, stopwatch: Stopwatch) -> None:
    """With all connections of all pools held, each operator's route answers 200 in under 100 ms; requests get 503."""
    async with serving(database.settings(pool_size=2, max_overflow=1, pool_timeout=0.2)) as service:
        primary, replica, analytics = service.databases.all()
        async with exhausted(primary), exhausted(replica), exhausted(analytics):
            started, asked_at = stopwatch.seconds, time.perf_counter()
            refused = await service.client.get("/patients/1")
            passed, waited = time.perf_counter() - asked_at, stopwatch.seconds - started
            for path in OPERATORS:
                started = stopwatch.seconds
                answer = await service.client.get(path)
                seconds = stopwatch.seconds - started

                assert answer.status_code == 200, path
                assert seconds < 0.1, (path, seconds)
            stats = (await service.client.get("/debug/pool-stats")).json()

    assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (503, "pool_exhausted", "1")
    assert passed > 0.15
    assert waited < 0.4
    for figures in stats.values():
        assert figures.items() >= {"pool_size": 2, "checked_out": 3, "overflow": 1, "total": 3, "available": 0}.items()


async def test_operators_are_answered_while_the_databases_are_down() -> None:
    """Alive, not ready, unhealthy by name: 503 with Retry-After, in bounded time, and no password anywhere."""
    async with serving(down(), settled=False) as service:
        answers = {}
        for path in OPERATORS:
            started = time.perf_counter()
            answers[path] = await service.client.get(path)
            assert time.perf_counter() - started < 1, path
        refused = await service.client.get("/patients/1")

    statuses = {path: answer.status_code for path, answer in answers.items()}
    assert statuses == dict.fromkeys(OPERATORS, 200) | {"/health/ready": 503, "/health/db": 503}
    assert {answers[path].headers["retry-after"] for path in ("/health/ready", "/health/db")} == {"1"}
    assert answers["/health/ready"].json() == {"status": "starting"}
    primary = answers["/health/db"].json()["databases"]["primary"]
    assert (primary["status"], primary["latency_ms"]) == ("error", None)
    assert "cannot be reached" in primary["error"]
    assert (primary["tls"], primary["tls_verified"], primary["hop"]) == (None, None, None)
    assert answers["/debug/connections"].json()["primary"]["server"] is None
    assert "cannot be reached" in answers["/debug/connections"].json()["primary"]["error"]
    assert (refused.status_code, refused.json()["code"]) == (503, "database_unreachable")
    assert not [answer for answer in answers.values() if "hunter2" in answer.text]


async def test_database_that_hangs_is_a_timeout(
    breakable_cluster: Cluster, database: Database, stopwatch: Stopwatch
) -> None:
    """A frozen server is told apart from one that is gone, within the health timeout; thawed, it is healthy again."""
    async with serving(database.settings(health_timeout_seconds=0.3, replica=False)) as service:
        breakable_cluster.primary.freeze()
        try:
            started = stopwatch.seconds
            answer = await service.client.get("/health/db")
            seconds = stopwatch.seconds - started
        finally:
            breakable_cluster.primary.thaw()

        async def healthy() -> bool:
            return (await service.client.get("/health/db")).is_success

        assert answer.status_code == 503
        assert answer.json()["databases"]["primary"]["status"] == "timeout"
        assert seconds < 1
        assert await eventually(healthy, 5)


async def test_look_that_was_under_way_is_not_the_answer(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server said before the question tells nothing about now: it is asked once more."""
    async with quiet(database.settings(replica=False)) as service:
        monitor = service.databases.primary.monitor
        looks, ask = 0, monitor.ask

        async def counting(sql: str, *arguments: object, timeout_seconds: float) -> object:
            nonlocal looks
            looks += 1
            return await ask(sql, *arguments, timeout_seconds=timeout_seconds)

        monkeypatch.setattr(monitor, "ask", counting)
        under_way = asyncio.create_task(monitor.probe())
        await asyncio.sleep(0)
        answer = await service.client.get("/health/db")
        await under_way

    assert (answer.status_code, looks) == (200, 2)


async def test_replica_that_is_down_leaves_the_service_ready(database: Database) -> None:
    """The primary serves the reads: ready, healthy, and the replica is named as broken."""
    url = f"postgresql://a@127.0.0.1:{free_port()}/x"
    settings = database.settings(replicas=({"url": url},))
    async with serving(settings, settled=False) as service:

        async def ready() -> bool:
            return (await service.client.get("/health/ready")).is_success

        assert await eventually(ready, 5)
        health = await service.client.get("/health/db")
        read = await service.client.get("/patients")

    assert health.status_code == 200
    assert health.json()["databases"]["replica"].items() >= {"status": "error", "state": "broken"}.items()
    assert read.status_code == 200


async def test_closing_service_is_not_ready(service: Service) -> None:
    """Readiness says no as soon as a shutdown begins, while the databases are well."""
    service.databases.closing = True

    answer = await service.client.get("/health/ready")

    assert (answer.status_code, answer.json()) == (503, {"status": "closing"})
    assert answer.headers["retry-after"] == "1"


async def test_balancer_may_keep_instances_whose_database_went_away(database: Database) -> None:
    """Asked with `when_away`, readiness stays when the primary goes, and not before it came or while closing."""
    async with Proxy(database.cluster.primary.port) as proxy:
        settings = database.settings(replica=False, primary={"url": proxy.url(database.url())})
        proxy.refuse()
        async with serving(settings, settled=False) as service:
            ask = service.client.get
            starting = await ask("/health/ready?when_away=true")
            await proxy.accept()

            async def is_ready(*, really: bool) -> bool:
                return (await ask("/health/ready")).is_success is really

            assert await eventually(lambda: is_ready(really=True), 10)
            proxy.refuse()
            proxy.cut()
            assert await eventually(lambda: is_ready(really=False), 10)
            away = await ask("/health/ready?when_away=true")
            plain = await ask("/health/ready")
            service.databases.closing = True
            closing = await ask("/health/ready?when_away=true")

    assert (starting.status_code, starting.json()) == (503, {"status": "starting"})
    assert (away.status_code, away.json()["writes"]) == (200, "primary database is not healthy")
    assert (plain.status_code, plain.json()) == (503, {"status": "primary database is not healthy"})
    assert (closing.status_code, closing.json()) == (503, {"status": "closing"})


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
async def test_probes_ask_the_database_nothing(service: Service, path: str) -> None:
    """A probe costs no statement and no connection."""
    before = service.databases.primary.pool.figures()

    await service.client.get(path)

    assert service.databases.primary.pool.figures() == before
    assert service.sample("db_query_seconds_count", pool="primary") == 0


async def test_document_says_what_an_unhealthy_answer_is() -> None:
    """503 is documented as the media type in which it comes."""
    async with serving(down(), settled=False) as service:
        document = (await service.client.get("/openapi.json")).json()
        for path in ("/health/ready", "/health/db"):
            answer = await service.client.get(path)

            assert answer.headers["content-type"] in document["paths"][path]["get"]["responses"]["503"]["content"]


async def test_operations_routes_take_no_thread(service: Service) -> None:
    """They answer while plain `def` endpoints have every thread of FastAPI's pool."""
    limiter = to_thread.current_default_thread_limiter()
    endpoints = [object() for _ in range(int(limiter.available_tokens))]
    for endpoint in endpoints:
        await limiter.acquire_on_behalf_of(endpoint)

    try:
        async with asyncio.timeout(30):
            answers = [await service.client.get(path) for path in OPERATORS]
    finally:
        for endpoint in endpoints:
            limiter.release_on_behalf_of(endpoint)

    assert [answer.status_code for answer in answers] == [200] * 6
