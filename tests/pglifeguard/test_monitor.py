"""The connection beside the pool tells how a database is, whatever the pool and the network are doing."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median
from typing import Any

import pytest

from pglifeguard.connector import Connector
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import DatabaseUnreachable
from pglifeguard.metrics import Metrics
from pglifeguard.monitor import Monitor, Probe, seconds_to_beat
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database
from tests.pglifeguard.conftest import service_settings, sessions_end
from tests.stopwatch import Stopwatch


@asynccontextmanager
async def watching(url: str, *, writable: bool = False, **service: Any) -> AsyncIterator[Monitor]:
    """Give a monitor of the database at `url`."""
    settings = service_settings(url, **service)
    connector = Connector(DatabaseSettings(url=url), writable=writable)
    monitor = Monitor("primary", connector, settings, Metrics())
    yield monitor
    await monitor.close()


async def test_look_at_a_primary(database: Database) -> None:
    """A primary says how far it has written."""
    async with watching(database.url()) as monitor:
        assert (monitor.last.status, monitor.healthy) == ("unknown", False)

        look = await monitor.probe()

        position = look.position
        assert (look.status, position.in_recovery, position.replay_age, look.error) == ("healthy", False, None, None)
        assert position == monitor.position
        assert position.lsn
        assert (position.timeline, position.stalled) == (1, 0.0)
        assert look.latency_seconds is not None
        assert monitor.healthy


async def test_look_at_a_replica(database: Database) -> None:
    """A standby says how far it has replayed, and how old the last transaction is."""
    async with watching(database.replica_url()) as monitor:
        look = await monitor.probe()

        assert (look.status, look.position.in_recovery, look.position.timeline) == ("healthy", True, 1)
        assert look.position.lsn
        assert look.position.replay_age is not None


async def test_primary_that_takes_no_writes_is_an_error(database: Database) -> None:
    """A demoted primary answers, and is not healthy; the next look asks the address again."""
    async with watching(database.replica_url("app_rw"), writable=True) as monitor:
        look = await monitor.probe()

        assert (look.status, look.error, monitor.healthy) == ("error", "The server takes no writes.", False)
        assert monitor._connection is None


async def test_refusing_database_is_an_error(database: Database, proxy: Proxy) -> None:
    """A database that refuses is not healthy from the first look on, and its last position is kept."""
    async with watching(proxy.url(database.url())) as monitor:
        position = (await monitor.probe()).position
        proxy.refuse()
        proxy.cut()

        async def refused() -> bool:
            return (await monitor.probe()).status == "error"

        assert await eventually(refused, 5)
        assert monitor.healthy is False
        assert "cannot be reached" in str(monitor.last.error)
        assert monitor.position == position


async def test_hanging_database_is_a_timeout(database: Database, proxy: Proxy, stopwatch: Stopwatch) -> None:
    """An answer that does not come ends the look in time; one late answer is forgiven, a second is not."""
    async with watching(proxy.url(database.url()), health_timeout_seconds=0.1) as monitor:
        await monitor.probe()
        proxy.hang()

        started = stopwatch.seconds
        first, forgiven = await monitor.probe(), monitor.healthy
        assert stopwatch.seconds - started < 1
        await monitor.probe()

        assert (first.status, forgiven, monitor.healthy) == ("timeout", True, False)
        proxy.resume()
        assert (await monitor.probe()).status == "healthy"
        assert monitor.healthy


async def test_hanging_connect_is_a_timeout(database: Database, proxy: Proxy) -> None:
    """A look that finds no connection is as bounded as one that has one."""
    proxy.hang()
    async with watching(proxy.url(database.url()), health_timeout_seconds=0.1) as monitor:
        assert (await monitor.probe()).status == "timeout"


async def test_lost_connection_is_replaced(database: Database, proxy: Proxy) -> None:
    """A connection that was cut costs at most one look."""
    async with watching(proxy.url(database.url())) as monitor:
        await monitor.probe()
        proxy.cut()

        async def healthy_again() -> bool:
            return (await monitor.probe()).status == "healthy" and proxy.connections == 2

        assert await eventually(healthy_again, 5)


async def test_those_who_ask_together_share_a_look(database: Database, proxy: Proxy) -> None:
    """However many ask for the health of a database, it is asked once; who goes away takes it from nobody."""
    async with watching(proxy.url(database.url())) as monitor:
        await monitor.probe()
        proxy.freeze()
        looks = [asyncio.create_task(monitor.probe()) for _ in range(20)]
        await asyncio.sleep(0)
        looks[0].cancel()
        proxy.round_trips = 0
        proxy.resume()

        found = await asyncio.gather(*looks[1:])

        assert {look.status for look in found} == {"healthy"}
        assert proxy.round_trips == 1


async def test_question_fails_in_time(database: Database, proxy: Proxy) -> None:
    """An operator's question is bounded, and the connection that did not answer is not used again."""
    async with watching(proxy.url(database.url())) as monitor:
        with pytest.raises(DatabaseUnreachable, match="no answer in time"):
            await monitor.ask("SELECT pg_sleep(60)", timeout_seconds=0.1)

        rows = await monitor.ask("SELECT $1::int AS number", 7, timeout_seconds=5)

        assert (rows[0]["number"], proxy.connections) == (7, 2)


async def test_question_that_is_wrong_says_so(database: Database) -> None:
    """What the server objects to is in the message."""
    async with watching(database.url()) as monitor:
        with pytest.raises(DatabaseUnreachable, match="does not exist"):
            await monitor.ask("SELECT * FROM nothing", timeout_seconds=5)


@pytest.mark.parametrize(
    ("passed", "left"),
    [(0.0, 0.5), (0.1, 0.4), (0.44, 0.06), (0.499, 0.501), (0.5, 0.5), (1.2, 0.3), (60.25, 0.25)],
)
def test_beats_are_multiples_of_the_interval(passed: float, left: float) -> None:
    """Also after a probe that took long; a loop that wakes a little early has had its beat."""
    assert seconds_to_beat(passed, 0.5) == pytest.approx(left)


async def test_monitors_keep_step_whatever_an_answer_takes(database: Database, proxy: Proxy) -> None:
    """A server that answers late does not move the probes, and monitors that began together wake together."""
    seconds = 0.1
    heard: list[Probe] = []
    async with watching(proxy.url(database.url()), monitor_interval_seconds=seconds) as monitor:
        await monitor.probe()
        proxy.delay_seconds = 0.035
        monitor.listeners.append(heard.append)
        begun = time.monotonic()
        task = asyncio.create_task(monitor.probe_forever())
        assert await eventually(lambda: asyncio.sleep(0, len(heard) >= 12), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    late = [(probe.at - (probe.latency_seconds or 0.0) - begun) % seconds for probe in heard]
    assert median(late) < seconds / 5


async def test_watch_looks_again_and_again(database: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """Listeners hear of each look, the log of each change."""
    heard: list[Probe] = []
    with caplog.at_level(logging.INFO, "pglifeguard.monitor"):
        async with watching(proxy.url(database.url()), monitor_interval_seconds=0.01) as monitor:
            monitor.listeners.append(heard.append)
            task = asyncio.create_task(monitor.probe_forever())

            async def heard_of(status: str, at_least: int) -> bool:
                return sum(look.status == status for look in heard) >= at_least

            assert await eventually(lambda: heard_of("healthy", 3), 5)
            proxy.refuse()
            proxy.cut()
            assert await eventually(lambda: heard_of("error", 2), 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    messages = [record.message for record in caplog.records if record.name == "pglifeguard.monitor"]
    server = f"database primary at 127.0.0.1:{proxy.port}"
    assert [message.partition(": ")[0] for message in messages] == [f"{server} is healthy", f"{server} is error"]
    assert vars(caplog.records[-1])["reason"] in messages[-1]


async def test_close_during_a_look_leaves_no_session(database: Database, proxy: Proxy) -> None:
    """A look that is still connecting when the service ends does not leave a session behind."""
    async with watching(proxy.url(database.url())) as monitor:
        proxy.hang()
        look = asyncio.create_task(monitor.probe())

        async def connecting() -> bool:
            return proxy.open == 1

        assert await eventually(connecting, 5)
        await monitor.close()
        proxy.resume()
        with pytest.raises(asyncio.CancelledError):
            await look
    assert await sessions_end(database)
