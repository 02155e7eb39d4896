"""What every request passes through: its id, the metrics, the last resort, and the token."""

import asyncio
import re
from collections.abc import AsyncIterator
from urllib.parse import quote

import asyncpg
import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.types import Message, Receive, Scope, Send

from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import MEDIA_TYPE
from pglifeguard.fastapi.middleware import ObserveRequests, ReadYourWrites
from pglifeguard.sampling import Sampler
from pglifeguard.testing.serving import Running, listening
from pglifeguard.wait_queue import client_key
from tests.conftest import Database
from tests.service import ADA, Service, serving, write

# The request id


async def test_plain_id_of_the_client_is_kept(service: Service) -> None:
    """An id that a proxy gave goes through the log and comes back."""
    answer = await service.client.get("/health/live", headers={"X-Request-ID": "trace-1.2_3"})

    assert answer.headers.get_list("x-request-id") == ["trace-1.2_3"]


@pytest.mark.parametrize("given", ["", "two words", "x" * 65, 'a"b', "ünïcode", "a\tb"])
async def test_other_id_is_replaced(service: Service, given: str) -> None:
    """What could forge a log line or fill it is not repeated."""
    answer = await service.client.get("/health/live", headers={b"X-Request-ID": given.encode()})

    assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["x-request-id"])


async def test_each_request_has_an_id_of_its_own(service: Service) -> None:
    """Errors have one too, and no two are alike."""
    answers = await asyncio.gather(*(service.client.get(path) for path in ["/patients/1", "/x", "/users"] * 10))

    assert len({answer.headers["x-request-id"] for answer in answers}) == 30


@pytest.mark.parametrize("by_address", [True, False])
async def test_clients_are_told_apart_by_address_where_that_is_said(database: Database, *, by_address: bool) -> None:
    """The address is that of the last proxy unless it reports another one, so it is no key by default."""
    seen: list[str | None] = []

    async def look() -> None:
        seen.append(client_key.get())

    async with serving(database.settings(clients_by_address=by_address, replica=False)) as running:
        running.app.add_api_route("/look", look)
        await running.client.get("/look")

    assert seen == ["127.0.0.1" if by_address else None]


# The metrics


async def test_requests_are_counted_by_template(service: Service) -> None:
    """The label is the route's template, whatever the path; unknown paths and methods have one label each."""
    for number in range(3):
        await service.client.get(f"/patients/{number + 1}")
        await service.client.get(f"/nothing/{number}")
        await service.client.request(f"ODD{number}", "/patients")

    def counted(method: str, route: str, status: str) -> float:
        return service.sample("http_requests_total", method=method, route=route, status=status)

    assert counted("GET", "/patients/{patient_id}", "404") == 3
    assert counted("GET", "unmatched", "404") == 3
    assert counted("other", "unmatched", "405") == 3
    assert service.sample("http_request_seconds_count", method="GET", route="/patients/{patient_id}") == 3
    assert service.sample("http_requests_in_progress") == 0


async def test_nobody_makes_the_figures_grow(service: Service) -> None:
    """Whatever methods, paths, parameters and cookies come, there is a handful of series for all of them."""
    metrics = service.databases.metrics

    async def roam(number: int) -> None:
        method = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", f"M{number}", f"x{number}")[number % 7]
        for path in (f"/x{number}", f"/patients?p{number}=1", "/users", "/health/live", f"/metrics/{number}", "/docs"):
            await service.client.request(method, path, headers={"X-Request-ID": str(number), "Cookie": f"c{number}=1"})

    def series() -> set[str]:
        # A pool may have opened another connection meanwhile: those figures are the service's own doing.
        samples = (sample for family in metrics.registry.collect() for sample in family.samples)
        return {f"{sample.name}{sample.labels}" for sample in samples if sample.name.startswith("http_")}

    for number in range(7):
        await roam(number)
    before = series()
    for number in range(7, 70):
        await roam(number)

    assert series() == before
    counted = [sample.labels for family in metrics.http_requests.collect() for sample in family.samples]
    assert {labels["route"] for labels in counted if labels["method"] != "GET"} == {"unmatched"}


async def test_request_in_progress_is_counted(service: Service) -> None:
    """The gauge goes up while a request is worked on, and down again."""
    arrived, may_go = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        arrived.set()
        await may_go.wait()

    service.app.add_api_route("/wait", wait)
    waiting = asyncio.create_task(service.client.get("/wait"))
    await arrived.wait()

    during = service.sample("http_requests_in_progress")
    may_go.set()
    await waiting

    assert (during, service.sample("http_requests_in_progress")) == (1, 0)


async def test_cancelled_request_is_counted_and_over(service: Service) -> None:
    """A request that the server gives up is counted as failed, and no longer in progress."""
    arrived = asyncio.Event()

    async def wait() -> None:
        arrived.set()
        await asyncio.Event().wait()

    service.app.add_api_route("/wait", wait)
    waiting = asyncio.create_task(service.client.get("/wait"))
    await arrived.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert service.sample("http_requests_in_progress") == 0
    assert service.sample("http_requests_total", method="GET", route="/wait", status="503") == 1


# Clients that leave


LEAVING = {
    "in the middle of an upload": b"POST /patients HTTP/1.1\r\nHost: x\r\n%sContent-Length: 100\r\n\r\n{",
    "in the middle of an upload with a key": (
        b"POST /patients HTTP/1.1\r\nHost: x\r\nIdempotency-Key: a\r\n%sContent-Length: 100\r\n\r\n{"
    ),
    "in the middle of a chunk": b"POST /patients HTTP/1.1\r\nHost: x\r\n%sTransfer-Encoding: chunked\r\n\r\n5\r\n{",
    "in the middle of a stream": b"GET /stream HTTP/1.1\r\nHost: x\r\n%s\r\n",
}


@pytest.mark.parametrize("when", LEAVING)
async def test_client_that_leaves_is_no_failure_of_ours(
    service: Service, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is counted with a status of its own, no longer in progress, and the log has no error of it."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"more and "
            await asyncio.sleep(0.01)

    async def stream() -> StreamingResponse:
        return StreamingResponse(endless())

    service.app.add_api_route("/stream", stream)
    path = LEAVING[when].split(b" ", 2)[1].decode()
    method = LEAVING[when].split(b" ", 1)[0].decode()

    async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await service.app(scope, receive, send)

    async def at_work() -> bool:
        return service.sample("http_requests_in_progress") == 1

    async def left() -> bool:
        return service.sample("http_requests_total", method=method, route=path, status="499") == 1

    async with listening(without_lifespan) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(LEAVING[when] % b"Content-Type: application/json\r\n")
        assert await eventually(at_work, 5)
        writer.transport.abort()
        assert await eventually(left, 5)

    assert service.sample("http_requests_in_progress") == 0
    assert [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}] == []


BROKEN_OFF = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"


async def break_off(service: Service, path: str, *, route: str) -> None:
    """Leave in the middle of an upload, over plain uvicorn, which tells nobody; return when it counts as 499."""

    async def at_work() -> bool:
        return service.sample("http_requests_in_progress") == 1

    async def left() -> bool:
        return service.sample("http_requests_total", method="POST", route=route, status="499") == 1

    async with listening(Running(service.app)) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(BROKEN_OFF % path.encode())
        assert await eventually(at_work, 5)
        writer.transport.abort()
        assert await eventually(left, 5)


async def test_broken_off_upload_is_no_failure_to_a_layer_outside(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """A BaseHTTPMiddleware that the application adds outside of this gets an answer, and makes no error of it."""
    statuses = []

    async def look(request: Request, call_next: RequestResponseEndpoint) -> Response:
        answer = await call_next(request)
        statuses.append(answer.status_code)
        return answer

    service.app.add_middleware(BaseHTTPMiddleware, dispatch=look)

    await break_off(service, "/patients", route="/patients")

    assert statuses == [499]
    assert [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}] == []


@pytest.mark.parametrize("path", ["/upload", "/raw"])
async def test_broken_off_upload_to_a_mounted_application_counts_alike(
    service: Service, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the mounted application answers, FastAPI's own 400 or Starlette's own 500, its client has left."""
    mounted = FastAPI()

    @mounted.post("/upload")
    async def upload(body: dict[str, str]) -> dict[str, str]:
        return body

    @mounted.post("/raw")
    async def raw(request: Request) -> int:
        return len(await request.body())

    service.app.mount("/mounted", mounted)

    await break_off(service, f"/mounted{path}", route=path)

    assert [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}] == []


async def test_body_that_was_not_read_is_not_broken_off(service: Service) -> None:
    """Once a request is answered, the server says that its client has left to whoever reads the rest of the body."""
    seen = []

    @service.app.post("/early")
    async def answer_early(request: Request) -> Response:
        async def read_on() -> None:
            seen.append((await request.receive())["type"])

        return Response(status_code=202, background=BackgroundTask(read_on))

    async with listening(Running(service.app)) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(BROKEN_OFF % b"/early")

        async def counted() -> bool:
            return service.sample("http_requests_total", method="POST", route="/early", status="202") == 1

        assert await eventually(counted, 5)
        writer.transport.abort()

    assert seen == ["http.disconnect"]


# The last resort


async def test_unforeseen_failure_is_a_problem_document(service: Service) -> None:
    """A bug is a 500 as a problem, with the request id, counted, and without a word of what went wrong."""

    async def fail() -> None:
        raise RuntimeError("the secret of Ada Lovelace")

    service.app.add_api_route("/fail", fail)

    answer = await service.client.get("/fail")

    assert (answer.status_code, answer.headers["content-type"]) == (500, MEDIA_TYPE)
    assert answer.json()["code"] == "internal_error"
    assert answer.headers["x-request-id"]
    assert "Ada" not in answer.text
    assert service.sample("http_requests_total", method="GET", route="/fail", status="500") == 1


async def test_failure_after_the_start_of_an_answer_is_the_servers(service: Service) -> None:
    """What has begun cannot be answered again: the failure goes on to the server, which cuts the connection."""

    async def broken() -> AsyncIterator[bytes]:
        yield b"half of "
        raise RuntimeError("a bug")

    async def stream() -> StreamingResponse:
        return StreamingResponse(broken())

    service.app.add_api_route("/stream", stream)

    with pytest.raises(RuntimeError, match="a bug"):
        await service.client.get("/stream")


@pytest.mark.parametrize(("method", "code"), [("GET", "closing"), ("POST", "outcome_unknown")])
async def test_request_cut_by_a_shutdown_is_answered(service: Service, method: str, code: str) -> None:
    """What uvicorn cancels when the grace is over gets a problem document, not uvicorn's own plain text."""
    at_work = asyncio.Event()

    async def endless() -> None:
        at_work.set()
        await asyncio.Event().wait()

    service.app.add_api_route("/endless", endless, methods=[method])

    async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await service.app(scope, receive, send)

    async with httpx.AsyncClient(trust_env=False) as client:
        async with listening(without_lifespan) as url:
            request = asyncio.create_task(client.request(method, f"{url}/endless"))
            await at_work.wait()
        answer = await request

    assert (answer.status_code, answer.headers["content-type"]) == (503, MEDIA_TYPE)
    assert (answer.json()["code"], answer.headers["retry-after"]) == (code, "1")


async def test_answer_cut_by_a_cancel_stays_cut(service: Service) -> None:
    """What has begun when the server gives a request up is not answered a second time."""
    begun = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"half of "
        begun.set()
        await asyncio.Event().wait()

    async def stream() -> StreamingResponse:
        return StreamingResponse(endless())

    service.app.add_api_route("/stream", stream)
    reading = asyncio.create_task(service.client.get("/stream"))
    await begun.wait()
    reading.cancel()

    with pytest.raises(asyncio.CancelledError):
        await reading

    assert service.sample("http_requests_total", method="GET", route="/stream", status="200") == 1


async def test_other_scopes_pass_through(service: Service) -> None:
    """Lifespan and websockets are none of these layers' business."""
    seen: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope)

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError(message)

    metrics, scope = service.databases.metrics, {"type": "websocket"}
    for layer in (ObserveRequests(app, metrics, Sampler()), ReadYourWrites(app, metrics, service.app.state.settings)):
        await layer(scope, receive, send)

    assert seen == [{"type": "websocket"}] * 2


# Read your writes


async def test_write_answers_with_its_position(service: Service, database: Database) -> None:
    """Header and cookie carry an LSN at which the write is visible; reads carry none."""
    created = await service.client.post("/patients", json=ADA)
    read = await service.client.get("/patients")

    token = created.headers["x-consistency-token"]
    assert re.fullmatch(r"[0-9a-f]{1,8}-1-[0-9A-F]{1,8}/[0-9A-F]{1,8}", token)
    assert created.headers["set-cookie"] == (f"consistency_token={token}; Max-Age=3600; Path=/; HttpOnly; SameSite=Lax")
    assert "x-consistency-token" not in read.headers
    owner = await asyncpg.connect(database.url("app_owner"))
    lsn = token.rpartition("-")[2]
    assert await owner.fetchval("SELECT $1::text::pg_lsn <= pg_current_wal_insert_lsn()", lsn)
    await owner.close()


async def test_two_services_on_one_domain_keep_their_cookies_apart(database: Database) -> None:
    """Name, path, domain and Secure are settings; a service takes its own cookie and no other's."""
    other = database.settings(
        consistency_cookie_name="__Secure-billing",
        consistency_cookie_path="/billing",
        consistency_cookie_domain="example.com",
        consistency_cookie_secure=True,
    )
    async with serving(other) as billing:
        created = await billing.client.post("/users", json={"email": "ada@example.com", "full_name": "Ada"})
        await billing.client.get("/users", headers={"Cookie": "consistency_token=FFFFFFFF/0"})
        await billing.client.get("/users", headers={"Cookie": "a=b; __Secure-billing=0/1; x__Secure-billing=z"})
        accepted = billing.sample("db_consistency_tokens_total", outcome="accepted")
        malformed = billing.sample("db_consistency_tokens_total", outcome="malformed")

    token = created.headers["x-consistency-token"]
    assert created.headers["set-cookie"] == (
        f"__Secure-billing={token}; Max-Age=3600; Path=/billing; Domain=example.com; Secure; HttpOnly; SameSite=Lax"
    )
    assert (accepted, malformed) == (1, 0)


@pytest.mark.parametrize("root_path", ["/billing", "/a b;c"])
async def test_cookie_belongs_to_where_the_service_is(service: Service, root_path: str) -> None:
    """Beneath a prefix it is sent to this service alone, and a prefix cannot write anything else into the header."""
    transport = httpx.ASGITransport(app=service.app, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        created = await client.post("/patients", json=ADA)

    assert f"; Path={quote(root_path)}; HttpOnly; SameSite=Lax" in created.headers["set-cookie"]


@pytest.mark.parametrize("way", ["header", "cookie", "newer header", "newer cookie"])
async def test_client_reads_what_it_wrote(behind: Service, way: str) -> None:
    """With the token in either place a list on a replica that is behind comes from the primary."""
    token = (await write(behind)).headers["x-consistency-token"]
    without = await behind.client.get("/patients")
    in_header = "0/1" if way == "newer cookie" else token
    in_cookie = "0/1" if way == "newer header" else token
    headers = {"X-Consistency-Token": in_header} if way != "cookie" else {}
    if way != "header":
        headers["Cookie"] = f"other=1; consistency_token={in_cookie}; more=2"

    with_token = await behind.client.get("/patients", headers=headers)

    assert without.json() == []
    assert [patient["mrn"] for patient in with_token.json()] == ["A-1"]
    assert behind.sample("db_reads_routed_total", target="primary", reason="behind_token") == 1


async def test_token_that_was_reached_reads_from_the_replica(service: Service, database: Database) -> None:
    """Once the replica has replayed the write, the token costs the primary nothing."""
    token = (await write(service)).headers["x-consistency-token"]
    await database.cluster.wait_replayed()

    async def from_replica() -> bool:
        before = service.sample("db_reads_routed_total", target="replica", reason="replica")
        answer = await service.client.get("/patients", headers={"X-Consistency-Token": token})
        assert [patient["mrn"] for patient in answer.json()] == ["A-1"]
        return service.sample("db_reads_routed_total", target="replica", reason="replica") > before

    assert await eventually(from_replica, 5)


@pytest.mark.parametrize("token", ["", "x", "1/2/3", "G/1", "123456789/1", "1/", "/1", "ä/1"])
async def test_malformed_token_is_ignored_and_counted(service: Service, token: str) -> None:
    """Anything else than an LSN asks for nothing."""
    headers = ({b"X-Consistency-Token": token.encode()}, {b"Cookie": b"consistency_token=" + token.encode()})

    answers = [await service.client.get("/patients", headers=header) for header in headers]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert service.sample("db_consistency_tokens_total", outcome="malformed") >= 1
    assert service.sample("db_reads_routed_total", target="primary", reason="behind_token") == 0


async def test_service_without_a_replica_gives_no_token(database: Database) -> None:
    """There is one place to read: a token would cost a round trip for nothing."""
    async with serving(database.settings(replica=False)) as service:
        assert "x-consistency-token" not in (await write(service)).headers
