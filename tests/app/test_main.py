"""The lifespan opens what the service needs, whatever state the databases are in, and leaves nothing behind."""

import asyncio
import subprocess
import sys
from typing import Any

import asyncpg
import httpx
import pytest

from app.main import create_app
from app.settings import Settings
from local.cluster import Cluster
from local.setup import PROJECT
from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.environment import SettingsError
from tests.conftest import Database
from tests.service import serving
from tests.stopwatch import Stopwatch

# What `import app.main` may load: the libraries that the service is built on, and what they load.
PACKAGES = {
    "annotated_doc", "annotated_types", "anyio", "asyncpg", "cython_runtime", "dotenv", "email_validator", "fastapi",
    "greenlet", "idna", "opentelemetry", "prometheus_client", "pydantic", "pydantic_core", "pydantic_settings",
    "pythonjsonlogger", "sqlalchemy", "starlette", "typing_extensions", "typing_inspection",
}  # fmt: skip
DOWN: dict[str, Any] = {"url": f"postgresql://a@127.0.0.1:{free_port()}/x"}


async def sessions(database: Database, name: str) -> int:
    """Count an application's sessions on the primary and on the replica."""
    found = 0
    for url in (database.url("postgres"), database.replica_url("postgres")):
        connection = await asyncpg.connect(url)
        found += await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name)
        await connection.close()
    return found


async def test_shutdown_leaves_no_session_on_the_servers(database: Database) -> None:
    """Warm pools and monitors are there while it runs, and gone from pg_stat_activity afterwards."""
    name = "come-and-go"
    analytics = {"url": database.replica_url(), "pool_min_size": 0, "application_name": name}
    async with serving(database.settings(pool_min_size=5, analytics=analytics, application_name=name)):

        async def warm() -> bool:
            # Five warm connections and a monitor each on primary and replica, and analytics' monitor.
            return await sessions(database, "come-and-go") == 13

        assert await eventually(warm, 5)

    async def gone() -> bool:
        return await sessions(database, "come-and-go") == 0

    assert await eventually(gone, 5)


async def test_starts_with_the_databases_down_and_is_ready_when_they_return(
    breakable_cluster: Cluster, database: Database, stopwatch: Stopwatch
) -> None:
    """Alive at once, not ready; within two seconds of the primary's return ready, and serving."""
    # On a busy machine the first login takes longer than half a second.
    settings = database.settings(monitor_interval_seconds=0.5, pool_timeout=10)
    await breakable_cluster.stop()
    started = stopwatch.seconds
    async with serving(settings, settled=False) as service:
        start_seconds = stopwatch.seconds - started
        live = await service.client.get("/health/live")
        unready = await service.client.get("/health/ready")

        await breakable_cluster.primary.start()
        returned = stopwatch.seconds

        async def ready() -> bool:
            return (await service.client.get("/health/ready")).is_success

        assert await eventually(ready, 20)
        seconds = stopwatch.seconds - returned
        read = await service.client.get("/patients")

    assert start_seconds < 2
    assert (live.status_code, unready.status_code, unready.headers["retry-after"]) == (200, 503, "1")
    assert seconds < 2
    assert (read.status_code, read.json()) == (200, [])


async def test_shutdown_is_quick_with_the_databases_down(stopwatch: Stopwatch) -> None:
    """Nothing to wait for, nothing waited for."""
    async with serving(Settings(_env_file=None, primary=DOWN, analytics=DOWN), settled=False):
        started = stopwatch.seconds

    assert stopwatch.seconds - started < 1


async def test_two_applications_share_a_process(database: Database) -> None:
    """Each has its own pools, figures and settings: one is exhausted, the other serves."""
    small = database.settings(pool_size=1, max_overflow=0, pool_timeout=0.05, retry_after_seconds=7)
    ada = {"mrn": "A-1", "full_name": "Ada", "birth_date": "1980-01-01"}
    async with serving(small) as first, serving(database.settings()) as second:
        async with first.databases.primary.engine.connect():
            refused = await first.client.post("/patients", json=ada)
            stored = await second.client.post("/patients", json=ada)

        assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")
        assert stored.status_code == 201
        labels = {"method": "POST", "route": "/patients"}
        assert first.sample("http_requests_total", status="503", **labels) == 1
        assert second.sample("http_requests_total", status="503", **labels) == 0


async def test_requests_after_the_end_are_refused(database: Database) -> None:
    """Once the lifespan is over no connection is opened any more: 503, not a leak."""
    async with serving(database.settings()) as service:
        pass
    async with httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://test") as client:
        answer = await client.get("/patients")

    assert (answer.status_code, answer.json()["code"]) == (503, "pool_exhausted")


async def test_request_in_flight_finishes_at_shutdown(database: Database) -> None:
    """A connection that is at work when the shutdown begins is waited for."""
    blocker = await asyncpg.connect(database.url("app_owner"))
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("LOCK TABLE patients")
    async with serving(database.settings(replica=False)) as service:
        slow = asyncio.create_task(service.client.get("/patients"))

        async def at_work() -> bool:
            return service.databases.primary.pool.figures().checked_out == 1

        assert await eventually(at_work, 5)
        asyncio.get_running_loop().call_later(0.1, lambda: asyncio.ensure_future(transaction.rollback()))

    assert (await slow).status_code == 200
    await blocker.close()


def test_wrong_environment_ends_the_process_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """`create_app()` reads the environment; what is wrong there is a sentence and no traceback."""
    monkeypatch.setenv("DATABASE_URL", "mysql://x/y")

    with pytest.raises(SystemExit, match=r"lifeguard cannot start\.\nDATABASE_URL: has the scheme 'mysql'"):
        create_app()


def test_import_loads_what_is_written_here() -> None:
    """An import that is new is seen here first: each worker, and each command of the service, waits for it."""
    loaded = "import app.main, sys; print(*sys.modules)"

    done = subprocess.run([sys.executable, "-c", loaded], check=True, capture_output=True, text=True, cwd=PROJECT)

    modules = set(done.stdout.split())
    # An interpreter of a distribution may have a `sitecustomize` of its own.
    packages = {name.partition(".")[0] for name in modules if not name.startswith("_")} - {"sitecustomize"}
    assert packages - sys.stdlib_module_names - PACKAGES == {"app", "pglifeguard"}
    # FastAPI loads it for the first route that is made. The first ones are made by `create_app`.
    assert "pydantic.v1" not in modules


def test_environment_is_read_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """`uvicorn --factory app.main:create_app` calls it so."""
    monkeypatch.setenv("DATABASE_URL", DOWN["url"])
    monkeypatch.setenv("RETRY_AFTER_SECONDS", "9")

    assert create_app().state.settings.retry_after_seconds == 9


def test_budget_is_checked_when_the_application_is_made(database: Database) -> None:
    """Settings that could open more connections than granted make no application."""
    with pytest.raises(SettingsError, match="CONNECTION_LIMIT"):
        create_app(database.settings(connection_limit=10))
