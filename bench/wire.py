"""Round trips of one request, counted on the wire between a server and its databases."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from uuid import uuid4

import httpx

from bench.load import BenchError
from bench.stage import Stage

CHUNK = 65536
REQUESTS = 20
DATABASES = ("DATABASE_URL", "DATABASE_REPLICA_URL")


@dataclass
class Trips:
    """How often the server's side of the talk fell silent and the client spoke again."""

    count: int = 0


@asynccontextmanager
async def counting(port: int) -> AsyncIterator[tuple[Trips, int]]:
    """Stand before a PostgreSQL on `port`; yield the count and the port to connect to instead."""
    trips = Trips()

    async def stand_between(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", port)
        answered = True

        async def onwards() -> None:
            nonlocal answered
            while data := await client.read(CHUNK):
                trips.count += answered and data[:1] != b"X"  # X says goodbye and awaits nothing.
                answered = False
                to_server.write(data)
            to_server.close()

        async def back() -> None:
            nonlocal answered
            while data := await server.read(CHUNK):
                answered = True
                to_client.write(data)
            to_client.close()

        await asyncio.gather(onwards(), back(), return_exceptions=True)

    listener = await asyncio.start_server(stand_between, "127.0.0.1", 0)
    try:
        yield trips, listener.sockets[0].getsockname()[1]
    finally:
        listener.close()


async def round_trips(
    stage: Stage,
    variant: str,
    requests: Sequence[tuple[str, str]],
    variables: Mapping[str, str] | None = None,
    *,
    name: str | None = None,
) -> list[float]:
    """Return how many round trips each request, a method and a path, takes at the primary and the replica together.

    Medians: the first requests prepare statements, and the monitor of ours probes over the same wire at times.
    """
    given = dict(variables or {})
    addresses = stage.environment | given
    async with AsyncExitStack() as stack:
        counts = []
        for variable in DATABASES:
            port = httpx.URL(addresses[variable]).port
            trips, between = await stack.enter_async_context(counting(int(port or 0)))
            counts.append(trips)
            given[variable] = addresses[variable].replace(f":{port}/", f":{between}/")
        server = await stack.enter_async_context(stage.serving(variant, given, name=name))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=server.url, trust_env=False))
        return [await _median(client, method, path, counts) for method, path in requests]


async def _median(client: httpx.AsyncClient, method: str, path: str, counts: Sequence[Trips]) -> float:
    seen = [sum(trips.count for trips in counts)]
    for _ in range(REQUESTS):
        patient = {"mrn": f"T-{uuid4().hex[:24].upper()}", "full_name": "Ada Example", "birth_date": "1980-05-17"}
        answer = await client.request(method, path, json=patient if method == "POST" else None)
        if not answer.is_success:
            raise BenchError(f"{method} {path} was answered {answer.status_code}: {answer.text[:200]}")
        seen.append(sum(trips.count for trips in counts))
    return median(after - before for before, after in pairwise(seen))
