"""Clients that hold connections: each sends the beginning of something, then a byte now and then, and never the end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pglifeguard.embedded.waiting import eventually

# Connections that are opened together: more would find a listener's backlog full.
AT_A_TIME = 500
# Clients that come at a steady rate come in waves.
WAVE_SECONDS = 0.05


class Member(asyncio.Protocol):
    """One client and what it has received."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.received = b""
        self.cut = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Keep what comes."""
        self.received += data

    def connection_lost(self, _exc: Exception | None) -> None:
        """Note that the server has had enough."""
        self.cut = True


class Crowd:
    """The clients of one test."""

    def __init__(self) -> None:
        self.members: list[Member] = []

    @property
    def held(self) -> int:
        """How many are still connected."""
        return sum(not member.cut for member in self.members)

    async def cut_off(self, seconds: float) -> bool:
        """Wait until none is connected any more; False after `seconds`."""

        async def none_is_left() -> bool:
            return self.held == 0

        return await eventually(none_is_left, seconds)


@asynccontextmanager
async def crowd(  # noqa: PLR0913  # Each says what the clients do.
    port: int, clients: int, *, begun: bytes, drip: bytes = b"", drip_seconds: float = 0.1, per_second: float = 0
) -> AsyncIterator[Crowd]:
    """Connect `clients` to a port of this machine, and let each drip until it is cut off or the test is over.

    They come as fast as they are let in, or `per_second`.
    """
    loop = asyncio.get_running_loop()
    held = Crowd()

    async def connect() -> None:
        _, member = await loop.create_connection(Member, "127.0.0.1", port)
        held.members.append(member)
        assert member.transport is not None
        member.transport.write(begun)

    async def go_on() -> None:
        while True:
            await asyncio.sleep(drip_seconds)
            for member in held.members:
                if member.transport is not None and not member.cut:
                    member.transport.write(drip)

    at_a_time = min(AT_A_TIME, round(per_second * WAVE_SECONDS)) if per_second else AT_A_TIME
    come_at = loop.time()
    for start in range(0, clients, at_a_time):
        await asyncio.gather(*(connect() for _ in range(min(at_a_time, clients - start))))
        come_at += WAVE_SECONDS if per_second else 0.0
        await asyncio.sleep(come_at - loop.time())
    dripping = asyncio.create_task(go_on()) if drip else None
    try:
        yield held
    finally:
        if dripping is not None:
            dripping.cancel()
        for member in held.members:
            if member.transport is not None:
                member.transport.abort()
