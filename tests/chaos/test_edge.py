"""Clients that want to take the service down from outside, without a token: others are answered meanwhile."""

import asyncio
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.
import pytest

from tests.app.test_cli import MODULE, Process, served
from tests.balancer import balanced, needs_haproxy
from tests.chaos import FULL
from tests.chaos.load import Answer, after, offer, quantile
from tests.chaos.wire import Client
from tests.conftest import Database
from tests.crowd import crowd

CLIENTS = 4200 if FULL else 200
# A request costs the service a quarter of a millisecond until its body is awaited: all at once would be a flood.
CLIENTS_PER_SECOND = 1000.0
SECONDS = 10.0 if FULL else 2.0
# For one probe of a balancer or of Kubernetes. A busy machine that runs a short form may take longer.
PROBE_SECONDS = 0.25 if FULL else 5.0
HEADERS = b"GET /health/live HTTP/1.1\r\nHost: test\r\nX-Slow: "
BODY = b"POST /patients HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n{"
HOLDING = {"headers": (HEADERS, b"x"), "bodies": (BODY, b" "), "nothing": (b"", b"")}


def _memory(server: Process) -> float:
    """Return the megabytes that the service has."""
    return float(psutil.Process(server.process.pid).memory_info().rss) / 1e6


async def _probe(url: str, seconds: float) -> list[Answer]:
    """Ask whether it is alive, ten times a second, each time on a connection of its own."""
    client = Client(url, keep=False)
    return await offer(lambda _: client.ask("GET", "/health/live"), per_second=10, until=after(seconds))


@needs_haproxy
@pytest.mark.parametrize("way", ["balancer", "direct"])
async def test_slow_and_silent_clients_keep_nobody_out(
    database: Database, tmp_path: Path, measured: Callable[[str], None], way: str
) -> None:
    """Thousands of clients send a byte every two seconds, or none, and never the end: probes are answered all along."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    environment = {"DATABASE_URL": database.url()}
    async with served(tmp_path, environment, *MODULE) as server, balanced(tmp_path, server.url) as balancer:
        url = balancer.url if way == "balancer" else server.url
        port = int(url.rpartition(":")[2])
        for what, (begun, drip) in HOLDING.items():
            before = _memory(server)
            # The crowd before has left all at once; this is answered when the service is done with that.
            await server.client.get("/health/live")
            probing = asyncio.create_task(_probe(url, CLIENTS / CLIENTS_PER_SECOND + SECONDS))
            async with crowd(
                port, CLIENTS, begun=begun, drip=drip, drip_seconds=2, per_second=CLIENTS_PER_SECOND
            ) as held:
                probes = await probing
                slowest = max(probe.seconds for probe in probes)
                measured(
                    f"{way}, {CLIENTS} × {what}: slowest probe {slowest * 1000:.0f} ms, "  # noqa: RUF001  # As people write it.
                    f"{_memory(server) - before:+.0f} MB, {held.held} left after {SECONDS:.0f} s"
                )
            assert {probe.status for probe in probes} == {200}
            assert slowest <= PROBE_SECONDS


async def test_questions_for_operators_leave_the_loop_alone(
    database: Database, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """Sixty-four clients ask for the same costly thing without a pause: probes are answered meanwhile."""
    async with served(tmp_path, {"DATABASE_URL": database.url()}, *MODULE) as server:
        for path in ("/metrics", "/health/db", "/debug/connections", "/openapi.json"):
            client = Client(server.url)
            ended = after(SECONDS)
            counts = [0] * 64

            async def ask(number: int, path: str = path) -> None:
                while not ended():  # noqa: B023  # Awaited before the next round.
                    assert (await client.ask("GET", path)).status == 200  # noqa: B023  # The same.
                    counts[number] += 1  # noqa: B023  # The same.

            asking = asyncio.gather(*(ask(number) for number in range(64)))
            probes = await _probe(server.url, SECONDS)
            await asking
            client.close()
            slowest = max(probe.seconds for probe in probes)
            median = quantile([probe.seconds for probe in probes], 0.5)
            measured(
                f"{path}: {sum(counts) / SECONDS:.0f}/s, probes' median {median * 1000:.0f} ms, "
                f"slowest {slowest * 1000:.0f} ms"
            )
            assert {probe.status for probe in probes} == {200}
            assert slowest <= PROBE_SECONDS


async def test_hostile_requests_take_neither_loop_nor_memory(
    database: Database, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """Bodies of unknown keys, as many as are let in and far more, and headers without end: probes are answered."""
    hostile = [
        json.dumps({f"{number:x}": 1 for number in range(count)}, separators=(",", ":")).encode()
        for count in (900, 100_000, 500_000)
    ]
    head = b"POST /patients HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    async with served(tmp_path, {"DATABASE_URL": database.url()}, *MODULE) as server:
        port = int(server.url.rpartition(":")[2])
        await server.client.post("/patients", content=hostile[0], headers={"Content-Type": "application/json"})
        before = _memory(server)
        statuses: set[bytes] = set()

        async def send(body: bytes) -> None:
            ended = time.monotonic() + SECONDS
            while time.monotonic() < ended:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                try:
                    writer.write(head % len(body) + body)
                    statuses.add((await reader.readline()).split(b" ")[1])
                finally:
                    writer.transport.abort()

        async def send_headers() -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(HEADERS)
                for _ in range(640):
                    writer.write(b"x" * 65_536)
                    await writer.drain()
            except ConnectionError:
                statuses.add(b"cut")
            finally:
                writer.transport.abort()

        sending = asyncio.gather(*map(send, hostile), *(send_headers() for _ in range(4)))
        probes = await _probe(server.url, SECONDS)
        await sending
        grown = _memory(server) - before

    slowest = max(probe.seconds for probe in probes)
    told = ", ".join(sorted(status.decode() for status in statuses))
    measured(f"slowest probe {slowest * 1000:.0f} ms, {grown:+.0f} MB; answers: {told}")
    assert {probe.status for probe in probes} == {200}
    assert statuses == {b"413", b"422", b"cut"}
    assert slowest <= PROBE_SECONDS
    assert grown < 60
