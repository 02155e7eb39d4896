"""A database that sleeps is woken by one login, while a hundred requests wait; left alone, it sees nobody."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import asyncpg
import pytest

from pglifeguard.embedded.postgres import HOST
from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing.proxy import Proxy
from tests.chaos import FULL
from tests.chaos.load import ask, tell
from tests.conftest import Database
from tests.service import Service, serving

CROWD = 100
# How long the server takes to wake up, in the full form; in the short form it wakes when all requests wait.
WAKING_SECONDS = 3.0
IDLE_SECONDS = 2.0 if FULL else 0.1
# How long the server is watched while nobody asks.
WATCHED_SECONDS = 10.0 if FULL else 0.5
# Sessions now, and those served since the server counts.
SEEN = """
SELECT (SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend') AS sessions,
       sessions AS served
FROM pg_stat_database WHERE datname = $1
"""


@pytest.mark.parametrize("how", ["holds", "refuses", "says_starting", "forgets", "swallows"])
async def test_sleeping_database_is_woken_by_one_login(
    database: Database, proxy: Proxy, how: str, measured: Callable[[str], None]
) -> None:
    """None of a hundred requests fails, and after the idle time the server sees no session and no statement."""
    url = proxy.url(database.url())
    # A sixth of it is the time after which a second login is tried beside a silent one.
    waking_seconds = 30 if FULL else 3
    settings = database.settings(
        replica=False,
        primary={"url": url, "profile": "sleeping", "pool_idle_seconds": IDLE_SECONDS, "wake_seconds": waking_seconds},
        analytics={"url": url, "profile": "sleeping"},
    )
    async with serving(settings, settled=False) as service, asleep(proxy, how) as wake_up:
        started = time.monotonic()
        requests = [asyncio.create_task(ask(service.app, "GET", "/users")) for _ in range(CROWD)]
        await _all_wait(service)
        await asyncio.sleep(WAKING_SECONDS if FULL else 0)
        knocks = proxy.connections
        await wake_up()
        answers = await asyncio.gather(*requests)
        seconds = time.monotonic() - started
        statements = await _watch(service, database, proxy)

    measured(
        f"{how}: {tell(Counter(answer.status for answer in answers))} after {seconds:.1f} s, {knocks} login(s) before"
    )
    assert {answer.status for answer in answers} == {200}
    assert how == "says_starting" or knocks <= 1
    assert statements == 0


@asynccontextmanager
async def asleep(proxy: Proxy, how: str) -> AsyncIterator[Callable[[], "asyncio.Future[None]"]]:
    """Let the server sleep in one of the ways of `Proxy.fall_asleep`, or drop the packets of all who connect.

    Gives a function that wakes it up.
    """
    if how != "swallows":
        proxy.fall_asleep(how)  # type: ignore[arg-type]  # The other ways are its own.
        yield lambda: asyncio.ensure_future(proxy.wake_up(how))  # type: ignore[arg-type]
        return
    proxy.fall_asleep("refuses")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, proxy.port))
        # The kernel drops the packets of further connects when the queue of a listener is full.
        listener.listen(0)
        full = [socket.socket() for _ in range(3)]
        for client in full:
            client.setblocking(False)
            client.connect_ex((HOST, proxy.port))

        async def wake_up() -> None:
            for one in (*full, listener):
                one.close()
            await proxy.wake_up("refuses")

        yield lambda: asyncio.ensure_future(wake_up())


async def _all_wait(service: Service) -> None:
    async def waiting() -> bool:
        return service.databases.primary.pool.load == CROWD

    assert await eventually(waiting, 10)


async def _watch(service: Service, database: Database, proxy: Proxy) -> int:
    """Wait until the service has left the server, watch that for a while, and count what came meanwhile."""
    watcher = await asyncpg.connect(database.cluster.url("postgres"))

    async def left() -> bool:
        primary = service.databases.primary
        seen = await watcher.fetchrow(SEEN, database.name)
        return primary.monitor.asleep and proxy.open == 0 and seen is not None and seen["sessions"] == 0

    try:
        assert await eventually(left, 20)
        before, sent = await watcher.fetchrow(SEEN, database.name), len(proxy.statements)
        assert (await service.client.get("/health/db")).json()["status"] == "asleep"
        await asyncio.sleep(WATCHED_SECONDS)
        assert proxy.open == 0
        after = await watcher.fetchrow(SEEN, database.name)
        assert before is not None
        assert after is not None
        assert (after["sessions"], after["served"]) == (0, before["served"])
        return len(proxy.statements) - sent
    finally:
        await watcher.close()
