"""A client that sends more than it may is told when to come again, and nobody else notices."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import httpx
import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from app.rate_limit import Buckets
from app.security import issue_token
from pglifeguard.errors import MEDIA_TYPE
from tests.conftest import Database
from tests.service import Service, serving

SECRET = "0123456789abcdef" * 4


class Clock:
    """A time that passes when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now


def by(subject: str) -> dict[str, str]:
    """Give the header of somebody's token."""
    token = issue_token(
        SecretStr(SECRET), subject=subject, scopes=["patients:read", "ops"], lifetime=timedelta(hours=1)
    )
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
async def limited(database: Database) -> AsyncIterator[Service]:
    """Give a service whose clients may send three at once, and then one in a thousand seconds."""
    settings = database.settings(
        replica=False, auth_secret=SECRET, rate_limit_per_second=0.001, rate_limit_burst=3, retry_after_spread_seconds=9
    )
    async with serving(settings) as running:
        yield running


async def test_client_that_sends_too_much_is_told_when_to_come_again(limited: Service) -> None:
    """After its burst it gets a 429 with the seconds, counted, while another client is served."""
    ada = [await limited.client.get("/patients", headers=by("ada")) for _ in range(5)]
    bob = await limited.client.get("/patients", headers=by("bob"))

    assert [answer.status_code for answer in ada] == [200, 200, 200, 429, 429]
    assert (ada[3].headers["content-type"], ada[3].json()["code"]) == (MEDIA_TYPE, "rate_limited")
    assert 990 < int(ada[3].headers["retry-after"]) <= 1000
    assert (ada[3].headers["cache-control"], bool(ada[3].headers["x-request-id"])) == ("no-store", True)
    assert bob.status_code == 200
    assert limited.sample("http_requests_refused_total", reason="rate_limited") == 2


async def test_a_clients_tokens_share_its_limit(limited: Service) -> None:
    """A token that is issued anew is not a new client; one that is refused costs nobody anything."""
    for _ in range(5):
        assert (await limited.client.get("/patients")).status_code == 401
        assert (await limited.client.get("/patients", headers={"Authorization": "Bearer x"})).status_code == 401
    statuses = []
    for hours in (1, 2, 3, 4):
        token = issue_token(SecretStr(SECRET), subject="ada", scopes=["patients:read"], lifetime=timedelta(hours=hours))
        answer = await limited.client.get("/patients", headers={"Authorization": f"Bearer {token}"})
        statuses.append(answer.status_code)

    assert statuses == [200, 200, 200, 429]


async def test_probes_figures_and_operators_come_through(limited: Service) -> None:
    """A client that is over its limit may be an operator, and Prometheus has none."""
    for _ in range(4):
        await limited.client.get("/patients", headers=by("ada"))

    for path in ("/health/live", "/health/ready", "/metrics", "/debug/pool-stats"):
        answers = [await limited.client.get(path, headers=by("ada")) for _ in range(4)]
        assert {answer.status_code for answer in answers} == {200}, path
    assert (await limited.client.get("/patients", headers=by("ada"))).status_code == 429


async def test_refused_request_takes_no_connection(limited: Service) -> None:
    """It ends before its route: nothing of the database is asked."""
    for _ in range(3):
        await limited.client.get("/patients", headers=by("ada"))
    before = limited.sample("db_connection_acquire_seconds_count", pool="primary")

    refused = await limited.client.get("/patients", headers=by("ada"))

    assert refused.status_code == 429
    assert limited.sample("db_connection_acquire_seconds_count", pool="primary") == before


async def test_address_stands_for_a_client_without_a_token(database: Database) -> None:
    """Where the proxy reports it: each IPv4 address, and each IPv6 network, has its own bucket."""
    settings = database.settings(
        replica=False, clients_by_address=True, rate_limit_per_second=0.001, rate_limit_burst=1
    )
    addresses = ("192.0.2.1", "192.0.2.2", "192.0.2.1", "2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:1::1", "x:y")
    statuses = []
    async with serving(settings) as service:
        for address in addresses:
            transport = httpx.ASGITransport(service.app, client=(address, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                statuses.append((await client.get("/patients")).status_code)

    assert statuses == [200, 200, 429, 200, 429, 200, 200]


async def test_without_the_setting_there_is_no_limit(database: Database) -> None:
    """It is off by default."""
    async with serving(database.settings(replica=False, auth_secret=SECRET)) as service:
        answers = await asyncio.gather(*(service.client.get("/patients", headers=by("ada")) for _ in range(60)))

    assert 429 not in {answer.status_code for answer in answers}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), max_size=60), st.integers(1, 4))
def test_buckets_are_token_buckets(asked: list[tuple[str, int]], burst: int) -> None:
    """Each client has what a bucket counted the plain way has, whichever dictionary it is in, and is told its time."""
    clock = Clock()
    buckets = Buckets(per_second=0.5, burst=burst, clock=clock)
    plain: dict[str, tuple[float, float]] = {}
    for client, tenths in asked:
        clock.now += tenths / 8  # Eighths, which are exact.
        tokens, since = plain.get(client, (float(burst), clock.now))
        tokens = min(burst, tokens + (clock.now - since) * 0.5)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / 0.5

        assert buckets.take(client) == wait

        plain[client] = (tokens - (wait == 0), clock.now)


def test_client_is_remembered_when_the_dictionaries_take_turns() -> None:
    """One who has just emptied its bucket finds it empty, whoever comes between."""
    clock = Clock()
    buckets = Buckets(per_second=1, burst=4, clock=clock)
    clock.now += 3.5
    emptied = [buckets.take("ada") for _ in range(4)]
    clock.now += 0.5
    buckets.take("bob")

    assert (emptied, buckets.take("ada")) == ([0.0] * 4, 0.5)


def test_client_that_waits_as_it_was_told_is_served() -> None:
    """Not earlier, and at that moment."""
    clock = Clock()
    buckets = Buckets(per_second=3, burst=1, clock=clock)
    buckets.take("ada")

    wait = buckets.take("ada")
    clock.now += wait / 2
    early = buckets.take("ada")
    clock.now += early

    assert early > 0
    assert buckets.take("ada") == 0


def test_million_clients_take_bounded_memory() -> None:
    """Of a flood of names a bounded number is remembered, and one who is among the last is still limited."""
    clock = Clock()
    buckets = Buckets(per_second=0.001, burst=1, clock=clock)
    before = psutil.Process().memory_info().rss
    for number in range(1_000_000):
        buckets.take(f"client-{number}")

    assert psutil.Process().memory_info().rss - before < 80_000_000
    assert len(buckets) <= 200_000
    assert buckets.take("client-999999") > 0


def test_clients_that_are_gone_are_forgotten() -> None:
    """When their buckets would be full again nothing is kept of them."""
    clock = Clock()
    buckets = Buckets(per_second=10, burst=5, clock=clock)
    for number in range(1000):
        buckets.take(f"client-{number}")
    before = len(buckets)

    for _ in range(2):
        clock.now += 0.6
        buckets.take("ada")

    assert (before, len(buckets)) == (1000, 1)
