"""The connection beside the pool tells how a database is, whatever the pool and the network are doing."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from app.db.connector import Connector
from app.db.sentinel import Look, Sentinel
from app.errors import DatabaseUnreachable
from app.metrics import Metrics
from app.settings import DatabaseSettings
from local.waiting import eventually
from tests.conftest import Database
from tests.db.conftest import service_settings, sessions_end
from tests.proxy import Proxy
from tests.stopwatch import Stopwatch


@asynccontextmanager
async def watching(url: str, *, writable: bool = False, **service: Any) -> AsyncIterator[Sentinel]:
    """Give a sentinel of the database at `url`."""
    settings = service_settings(url, **service)
    connector = Connector(DatabaseSettings(url=url), writable=writable)
    sentinel = Sentinel("primary", connector, settings, Metrics())
    yield sentinel
    await sentinel.close()


async def test_look_at_a_primary(database: Database) -> None:
    """A primary says how far it has written."""
    async with watching(database.url()) as sentinel:
        assert (sentinel.last.status, sentinel.healthy) == ("unknown", False)

        look = await sentinel.look()

        position = look.position
        assert (look.status, position.in_recovery, position.replay_age, look.error) == ("healthy", False, None, None)
        assert position == sentinel.position
        assert position.lsn
        assert (position.timeline, position.stalled) == (1, 0.0)
        assert look.latency_seconds is not None
        assert sentinel.healthy


async def test_look_at_a_replica(database: Database) -> None:
    """A standby says how far it has replayed, and how old the last transaction is."""
    async with watching(database.replica_url()) as sentinel:
        look = await sentinel.look()

        assert (look.status, look.position.in_recovery, look.position.timeline) == ("healthy", True, 1)
        assert look.position.lsn
        assert look.position.replay_age is not None


async def test_primary_that_takes_no_writes_is_an_error(database: Database) -> None:
    """A demoted primary answers, and is not healthy; the next look asks the address again."""
    async with watching(database.replica_url("app_rw"), writable=True) as sentinel:
        look = await sentinel.look()

        assert (look.status, look.error, sentinel.healthy) == ("error", "The server takes no writes.", False)
        assert sentinel._connection is None


async def test_refusing_database_is_an_error(database: Database, proxy: Proxy) -> None:
    """A database that refuses is not healthy from the first look on, and its last position is kept."""
    async with watching(proxy.url(database.url())) as sentinel:
        position = (await sentinel.look()).position
        proxy.refuse()
        proxy.cut()

        async def refused() -> bool:
            return (await sentinel.look()).status == "error"

        assert await eventually(refused, 5)
        assert sentinel.healthy is False
        assert "cannot be reached" in str(sentinel.last.error)
        assert sentinel.position == position


async def test_hanging_database_is_a_timeout(database: Database, proxy: Proxy, stopwatch: Stopwatch) -> None:
    """An answer that does not come ends the look in time; one late answer is forgiven, a second is not."""
    async with watching(proxy.url(database.url()), health_timeout_seconds=0.1) as sentinel:
        await sentinel.look()
        proxy.hang()

        started = stopwatch.seconds
        first, forgiven = await sentinel.look(), sentinel.healthy
        assert stopwatch.seconds - started < 1
        await sentinel.look()

        assert (first.status, forgiven, sentinel.healthy) == ("timeout", True, False)
        proxy.resume()
        assert (await sentinel.look()).status == "healthy"
        assert sentinel.healthy


async def test_hanging_connect_is_a_timeout(database: Database, proxy: Proxy) -> None:
    """A look that finds no connection is as bounded as one that has one."""
    proxy.hang()
    async with watching(proxy.url(database.url()), health_timeout_seconds=0.1) as sentinel:
        assert (await sentinel.look()).status == "timeout"


async def test_lost_connection_is_replaced(database: Database, proxy: Proxy) -> None:
    """A connection that was cut costs at most one look."""
    async with watching(proxy.url(database.url())) as sentinel:
        await sentinel.look()
        proxy.cut()

        async def healthy_again() -> bool:
            return (await sentinel.look()).status == "healthy" and proxy.connections == 2

        assert await eventually(healthy_again, 5)


async def test_those_who_ask_together_share_a_look(database: Database, proxy: Proxy) -> None:
    """However many ask for the health of a database, it is asked once; who goes away takes it from nobody."""
    async with watching(proxy.url(database.url())) as sentinel:
        await sentinel.look()
        proxy.freeze()
        looks = [asyncio.create_task(sentinel.look()) for _ in range(20)]
        await asyncio.sleep(0)
        looks[0].cancel()
        proxy.round_trips = 0
        proxy.resume()

        found = await asyncio.gather(*looks[1:])

        assert {look.status for look in found} == {"healthy"}
        assert proxy.round_trips == 1


async def test_question_fails_in_time(database: Database, proxy: Proxy) -> None:
    """An operator's question is bounded, and the connection that did not answer is not used again."""
    async with watching(proxy.url(database.url())) as sentinel:
        with pytest.raises(DatabaseUnreachable, match="no answer in time"):
            await sentinel.ask("SELECT pg_sleep(60)", timeout_seconds=0.1)

        rows = await sentinel.ask("SELECT $1::int AS number", 7, timeout_seconds=5)

        assert (rows[0]["number"], proxy.connections) == (7, 2)


async def test_question_that_is_wrong_says_so(database: Database) -> None:
    """What the server objects to is in the message."""
    async with watching(database.url()) as sentinel:
        with pytest.raises(DatabaseUnreachable, match="does not exist"):
            await sentinel.ask("SELECT * FROM nothing", timeout_seconds=5)


async def test_watch_looks_again_and_again(database: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """Listeners hear of each look, the log of each change."""
    heard: list[Look] = []
    with caplog.at_level(logging.INFO, "app.db.sentinel"):
        async with watching(proxy.url(database.url()), monitor_interval_seconds=0.01) as sentinel:
            sentinel.listeners.append(heard.append)
            task = asyncio.create_task(sentinel.watch())

            async def heard_of(status: str, at_least: int) -> bool:
                return sum(look.status == status for look in heard) >= at_least

            assert await eventually(lambda: heard_of("healthy", 3), 5)
            proxy.refuse()
            proxy.cut()
            assert await eventually(lambda: heard_of("error", 2), 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    messages = [record.message for record in caplog.records if record.name == "app.db.sentinel"]
    assert messages == ["database is healthy", "database is error"]


async def test_close_during_a_look_leaves_no_session(database: Database, proxy: Proxy) -> None:
    """A look that is still connecting when the service ends does not leave a session behind."""
    async with watching(proxy.url(database.url())) as sentinel:
        proxy.hang()
        look = asyncio.create_task(sentinel.look())

        async def connecting() -> bool:
            return proxy.open == 1

        assert await eventually(connecting, 5)
        await sentinel.close()
        proxy.resume()
        with pytest.raises(asyncio.CancelledError):
            await look
    assert await sessions_end(database)
