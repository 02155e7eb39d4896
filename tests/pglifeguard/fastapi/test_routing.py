"""A request finds its own route, wherever the service is mounted, and no other."""

import httpx
import pytest
from fastapi import APIRouter
from sqlalchemy import text

from pglifeguard.errors import NotFound
from pglifeguard.fastapi.sessions import ReadDB
from tests.service import Service


@pytest.mark.parametrize("root_path", ["", "/api", "/api/v1"])
async def test_root_path_is_no_part_of_a_route(service: Service, root_path: str) -> None:
    """A proxy that serves the application below a path changes nothing in what it finds there."""
    transport = httpx.ASGITransport(app=service.app, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        found = await client.get(f"{root_path}/patients")
        missing = await client.get(f"{root_path}/patients/1/notes")

    assert (found.status_code, found.json()) == (200, [])
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")


async def test_router_may_be_included(service: Service) -> None:
    """FastAPI's own way to put routers together, with prefixes, finds the same routes."""
    inner, outer = APIRouter(prefix="/notes"), APIRouter(prefix="/archive")

    @inner.get("/{number}")
    async def get_note(number: int, session: ReadDB) -> int:
        if (await session.execute(text("SELECT pg_is_in_recovery()"))).scalar_one():
            raise NotFound("Not on the replica.")
        return number

    @inner.delete("/{number}")
    async def delete_note(number: int) -> None:
        raise AssertionError(number)

    outer.include_router(inner)
    service.app.include_router(outer, prefix="/v1")

    found = await service.client.get("/v1/archive/notes/7")
    refused = await service.client.put("/v1/archive/notes/7")
    missing = await service.client.get("/archive/notes/7")

    assert (found.status_code, found.json()) == (200, 7)
    assert (refused.status_code, refused.headers["allow"]) == (405, "DELETE, GET")
    assert missing.status_code == 404
    assert (await service.client.get("/patients")).status_code == 200
    route = "/v1/archive/notes/{number}"
    assert service.sample("http_requests_total", method="GET", route=route, status="200") == 1
    assert service.sample("db_connection_hold_seconds_count", pool="primary", route=route) == 1


@pytest.mark.parametrize("path", ["/patients/", "/Patients", "/patient", "/patientss", "//patients", "/", "/redoc"])
async def test_path_is_exact(service: Service, path: str) -> None:
    """What is nearly a path is none, and leads nowhere else."""
    answer = await service.client.get(path)

    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert service.sample("http_requests_total", method="GET", route="unmatched", status="404") == 1


async def test_method_that_no_route_has(service: Service) -> None:
    """A path that is there answers another method with those that it has."""
    answer = await service.client.put("/patients/7")

    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "DELETE, GET, PATCH"
