"""POST /users/{id}/sync asks a real HTTP server, and holds no connection while it waits for the answer."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse

from local.cluster import Cluster
from pglifeguard.embedded.postgres import free_port
from pglifeguard.testing.serving import listening
from tests.conftest import Database, Execute
from tests.service import Service, serving

Answer = Callable[[str], Awaitable[Response]]
PROFILE = b'{"full_name": "Ada King", "is_active": false, "more": 1}'


@asynccontextmanager
async def synced(
    database: Database, answer: Answer, *, patience: float = 0.3, audit: str = "off"
) -> AsyncIterator[tuple[Service, str]]:
    """Serve with a directory that answers so; give the service and the path of a user to sync."""
    directory = FastAPI()

    @directory.get("/api/profiles/{email:path}")
    async def get_profile(email: str) -> Response:
        return await answer(email)

    async with listening(directory) as url:
        settings = database.settings(directory_url=f"{url}/api", directory_timeout_seconds=patience, audit=audit)
        async with serving(settings) as service:
            yield service, await add(service, "ada+x/y?z#@example.com")


async def add(service: Service, email: str) -> str:
    """Store a user and return the path of its sync."""
    created = await service.client.post("/users", json={"email": email, "full_name": "Ada"})
    return f"/users/{created.json()['id']}/sync"


async def test_sync_takes_over_the_profile(database: Database) -> None:
    """Name and state are the directory's afterwards; the address arrives there whole."""
    asked: list[str] = []

    async def answer(email: str) -> Response:
        asked.append(email)
        return Response(PROFILE)

    async with synced(database, answer) as (service, path):
        synchronised = await service.client.post(path)
        read = await service.client.get(path.removesuffix("/sync"))

    assert asked == ["ada+x/y?z#@example.com"]
    assert synchronised.status_code == 200
    assert synchronised.json() == read.json()
    assert (read.json()["full_name"], read.json()["is_active"]) == ("Ada King", False)


async def test_sync_is_in_the_audit_trail(database: Database, execute: Execute) -> None:
    """The session that the route opens itself names the caller, too."""

    async def answer(_email: str) -> Response:
        return Response(PROFILE)

    async with synced(database, answer, audit="table") as (service, path):
        await service.client.post(path)

    trail = "SELECT string_agg(concat_ws(' ', subject, action, relation), ', ' ORDER BY id) FROM audit_trail"
    assert await execute(trail) == "anonymous insert users, anonymous update users"


async def test_sync_holds_no_connection_while_the_directory_thinks(database: Database) -> None:
    """Ten requests wait at the directory, and every pool has nothing checked out and nothing waiting."""
    arrived, may_answer = asyncio.Semaphore(0), asyncio.Event()

    async def answer(_email: str) -> Response:
        arrived.release()
        await may_answer.wait()
        return Response(PROFILE)

    async with synced(database, answer, patience=10) as (service, _):
        paths = [await add(service, f"user-{number}@example.com") for number in range(10)]
        requests = [asyncio.create_task(service.client.post(path)) for path in paths]
        for _request in requests:
            await asyncio.wait_for(arrived.acquire(), 5)

        figures = [each.pool.figures() for each in service.databases.all()]
        may_answer.set()
        answers = await asyncio.gather(*requests)

    assert [(each.checked_out, each.waiting) for each in figures] == [(0, 0)] * 3
    assert {each.status_code for each in answers} == {200}


async def late(_email: str) -> Response:
    """Answer when nobody listens any more."""
    await asyncio.sleep(1)
    return Response(PROFILE)


async def dripping(_email: str) -> Response:
    """Answer in drops, each of them in time."""

    async def drops() -> AsyncIterator[bytes]:
        for number in range(len(PROFILE)):
            await asyncio.sleep(0.05)
            yield PROFILE[number : number + 1]

    return StreamingResponse(drops())


def saying(status: int, content: bytes) -> Answer:
    """Make a directory that answers so."""

    async def answer(_email: str) -> Response:
        return Response(content, status)

    return answer


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (late, "did not answer in time"),
        (dripping, "did not answer in time"),
        (saying(500, b""), "answered 500"),
        (saying(404, b""), "answered 404"),
        (saying(302, b""), "answered 302"),
        (saying(200, b"<html>"), "is not a profile"),
        (saying(200, b'{"full_name": "", "is_active": true}'), "is not a profile"),
    ],
)
async def test_directory_that_fails_is_502(database: Database, answer: Answer, detail: str) -> None:
    """Somebody else's failure is a 502 with its kind, and the user stays as it was."""
    async with synced(database, answer) as (service, path):
        failed = await service.client.post(path)
        read = await service.client.get(path.removesuffix("/sync"))

    assert (failed.status_code, failed.json()["code"]) == (502, "directory_failed")
    assert detail in failed.json()["detail"]
    assert "@" not in failed.text
    assert read.json()["full_name"] == "Ada"


async def test_directory_that_is_down_is_502(database: Database) -> None:
    """Nobody listens: 502."""
    settings = database.settings(directory_url=f"http://127.0.0.1:{free_port()}")
    async with serving(settings) as service:
        failed = await service.client.post(await add(service, "ada@example.com"))

    assert (failed.status_code, failed.json()["detail"]) == (502, "The user directory cannot be reached.")


async def test_unknown_user_is_not_asked_for(database: Database) -> None:
    """404 comes before any call to the directory."""

    async def answer(_email: str) -> Response:
        raise AssertionError

    async with synced(database, answer) as (service, _):
        assert (await service.client.post("/users/4711/sync")).status_code == 404


async def test_user_of_a_moment_ago_is_found(breakable_cluster: Cluster, database: Database) -> None:
    """The replica has not replayed the user, and the client says nothing of its own write."""
    async with synced(database, saying(200, PROFILE)) as (service, _):
        await breakable_cluster.pause_replay()
        try:
            path = await add(service, "late@example.com")
            service.client.cookies.clear()
            synchronised = await service.client.post(path)
        finally:
            await breakable_cluster.resume_replay()

    assert synchronised.json()["full_name"] == "Ada King"


async def test_user_deleted_meanwhile_is_404(database: Database) -> None:
    """The second half finds out that the user is gone."""
    deleted: list[httpx.Response] = []

    async def answer(_email: str) -> Response:
        deleted.append(await running[0].client.delete("/users/1"))
        return Response(PROFILE)

    running: list[Service] = []
    async with synced(database, answer) as (service, path):
        running.append(service)

        assert (await service.client.post(path)).status_code == 404
    assert deleted[0].status_code == 204


async def test_route_exists_only_with_a_directory(service: Service) -> None:
    """Without DIRECTORY_URL there is no such route, in the document neither."""
    document: dict[str, Any] = (await service.client.get("/openapi.json")).json()

    assert (await service.client.post("/users/1/sync")).status_code == 404
    assert "/users/{user_id}/sync" not in document["paths"]
