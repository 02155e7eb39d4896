"""Notifications reach whoever listens, on one connection of the process; what was missed is said."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from sqlalchemy import text

from pglifeguard import listening
from pglifeguard.databases import Databases
from pglifeguard.embedded.waiting import eventually
from pglifeguard.environment import SettingsError
from pglifeguard.errors import ConnectionLost, DatabaseUnreachable
from pglifeguard.listening import CLOSING, MAX_UNREAD, NO_URL, POOLED, Notifications
from pglifeguard.monitor import Probe
from pglifeguard.testing.proxy import Proxy
from tests.chaos import pooler
from tests.conftest import Database, Execute
from tests.pglifeguard.conftest import service_settings

LISTENING = """
    SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query ~ '^(UN)?LISTEN'
"""


@pytest.fixture
async def databases(database: Database, proxy: Proxy) -> AsyncIterator[Databases]:
    """Give databases that listen through a network which can be cut."""
    url = database.url()
    primary = {"url": url, "pool_timeout": 5}
    settings = service_settings(url, listen_url=proxy.url(url), primary=primary, monitor_interval_seconds=60)
    async with Databases(settings) as opened:
        # It looks once, so that a test may say in its place which server is the primary.
        await opened.primary.monitor.probe()
        yield opened


async def connections_end(execute: Execute) -> bool:
    """Tell whether the connection that listens ends in time."""

    async def none() -> bool:
        return bool(await execute(LISTENING) == 0)

    return await eventually(none, 5)


async def hear(news: AsyncIterator[str | None], count: int) -> list[str | None]:
    """Wait for as many notifications."""
    return [await anext(news) for _ in range(count)]


async def test_payloads_come_in_the_order_of_their_commits(databases: Databases, execute: Execute) -> None:
    """First of all the listener is told to look, and what a transaction takes back is not heard."""
    async with databases.listen("news") as news:
        await execute("NOTIFY news, 'one'")
        async with databases.writing() as session:
            await session.execute(text("SELECT pg_notify('news', 'never')"))
            await session.rollback()
        async with databases.writing() as session:
            await session.execute(text("SELECT pg_notify('news', 'two')"))
        await execute("NOTIFY news")

        assert await hear(news, 4) == [None, "one", "two", ""]


async def test_listeners_share_one_connection(databases: Databases, execute: Execute, proxy: Proxy) -> None:
    """Each hears its own channel, whatever its name; a channel without listeners is left, and at last the server."""
    async with databases.listen("a") as first, databases.listen("a") as second:
        async with databases.listen('Other "channel" ä') as third:
            await execute("SELECT pg_notify('Other \"channel\" ä', 'three')")
            await execute("NOTIFY a, 'both'")
            heard = [await hear(news, 2) for news in (first, second, third)]

        async def left() -> bool:
            return any(said.startswith("UNLISTEN") for said in proxy.statements)

        assert await eventually(left, 5)
        assert (proxy.connections, await execute(LISTENING)) == (1, 1)

    assert heard == [[None, "both"], [None, "both"], [None, "three"]]
    assert await connections_end(execute)


async def test_listener_takes_nothing_of_the_pool(databases: Databases) -> None:
    """However long it waits."""
    async with databases.listen("news") as news:
        await anext(news)

        assert databases.primary.pool.figures().checked_out == 0


async def test_listener_that_comes_when_all_have_left_is_served(databases: Databases, execute: Execute) -> None:
    """The connection is opened again."""
    for payload in ("one", "two"):
        async with databases.listen("news") as news:
            await execute(f"NOTIFY news, '{payload}'")
            assert await hear(news, 2) == [None, payload]
        assert await connections_end(execute)


async def test_lost_connection_comes_back(
    databases: Databases, execute: Execute, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Who listens is told that something may have been missed, and hears what comes then."""
    caplog.set_level("INFO")
    async with databases.listen("news") as news:
        await anext(news)
        proxy.refuse()
        proxy.cut()
        waiting = asyncio.ensure_future(anext(news))

        async def said() -> bool:
            return "not listening" in caplog.text

        assert await eventually(said, 5)
        await execute("NOTIFY news, 'missed'")
        await proxy.accept()

        assert await waiting is None
        await execute("NOTIFY news, 'heard'")
        assert await anext(news) == "heard"

    assert caplog.messages.count("listening again") == 1


async def test_connection_that_stays_away_is_told(
    databases: Databases, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the bound, those who listen are told; who comes meanwhile is told at once."""
    monkeypatch.setattr(listening, "RECONNECT_SECONDS", 0.2)
    async with databases.listen("news") as news:
        await anext(news)
        proxy.refuse()
        proxy.cut()
        for _ in range(2):  # It stays as it ended.
            with pytest.raises(ConnectionLost):
                await anext(news)

    with pytest.raises(DatabaseUnreachable):
        async with databases.listen("news"):
            raise AssertionError


async def test_database_that_is_down_is_told_at_once(databases: Databases, proxy: Proxy) -> None:
    """Who comes while there is no connection is a 503, and the next one is served when it is back."""
    proxy.refuse()

    with pytest.raises(DatabaseUnreachable):
        async with databases.listen("news"):
            raise AssertionError

    await proxy.accept()
    async with databases.listen("news") as news:
        assert await anext(news) is None


async def test_standby_is_told(database: Database) -> None:
    """A server that takes no LISTEN answers as one that cannot be reached, in its own words."""
    settings = service_settings(database.url(), listen_url=database.replica_url())
    async with Databases(settings) as databases:
        with pytest.raises(DatabaseUnreachable, match="LISTEN during recovery"):
            async with databases.listen("news"):
                raise AssertionError


async def test_server_that_another_one_replaced_is_left(databases: Databases, proxy: Proxy) -> None:
    """Its connection may stay open, and nobody notifies there any more."""
    listener = databases.listener
    listener.follow(Probe(at=0.0, status="timeout"))
    listener.follow(Probe(at=0.0, status="healthy", server=-1.0))  # Nobody listens yet.
    async with databases.listen("news") as news:
        await anext(news)
        listener.follow(Probe(at=0.0, status="healthy", server=-2.0))

        assert await anext(news) is None
    assert proxy.connections == 2


async def test_listener_that_does_not_read_fills_no_memory(databases: Databases, execute: Execute) -> None:
    """Above the bound it is told that it missed something, and goes on from there."""
    async with databases.listen("news") as news:
        await anext(news)
        await execute(
            "SELECT count(pg_notify('news', number::text)) FROM generate_series(1, $1::int) AS number", MAX_UNREAD + 2
        )

        async def heard_all() -> bool:
            return bool(cast("Notifications", news)._unread.qsize() == 2)

        assert await eventually(heard_all, 5)
        assert await hear(news, 2) == [None, str(MAX_UNREAD + 2)]


async def test_listener_may_be_cancelled(databases: Databases, execute: Execute, proxy: Proxy) -> None:
    """While it waits for the connection, and while it waits for news; nothing is left behind."""

    async def listen() -> None:
        async with databases.listen("news") as news:
            async for _ in news:
                pass

    proxy.hang()
    coming = asyncio.create_task(listen())

    async def connecting() -> bool:
        return proxy.open > 0

    assert await eventually(connecting, 5)
    coming.cancel()
    proxy.resume()
    listening_task = asyncio.create_task(listen())

    async def listens() -> bool:
        return bool(await execute(LISTENING) == 1)

    assert await eventually(listens, 5)
    listening_task.cancel()

    await asyncio.gather(coming, listening_task, return_exceptions=True)
    assert await connections_end(execute)


async def test_closing_ends_those_who_listen(database: Database, proxy: Proxy) -> None:
    """A stream of news does not hold up the shutdown; who still comes is a 503, as at the pools."""
    url = database.url()
    databases = Databases(service_settings(url, listen_url=proxy.url(url)))
    await databases.open()
    async with databases.listen("news") as news:
        await anext(news)
        proxy.hang()
        waiting = asyncio.create_task(databases.listen("other").__aenter__())
        await databases.close()

        assert [payload async for payload in news] == []
    with pytest.raises(DatabaseUnreachable, match=CLOSING):
        await waiting
    with pytest.raises(DatabaseUnreachable, match=CLOSING):
        async with databases.listen("news"):
            raise AssertionError


async def test_listener_that_comes_while_another_is_served_has_its_turn(
    databases: Databases, execute: Execute, proxy: Proxy
) -> None:
    """Nobody is told that the server listens before it does."""

    async def listen(channel: str) -> list[str | None]:
        async with databases.listen(channel) as news:
            await execute(f"NOTIFY {channel}, 'heard'")
            return await hear(news, 2)

    async with databases.listen("first") as first:
        await anext(first)
        proxy.freeze()
        second = asyncio.create_task(listen("second"))

        async def asked() -> bool:
            return 'LISTEN "second"' in proxy.statements

        assert await eventually(asked, 5)
        third = asyncio.create_task(listen("third"))

        async def came() -> bool:
            return len(databases.listener._listening) == 3

        assert await eventually(came, 5)
        proxy.resume()

        assert list(await asyncio.gather(second, third)) == [[None, "heard"]] * 2
        await execute("NOTIFY first, 'undisturbed'")
        assert await anext(first) == "undisturbed"


# What is refused.


async def test_listening_has_to_be_set_up(database: Database) -> None:
    """Without LISTEN_URL nothing is counted for it, and so nothing is opened."""
    async with Databases(service_settings(database.url())) as databases:
        with pytest.raises(RuntimeError, match="set LISTEN_URL") as refused:
            databases.listen("news")

    assert str(refused.value) == NO_URL


@pytest.mark.parametrize("channel", ["", "ä" * 32, "a\0b"])
async def test_channel_that_postgresql_would_not_hear_is_refused(databases: Databases, channel: str) -> None:
    """LISTEN would cut the name off without an error, and never hear a thing."""
    with pytest.raises(ValueError, match="1 to 63 bytes"):
        databases.listen(channel)


async def test_longest_channel_is_heard(databases: Databases, execute: Execute) -> None:
    """63 bytes are a name."""
    async with databases.listen("a" * 63) as news:
        await execute(f"NOTIFY {'a' * 63}, 'x'")
        assert await hear(news, 2) == [None, "x"]


@pytest.mark.skipif(pooler.program() is None, reason="PgBouncer is not installed: apt-get install pgbouncer")
async def test_pooler_is_refused(database: Database, open_directory: Path) -> None:
    """Behind it LISTEN would be somebody else's."""
    async with pooler.pooling(database.cluster, open_directory, size=1) as port:
        url = database.url().replace(f":{database.cluster.primary.port}/", f":{port}/")
        settings = service_settings(
            database.url(),
            listen_url=url,
            primary={"url": database.url(), "statement_cache_size": pooler.statement_cache_size(), "pool_timeout": 5},
        )
        async with Databases(settings) as databases:
            with pytest.raises(RuntimeError, match="past the pooler") as refused:
                async with databases.listen("news"):
                    raise AssertionError

    assert str(refused.value) == POOLED


def test_url_is_checked_as_every_other_one() -> None:
    """A mistake in LISTEN_URL ends the start, by its name."""
    with pytest.raises(SettingsError, match="LISTEN_URL"):
        service_settings("postgresql://a@b/c", listen_url="mysql://a@b/c")
