"""The patients that the load reads and changes: made by it, and deleted by it, through the service's own routes."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

import httpx

from local.load.target import Target
from pglifeguard.embedded.account import EmbeddedError
from pglifeguard.embedded.waiting import eventually

# Requests at a time: far fewer than any pool serves.
TOGETHER = 4
# For the service to recover from what the load did to it, before rows are left behind.
DELETE_SECONDS = 10.0
PAGE = 100
# Numbers of the patients whose changes are slow have this in them.
SLOW = "-slow-"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Rows:
    """Ids of patients by what they are for: those of the calm load, and those whose changes are slow."""

    prefix: str
    calm: list[int]
    slow: list[int]


@asynccontextmanager
async def made_rows(target: Target, say: Callable[[str], None], *, calm: int, slow: int) -> AsyncIterator[Rows]:
    """Make patients, and delete them at the end; `say` is told both, and what could not be deleted.

    Raises: EmbeddedError when they cannot be made.
    """
    prefix = f"LOAD-{secrets.token_hex(3)}"
    async with target.client() as client:

        async def make(mrn: str) -> int:
            new = {"mrn": mrn, "full_name": f"{prefix} Example", "birth_date": "1980-05-17"}
            try:
                answer = await client.post("/patients", json=new)
            except httpx.TransportError as error:
                raise EmbeddedError(f"A patient could not be made: {type(error).__name__}.") from None
            if answer.status_code == HTTPStatus.TOO_MANY_REQUESTS:
                raise EmbeddedError(
                    f"{target.url} lets no client ask so often (429): to load it, serve without RATE_LIMIT_PER_SECOND."
                )
            if answer.status_code != HTTPStatus.CREATED:
                raise EmbeddedError(f"A patient could not be made: {answer.status_code} {answer.text[:200]}")
            return int(answer.json()["id"])

        async def all_deleted() -> bool:
            # Found by name, so that one whose answer never came is among them.
            try:
                page = await client.get("/patients", params={"name": prefix, "limit": PAGE})
                found = page.raise_for_status().json()
                await _a_few_at_a_time(lambda row: client.delete(f"/patients/{row['id']}"), found)
            except httpx.HTTPError:
                return False
            return not found

        try:
            say(f"Making {calm + slow} patients to read and change, {prefix}-…; they are deleted at the end.")
            calm_ids = await _a_few_at_a_time(make, [f"{prefix}-{number:04}" for number in range(calm)])
            slow_ids = await _a_few_at_a_time(make, [f"{prefix}{SLOW}{number:04}" for number in range(slow)])
            yield Rows(prefix, calm_ids, slow_ids)
        finally:
            if await eventually(all_deleted, DELETE_SECONDS):
                say(f"The patients {prefix}-… are deleted.")
            else:
                say(f"Patients {prefix}-… are left: {target.url} does not delete them.")


async def _a_few_at_a_time(work: Callable[[Item], Awaitable[Result]], items: Iterable[Item]) -> list[Result]:
    """Do the work for each item, and return the results in order."""
    turns = asyncio.Semaphore(TOGETHER)

    async def one(item: Item) -> Result:
        async with turns:
            return await work(item)

    return await asyncio.gather(*map(one, items))
