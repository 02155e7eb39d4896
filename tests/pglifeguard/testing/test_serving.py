"""An application runs with its lifespan open, whatever that holds, and on a socket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI, Request

from pglifeguard import Databases
from pglifeguard.testing import serving
from pglifeguard.testing.serving import listening, running, settle


@asynccontextmanager
async def with_a_group(_app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Hold a task group, which its own task alone may leave, and give a state."""
    async with anyio.create_task_group() as group:
        group.start_soon(asyncio.sleep, 0)
        yield {"word": "held"}


def stateful() -> FastAPI:
    """Return an application without databases that answers with the state of its lifespan."""
    made = FastAPI(lifespan=with_a_group)

    @made.get("/")
    async def show(request: Request) -> str:
        return str(request.state.word)

    return made


class TestStateful:
    """With an application that needs no database."""

    @pytest.fixture
    def app(self) -> FastAPI:
        """Give it."""
        return stateful()

    async def test_state_of_the_lifespan_reaches_requests(self, client: httpx.AsyncClient, live_url: str) -> None:
        """Without a socket and with one; the lifespan may hold what the task that entered it has to leave."""
        async with httpx.AsyncClient(base_url=live_url) as other:
            assert [(await each.get("/")).json() for each in (client, other)] == ["held", "held"]


async def test_lifespan_of_its_own_is_opened_on_a_socket() -> None:
    """What nobody has opened, uvicorn opens."""
    async with listening(stateful()) as url, httpx.AsyncClient() as client:
        assert (await client.get(url)).json() == "held"


async def test_application_that_does_not_start_is_told() -> None:
    """Its own error comes out, and on a socket a sentence."""

    def broken(_app: FastAPI) -> AbstractAsyncContextManager[None]:
        raise ValueError

    app = FastAPI(lifespan=broken)

    with pytest.raises(ValueError):  # noqa: PT011  # It is the application's own.
        async with running(app):
            raise AssertionError
    with pytest.raises(RuntimeError, match="the application does not start"):
        async with listening(app):
            raise AssertionError


async def test_databases_that_do_not_become_usable_are_told(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within ten seconds."""
    monkeypatch.setattr(serving, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(databases.router.replicas[0], "state", "lagging")

    with pytest.raises(TimeoutError, match="usable"):
        await settle(databases)
