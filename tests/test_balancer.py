"""What the balancer lets through, and for how long it keeps a place for a client that is slow or silent."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing.faults import exhausted
from pglifeguard.testing.serving import listening
from tests.balancer import Balancer, balanced, needs_haproxy
from tests.crowd import crowd
from tests.service import ADA, Service

pytestmark = needs_haproxy

PLACES = 60
ANY_ADDRESS = '"${ADDRESS_CONNECTIONS-8000}"'
# The times are a tenth of the real ones: what is shown is that each of them is there and acts.
SMALLER = {
    "maxconn 8000": f"maxconn {PLACES}",
    "timeout http-request 5s": "timeout http-request 500ms",
    "timeout http-keep-alive 10s": "timeout http-keep-alive 1s",
    "timeout client 30s": "timeout client 3s",
}
ALIVE = b"GET /health/live HTTP/1.1\r\nHost: test\r\n\r\n"
# What HAProxy answers in time; from version 3.0 on it keeps the connection while a byte comes now and then.
BODIES = {
    "a body without end": (
        b"POST /patients HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
        b" ",
    ),
    "a chunk without end": (
        b"POST /patients HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n3E8\r\n{",
        b" ",
    ),
}
HOLDING = {
    "nothing at all": (b"", b""),
    "a request line without end": (b"GET /", b"x"),
    "headers without end": (b"GET /health/live HTTP/1.1\r\nHost: test\r\nX-Slow: ", b"x"),
    "nothing after an answer": (ALIVE, b""),
    "a second request without end": (ALIVE + b"GET /", b"x"),
    # A connection in good order, SETTINGS and then PING after PING, and never a request.
    "HTTP/2 in clear text": (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0",
        b"\0\0\x08\6\0\0\0\0\0" + b"anything",
    ),
}


def without_lifespan(service: Service) -> ASGIApp:
    """Return the running service as something to listen for, which is neither started nor stopped again."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await service.app(scope, receive, send)

    return serve


@pytest.fixture
async def balancer(service: Service, tmp_path: Path) -> AsyncIterator[Balancer]:
    """Give a balancer with few places in front of the running service."""
    async with listening(without_lifespan(service)) as url, balanced(tmp_path, url, changes=SMALLER) as running:
        yield running


@pytest.mark.parametrize("holding", HOLDING)
async def test_slow_and_silent_clients_lose_their_places(balancer: Balancer, holding: str) -> None:
    """More clients than there are places send a byte now and then, or none: each is cut off, and others get in."""
    begun, drip = HOLDING[holding]

    async with crowd(balancer.port, PLACES + 20, begun=begun, drip=drip) as held, httpx.AsyncClient() as client:
        operators = await client.get(f"{balancer.operators_url}/health", timeout=5)

        async def answers() -> bool:
            try:
                return (await client.get(f"{balancer.url}/health/live", timeout=1)).is_success
            except httpx.TransportError:
                return False

        assert await eventually(answers, 15)
        assert await held.cut_off(15)

    assert operators.status_code == 200


@pytest.mark.parametrize("holding", BODIES)
async def test_slow_bodies_are_answered_and_reach_no_instance(balancer: Balancer, holding: str) -> None:
    """Each is told 408 in time, though it goes on sending, and takes no place on an instance; others are served."""
    begun, drip = BODIES[holding]

    async with crowd(balancer.port, PLACES - 20, begun=begun, drip=drip) as held, httpx.AsyncClient() as client:

        async def told() -> bool:
            return all(member.received.startswith(b"HTTP/1.1 408 ") for member in held.members)

        assert await eventually(told, 15)
        asked = await balancer.figure("backend_sessions_total", "instances")
        alive = await client.get(f"{balancer.url}/health/live", timeout=5)

    assert alive.is_success
    assert (asked, await balancer.figure("backend_sessions_total", "instances")) == (0, 1)


@pytest.mark.parametrize("holding", BODIES)
async def test_slow_clients_of_one_address_keep_no_other_out(service: Service, tmp_path: Path, holding: str) -> None:
    """ADDRESS_CONNECTIONS is what one address may hold: its next connection is ended, another address gets in."""
    begun, drip = BODIES[holding]
    other = httpx.AsyncHTTPTransport(local_address="127.0.0.2")

    async with (
        listening(without_lifespan(service)) as url,
        balanced(tmp_path, url, changes=SMALLER | {ANY_ADDRESS: str(PLACES // 2)}) as balancer,
        crowd(balancer.port, PLACES // 2, begun=begun, drip=drip),
        httpx.AsyncClient() as same_address,
        httpx.AsyncClient(transport=other) as other_address,
    ):

        async def all_there() -> bool:
            return await balancer.figure("frontend_current_sessions", "service") == PLACES // 2

        assert await eventually(all_there, 5)
        with pytest.raises(httpx.TransportError):
            await same_address.get(f"{balancer.url}/health/live", timeout=5)
        alive = await other_address.get(f"{balancer.url}/health/live", timeout=5)

    assert alive.is_success


async def test_answer_may_take_longer_than_a_client_may_be_silent(balancer: Balancer, service: Service) -> None:
    """A client that waits for its answer is not a silent one."""

    async def take_long() -> str:
        await asyncio.sleep(3.5)
        return "at last"

    service.app.add_api_route("/long", take_long)
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{balancer.url}/long", timeout=30)

    assert answer.json() == "at last"


async def test_client_that_leaves_is_told_to_the_instance(balancer: Balancer, service: Service) -> None:
    """The place in the queue for a connection is free at once, also behind a balancer."""
    pool = service.databases.primary.pool

    async def waits() -> bool:
        return pool.figures().waiting == 1

    async def left() -> bool:
        return pool.figures().waiting == 0

    async with exhausted(service.databases.primary):
        pool.settings = pool.settings.model_copy(update={"pool_timeout": 60})
        _, writer = await asyncio.open_connection("127.0.0.1", balancer.port)
        writer.write(b"DELETE /patients/1 HTTP/1.1\r\nHost: test\r\n\r\n")
        assert await eventually(waits, 5)
        writer.transport.abort()
        assert await eventually(left, 5)

    assert service.sample("db_connection_cancelled_total", pool="primary", reason="client_left") == 1


OPERATORS = (
    "/metrics",
    "/debug/pool-stats",
    "/debug/connections",
    "/%6detrics",
    "/%64ebug/pool-stats",
    "/debug%2Fpool-stats",
    "//metrics",
    "/metrics?x=1",
    "/metrics;x",
)
EVERYBODY = ("/patients", "/metricsystem", "/debugging", "/patients?name=/metrics", "/docs")


async def test_what_is_for_operators_is_not_for_everybody(balancer: Balancer) -> None:
    """However the path is written, the answer is that of a path that leads nowhere, and no instance is asked."""
    async with httpx.AsyncClient(base_url=balancer.url) as client:
        nowhere = await client.get("/nowhere")
        refused = {path: await client.get(httpx.URL(balancer.url + path)) for path in OPERATORS}
        others = {path: await client.get(path) for path in EVERYBODY}

    for path, answer in refused.items():
        assert (answer.status_code, answer.headers["content-type"]) == (404, nowhere.headers["content-type"]), path
        assert answer.json() == nowhere.json()
        assert "x-request-id" not in answer.headers, path
    assert [path for path, answer in others.items() if "x-request-id" not in answer.headers] == []


async def test_operators_have_a_port_of_their_own(balancer: Balancer) -> None:
    """There are the balancer's figures and the pages of an instance, and nothing else."""
    async with httpx.AsyncClient(base_url=balancer.operators_url) as client:
        figures = await client.get("/metrics")
        pools = await client.get("/debug/pool-stats")
        others = {path: (await client.get(path)).status_code for path in ("/patients", "/", "/debug")}

    assert "haproxy_frontend_current_sessions" in figures.text
    assert set(pools.json()) == {"primary", "replica", "analytics"}
    assert set(others.values()) == {404}


async def test_small_and_large_bodies_pass(balancer: Balancer) -> None:
    """Waiting for a body changes nothing about it, whether it fits into the balancer's buffer or not."""
    async with httpx.AsyncClient(base_url=balancer.url) as client:
        small = await client.post("/patients", json=ADA)
        large = await client.post("/patients", json=ADA | {"full_name": "x" * 60_000})

    assert (small.status_code, large.status_code) == (201, 422)
    assert large.json()["errors"][0]["loc"] == ["body", "full_name"]
