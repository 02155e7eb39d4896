"""While nothing takes writes, and when everything connects at once: few logins, prompt answers, and nobody else harmed.

A login costs the server a process and both sides a millisecond of hashing. Logins that each request makes for itself
are what an outage turns into an overload by: counted here at the proxies in front of the servers.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

from sqlalchemy.engine import make_url

from pglifeguard.testing.proxy import Proxy
from tests.chaos import FULL
from tests.chaos.load import Answer, after, ask, offer, quantile, tell
from tests.conftest import Database
from tests.service import serving

SECONDS = 10.0 if FULL else 1.5
WRITES_PER_SECOND = 50
LOGINS_PER_SECOND = 20
LIVE_SECONDS = 0.1
# More than two, in one process with their clients, are an overload of the process and not of the server.
INSTANCES = 2
CLIENTS = 22 * INSTANCES
HERD_SECONDS = 10.0 if FULL else 1.0
PATIENT = {"full_name": "Ada Example", "birth_date": "1980-05-17"}


async def test_no_writable_host_is_no_login_storm(database: Database, measured: Callable[[str], None]) -> None:
    """Two hosts that take no writes, 50 writes a second: few logins; writes hear of it in time, reads go on."""
    standby = database.cluster.replica.port
    async with Proxy(database.cluster.primary.port) as first, Proxy(standby) as second:
        url = make_url(database.url()).set(host=None, port=None, query={"host": (host(first), host(second))})
        primary = {"url": url.render_as_string(hide_password=False)}
        settings = database.settings(primary=primary, monitor_interval_seconds=0.5)
        async with serving(settings) as service:
            first.upstream = standby
            first.cut()
            started, before = time.monotonic(), first.connections + second.connections
            writes, reads, lives = await asyncio.gather(
                offer(lambda n: write(service.app, n), per_second=WRITES_PER_SECOND, until=after(SECONDS)),
                offer(lambda _: ask(service.app, "GET", "/patients?limit=1"), per_second=20, until=after(SECONDS)),
                offer(lambda _: ask(service.app, "GET", "/health/live"), per_second=20, until=after(SECONDS)),
            )
            seconds = time.monotonic() - started
            logins = first.connections + second.connections - before

    p99 = quantile([answer.seconds for answer in lives], 0.99)
    slowest = max(answer.seconds for answer in writes)
    slowest_read = max(answer.seconds for answer in reads)
    measured(
        f"{logins / seconds:.1f} logins/s, live p99 {p99 * 1000:.0f} ms, slowest write {slowest:.2f} s, slowest read "
        f"{slowest_read * 1000:.0f} ms, {tell(outcomes(writes))}"
    )
    assert logins <= LOGINS_PER_SECOND * seconds
    # A few were under way when the primary went.
    assert set(outcomes(writes)) <= {"database_unreachable", "connection_lost", "outcome_unknown"}
    assert {answer.status for answer in (*lives, *reads)} == {200}
    if FULL:
        assert p99 < LIVE_SECONDS
        assert slowest < settings.primary.pool_timeout + LIVE_SECONDS
        assert slowest_read < LIVE_SECONDS


async def test_fresh_instances_are_no_herd(database: Database, measured: Callable[[str], None]) -> None:
    """Instances that start under load open what they need, and no request is refused because too many log in."""
    async with Proxy(database.cluster.primary.port) as proxy, AsyncExitStack() as stack:
        pool: dict[str, Any] = {
            "url": proxy.url(database.url()),
            "pool_size": 20,
            "max_overflow": 0,
            "pool_min_size": 0,
        }
        settings = database.settings(replica=False, primary=pool, monitor_interval_seconds=0.5)
        running = [await stack.enter_async_context(serving(settings)) for _ in range(INSTANCES)]
        before, over = proxy.connections, after(HERD_SECONDS)

        async def client(number: int) -> list[Answer]:
            answers: list[Answer] = []
            while not over():
                answers.append(await write(running[number % INSTANCES].app, 10_000 * number + len(answers)))
            return answers

        answers = [a for told in await asyncio.gather(*map(client, range(CLIENTS))) for a in told]
        logins = proxy.connections - before

    measured(f"{INSTANCES} instances, {CLIENTS} clients: {logins} logins, {tell(outcomes(answers))}")
    assert "database_unreachable" not in outcomes(answers), outcomes(answers)
    assert logins <= INSTANCES * 20


async def write(app: Any, number: int) -> Answer:
    """Store a patient."""
    return await ask(app, "POST", "/patients", {"mrn": f"L-{number}", **PATIENT})


def host(proxy: Proxy) -> str:
    """Return one entry of a list of hosts."""
    return f"127.0.0.1:{proxy.port}"


def outcomes(answers: list[Answer]) -> Counter[str]:
    """Count the answers by status, or by code where there is one."""
    return Counter(answer.code or str(answer.status) for answer in answers)
