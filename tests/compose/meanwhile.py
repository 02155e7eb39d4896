"""What goes on in the stack while an alert is waited for: somebody at a prompt, clients that write or read."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx

from tests.compose.stack import SUPERUSER_PASSWORD, Stack

NEW = {"full_name": "Walked Through", "birth_date": "1970-01-01"}


@asynccontextmanager
async def somebody(stack: Stack, application: str, *lines: str, seconds: int) -> AsyncIterator[None]:
    """Be at a prompt of the primary under a name: type these lines, and go away without a word for so long."""
    typed = "; ".join(lines)
    prompt = f'(echo "{typed};"; exec sleep {seconds}) | psql -qX -U postgres -d lifeguard'
    session = asyncio.create_task(
        stack.compose(
            *("exec", "-T", "-e", f"PGPASSWORD={SUPERUSER_PASSWORD}", "-e", f"PGAPPNAME={application}"),
            *("primary", "bash", "-c", prompt),
            check=False,
        )
    )
    try:
        yield
    finally:
        ended = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{application}'"  # noqa: S608  # Ours.
        await stack.psql("primary", ended)
        session.cancel()
        with suppress(asyncio.CancelledError):
            await session


@asynccontextmanager
async def asking(client: httpx.AsyncClient, *, clients: int, pause: float) -> AsyncIterator[None]:
    """Let so many clients add patients, one after the other, whatever the answers are."""
    # A patient that is there already would be a 409, and no write.
    run = secrets.token_hex(4)

    async def ask(number: int) -> None:
        for attempt in range(100_000):
            with suppress(httpx.TransportError):
                await client.post("/patients", json=NEW | {"mrn": f"WALK-{run}-{number}-{attempt}"})
            await asyncio.sleep(pause)

    async with meanwhile(*(ask(number) for number in range(clients))):
        yield


@asynccontextmanager
async def reading(client: httpx.AsyncClient) -> AsyncIterator[None]:
    """Read a list ten times a second."""

    async def read() -> None:
        while True:
            with suppress(httpx.TransportError):
                await client.get("/patients?limit=1")
            await asyncio.sleep(0.1)

    async with meanwhile(read()):
        yield


@asynccontextmanager
async def meanwhile(*activities: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Do all of this until the block is left."""
    tasks = [asyncio.create_task(activity) for activity in activities]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
