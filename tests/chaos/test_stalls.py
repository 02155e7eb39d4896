"""Something stands still and goes on: a lock, the whole database."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing.proxy import Proxy
from tests.chaos import FULL, in_time
from tests.chaos.load import Answer, ask, offer, quantile
from tests.conftest import Database
from tests.service import Service, serving

POOL = {"pool_size": 5, "max_overflow": 0, "pool_min_size": 5}
STALL_SECONDS = 1.0
WATCHED_SECONDS = 3.0 if FULL else 0.8
READS_PER_SECOND = 100
WAITING = 100


@asynccontextmanager
async def locked(database: Database) -> AsyncIterator[None]:
    """Lock all patients, as a migration at a bad moment does."""
    owner = await database.cluster.primary.connect(database.name)
    try:
        async with owner.transaction():
            await owner.execute("LOCK TABLE patients IN ACCESS EXCLUSIVE MODE")
            yield
    finally:
        await owner.close()


async def stall(service: Service, database: Database, app: Any) -> tuple[list[Answer], float, float]:
    """Read at a steady rate, with all patients locked for a second; return answers, the lock's end, new connections."""

    def opened() -> float:
        return service.sample("db_connection_connect_seconds_count", pool="primary")

    before, stopped = opened(), False
    reading = asyncio.create_task(
        offer(lambda _: ask(app, "GET", "/patients?limit=1"), per_second=READS_PER_SECOND, until=lambda: stopped)
    )
    async with locked(database):
        await asyncio.sleep(STALL_SECONDS)
    unlocked = time.monotonic()
    await asyncio.sleep(WATCHED_SECONDS)
    stopped = True
    return await reading, unlocked, opened() - before


async def test_full_rate_after_a_lock_stall(database: Database, measured: Callable[[str], None]) -> None:
    """After a second behind a lock everything is answered within two more, on the connections that were there."""
    async with serving(database.settings(replica=False, **POOL)) as service:
        answers, unlocked, opened = await stall(service, database, service.app)

    failed_since = max(0.0, *(answer.asked_at - unlocked for answer in answers if answer.status != 200))
    later = [answer for answer in answers if answer.asked_at >= unlocked + failed_since]
    measured(
        f"full rate {failed_since:.2f} s after the lock's end, p99 then "
        f"{quantile([a.seconds for a in later], 0.99) * 1000:.0f} ms, {opened:.0f} new connections"
    )
    assert {answer.status for answer in answers} <= {200, 503}
    in_time(failed_since <= 2, failed_since)
    assert opened < 2 * POOL["pool_size"]


async def test_deadlines_by_cancelling_throw_the_pool_away(database: Database) -> None:
    """The usual deadline, a cancel around the request, opens connections in a storm: that is why there is none."""

    async def impatient(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.wait_for(service.app(scope, receive, send), 0.08)
        except TimeoutError:
            await send({"type": "http.response.start", "status": 504, "headers": []})
            await send({"type": "http.response.body", "body": b'{"code": "timeout"}'})

    async with serving(database.settings(replica=False, **POOL)) as service:
        _, _, opened = await stall(service, database, impatient)

    assert opened >= 2 * POOL["pool_size"]


async def test_waiters_are_served_at_once_after_an_outage(database: Database, measured: Callable[[str], None]) -> None:
    """A queue that formed while the database was mute is served within half a second of its return."""
    async with Proxy(database.cluster.primary.port) as proxy:
        primary = {"url": proxy.url(database.url()), "pool_timeout": 5, "connect_timeout_seconds": 5} | POOL
        async with serving(database.settings(replica=False, primary=primary)) as service:
            pool = service.databases.primary.pool
            proxy.hang()
            proxy.reset()

            async def all_lost() -> bool:
                return pool.figures().checked_in == 0

            assert await eventually(all_lost, 5), pool.figures()
            reads = [asyncio.create_task(ask(service.app, "GET", "/patients?limit=1")) for _ in range(WAITING)]

            async def all_queue() -> bool:
                return pool.figures().waiting >= WAITING - pool.settings.capacity

            assert await eventually(all_queue, 5), pool.figures()
            proxy.resume()
            returned = time.monotonic()
            answers = await asyncio.gather(*reads)

    slowest = max(answer.answered_at for answer in answers) - returned
    measured(f"{WAITING} waiting requests answered {slowest:.2f} s after the database's return")
    assert {answer.status for answer in answers} == {200}
    in_time(slowest <= 0.5, slowest)


async def test_waiters_hear_of_a_refusal_at_once(database: Database, measured: Callable[[str], None]) -> None:
    """When connects begin to be refused, the whole queue is answered, not only the one that tried."""
    async with Proxy(database.cluster.primary.port) as proxy:
        primary = {"url": proxy.url(database.url()), "pool_timeout": 5, "connect_timeout_seconds": 5} | POOL
        async with serving(database.settings(replica=False, primary=primary)) as service:
            pool = service.databases.primary.pool
            proxy.hang()
            reads = [asyncio.create_task(ask(service.app, "GET", "/patients?limit=1")) for _ in range(WAITING)]

            async def all_queue() -> bool:
                return pool.figures().waiting >= WAITING - pool.settings.capacity

            assert await eventually(all_queue, 5), pool.figures()
            proxy.refuse()
            proxy.reset()
            refused = time.monotonic()
            answers = await asyncio.gather(*reads)

    seconds = max(answer.answered_at for answer in answers) - refused
    measured(f"{WAITING} waiting requests answered {seconds:.2f} s after the refusal")
    assert {answer.status for answer in answers} == {503}
    in_time(seconds <= 0.5, seconds)
