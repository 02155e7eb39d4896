"""A pool that is paused hands out nothing: requests wait beside their patience, and go on with new connections."""

import asyncio
import math
from contextlib import AsyncExitStack
from typing import Any

import pytest

from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import PoolExhausted
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database
from tests.pglifeguard.conftest import Clock, Pooled, grow, pooled
from tests.service import Service, serving

LONG = 60.0


async def waiting(p: Pooled, number: int) -> "list[asyncio.Task[int]]":
    """Ask for so many connections in tasks, and wait until they are in the queue."""
    tasks = [asyncio.create_task(p.backend()) for _ in range(number)]

    async def queued() -> bool:
        return len(p.pool._queue.waiters) == number

    assert await eventually(queued, 5)
    return tasks


async def test_requests_wait_for_the_end_of_a_pause(database: Database) -> None:
    """An idle connection is not handed out; after `resume` all are served, by new connections."""
    async with pooled(database.url(), pool_size=2) as p:
        before = await p.backend()
        p.pool.pause(LONG)
        tasks = await waiting(p, 5)

        p.pool.resume()
        backends = await asyncio.gather(*tasks)

        assert before not in backends
        p.pool.resume()  # A second one changes nothing.
        assert await p.backend() in backends


async def test_pause_ends_by_itself(database: Database) -> None:
    """When its seconds are over; a later call sets other seconds."""
    async with pooled(database.url()) as p:
        p.pool.pause(LONG)
        (task,) = await waiting(p, 1)

        p.pool.pause(0.01)

        assert await task


async def test_nobody_is_refused_during_a_pause(database: Database, proxy: Proxy) -> None:
    """Whoever waited before is served as well, when its patience has passed meanwhile and when its login has failed."""
    async with pooled(proxy.url(database.url()), pool_size=1, max_overflow=0, connect_timeout_seconds=30) as p:
        proxy.hang()
        (early,) = await waiting(p, 1)

        async def logging_in() -> bool:
            return proxy.open == 1

        assert await eventually(logging_in, 5)
        p.pool.pause(LONG)
        proxy.reset()

        async def login_has_failed() -> bool:
            return not p.pool._openings

        assert await eventually(login_has_failed, 10)
        (waiter,) = p.pool._queue.waiters
        p.pool._expire(waiter, 0.0)
        assert not waiter.done()
        proxy.resume()

        p.pool.resume()

        assert await early


async def test_queue_that_grew_holds_all_during_a_pause(database: Database, clock: Clock) -> None:
    """Otherwise each request of the first moment would push another one out."""
    async with pooled(database.url(), clock=clock, pool_size=1, max_overflow=0) as p:
        grow(p.pool._queue, clock.now)
        p.pool.pause(LONG)
        tasks = await waiting(p, 3)

        p.pool.resume()

        assert all(await asyncio.gather(*tasks))


async def test_what_is_at_work_goes_on(database: Database) -> None:
    """A connection that comes back during a pause is kept, and replaced when the pause ends."""
    async with pooled(database.url(), pool_size=1, max_overflow=0) as p:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(p.database.engine.connect())
            p.pool.pause(LONG)
            tasks = await waiting(p, 1)
        assert (p.pool.figures().checked_out, p.pool.figures().checked_in) == (0, 1)
        assert not tasks[0].done()

        p.pool.resume()

        assert await tasks[0]


async def test_shutdown_ends_a_pause(database: Database) -> None:
    """Those who wait are told that the service closes."""
    async with pooled(database.url()) as p:
        p.pool.pause(LONG)
        tasks = await waiting(p, 1)

        p.pool.close()

        with pytest.raises(PoolExhausted, match="shutting down"):
            await tasks[0]


async def test_who_comes_after_a_pause_waits_like_who_came_in_it(database: Database, proxy: Proxy) -> None:
    """All connections are opened anew then: nobody is refused for a full queue, or for a patience that is over."""
    hasty: dict[str, Any] = {"pool_timeout": 0.01, "pool_max_waiting": 0, "connect_timeout_seconds": 30}
    async with pooled(proxy.url(database.url()), pool_size=1, max_overflow=0, **hasty) as p:
        proxy.hang()
        p.pool.pause(LONG)
        before = await waiting(p, 1)
        p.pool.resume()
        after = [asyncio.create_task(p.backend()) for _ in range(3)]

        async def all_wait() -> bool:
            return len(p.pool._queue.waiters) == 4

        assert await eventually(all_wait, 5)
        for waiter in list(p.pool._queue.waiters):
            p.pool._expire(waiter, 0.0)  # As their own timers may have done.
        proxy.resume()

        assert all(await asyncio.gather(*before, *after))


async def test_reads_whose_replica_is_lost_wait_for_the_primary(database: Database, replica_proxy: Proxy) -> None:
    """At the end of the pause all of them go to the primary at once, which serves a few of them at a time."""
    async with Proxy(database.cluster.primary.port) as slow:
        primary = {"url": slow.url(database.url()), "pool_size": 2, "max_overflow": 0, "pool_timeout": 0.1}
        replica = {"url": replica_proxy.url(database.replica_url()), "pool_timeout": 0.1}
        async with serving(database.settings(primary=primary, replicas=(replica,))) as service:
            service.databases.pause(seconds=LONG)
            reads = [asyncio.create_task(service.client.get("/patients")) for _ in range(10)]
            pool = service.databases.replicas[0].pool

            async def queued() -> bool:
                return len(pool._queue.waiters) == 10

            assert await eventually(queued, 10)
            replica_proxy.refuse()
            replica_proxy.cut()
            slow.delay_seconds = 0.05

            service.databases.resume()

            assert {answer.status_code for answer in await asyncio.gather(*reads)} == {200}


async def test_queue_of_a_pause_is_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far beyond that of other times, and yet. Who is refused may come back when the pause ends."""
    monkeypatch.setattr("pglifeguard.pool.PAUSED_WAITING", 1)
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_max_waiting=0) as p:
        p.pool.pause(LONG)
        tasks = await waiting(p, 2)

        with pytest.raises(PoolExhausted) as refused:
            await p.backend()
        assert LONG / 2 < refused.value.retry_after_seconds <= LONG

        p.pool.resume()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
async def test_pause_of_no_length_is_refused(service: Service, seconds: float) -> None:
    """It would be logged as one; and the time of an endless one can be told to no client."""
    with pytest.raises(ValueError, match="seconds above 0"):
        service.databases.pause(seconds=seconds)

    assert not service.databases.paused


async def test_operators_pause_and_resume(database: Database) -> None:
    """Reads and writes wait, operators do not; the answer tells what is still at work."""
    async with serving(database.settings()) as service:
        paused = await service.client.post("/debug/pause", params={"seconds": 60})
        request = asyncio.create_task(service.client.get("/patients"))

        async def queued() -> bool:
            stats = (await service.client.get("/debug/pool-stats")).json()
            return any(figures["waiting"] or figures["connecting"] for figures in stats.values())

        assert await eventually(queued, 5)
        during = await service.client.get("/health/ready")
        resumed = await service.client.post("/debug/resume")
        after = await service.client.get("/health/ready")
        refused = await service.client.post("/debug/pause", params={"seconds": 0})

        assert (await request).status_code == 200
    assert (paused.status_code, resumed.status_code, refused.status_code) == (202, 202, 422)
    none = {"primary": 0, "replica": 0, "analytics": 0}
    assert paused.json() == resumed.json() == {"workers": 1, "obeyed": 1, "pending": none, "failures": []}
    assert during.json() == {"status": "ready", "requests": "paused"}
    assert after.json() == {"status": "ready"}
