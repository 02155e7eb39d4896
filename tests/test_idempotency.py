"""A POST or PATCH with an `Idempotency-Key` is done once and answered twice alike."""

import asyncio
from collections.abc import AsyncIterator
from datetime import date
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import APIRouter, Depends, HTTPException
from sqlalchemy import text

from app.db.dependencies import ReadDB, WriteDB
from app.errors import NotFound
from app.idempotency import HEADER, PURGE_ROWS, IdempotentRoute, keep_house, purge_expired
from app.patients import queries
from local.waiting import eventually
from tests.conftest import Database
from tests.service import Service, serving

ADA = {"mrn": "K-1", "full_name": "Ada Example", "birth_date": "1980-05-17"}
PATIENT = ADA | {"birth_date": date(1980, 5, 17)}


async def post(service: Service, body: dict[str, Any], key: str, **headers: str) -> httpx.Response:
    """Create a patient with a key."""
    return await service.client.post("/patients", json=body, headers={HEADER: key, **headers})


async def count(database: Database, table: str) -> int:
    """Count the rows of a table."""
    connection = await asyncpg.connect(database.url("postgres"), timeout=5)
    try:
        return int(await connection.fetchval(f"SELECT count(*) FROM {table}"))  # noqa: S608  # A name of ours.
    finally:
        await connection.close()


async def test_post_is_done_once_and_answered_alike(service: Service, database: Database) -> None:
    """The second answer is the first one's, byte for byte, and makes no second patient."""
    first, second = await post(service, ADA, "one"), await post(service, ADA, "one")

    assert (first.status_code, second.status_code) == (201, 201)
    assert (second.content, second.headers["location"]) == (first.content, first.headers["location"])
    assert second.headers["content-type"] == first.headers["content-type"]
    assert await count(database, "patients") == 1


async def test_patch_is_done_once_and_answered_alike(service: Service) -> None:
    """A PATCH that is repeated after another change does not undo that change."""
    path = (await service.client.post("/patients", json=ADA)).headers["location"]
    change: dict[str, Any] = {"json": {"full_name": "Ada One"}, "headers": {HEADER: "one"}}
    first = await service.client.patch(path, **change)
    await service.client.patch(path, json={"full_name": "Ada Two"})

    second = await service.client.patch(path, **change)

    assert (first.status_code, second.content) == (200, first.content)
    last = await service.client.get(path, headers={"X-Consistency-Token": "FFFFFFFF/0"})
    assert last.json()["full_name"] == "Ada Two"


@pytest.mark.parametrize("key", ["", "x" * 256, "with\ttab", "ä"])
async def test_key_that_cannot_be_one_is_refused(service: Service, key: str) -> None:
    """A key is 1 to 255 printable ASCII characters."""
    answer = await service.client.post("/patients", json=ADA, headers={HEADER.encode(): key.encode()})

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_idempotency_key")


async def test_key_belongs_to_its_request(service: Service) -> None:
    """With another body, path or method the key is refused; nothing of the first answer is told."""
    first = await post(service, ADA, "one")

    others = [
        await post(service, ADA | {"full_name": "Eve"}, "one"),
        await service.client.post("/users", json={"email": "a@b.org", "full_name": "A"}, headers={HEADER: "one"}),
        await service.client.patch(first.headers["location"], json=ADA, headers={HEADER: "one"}),
    ]

    assert [(other.status_code, other.json()["code"]) for other in others] == [(422, "idempotency_key_reused")] * 3


async def test_key_belongs_to_its_caller(service: Service) -> None:
    """Two callers may choose the same key; neither meets the other's answer."""
    first = await post(service, ADA, "one", Authorization="Bearer a")
    second = await post(service, ADA | {"mrn": "K-2"}, "one", Authorization="Bearer b")

    assert (first.json()["mrn"], second.json()["mrn"]) == ("K-1", "K-2")


async def test_concurrent_twins_do_the_work_once(service: Service, database: Database) -> None:
    """Ten twins at the same moment are answered alike, and one patient is made."""
    answers = await asyncio.gather(*(post(service, ADA, "one") for _ in range(10)))

    assert {(answer.status_code, answer.content) for answer in answers} == {(201, answers[0].content)}
    assert await count(database, "patients") == 1


async def test_failure_frees_the_key(service: Service) -> None:
    """What was rolled back was not done: the key may be sent again, and is a new request."""
    path = (await service.client.post("/patients", json=ADA)).headers["location"]
    refused = await post(service, ADA, "one")
    await service.client.delete(path)

    again = await post(service, ADA, "one")

    assert (refused.status_code, again.status_code) == (409, 201)


async def test_key_is_forgotten_after_its_time(database: Database) -> None:
    """A key older than the setting is as good as new."""
    async with serving(database.settings(idempotency_hours=1e-9)) as service:
        first = await post(service, ADA, "one")
        second = await post(service, ADA | {"mrn": "K-2"}, "one")

    assert (first.json()["mrn"], second.json()["mrn"]) == ("K-1", "K-2")


async def test_housekeeping_deletes_what_is_forgotten(service: Service, database: Database) -> None:
    """Old keys are deleted in batches, those that are still good stay."""
    connection = await asyncpg.connect(database.url("postgres"), timeout=5)
    await connection.execute(
        """
        INSERT INTO idempotency_keys (digest, fingerprint, created_at)
        SELECT sha256(n::text::bytea), '', now() - interval '25 hours' FROM generate_series(1, $1) AS n
        """,
        2 * PURGE_ROWS + 1,
    )
    await connection.close()
    await post(service, ADA, "one")

    first = await purge_expired(service.databases, hours=24)
    assert (first, await count(database, "idempotency_keys")) == (PURGE_ROWS, PURGE_ROWS + 2)
    house = asyncio.create_task(keep_house(service.databases, hours=24, interval_seconds=0.01))

    async def one_left() -> bool:
        return await count(database, "idempotency_keys") == 1

    assert await eventually(one_left, 5)
    house.cancel()


async def test_housekeeping_outlives_an_outage(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """A round that cannot reach the database is logged, and the next one comes."""
    service.databases.primary.pool.close()
    house = asyncio.create_task(keep_house(service.databases, hours=24, interval_seconds=0.01))

    async def twice() -> bool:
        return sum(record.message == "idempotency keys not purged" for record in caplog.records) >= 2

    assert await eventually(twice, 5)
    assert not house.done()
    house.cancel()


@pytest.mark.parametrize("headers", [{}, {HEADER: "one"}], ids=["without", "with"])
async def test_end_of_a_dependency_is_part_of_the_work(
    service: Service, database: Database, headers: dict[str, str]
) -> None:
    """What it writes there is stored, and what it refuses there is taken back, with a key and without."""
    router = APIRouter(route_class=IdempotentRoute)

    async def audited(session: WriteDB, veto: bool) -> AsyncIterator[None]:  # noqa: FBT001  # FastAPI names it.
        yield
        await queries.add_patient(session, PATIENT | {"mrn": "AUDIT"})
        if veto:
            raise HTTPException(409)

    @router.post("/work", dependencies=[Depends(audited, scope="function")])
    async def work(session: WriteDB) -> None:
        await queries.add_patient(session, PATIENT)

    service.app.include_router(router)

    refused = [await service.client.post("/work?veto=true", headers=headers) for _ in range(2)]
    stored = await count(database, "patients")
    done = await service.client.post("/work?veto=false", headers=headers)

    assert [answer.status_code for answer in refused] == [409, 409]
    assert stored == 0
    assert done.status_code == 200
    assert await count(database, "patients") == 2


async def test_key_of_a_get_means_nothing(service: Service, database: Database) -> None:
    """A route with more methods than POST claims no key for a GET, which may be run once more."""
    router = APIRouter(route_class=IdempotentRoute)

    @router.api_route("/either", methods=["GET", "POST"])
    async def either(session: ReadDB) -> None:
        if (await session.execute(text("SELECT pg_is_in_recovery()"))).scalar_one():
            raise NotFound("Not here.")

    service.app.include_router(router)

    assert (await service.client.get("/either", headers={HEADER: "one"})).status_code == 200
    assert await count(database, "idempotency_keys") == 0
