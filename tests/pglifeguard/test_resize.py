"""Pools change their size, and renew their connections, while requests use them: none of these fails for it."""

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import Any, Self

import pytest

from pglifeguard.databases import Databases
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import BudgetExceeded, DatabaseUnreachable, NotFound
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database
from tests.pglifeguard.conftest import Pooled, pooled
from tests.service import Service, serving

NONE = {"primary": 0, "replica": 0, "analytics": 0}


async def hold(p: Pooled, stack: AsyncExitStack, number: int) -> None:
    """Check out so many connections until the stack ends."""
    for _ in range(number):
        await stack.enter_async_context(p.database.engine.connect())


async def test_smaller_pool_closes_what_is_idle_now_and_the_rest_at_release(database: Database) -> None:
    """The queue goes on with what is left, and nobody is refused."""
    async with pooled(database.url(), pool_size=4, max_overflow=0, pool_timeout=30) as p:
        async with AsyncExitStack() as stack:
            async with AsyncExitStack() as idle:
                await hold(p, stack, 3)
                await hold(p, idle, 1)
            p.database.resize(p.database.settings.resized(1, 1))

            assert (p.pool.figures().checked_in, p.replaced("surplus"), p.pool.leaving) == (0, 1, 1)
            assert (p.pool.figures().total, p.pool.figures().available, p.pool.figures().overflow) == (2, 0, 2)
            assert p.pool._queue.settings is p.pool.settings
            requests = [asyncio.create_task(p.backend()) for _ in range(3)]
            await p.waiting(3)
        backends = await asyncio.gather(*requests)

        assert (len(set(backends)), p.replaced("surplus"), p.pool.leaving) == (2, 2, 0)
        assert (p.pool.figures().checked_in, p.pool.figures().available) == (2, 2)
        assert not p.pool._shrinking


async def test_larger_pool_serves_who_waits(database: Database) -> None:
    """At once, by new connections."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_timeout=30) as p, AsyncExitStack() as stack:
        await hold(p, stack, 1)
        request = asyncio.create_task(p.backend())
        await p.waiting(1)

        p.database.resize(p.database.settings.resized(1, 1))

        assert await request


async def test_login_of_the_larger_pool_is_closed(database: Database, proxy: Proxy) -> None:
    """A connection that arrives after the pool became smaller is one too many, unless it fits."""
    async with pooled(proxy.url(database.url()), pool_size=3, max_overflow=0, connect_timeout_seconds=30) as p:
        await p.backend()
        proxy.hang()
        async with AsyncExitStack() as stack:
            await hold(p, stack, 1)
            requests = [asyncio.create_task(p.backend()) for _ in range(2)]

            async def logging_in() -> bool:
                return len(p.pool._openings) == 2

            assert await eventually(logging_in, 5)
            p.database.resize(p.database.settings.resized(2, 0))
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
            proxy.resume()

            async def logged_in() -> bool:
                return not p.pool._openings

            assert await eventually(logged_in, 10)
            assert (p.pool.figures().checked_out, p.pool.figures().checked_in, p.replaced("surplus")) == (1, 1, 1)


def test_size_keeps_to_the_bounds_of_the_settings(database: Database) -> None:
    """No more connections are kept warm than the pool keeps, and never more than were set."""
    settings = database.settings(replica=False, pool_size=5, pool_min_size=4).primary

    assert [settings.resized(size, 0).pool_min_size for size in (2, 8)] == [2, 4]
    wrong: list[tuple[Any, Any]] = [(0, 5), (501, 5), (5, -1), (5, 501), (2.5, 0), (True, 0), (5, "1")]
    for size, overflow in wrong:
        with pytest.raises(ValueError, match="a whole number from 1 to 500, and max_overflow from 0 to 500"):
            settings.resized(size, overflow)


async def test_resize_keeps_to_the_budget(database: Database) -> None:
    """What all workers and instances would take is compared with what the server grants, and shown."""
    many: dict[str, Any] = {"workers": 2, "instances": 3, "connection_limit": 100}
    settings = database.settings(replica=False, pool_size=3, max_overflow=0, **many)
    async with Databases(settings) as databases:
        with pytest.raises(BudgetExceeded, match=r"2 workers x 3 instances x .* = 103 connections, and grants .* 97\."):
            databases.resize("primary", pool_size=10, max_overflow=2)
        assert databases.primary.pool.figures().total == 3

        databases.resize("analytics", pool_size=2)
        databases.resize("primary", pool_size=10, max_overflow=2)

        wanted = databases.metrics.registry.get_sample_value(
            "db_connection_budget_wanted", {"server": settings.primary.server}
        )
        assert (wanted, databases.primary.pool.figures().total) == (97, 12)
        with pytest.raises(NotFound, match="no pool 'replica'; there are primary, analytics"):
            databases.resize("replica", pool_size=1)


async def test_pool_over_the_budget_may_become_smaller(database: Database) -> None:
    """The server may grant less than the settings ask for, which is an alert and no reason to refuse a smaller pool."""
    async with Databases(database.settings(replica=False, instances=50, pool_size=5)) as databases:
        await databases.primary.monitor.probe()
        with pytest.raises(BudgetExceeded):
            databases.resize("primary", pool_size=6)

        databases.resize("primary", pool_size=4)

        assert databases.primary.settings.pool_size == 4


async def test_operators_resize(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Figures, health, metrics and what else depends on it follow; without sizes it is that of the settings again."""
    async with serving(database.settings(pool_size=3, max_overflow=1)) as service:
        post = service.client.post
        with caplog.at_level(logging.WARNING, "pglifeguard.fastapi.debug"):
            grown = await post("/debug/resize?pool=primary&pool_size=7&max_overflow=2")
        retried_at_once = service.databases.primary_retry._room._value
        part = await post("/debug/resize?pool=replica&max_overflow=0")
        health = (await service.client.get("/health/db")).json()["databases"]
        stats = (await service.client.get("/debug/pool-stats")).json()
        await service.client.get("/metrics")
        gauges = [service.sample("db_pool_connections_total", pool=pool) for pool in ("primary", "replica")]
        back = await post("/debug/resize?pool=primary")
        too_large = await post("/debug/resize?pool=primary&pool_size=400")
        unknown = await post("/debug/resize?pool=secondary&pool_size=4")
        wrong = [(await post(f"/debug/resize?pool=primary&{size}")).status_code for size in ("pool_size=0", "size=4")]

    note = "A restart goes back to the settings: pool_size 3, max_overflow 1."
    told = {"workers": 1, "obeyed": 1, "pending": NONE, "failures": [], "note": note}
    assert (grown.status_code, grown.json()) == (202, told | {"pool": "primary", "pool_size": 7, "max_overflow": 2})
    assert part.json() == told | {"pool": "replica", "pool_size": 3, "max_overflow": 0}
    assert (health["primary"]["pool_size"], stats["primary"]["total"], stats["replica"]["total"]) == (7, 9, 3)
    assert (gauges, retried_at_once) == ([9, 3], 9 // 2)
    assert back.json() == told | {"pool": "primary", "pool_size": 3, "max_overflow": 1}
    assert (too_large.status_code, too_large.json()["code"]) == (409, "budget_exceeded")
    assert (unknown.status_code, wrong) == (404, [422, 422])
    shown: dict[str, Any] = vars(next(record for record in caplog.records if record.message == "operator's order"))
    assert (shown["operation"], shown["by"], shown["pool"], shown["pool_size"]) == ("resize", None, "primary", 7)
    assert (shown["address"], shown["obeyed"]) == ("127.0.0.1", 1)


class Readers:
    """Reads from both databases without a pause, until the block ends."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.statuses: list[int] = []
        self._stopped = False

    async def _read(self, path: str) -> None:
        while not self._stopped:
            self.statuses.append((await self.service.client.get(path)).status_code)

    async def __aenter__(self) -> Self:
        """Begin, with twice as many readers as the pool has connections."""
        self._tasks = [asyncio.create_task(self._read(path)) for path in ("/patients", "/users") for _ in range(4)]
        await self.more()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop, and let what is under way end."""
        self._stopped = True
        await asyncio.gather(*self._tasks)

    async def more(self) -> None:
        """Wait until more answers have come."""
        seen = len(self.statuses)

        async def came() -> bool:
            return len(self.statuses) >= seen + 20

        assert await eventually(came, 30)


async def test_nobody_fails_when_pools_are_drained_and_resized(database: Database) -> None:
    """Under more requests than the pools have connections, and with a patience shorter than a login."""
    hasty: dict[str, Any] = {"pool_size": 3, "max_overflow": 1, "pool_timeout": 0.5}
    async with serving(database.settings(**hasty)) as service, Readers(service) as readers:
        drained = await service.client.post("/debug/drain?wait_seconds=10")
        await readers.more()
        for size in (1, 2, 6, 1):
            smaller = await service.client.post(f"/debug/resize?pool=replica&pool_size={size}&wait_seconds=10")
            await readers.more()

        assert service.sample("db_connection_invalidations_total", pool="replica", reason="disposed") > 0
    assert (drained.json()["pending"], smaller.json()["pending"]) == (NONE, NONE)
    assert set(readers.statuses) == {200}


async def test_one_pool_is_drained(database: Database) -> None:
    """Its old connection at work is pending until its release; the other pools keep theirs."""
    async with serving(database.settings()) as service:
        async with service.databases.primary.engine.connect():
            pending = (await service.client.post("/debug/drain?pool=primary")).json()["pending"]
        after = (await service.client.post("/debug/drain?pool=primary&wait_seconds=10")).json()["pending"]
        unknown = await service.client.post("/debug/drain?pool=secondary")

        assert (pending, after, unknown.status_code) == (NONE | {"primary": 1}, NONE, 404)
        assert service.sample("db_connection_invalidations_total", pool="replica", reason="disposed") == 0


async def test_login_that_is_slow_refuses_nobody_in_a_drained_pool(database: Database, proxy: Proxy) -> None:
    """Requests wait for the new connections for longer than DATABASE_POOL_TIMEOUT."""
    async with pooled(proxy.url(database.url()), pool_timeout=0.01, connect_timeout_seconds=30) as p:
        proxy.hang()
        p.pool.renew()
        request = asyncio.create_task(p.backend())

        async def waits() -> bool:
            return bool(p.pool._queue.waiters)

        assert await eventually(waits, 5)
        (waiter,) = p.pool._queue.waiters
        p.pool._expire(waiter, 0.0)  # As its own timer may have done.
        proxy.resume()

        assert await request


async def test_database_that_lets_nobody_in_is_not_drained(database: Database, proxy: Proxy) -> None:
    """Its old connections go on, and the answer says why."""
    url = proxy.url(database.url())
    settings = database.settings(replica=False, primary={"url": url}, health_timeout_seconds=0.2)
    async with serving(settings) as service:
        before = service.databases.primary.pool.figures().checked_in
        proxy.refuse()
        answer = await service.client.post("/debug/drain?pool=primary")
        with pytest.raises(DatabaseUnreachable):
            await service.databases.renew_connections("primary")
        kept = service.databases.primary.pool.figures().checked_in

    assert (answer.status_code, answer.json()["code"]) == (503, "database_unreachable")
    assert kept == before > 0
