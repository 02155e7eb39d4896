"""Round trips of one request, counted on the wire between a server and the replica."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

CHUNK = 65536


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
