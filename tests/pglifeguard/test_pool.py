"""The pool admits so many, so long, in order; gives out what works; and always knows its figures."""

import asyncio
import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from contextvars import copy_context
from typing import Any, cast, get_args

import asyncpg
import pytest
from sqlalchemy import Integer, Text, bindparam, exc, func, literal, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from pglifeguard import database as database_module
from pglifeguard.checkout import WaitOutcome
from pglifeguard.connector import KeptAliveConnection
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import DatabaseUnreachable, PoolExhausted, sqlstate
from pglifeguard.lease import fetch_once
from pglifeguard.query import Query
from pglifeguard.testing.proxy import Proxy
from pglifeguard.wait_queue import client_key, watch_client
from tests.conftest import Database, Execute
from tests.pglifeguard.conftest import Clock, Pooled, grow, pooled, sessions_end
from tests.stopwatch import Stopwatch


async def hold(pooled: Pooled, stack: AsyncExitStack, count: int) -> list[AsyncConnection]:
    """Take so many connections until the stack is left."""
    return [await stack.enter_async_context(pooled.database.engine.connect()) for _ in range(count)]


def drop(held: list[AsyncConnection]) -> None:
    """Forget them without closing them."""
    held.clear()
    gc.collect()


def taking(pooled: Pooled) -> "asyncio.Task[int]":
    """Ask for a connection in a task."""
    return asyncio.create_task(pooled.backend())


# Admission.


async def test_at_most_capacity_is_at_work(database: Database, proxy: Proxy) -> None:
    """The size and the overflow together are the limit; the next one waits, and gets what comes back."""
    async with pooled(proxy.url(database.url()), pool_size=1, max_overflow=1, pool_timeout=10) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 2)
            third = taking(p)
            await p.waiting(1)
            figures = p.pool.figures()

        assert await third
        assert (figures.total, figures.checked_out, figures.available, figures.overflow) == (2, 2, 0, 1)
        assert (p.sample("db_connection_wait_total"), proxy.connections) == (1, 2)
        assert p.sample("db_connection_acquire_seconds_count") == 3


async def test_queue_is_first_come_first_served(database: Database) -> None:
    """Whoever has waited longest is served next."""
    served: list[int] = []

    async def take(p: Pooled, number: int) -> None:
        await p.backend()
        served.append(number)

    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_timeout=10) as p:
        tasks = []
        async with AsyncExitStack() as stack:
            await hold(p, stack, 1)
            for number in range(5):
                tasks.append(asyncio.create_task(take(p, number)))
                await p.waiting(number + 1)
        await asyncio.gather(*tasks)

    assert served == [0, 1, 2, 3, 4]


async def test_refusal_tells_how_long_the_queue_takes(database: Database) -> None:
    """As long as the one who was served last would take again for each one that waits."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_max_waiting=2, pool_timeout=10) as p:
        async with AsyncExitStack() as stack:
            async with AsyncExitStack() as first:
                await hold(p, first, 1)
                served = asyncio.create_task(hold(p, stack, 1))
                await p.waiting(1)
            await served
            tasks = [taking(p)]
            await p.waiting(1)
            tasks.append(taking(p))
            await p.waiting(2)
            with pytest.raises(PoolExhausted) as refused:
                await p.backend()
            assert refused.value.retry_after_seconds > 0
        await asyncio.gather(*tasks)


async def test_full_queue_refuses_at_once(database: Database, stopwatch: Stopwatch) -> None:
    """Past the queue's length nobody waits; the median refusal takes less than 5 ms."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_max_waiting=1, pool_timeout=10) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 1)
            second = taking(p)
            await p.waiting(1)
            seconds = []
            for _ in range(20):
                started = stopwatch.seconds
                with pytest.raises(PoolExhausted, match="All 1 connections are at work and 1 requests wait"):
                    await p.backend()
                seconds.append(stopwatch.seconds - started)

        assert await second
        assert p.rejected("queue_full") == 20
        assert sorted(seconds)[10] < 0.005


async def asking(p: Pooled, client: str, number: int) -> "asyncio.Task[int]":
    """Ask for a connection as this client, and wait until so many requests are in the queue."""

    async def ask() -> int:
        client_key.set(client)
        return await p.backend()

    task = asyncio.create_task(ask())
    await p.waiting(number)
    return task


async def test_full_queue_has_room_for_another_client(database: Database) -> None:
    """The newest request of the client that fills it is refused for it, unless that has just left."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_max_waiting=3, pool_timeout=10) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 1)
            greedy = [await asking(p, "greedy", number) for number in (1, 2, 3)]
            one = await asking(p, "one", 3)
            with pytest.raises(PoolExhausted, match="3 requests wait"):
                await greedy[2]
            # Both happen in one turn of the event loop: the other client comes when the newest has just been cancelled.
            other = asyncio.create_task(p.backend())
            greedy[1].cancel()
            await p.waiting(3)

        assert await asyncio.gather(greedy[0], one, other)


async def test_overload_is_told_at_once(database: Database) -> None:
    """A queue that stands takes as many requests as can be served in time, and lets go of those that came before."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_timeout=10) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 1)
            first = taking(p)
            await p.waiting(1)
            p.pool._queue._limit = 1
            with pytest.raises(PoolExhausted, match="kept short"):
                await p.backend()
            late = asyncio.get_running_loop().create_future()
            p.pool._queue.overdue.append(late)

        with pytest.raises(PoolExhausted, match="kept short"):
            await late
        assert await first
        assert p.rejected("overload") == 2


@pytest.mark.parametrize("end", ["pause", "close"])
async def test_overdue_are_told_before_nothing_is_granted_any_more(database: Database, end: str) -> None:
    """A pause stops their patience, and after the end nobody else tells them. Who has left is passed over."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_timeout=10) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 1)
            waiting = taking(p)
            await p.waiting(1)
            late, left = (asyncio.get_running_loop().create_future() for _ in range(2))
            left.cancel()
            p.pool._queue.overdue.extend([left] * 10 + [late])

            if end == "pause":
                p.pool.pause(10)
                p.pool.resume()
            else:
                p.pool.close()

            assert isinstance(late.exception(), PoolExhausted)
            assert p.rejected("overload") == 1
        if end == "pause":
            assert await waiting
        else:
            with pytest.raises(PoolExhausted, match="shutting down"):
                await waiting


async def test_request_that_is_pushed_out_is_told_before_a_release(database: Database, clock: Clock) -> None:
    """Nobody else would tell it: a pool that is closed meanwhile does not find it in the queue."""
    async with pooled(database.url(), clock=clock, pool_size=1, max_overflow=0, pool_timeout=10) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 1)
            first = taking(p)
            await p.waiting(1)
            grow(p.pool._queue, clock.now)
            second = taking(p)
            with pytest.raises(PoolExhausted, match="kept short"):
                await asyncio.wait_for(first, 5)

        assert await second
        assert p.rejected("overload") == 1


async def test_connection_stays_when_all_who_waited_have_left(database: Database) -> None:
    """A request that is cancelled in the turn of a release has no use for it."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_timeout=10) as p:
        slot = await p.pool.acquire()
        waiting = taking(p)
        await p.waiting(1)
        waiting.cancel()
        p.pool.release(slot)

        assert (p.pool.figures().checked_in, p.pool.figures().checked_out) == (1, 0)
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_waiting_ends_at_the_deadline(database: Database) -> None:
    """Who gets no connection in time is refused, and leaves the queue."""
    sizes: dict[str, Any] = {"pool_size": 1, "pool_min_size": 1, "max_overflow": 0}
    async with pooled(database.url(), **sizes, pool_timeout=0.05) as p, AsyncExitStack() as stack:
        await p.pool.warm_up()
        await hold(p, stack, 1)

        with pytest.raises(PoolExhausted, match=r"No connection became free within 0\.05 s"):
            await p.backend()

        assert (p.rejected("timeout"), p.pool.figures().waiting) == (1, 0)


async def test_login_that_the_first_in_the_queue_asked_for_is_what_it_waited_for(
    database: Database, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its wait and that login begin in the same moment, and the event loop may be on time to the microsecond."""
    url = proxy.url(database.url())
    async with pooled(url, pool_size=2, connect_timeout_seconds=30) as p, AsyncExitStack() as stack:
        await hold(p, stack, 1)
        proxy.hang()
        waiting = asyncio.create_task(p.backend())

        async def queued() -> bool:
            return bool(p.pool._queue.waiters)

        assert await eventually(queued, 5)
        (waiter,) = p.pool._queue.waiters
        loop: Any = asyncio.get_running_loop()
        (timer,) = [each for each in loop._scheduled if waiter in (each._args or ())]
        monkeypatch.setattr(loop, "time", timer.when)
        timer._run()
        monkeypatch.undo()

        with pytest.raises(DatabaseUnreachable, match="no connection was opened within"):
            await waiting


async def test_connecting_ends_at_the_deadline(database: Database, proxy: Proxy) -> None:
    """Who waits for a server that accepts and says nothing is refused in time; the login serves the next one."""
    proxy.hang()
    async with pooled(proxy.url(database.url()), pool_timeout=0.1, connect_timeout_seconds=30) as p:
        with pytest.raises(DatabaseUnreachable, match=r"no connection was opened within 0\.1 s"):
            await p.backend()
        waited = p.pool.figures()
        proxy.resume()

        async def opened() -> bool:
            return p.pool.figures().checked_in == 1

        assert await eventually(opened, 5)
        assert await p.backend()
        assert (waited.connecting, waited.available, proxy.connections) == (1, waited.total - 1, 1)
        assert p.sample("db_connection_connect_failures_total") == 0


async def test_first_questions_end_at_the_deadline(database: Database, proxy: Proxy, stopwatch: Stopwatch) -> None:
    """What SQLAlchemy asks a server on an engine's first connection counts as connecting."""
    proxy.fates["select pg_catalog.version()"] = "hang"
    async with pooled(proxy.url(database.url()), pool_timeout=0.3, connect_timeout_seconds=30) as p:
        started = stopwatch.seconds
        with pytest.raises(DatabaseUnreachable):
            await p.backend()

        assert stopwatch.seconds - started < 1
        assert any("version" in statement for statement in proxy.statements)


async def test_checking_ends_at_the_deadline(
    database: Database, proxy: Proxy, clock: Clock, stopwatch: Stopwatch
) -> None:
    """When neither the idle connection nor a new one answers, the refusal comes in time."""
    async with pooled(proxy.url(database.url()), clock=clock, pool_timeout=0.2) as p:
        await p.backend()
        clock.now += 31
        proxy.hang()

        started = stopwatch.seconds
        with pytest.raises(DatabaseUnreachable):
            await p.backend()

        assert stopwatch.seconds - started < 1
        assert p.replaced("unresponsive") == 1


async def test_one_deadline_covers_waiting_and_connecting(
    database: Database, proxy: Proxy, stopwatch: Stopwatch
) -> None:
    """The time that was spent in the queue is not there for connecting."""
    async with pooled(
        proxy.url(database.url()), pool_size=1, max_overflow=0, pool_timeout=0.6, connect_timeout_seconds=30
    ) as p:
        async with AsyncExitStack() as stack:
            (held,) = await hold(p, stack, 1)
            started, asked_at = stopwatch.seconds, time.perf_counter()
            second = taking(p)
            await p.waiting(1)
            await asyncio.sleep(0.4)  # The time that is spent is the point.
            # Returned at once, and unable to serve.
            cast("Any", held.sync_connection).connection.driver_connection.terminate()
            proxy.hang()

        with pytest.raises(DatabaseUnreachable):
            await second
        assert stopwatch.seconds - started < 0.95
        assert time.perf_counter() - asked_at > 0.55


async def test_failing_connects_wake_those_who_wait(database: Database, proxy: Proxy, stopwatch: Stopwatch) -> None:
    """When the database is gone, everybody in the queue learns it as fast as a connect is refused."""
    async with pooled(proxy.url(database.url()), pool_size=1, max_overflow=0, pool_timeout=20) as p:
        async with p.database.engine.connect() as held:
            waiters = [taking(p) for _ in range(10)]
            await p.waiting(10)
            proxy.refuse()
            started = stopwatch.seconds
            await held.invalidate()

        results = await asyncio.gather(*waiters, return_exceptions=True)

        assert stopwatch.seconds - started < 2
        assert all(isinstance(result, DatabaseUnreachable) for result in results), results
        await proxy.accept()
        assert await p.backend()


async def test_cancelled_waiter_leaves_the_queue(database: Database) -> None:
    """A request that is given up while it waits takes no place and no permit."""
    async with pooled(database.url(), pool_size=1, max_overflow=0) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 1)
            second = taking(p)
            await p.waiting(1)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            assert p.pool.figures().waiting == 0

        assert await p.backend()


async def test_wait_is_counted_by_its_end(database: Database, clock: Clock) -> None:
    """The seconds in the queue count for the served, the refused and the cancelled alike, and are no logins."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_timeout=10, clock=clock) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 1)
            tasks = [taking(p) for _ in range(3)]
            await p.waiting(3)
            clock.now += 3
            tasks[0].cancel()
            await p.waiting(2)
            clock.now += 4
            p.pool._expire(next(iter(p.pool._queue.waiters)), 0.0)
            await asyncio.wait(tasks[1:2])
            clock.now += 5
        ends = await asyncio.gather(*tasks, return_exceptions=True)

        assert [type(end) for end in ends] == [asyncio.CancelledError, PoolExhausted, int]
        seconds = {how: p.sample("db_connection_wait_seconds_sum", outcome=how) for how in get_args(WaitOutcome)}
        assert seconds == {"cancelled": 3, "refused": 7, "granted": 12}
        counts = [p.sample("db_connection_wait_seconds_count", outcome=how) for how in seconds]
        assert (sum(counts), p.sample("db_connection_wait_total")) == (3, 3)
        assert p.sample("db_connection_cancelled_total", reason="cancelled") == 1


async def test_permit_granted_to_a_cancelled_waiter_goes_on(database: Database) -> None:
    """When grant and cancel cross, the next in the queue gets the permit."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_timeout=10) as p:
        held = await p.database.engine.connect()
        second, third = taking(p), taking(p)
        await p.waiting(2)

        await held.close()
        granted = p.pool.figures()
        second.cancel()

        with pytest.raises(asyncio.CancelledError):
            await second
        assert await third
        assert (granted.checked_out, granted.connecting, granted.available, granted.waiting) == (0, 1, 0, 1)


async def test_cancelled_waiter_is_passed_over(database: Database) -> None:
    """A permit goes to the first one in the queue who still wants it, and a refusal to nobody twice."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_timeout=10) as p:
        held = await p.database.engine.connect()
        second, third, fourth = taking(p), taking(p), taking(p)
        await p.waiting(3)

        second.cancel()
        await held.close()
        fourth.cancel()
        p.pool.close()

        assert await third
        for cancelled in (second, fourth):
            with pytest.raises(asyncio.CancelledError):
                await cancelled
        assert p.rejected("closing") == 0


async def test_deadline_that_meets_a_grant_refuses_nobody(database: Database) -> None:
    """When time is over in the moment of the grant, the grant stands."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_timeout=10) as p:
        held = await p.database.engine.connect()
        second = taking(p)
        await p.waiting(1)
        (waiter,) = p.pool._queue.waiters

        await held.close()
        p.pool._expire(waiter, 0.0)

        assert await second
        assert p.rejected("timeout") == 0


async def test_client_that_leaves_with_its_grant_is_served(database: Database) -> None:
    """When a client leaves in the moment of the grant, the connection is in hand, and the request has it."""
    left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_timeout=10) as p:
        held = await p.database.engine.connect()
        context = copy_context()
        context.run(watch_client.set, lambda: left)
        second = asyncio.create_task(p.backend(), context=context)
        await p.waiting(1)

        await held.close()
        left.set_result(None)

        assert await second
        assert p.sample("db_connection_cancelled_total", reason="client_left") == 0


async def test_refusal_of_a_cancelled_waiter_returns_no_permit(database: Database) -> None:
    """When refusal and cancel cross, the pool does not count a permit that nobody had."""
    async with pooled(database.url(), pool_size=1, max_overflow=0) as p, AsyncExitStack() as stack:
        await hold(p, stack, 1)
        second = taking(p)
        await p.waiting(1)

        p.pool.close()
        second.cancel()

        with pytest.raises(asyncio.CancelledError):
            await second
        assert p.pool.figures().available == 0


# Checkout.


async def test_taking_a_connection_costs_no_round_trip(database: Database, proxy: Proxy) -> None:
    """The check of a warm connection stays in the process."""
    async with pooled(proxy.url(database.url())) as p:
        await p.backend()
        proxy.round_trips = 0

        async with p.database.engine.connect():
            pass

        assert (proxy.round_trips, proxy.connections) == (0, 1)


async def test_most_recently_used_connection_is_taken(database: Database) -> None:
    """Last in, first out: the others may idle until they are closed."""
    async with pooled(database.url(), pool_size=3, max_overflow=0) as p:
        async with AsyncExitStack() as stack:
            connections = await hold(p, stack, 3)
            first = (await connections[0].execute(text("SELECT pg_backend_pid()"))).scalar_one()

        # The stack returned the first one last.
        assert [await p.backend() for _ in range(5)] == [first] * 5


async def test_closed_connection_is_not_given_out(database: Database, proxy: Proxy) -> None:
    """A connection that was cut while it idled is replaced without anybody noticing."""
    async with pooled(proxy.url(database.url())) as p:
        before = await p.backend()
        proxy.cut()

        async def noticed() -> bool:
            return bool(p.pool._idle[0].driver_connection and p.pool._idle[0].driver_connection.is_closed())

        assert await eventually(noticed, 5)

        assert await p.backend() != before
        assert p.replaced("closed") == 1


async def test_connection_proves_itself_after_idling(database: Database, proxy: Proxy, clock: Clock) -> None:
    """After 30 seconds of idling, and not before, taking a connection costs one round trip."""
    async with pooled(proxy.url(database.url()), clock=clock) as p:
        await p.backend()
        trips = []
        for seconds in (29, 31):
            clock.now += seconds
            proxy.round_trips = 0
            async with p.database.engine.connect():
                trips.append(proxy.round_trips)

        assert trips == [0, 1]


async def test_black_holed_idle_connection_is_replaced(
    database: Database, proxy: Proxy, clock: Clock, stopwatch: Stopwatch
) -> None:
    """A peer that vanished without a word costs half of the deadline, and the request is served."""
    async with pooled(proxy.url(database.url()), clock=clock, pool_timeout=0.6) as p:
        before = await p.backend()
        proxy.freeze()
        clock.now += 31

        started = stopwatch.seconds
        after = await p.backend()

        assert after != before
        assert stopwatch.seconds - started < 0.6
        assert p.replaced("unresponsive") == 1


async def test_cancel_during_the_check_drops_the_connection(database: Database, proxy: Proxy, clock: Clock) -> None:
    """Nobody knows what a connection answers whose check was given up."""
    async with pooled(proxy.url(database.url()), clock=clock, pool_timeout=10) as p:
        await p.backend()
        clock.now += 31
        proxy.freeze()
        task = taking(p)

        async def checking() -> bool:
            return p.pool.figures().connecting == 1

        assert await eventually(checking, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert p.replaced("unresponsive") == 1
        assert p.pool.figures().checked_in == 0


async def test_lifetime_is_jittered(database: Database, clock: Clock) -> None:
    """Connections opened at one moment end at different ones, within the last tenth of their lifetime."""
    async with pooled(database.url(), clock=clock, pool_size=10, pool_recycle=1000) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 10)
        ends = {entry.info["checkout"].expires_at - clock.now for entry in p.pool._idle}

        assert len(ends) == 10
        assert all(900 <= seconds <= 1000 for seconds in ends)


async def test_old_connection_is_replaced(database: Database, clock: Clock) -> None:
    """Past its lifetime a connection is used until the login for another one has succeeded, and not again."""
    async with pooled(database.url(), clock=clock, pool_recycle=100, pool_check_after_seconds=1000) as p:
        first = await p.backend()
        clock.now += 89
        assert await p.backend() == first
        clock.now += 11
        assert await p.backend() == first
        assert p.replaced("age") == 0
        await p.pool.warm_up()

        assert await p.backend() != first
        p.pool.tend()
        assert (p.replaced("age"), p.pool.figures().checked_in) == (1, 1)


async def test_connection_is_replaced_after_so_many_uses(database: Database, clock: Clock) -> None:
    """The last allowed use is followed by others only until the login for another connection has succeeded."""
    async with pooled(database.url(), clock=clock, pool_min_size=1, pool_max_uses=2) as p:
        await p.pool.warm_up()
        clock.now += 1
        backends = [await p.backend() for _ in range(3)]
        await p.pool.warm_up()
        p.pool.tend()
        clock.now += 1
        backends += [await p.backend() for _ in range(2)]

        assert backends[0] == backends[1] == backends[2] != backends[3] == backends[4]
        assert p.replaced("uses") == 1


async def test_full_pool_gives_up_one_old_connection_at_a_time(database: Database, clock: Clock) -> None:
    """The login needs a place. At a release that is the released connection's, in the background an idle one's."""
    async with pooled(database.url(), clock=clock, pool_size=3, max_overflow=0, pool_recycle=100) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 3)
            clock.now += 101
        released = p.replaced("age")
        p.pool.tend()
        in_the_background = p.replaced("age")
        await p.pool.warm_up()
        p.pool.tend()

        assert (released, in_the_background, p.replaced("age")) == (1, 1, 3)
        assert p.pool.figures().checked_in == 1


async def test_lost_connection_is_counted_as_an_error(database: Database) -> None:
    """A connection that its holder found broken does not come back."""
    async with pooled(database.url()) as p:
        async with p.database.engine.connect() as connection:
            await connection.invalidate()

        assert p.replaced("error") == 1
        assert p.pool.figures().checked_in == 0


async def test_connection_is_lost_once(database: Database) -> None:
    """Who hears twice that a connection is lost gives it up once."""
    async with pooled(database.url()) as p:
        async with p.database.engine.connect() as connection:
            lost = await connection.get_raw_connection()
            for _ in range(2):
                p.database.adapter._invalidate(lost)

        assert p.replaced("error") == 1


async def test_one_lost_connection_does_not_take_the_others(database: Database) -> None:
    """Each connection is judged by itself: a killed backend costs one reconnect, not the whole pool."""
    async with pooled(database.url(), pool_size=2) as p:
        async with AsyncExitStack() as stack:
            one, other = await hold(p, stack, 2)
            victim = (await one.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            with pytest.raises(exc.DBAPIError):
                await one.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": victim})
            survivor = (await other.execute(text("SELECT pg_backend_pid()"))).scalar_one()

        assert p.pool.figures().checked_in == 1
        assert await p.backend() == survivor


async def test_direct_read_checks_what_it_takes(database: Database, proxy: Proxy, clock: Clock) -> None:
    """The short way to a connection is for those that need no check: after idling it costs the same round trip."""
    async with pooled(proxy.url(database.url()), role="replica", clock=clock) as p:
        trips, query = [], Query(select(literal(1)))
        for seconds in (0, 0, 31):
            clock.now += seconds
            proxy.round_trips = 0
            await fetch_once(p.database, query, {})
            trips.append(proxy.round_trips)

        assert trips[1:] == [1, 2]


async def test_cold_start_opens_many_at_once(database: Database) -> None:
    """The first connections of an engine may be asked for together."""
    async with pooled(database.url(), pool_size=10, max_overflow=0, pool_timeout=10) as p:
        backends = await asyncio.gather(*(p.backend() for _ in range(30)))

        assert len(set(backends)) <= 10


# Opening.


async def test_few_are_opened_at_once(database: Database, proxy: Proxy) -> None:
    """However many find the pool empty, three logins are under way, and no more than the pool may hold are made."""
    async with pooled(
        proxy.url(database.url()), pool_size=5, max_overflow=0, pool_timeout=10, connect_timeout_seconds=10
    ) as p:
        await p.backend()
        await p.database.engine.dispose()
        proxy.hang()
        tasks = [taking(p) for _ in range(20)]
        await p.waiting(15)

        async def logging_in() -> bool:
            return proxy.open >= 3

        assert await eventually(logging_in, 5)
        assert (proxy.open, p.pool.figures().connecting) == (3, 5)
        proxy.resume()
        await asyncio.gather(*tasks)

        assert proxy.connections <= 1 + 5


async def test_returned_connection_comes_before_one_being_opened(database: Database, proxy: Proxy) -> None:
    """Who waits takes what comes first; what is opened meanwhile is kept for the next one."""
    async with pooled(
        proxy.url(database.url()), pool_size=2, max_overflow=0, pool_timeout=10, connect_timeout_seconds=10
    ) as p:
        async with AsyncExitStack() as stack:
            (held,) = await hold(p, stack, 1)
            first = (await held.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            proxy.hanging = True
            second = asyncio.create_task(p.database.engine.connect().start())

            async def logging_in() -> bool:
                return proxy.open == 2

            assert await eventually(logging_in, 5)
        served = await second
        assert (await served.execute(text("SELECT pg_backend_pid()"))).scalar_one() == first
        proxy.resume()

        async def kept() -> bool:
            return p.pool.figures().checked_in == 1

        assert await eventually(kept, 5)
        await served.close()
        assert (p.pool.figures().checked_in, proxy.connections) == (2, 2)


async def test_cancelled_request_leaves_its_login(database: Database, proxy: Proxy) -> None:
    """A connect under way outlives the request for which it began, and serves the next one."""
    async with pooled(proxy.url(database.url()), pool_timeout=10, connect_timeout_seconds=10) as p:
        proxy.hang()
        first = taking(p)

        async def logging_in() -> bool:
            return proxy.open == 1

        assert await eventually(logging_in, 5)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        proxy.resume()

        assert await p.backend()
        assert proxy.connections == 1


async def test_server_that_is_full_lets_others_wait_for_what_is_open(database: Database, execute: Execute) -> None:
    """A connection that comes back serves who could not get a new one; in the end the server's reason is told."""
    await execute("CREATE ROLE narrow LOGIN PASSWORD 'narrow' CONNECTION LIMIT 1")
    url = database.url().partition("@")[2]
    try:
        async with pooled(f"postgresql://narrow:narrow@{url}", role="replica", pool_size=2, pool_timeout=5) as p:
            async with AsyncExitStack() as stack:
                await hold(p, stack, 1)
                second = taking(p)

                async def failed() -> bool:
                    return p.sample("db_connection_connect_failures_total") >= 1

                assert await eventually(failed, 5)
                assert not second.done()
            assert await second

        async with (
            pooled(f"postgresql://narrow:narrow@{url}", role="replica", pool_size=2, pool_timeout=0.3) as p,
            AsyncExitStack() as stack,
        ):
            assert await eventually(lambda: _holds(p, stack), 5)  # The session of before may take a moment to end.
            with pytest.raises(DatabaseUnreachable, match="too many connections") as refused:
                await p.backend()
            assert sqlstate(refused.value) == "53300"
    finally:
        await execute("DROP ROLE narrow")


async def _holds(p: Pooled, stack: AsyncExitStack) -> bool:
    try:
        await hold(p, stack, 1)
    except DatabaseUnreachable:
        return False
    return True


async def test_line_that_is_full_because_nothing_opens_says_so(database: Database, proxy: Proxy) -> None:
    """When connects fail, a full line is not blamed on requests at work."""
    async with pooled(proxy.url(database.url()), pool_size=1, max_overflow=0, pool_max_waiting=0, pool_timeout=5) as p:
        proxy.refuse()
        for _ in range(3):
            with pytest.raises(DatabaseUnreachable):
                await p.backend()
        first = taking(p)  # It waits for the next round.
        await asyncio.sleep(0)
        assert p.pool.figures().connecting == 1

        with pytest.raises(DatabaseUnreachable, match="Connect call failed"):
            await p.backend()

        with pytest.raises(DatabaseUnreachable):
            await first
        assert p.rejected("queue_full") == 0


async def test_refused_connect_spares_those_who_wait_for_work_to_end(database: Database, proxy: Proxy) -> None:
    """Who stands behind connections at work is not told of a failure that does not concern it."""
    async with pooled(proxy.url(database.url()), pool_size=2, max_overflow=0, pool_timeout=10) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 1)
            proxy.refuse()
            tasks = [taking(p) for _ in range(2)]
            with pytest.raises(DatabaseUnreachable):
                await tasks[0]
            assert not tasks[1].done()

        results = await asyncio.gather(*tasks[1:], return_exceptions=True)

        assert isinstance(results[0], int)
        await proxy.accept()


async def test_bug_in_connecting_is_raised_as_it_is(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no outage does not look like one."""
    async with pooled(database.url(), pool_min_size=1) as p:

        def spoilt(*_arguments: object) -> None:
            raise TypeError("spoilt")

        monkeypatch.setattr(p.database.adapter, "_create_connection", spoilt)
        with pytest.raises(TypeError, match="spoilt"):
            await p.backend()
        with pytest.raises(TypeError, match="spoilt"):
            await p.pool.warm_up()
    assert await sessions_end(database)


async def test_connection_to_a_server_that_was_left_is_not_kept(database: Database, proxy: Proxy) -> None:
    """A login that was under way when another server took over counts only if it leads to that one."""
    async with pooled(proxy.url(database.url()), pool_timeout=10, connect_timeout_seconds=10) as p:
        await p.backend()
        (slot,) = p.pool._idle
        server = cast("KeptAliveConnection", slot.driver_connection).server or 0.0
        for keep, kept in ((server + 1, False), (server, True)):
            await p.database.engine.dispose()
            proxy.hang()
            before = proxy.connections
            task = taking(p)

            async def logging_in(count: int = before + 1) -> bool:
                return proxy.connections == count

            assert await eventually(logging_in, 5)
            p.pool.abandon(keep=keep)
            proxy.resume()
            await task

            assert (proxy.connections == before + 1) is kept
    assert p.replaced("superseded") == 1


async def test_disposed_login_for_nobody_is_closed(database: Database, proxy: Proxy) -> None:
    """A login that was under way when the pool was disposed, and that nobody waits for, is not kept."""
    async with pooled(proxy.url(database.url()), pool_timeout=10, connect_timeout_seconds=10) as p:
        proxy.hang()
        task = taking(p)

        async def logging_in() -> bool:
            return proxy.open == 1

        assert await eventually(logging_in, 5)
        task.cancel()
        p.pool.dispose()
        proxy.resume()

        async def closed() -> bool:
            return p.replaced("disposed") == 1

        assert await eventually(closed, 5)
        assert (p.pool.figures().checked_in, p.pool.figures().connecting) == (0, 0)


async def test_failure_of_a_connect_is_not_told_to_the_cancelled(database: Database, proxy: Proxy) -> None:
    """When failure and cancel cross, the cancel stands."""
    async with pooled(proxy.url(database.url()), pool_timeout=10, connect_timeout_seconds=10) as p:
        proxy.hang()
        task = taking(p)

        async def logging_in() -> bool:
            return proxy.open == 1

        assert await eventually(logging_in, 5)
        task.cancel()
        p.pool._refuse_waiting(ConnectionResetError(), next(iter(p.pool._openings)))

        with pytest.raises(asyncio.CancelledError):
            await task
        proxy.resume()


async def test_closed_pool_keeps_no_login(database: Database, proxy: Proxy) -> None:
    """What is being opened when the pool closes is given up, and leaves no session."""
    async with pooled(proxy.url(database.url()), pool_timeout=10, connect_timeout_seconds=10) as p:
        proxy.hang()
        task = taking(p)

        async def logging_in() -> bool:
            return proxy.open == 1

        assert await eventually(logging_in, 5)
        p.pool.close()
        with pytest.raises(PoolExhausted, match="shutting down"):
            await task
        assert await p.pool.drained(5)
        assert p.pool.figures().connecting == 0
        proxy.resume()
    assert await sessions_end(database)


# Upkeep.


async def test_tend_closes_what_idles_beyond_the_size(database: Database, clock: Clock) -> None:
    """Overflow connections are kept through a burst and closed five seconds after it."""
    async with pooled(database.url(), clock=clock, pool_size=1, max_overflow=2) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 3)
        clock.now += 4
        p.pool.tend()
        kept = p.pool.figures()
        clock.now += 1
        p.pool.tend()

        assert (kept.checked_in, kept.overflow) == (3, 2)
        assert (p.pool.figures().checked_in, p.replaced("surplus")) == (1, 2)


async def test_tend_closes_what_idles_for_long(database: Database, clock: Clock) -> None:
    """After the idle lifetime as many stay as are kept warm."""
    async with pooled(database.url(), clock=clock, pool_size=4, pool_min_size=1, pool_idle_seconds=300) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 4)
        clock.now += 299
        p.pool.tend()
        kept = p.pool.figures().checked_in
        clock.now += 1
        p.pool.tend()

        assert (kept, p.pool.figures().checked_in, p.replaced("idle")) == (4, 1, 3)


async def test_tend_closes_what_is_old_even_if_kept_warm(database: Database, clock: Clock) -> None:
    """Age ends a connection in the background, and not in somebody's request."""
    async with pooled(database.url(), clock=clock, pool_min_size=1, pool_recycle=100) as p:
        before = await p.backend()
        clock.now += 101

        p.pool.tend()
        await p.pool.warm_up()
        p.pool.tend()

        assert (p.pool.figures().checked_in, p.replaced("age")) == (1, 1)
        assert await p.backend() != before


async def test_old_connection_that_nobody_needs_wakes_nobody(database: Database, proxy: Proxy, clock: Clock) -> None:
    """Beyond what is kept warm, one that nobody has used since it came of age needs no login: it ends for idling."""
    async with pooled(
        proxy.url(database.url()),
        clock=clock,
        pool_min_size=0,
        pool_recycle=100,
        pool_idle_seconds=300,
        pool_check_after_seconds=1000,
    ) as p:
        await p.backend()
        clock.now += 101
        await p.pool.warm_up()
        unused = proxy.connections
        await p.backend()
        await p.pool.warm_up()
        p.pool.tend()

        assert (unused, proxy.connections, p.replaced("age")) == (1, 2, 1)


async def test_warm_up_opens_as_many_as_are_kept(database: Database, proxy: Proxy) -> None:
    """The first requests find connections that are open."""
    async with pooled(proxy.url(database.url()), pool_size=3, pool_min_size=2) as p:
        await p.pool.warm_up()
        await p.pool.warm_up()
        await p.backend()

        assert (p.pool.figures().checked_in, proxy.connections) == (2, 2)


async def test_warm_up_fails_and_loses_nothing(database: Database, proxy: Proxy) -> None:
    """A database that refuses is said; the permit comes back, and so does the database."""
    proxy.refuse()
    async with pooled(proxy.url(database.url()), pool_size=1, pool_min_size=1) as p:
        with pytest.raises(DatabaseUnreachable):
            await p.pool.warm_up()
        assert p.pool.figures().available == p.pool.figures().total

        await proxy.accept()
        await p.pool.warm_up()

        assert p.pool.figures().checked_in == 1


async def test_closed_pool_is_not_warmed(database: Database) -> None:
    """Shutdown and upkeep may cross."""
    async with pooled(database.url(), pool_min_size=2) as p:
        p.pool.close()
        await p.pool.warm_up()

        assert p.pool.figures().checked_in == 0


# Leaks.


async def test_dropped_connection_gives_its_permit_back(database: Database) -> None:
    """What nobody closed is collected: it is said, its permit serves the next one, and the server's session ends."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_timeout=10) as p:
        held = [await p.database.engine.connect()]
        before = (await held[0].execute(text("SELECT pg_backend_pid()"))).scalar_one()
        waiter = taking(p)
        await p.waiting(1)

        with pytest.warns(exc.SAWarning, match="garbage collector is trying to clean up non-checked-in connection"):
            drop(held)

        assert await waiter != before
    assert await sessions_end(database)


async def test_long_held_connection_is_reported_once(database: Database, clock: Clock) -> None:
    """The report names who holds it, for how long, and how much of that without a query."""
    async with pooled(database.url(), clock=clock) as p, AsyncExitStack() as stack:
        await hold(p, stack, 1)
        assert p.pool.newly_long_held(60) == []
        clock.now += 61

        (holding,) = p.pool.newly_long_held(60)

        assert (holding.holder, holding.held_seconds, holding.idle_seconds) == ("background", 61, 61)
        assert holding.taken_in is None
        assert p.pool.newly_long_held(60) == []
        assert p.pool.holdings() == [holding]


async def test_development_names_the_line_that_took_a_connection(database: Database) -> None:
    """The line is the caller's, not SQLAlchemy's and not the pool's."""
    async with pooled(database.url(), service={"environment": "development"}) as p:
        async with p.database.engine.connect():
            taken_in = p.pool.holdings()[0].taken_in

        assert taken_in is not None
        assert taken_in.startswith("tests.pglifeguard.test_pool:")
        assert taken_in.endswith("in test_development_names_the_line_that_took_a_connection")


async def test_development_names_the_line_of_a_direct_read(database: Database) -> None:
    """The short way to a connection leaves its line as well."""
    lines: list[str | None] = []

    class Watching(Mapping[str, int]):
        """Parameters that look at who holds a connection while they are read."""

        def __getitem__(self, name: str) -> int:
            lines.append(p.pool.holdings()[0].taken_in)
            return 1

        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Iterator[str]:
            return iter(["number"])

    async with pooled(database.url(), role="replica", service={"environment": "development"}) as p:
        for _ in range(2):
            await fetch_once(p.database, Query(select(bindparam("number", type_=Integer))), Watching())

    assert len(lines) == 2
    assert all(str(line).endswith("in test_development_names_the_line_of_a_direct_read") for line in lines), lines


# The end.


async def test_dispose_keeps_the_figures_right(database: Database, proxy: Proxy) -> None:
    """Idle connections close at once, one at work when it comes back, and at no instant is a figure wrong."""
    async with pooled(proxy.url(database.url()), pool_size=2, max_overflow=0) as p:
        async with AsyncExitStack() as stack:
            await hold(p, stack, 1)
            before = await p.backend()
            await p.database.engine.dispose()
            during = p.pool.figures()
        after = p.pool.figures()

        assert (during.checked_out, during.checked_in, during.available) == (1, 0, 1)
        assert (after.checked_out, after.checked_in, after.available) == (0, 0, 2)
        assert p.replaced("disposed") == 2
        assert await p.backend() != before
        assert p.database.adapter.bounded is p.pool
        assert p.database.engine.pool is p.database.adapter


async def test_dispose_holds_for_a_connection_being_opened(database: Database, proxy: Proxy) -> None:
    """A connection on its way when the pool was disposed may lead to the wrong server: it serves one request only."""
    async with pooled(proxy.url(database.url()), pool_timeout=10, connect_timeout_seconds=10) as p:
        proxy.hang()
        task = taking(p)

        async def connecting() -> bool:
            return proxy.open == 1

        assert await eventually(connecting, 5)
        p.pool.dispose()
        proxy.resume()
        first = await task

        assert p.pool.figures().checked_in == 0
        assert await p.backend() != first


async def test_abandon_cuts_those_at_work(database: Database, execute: Execute) -> None:
    """When the server behind them is gone, nobody waits for an answer from it."""
    async with pooled(database.url()) as p:
        async with AsyncExitStack() as stack:
            one, other = await hold(p, stack, 2)
            await other.invalidate()
            query = asyncio.create_task(one.execute(text("SELECT pg_sleep(60)")))

            async def asked() -> bool:
                return bool(await execute("SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"))

            assert await eventually(asked, 5)
            p.pool.abandon()
            with pytest.raises(exc.DBAPIError):
                await query

        assert p.pool.figures().checked_in == 0


async def test_abandon_keeps_what_leads_to_the_right_server(database: Database) -> None:
    """Connections to the server that took over stay; the others go."""
    async with pooled(database.url()) as p:
        before = await p.backend()
        (entry,) = p.pool._idle
        server = cast("KeptAliveConnection", entry.driver_connection).server
        assert server is not None

        p.pool.abandon(keep=server)
        assert await p.backend() == before

        p.pool.abandon(keep=server + 1)
        assert await p.backend() != before


async def test_demoted_server_is_logged_in_to_now_and_then(database: Database, clock: Clock) -> None:
    """As long as an address leads to a server that takes no writes, a write does not cost a login."""
    url = database.replica_url("app_rw")
    async with Proxy(database.cluster.replica.port) as demoted, pooled(demoted.url(url), clock=clock) as p:
        write = text("DELETE FROM patients")
        for round_ in range(1, 4):
            for _ in range(5):
                async with p.database.engine.connect() as connection:
                    with pytest.raises(exc.DBAPIError, match="read-only transaction"):
                        await connection.execute(write)
            # The first write of a round gives its connection up, the second one opens another.
            assert demoted.connections == round_ + 1
            clock.now += 1


async def test_what_a_mute_server_does_not_answer_is_cut(
    database: Database, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When neither looks nor statements are answered, who waits is told long before a command times out."""
    monkeypatch.setattr(database_module, "MUTE_SECONDS", 0.2)
    async with pooled(proxy.url(database.url())) as p:
        await p.database.monitor.probe()
        query = asyncio.create_task(fetch_once(p.database, Query(select(func.pg_sleep(60).cast(Text))), {}))

        async def asked() -> bool:
            return any(checkout.asked_at is not None for checkout in p.pool._out.values())

        assert await eventually(asked, 5)
        await p.database.monitor.probe()
        assert not query.done()
        proxy.hang()

        async def cut() -> bool:
            await p.database.monitor.probe(timeout_seconds=0.05)
            return query.done()

        assert await eventually(cut, 10)
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            await query
        proxy.resume()


async def test_server_that_answers_somebody_is_not_mute(database: Database, clock: Clock) -> None:
    """A statement that takes long is not cut while another connection comes back in good order."""
    async with pooled(database.url(), clock=clock) as p:
        query = asyncio.create_task(fetch_once(p.database, Query(select(func.pg_sleep(60).cast(Text))), {}))

        async def asked() -> bool:
            return any(checkout.asked_at is not None for checkout in p.pool._out.values())

        assert await eventually(asked, 5)
        await p.backend()

        assert p.pool.cut_unanswered(1e-6) == 0
        clock.now += 1
        assert p.pool.cut_unanswered(1e-6) == 1
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            await query


async def test_closed_pool_admits_nobody(database: Database) -> None:
    """Who waits and who comes are refused; who is at work goes on."""
    async with pooled(database.url(), pool_size=1, max_overflow=0, pool_timeout=10) as p:
        async with AsyncExitStack() as stack:
            (held,) = await hold(p, stack, 1)
            second = taking(p)
            await p.waiting(1)
            p.pool.close()

            for refused in (second, taking(p)):
                with pytest.raises(PoolExhausted, match="shutting down"):
                    await refused
            assert await p.pool.drained(0.01) is False
            draining = asyncio.create_task(p.pool.drained(5))
            assert (await held.execute(text("SELECT 1"))).scalar_one() == 1

        assert await draining is True
        assert p.rejected("closing") == 2


async def test_status_is_one_line_of_figures(database: Database) -> None:
    """What SQLAlchemy shows of a pool is what operators read."""
    async with pooled(database.url()) as p:
        assert p.database.engine.pool.status() == str(p.pool.figures())
        assert "checked_out=0" in p.database.engine.pool.status()
        assert p.pool.load == 0
