"""Whatever is cancelled, cut or closed, in whatever order: no permit is lost, no session stays, figures are right."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Integer, Text, literal_column, select
from sqlalchemy.ext.asyncio import AsyncConnection

from pglifeguard.consistency import Consistency
from pglifeguard.errors import DatabaseUnavailable
from pglifeguard.lease import fetch_once
from pglifeguard.pool import ConnectionPool
from pglifeguard.query import Query
from pglifeguard.sessions import WriteSession
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database
from tests.pglifeguard.conftest import Clock, Pooled, pooled, sessions_end

STEP_SECONDS = 0.0007
NAP = select(literal_column("pg_sleep(0.01)::text", Text), literal_column("7", Integer))
NAP_PAST_SQLALCHEMY = Query(NAP)


def check(pool: ConnectionPool[Any]) -> None:
    """Look at the figures of this instant."""
    figures = pool.figures()
    assert figures.checked_out + figures.connecting + figures.available == figures.total, figures
    assert figures.checked_out + figures.checked_in <= figures.total, figures
    assert min(figures.checked_out, figures.checked_in, figures.connecting, figures.available) >= 0, figures
    assert 0 <= figures.waiting <= pool.settings.pool_max_waiting, figures
    assert figures.overflow == max(0, figures.checked_out + figures.checked_in - figures.pool_size), figures


async def in_a_transaction(p: Pooled) -> None:
    """Connect, begin, ask, commit."""
    async with p.database.engine.begin() as connection:
        assert (await connection.execute(NAP)).one()[1] == 7


async def past_sqlalchemy(p: Pooled) -> None:
    """Lease a connection and ask, as a read on a replica does."""
    ((_, answer),) = await fetch_once(p.database, NAP_PAST_SQLALCHEMY, {})
    assert answer == 7


async def in_a_session(p: Pooled) -> None:
    """Begin, ask and commit by the driver, and ask where that led, as a write does."""
    async with WriteSession(p.database, label="storm", consistency=Consistency()) as session:
        ((_, answer),) = await session.rows(NAP_PAST_SQLALCHEMY)
        assert answer == 7


async def in_a_session_handed_over(p: Pooled) -> None:
    """Begin by the driver, and let SQLAlchemy go on and commit."""
    async with WriteSession(p.database, label="storm", consistency=Consistency()) as session:
        await session.rows(NAP_PAST_SQLALCHEMY)
        assert (await session.execute(NAP)).one()[1] == 7


WORKS = [in_a_transaction, past_sqlalchemy, in_a_session, in_a_session_handed_over]


async def cancel_once(work: Awaitable[None], seconds: float) -> None:
    """Cancel a task as asyncio does."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().call_later(seconds, task.cancel)
    with suppress(asyncio.CancelledError):
        await task


async def cancel_twice(work: Awaitable[None], seconds: float) -> None:
    """Cancel a task, and once more while it cleans up."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)

    def cancel() -> None:
        task.cancel()
        loop.call_soon(lambda: loop.call_soon(task.cancel))

    loop.call_later(seconds, cancel)
    with suppress(asyncio.CancelledError):
        await task


async def cancel_for_good(work: Awaitable[None], seconds: float) -> None:
    """Cancel as anyio does: again at every await, until the scope is left."""
    with anyio.move_on_after(seconds):
        await work


@pytest.mark.parametrize("cancelled", [cancel_once, cancel_twice, cancel_for_good])
@pytest.mark.parametrize("work", WORKS)
async def test_cancel_at_any_moment_loses_nothing(
    database: Database,
    work: Callable[[Pooled], Awaitable[None]],
    cancelled: Callable[[Awaitable[None], float], Awaitable[None]],
) -> None:
    """Connecting, asking, committing, closing: wherever the cancel hits, the only permit comes back and works."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_timeout=10, pool_max_uses=3) as p:
        for step in range(50):
            await cancelled(work(p), step * STEP_SECONDS)
            check(p.pool)
            assert await p.backend()
            assert p.pool.figures().available == 1

    assert await sessions_end(database)


async def test_cancelled_crowd_loses_nothing(database: Database, proxy: Proxy) -> None:
    """A hundred requests on two connections, each cancelled some time, over a network that comes and goes."""
    chance = random.Random(7)  # noqa: S311  # Repeatable is what it must be.
    async with pooled(proxy.url(database.url()), pool_size=1, max_overflow=1, pool_timeout=0.3) as p:

        async def one() -> None:
            with suppress(DatabaseUnavailable, Exception):
                await cancel_once(chance.choice(WORKS)(p), chance.uniform(0, 0.4))

        crowd = [asyncio.create_task(one()) for _ in range(100)]
        while not all(task.done() for task in crowd):
            check(p.pool)
            chance.choice([proxy.cut, proxy.reset, proxy.freeze, proxy.resume, proxy.resume, p.pool.tend])()
            await asyncio.sleep(0.003)

        proxy.resume()
        assert await p.backend()
    assert await sessions_end(database)


Operation = tuple[str, int]
# Taking and returning are what happens most.
KINDS = ["take"] * 3 + ["return"] * 2
KINDS += ["lose", "cancel", "cut", "refuse", "accept", "hang", "resume", "dispose", "abandon", "tend", "age"]
OPERATIONS = st.tuples(
    st.sampled_from(KINDS),
    st.integers(0, 7),
)


@settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(operations=st.lists(OPERATIONS, min_size=5, max_size=40))
async def test_figures_are_right_after_any_history(
    database: Database, proxy: Proxy, operations: list[Operation]
) -> None:
    """After any order of taking, losing, cancelling, refusing, disposing and ageing, all permits are back."""
    clock = Clock()
    await proxy.accept()
    proxy.resume()
    async with pooled(
        proxy.url(database.url()), clock=clock, pool_size=2, max_overflow=1, pool_timeout=20, pool_max_waiting=2
    ) as p:
        history = _History(p, proxy, clock)
        for name, number in operations:
            await history.apply(name, number)
            check(p.pool)

        await proxy.accept()
        await history.end()
        assert len(await asyncio.gather(*(p.backend() for _ in range(3)))) == 3


class _History:
    """What happens to a pool, step by step."""

    def __init__(self, p: Pooled, proxy: Proxy, clock: Clock) -> None:
        self.p = p
        self.proxy = proxy
        self.clock = clock
        self.tasks: list[asyncio.Task[AsyncConnection]] = []

    async def apply(self, name: str, number: int) -> None:
        """Do one thing to the pool."""
        simple: dict[str, Callable[[], Any]] = {
            "cut": self.proxy.cut,
            "refuse": self.proxy.refuse,
            "hang": self.proxy.hang,
            "resume": self.proxy.resume,
            "dispose": self.p.pool.dispose,
            "abandon": self.p.pool.abandon,
            "tend": self.p.pool.tend,
        }
        if name in simple:
            simple[name]()
        elif name == "take":
            self.tasks.append(asyncio.create_task(self._take()))
        elif name == "accept":
            await self.proxy.accept()
        elif name == "age":
            self.clock.now += 10.0**number / 100
        elif self.tasks:
            await self._finish(name, self.tasks[number % len(self.tasks)])
        # A few turns of the loop, so that connects are met at different stages.
        for _ in range(number * number):
            await asyncio.sleep(0)

    async def end(self) -> None:
        """Return everything that was taken."""
        self.proxy.resume()
        for task in list(self.tasks):
            with suppress(DatabaseUnavailable):
                await asyncio.wait([task])
            await self._finish("return", task)

    async def _take(self) -> AsyncConnection:
        return await self.p.database.engine.connect()

    async def _finish(self, name: str, task: "asyncio.Task[AsyncConnection]") -> None:
        if name == "cancel" or not task.done():
            if name == "cancel":
                task.cancel()
            if not task.done():
                return
        self.tasks.remove(task)
        if task.cancelled() or task.exception() is not None:
            return
        if name == "lose":
            await task.result().invalidate()
        await task.result().close()
