"""A POST or PATCH with an `Idempotency-Key` is done once and answered twice alike."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import date, timedelta
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from pydantic import SecretStr
from sqlalchemy import text
from starlette.background import BackgroundTask

from app.patients import queries
from app.security import Unauthorized, issue_token
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import NotFound
from pglifeguard.fastapi.idempotency import (
    HEADER,
    MAX_BYTES,
    PURGE_ROWS,
    IdempotentRoute,
    _claim,
    purge_expired,
    purge_expired_keys,
)
from pglifeguard.fastapi.sessions import ReadDB, WriteDB
from tests.conftest import Database
from tests.service import Service, serving

pytestmark = pytest.mark.shares_service
ADA = {"mrn": "K-1", "full_name": "Ada Example", "birth_date": "1980-05-17"}
ADD_SOMEBODY = text(
    "INSERT INTO patients (mrn, full_name, birth_date) SELECT gen_random_uuid()::text, 'x', '1980-01-01'::date"
)
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
    purge = asyncio.create_task(purge_expired_keys(service.databases, hours=24, interval_seconds=0.01))

    async def one_left() -> bool:
        return await count(database, "idempotency_keys") == 1

    assert await eventually(one_left, 5)
    purge.cancel()


@pytest.mark.fresh_service
async def test_housekeeping_outlives_an_outage(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """A round that cannot reach the database is logged, and the next one comes."""
    service.databases.primary.pool.close()
    purge = asyncio.create_task(purge_expired_keys(service.databases, hours=24, interval_seconds=0.01))

    async def twice() -> bool:
        return sum(record.message == "idempotency keys not purged" for record in caplog.records) >= 2

    assert await eventually(twice, 5)
    assert not purge.done()
    purge.cancel()


@pytest.mark.fresh_service
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


# What is kept


def answering(service: Service, answer: Callable[[], Response], **options: Any) -> None:
    """Add a route that stores a patient, once for each call, and gives an answer."""
    router = APIRouter(route_class=IdempotentRoute)

    @router.post("/work", **options)
    async def work(session: WriteDB) -> Response:
        await session.execute(
            text(
                "INSERT INTO patients (mrn, full_name, birth_date) VALUES (gen_random_uuid()::text, 'x', '1980-01-01')"
            )
        )
        return answer()

    service.app.include_router(router)


async def twice(service: Service, **request: Any) -> list[httpx.Response]:
    """Send the same request twice."""
    return [await service.client.post("/work", headers={HEADER: "one"}, **request) for _ in range(2)]


def cookies() -> Response:
    """Give an answer with two cookies and a header of its own."""
    response = JSONResponse({"a": 1}, 202, {"X-Own": "yes", "ETag": '"1"', "Location": "/there"})
    response.set_cookie("one", "1")
    response.set_cookie("two", "2", httponly=True)
    return response


async def lines() -> AsyncIterator[str]:
    """Give a stream."""
    for number in range(3):
        yield f"line {number}\n"


ANSWERS: dict[str, Callable[[], Response]] = {
    "JSON with cookies": cookies,
    "nothing": lambda: Response(status_code=204),
    "empty": lambda: Response(status_code=201),
    "text": lambda: PlainTextResponse("é", 203),
    "bytes": lambda: Response(b"\x00\xff", media_type="application/octet-stream"),
    "redirect": lambda: RedirectResponse("/elsewhere", 303),
    "stream": lambda: StreamingResponse(lines(), 200, {"X-Own": "yes"}, "text/csv"),
    "stream of a generator": lambda: StreamingResponse(iter(["a", "b"])),
    "file": lambda: FileResponse(__file__, filename="own.py"),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_any_answer_is_kept_whole(service: Service, database: Database, answer: Callable[[], Response]) -> None:
    """Status, body and every header of the first answer, cookies, too, are those of the second."""
    answering(service, answer)

    first, second = await twice(service)

    ours = {"x-request-id", "x-consistency-token", "set-cookie"}
    told = [
        [(n, v) for n, v in a.headers.multi_items() if n not in ours or (n == "set-cookie" and "consistency" not in v)]
        for a in (first, second)
    ]
    assert first.is_success or first.is_redirect
    assert (first.status_code, first.content) == (second.status_code, second.content)
    assert sorted(told[0]) == sorted(told[1])
    assert await count(database, "patients") == 1


async def test_stream_and_file_are_sent_as_without_a_key(service: Service) -> None:
    """The first answer with a key has what it has without one; a part of a file stays that part."""
    answering(service, ANSWERS["stream"])
    plain = await service.client.post("/work")

    keyed, _ = await twice(service)

    assert (plain.text, keyed.text) == ("line 0\nline 1\nline 2\n",) * 2
    assert keyed.headers["content-type"] == plain.headers["content-type"] == "text/csv; charset=utf-8"
    assert (keyed.headers["x-own"], keyed.headers["content-length"]) == ("yes", "21")


async def test_background_task_runs_once_and_afterwards(service: Service, database: Database) -> None:
    """It begins when the work is committed, whatever kind of answer it hangs on, and not for the second answer."""
    found: list[int] = []

    async def look() -> None:
        found.append(await count(database, "patients"))

    answering(service, lambda: StreamingResponse(lines(), background=BackgroundTask(look)))

    await twice(service)

    assert found == [1]


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (lambda: Response(b"x" * (MAX_BYTES + 1)), "longer"),
        (lambda: StreamingResponse(iter([b"x" * MAX_BYTES, b"x"])), "longer"),
        (lambda: StreamingResponse(lines(), media_type="text/event-stream"), "stream of events"),
    ],
)
async def test_answer_that_cannot_be_kept_is_refused(
    service: Service, database: Database, answer: Callable[[], Response], word: str
) -> None:
    """Before the commit: nothing is stored, the client learns what to do, and without a key it is served."""
    answering(service, answer)

    refused = await twice(service)
    stored = [await count(database, table) for table in ("patients", "idempotency_keys")]
    served = await service.client.post("/work")

    assert [(a.status_code, a.json()["code"]) for a in refused] == [(422, "idempotency_not_possible")] * 2
    assert word in refused[0].json()["detail"]
    assert stored == [0, 0]
    assert served.status_code == 200


@pytest.mark.parametrize(
    "request_", [{"data": {"a": "1"}}, {"files": {"f": b"\x00"}}, {"content": b"\xff"}, {"json": {"a": 1}}]
)
async def test_body_of_any_kind_is_part_of_the_request(service: Service, request_: dict[str, Any]) -> None:
    """It is read by the key and then by the endpoint; another body with the same key is another request."""
    router = APIRouter(route_class=IdempotentRoute)
    read: list[bytes] = []

    @router.post("/work")
    async def work(request: Request, session: WriteDB) -> int:
        read.append(b"".join([chunk async for chunk in request.stream()]))
        return int((await session.execute(text("SELECT 1"))).scalar_one())

    service.app.include_router(router)
    boundary = {"Content-Type": "multipart/form-data; boundary=b"} if "files" in request_ else {}
    headers = {HEADER: "one", **boundary}

    answers = [await service.client.post("/work", headers=headers, **request_) for _ in range(2)]
    other = await service.client.post("/work", headers={HEADER: "one"}, content=b"other")

    assert [answer.json() for answer in answers] == [1, 1]
    assert len(read) == 1
    assert read[0]
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


# Whose key it is


async def test_key_belongs_to_a_path_and_a_method(service: Service) -> None:
    """The same key for another path or method is another request, and refused."""
    answering(service, lambda: Response(b"1"))
    router = APIRouter(route_class=IdempotentRoute)
    router.add_api_route("/work", lambda: 1, methods=["PATCH"])
    router.add_api_route("/other", lambda: 1, methods=["POST"])
    service.app.include_router(router)
    key = {HEADER: "one"}

    done = await service.client.post("/work", headers=key)
    others = [await service.client.patch("/work", headers=key), await service.client.post("/other", headers=key)]
    others.append(await service.client.post("/work?a=1", headers=key))

    assert done.status_code == 200
    assert [answer.json()["code"] for answer in others] == ["idempotency_key_reused"] * 3


async def test_two_keys_are_none(service: Service) -> None:
    """A request with two keys says nothing that can be held to."""
    answer = await service.client.post("/patients", json=ADA, headers=[(HEADER, "one"), (HEADER, "two")])

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_idempotency_key")


async def test_retry_may_come_with_a_new_token(database: Database) -> None:
    """The caller is the token's subject: its next token has its answers, and another subject's has not."""
    secret = "0123456789abcdef" * 4

    def bearer(subject: str, seconds: int) -> dict[str, str]:
        lifetime = timedelta(seconds=seconds)
        token = issue_token(SecretStr(secret), subject=subject, scopes=["patients:write"], lifetime=lifetime)
        return {"Authorization": f"Bearer {token}", HEADER: "one"}

    async with serving(database.settings(auth_secret=secret, replica=False)) as service:
        first = await service.client.post("/patients", json=ADA, headers=bearer("ada", 100))
        again = await service.client.post("/patients", json=ADA, headers=bearer("ada", 200))
        other = await service.client.post("/patients", json=ADA, headers=bearer("eve", 100))

    assert (first.status_code, again.content) == (201, first.content)
    assert (other.status_code, other.json()["code"]) == (409, "mrn_taken")


async def test_dependency_may_say_who_calls(service: Service) -> None:
    """The library knows no tokens: `request.state.caller` decides whose key it is, else the header does."""

    def identify(request: Request, user: str | None = None) -> None:
        if user is not None:
            request.state.caller = user

    numbers = iter(range(10))
    answering(service, lambda: PlainTextResponse(str(next(numbers))), dependencies=[Depends(identify)])

    async def ask(user: str, token: str) -> str:
        headers = {HEADER: "one", "Authorization": f"Bearer {token}"}
        return (await service.client.post(f"/work{user}", headers=headers)).text

    assert [await ask("?user=ada", "a1"), await ask("?user=ada", "a2")] == ["0", "0"]
    assert [await ask("?user=eve", "e1"), await ask("?user=eve", "a1")] == ["1", "1"]
    assert [await ask("", "a1"), await ask("", "a2"), await ask("", "a1")] == ["2", "3", "2"]


async def test_who_is_refused_gets_no_stored_answer(service: Service) -> None:
    """The dependencies of the route decide before the key does."""
    allowed = [True, False]

    def decide() -> None:
        if not allowed.pop(0):
            raise Unauthorized("Not any more.")

    answering(service, lambda: Response(b"secret"), dependencies=[Depends(decide)])

    first, second = await twice(service)

    assert (first.status_code, second.status_code) == (200, 401)


async def test_session_that_a_dependency_opened_is_the_keys(service: Service, database: Database) -> None:
    """What a dependency writes before the key is claimed is part of the key's transaction."""

    async def touch(session: WriteDB) -> None:
        await session.rows(queries.ADD, **PATIENT)

    def fail() -> Response:
        raise NotFound("Not here.")

    answering(service, fail, dependencies=[Depends(touch)])

    assert [answer.status_code for answer in await twice(service)] == [404, 404]
    assert await count(database, "patients") == 0


async def test_claim_can_be_overridden(service: Service, database: Database) -> None:
    """A test of an endpoint alone may leave the key out."""
    answering(service, lambda: Response(b"1"))
    service.app.dependency_overrides[_claim] = lambda: None

    assert [answer.status_code for answer in await twice(service)] == [200, 200]
    assert await count(database, "patients") == 2


@pytest.mark.fresh_service
async def test_row_of_the_version_before_is_answered(service: Service, execute: Any) -> None:
    """An answer that was kept without its headers has the three that were kept."""
    first = await post(service, ADA, "one")
    await execute("UPDATE idempotency_keys SET headers = NULL")

    second = await post(service, ADA, "one")

    told = ("location", "content-type", "content-length")
    assert [second.headers[name] for name in told] == [first.headers[name] for name in told]
    assert second.content == first.content
