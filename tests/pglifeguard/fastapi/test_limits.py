"""What a body may take: bytes, values and time; and what becomes of values that nobody can store."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel
from sqlalchemy import text
from starlette.types import Receive, Scope, Send

from pglifeguard import NotFound
from pglifeguard.errors import MEDIA_TYPE
from pglifeguard.fastapi.problems import DETAIL_CHARACTERS, ERRORS_TOLD
from pglifeguard.fastapi.sessions import ReadDB
from pglifeguard.testing.serving import listening
from tests.conftest import Database
from tests.service import ADA, Service, serving

pytestmark = pytest.mark.shares_service
KILOBYTE = 1024
JSON = b"Content-Type: application/json\r\n"


@asynccontextmanager
async def on_a_socket(app: FastAPI) -> AsyncIterator[int]:
    """Serve an application whose lifespan runs already; gives the port."""

    async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await app(scope, receive, send)

    async with listening(without_lifespan) as url:
        yield int(url.rpartition(":")[2])


async def answer_to(port: int, *pieces: bytes) -> tuple[bytes, dict[str, Any]]:
    """Send pieces and no more, and read: the head of the answer, and its document."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.splitlines() if line.startswith(b"content-length:"))
        body = await reader.readexactly(length)
    writer.close()
    return head, json.loads(body)


@pytest.fixture
async def small(database: Database) -> AsyncIterator[Service]:
    """Give a service that takes bodies of a kilobyte, of ten values, within half a second."""
    limits = {"request_body_bytes": KILOBYTE, "request_body_values": 10, "request_body_seconds": 0.5}
    async with serving(database.settings(replica=False, **limits)) as service:
        yield service


async def test_body_at_the_limit_is_read_and_one_byte_more_is_not(small: Service) -> None:
    """The limit is what it says, to the byte."""
    patient = json.dumps(ADA).encode()

    fits = await small.client.post(
        "/patients", content=patient.ljust(KILOBYTE), headers={"Content-Type": "application/json"}
    )
    refused = await small.client.post(
        "/patients", content=patient.ljust(KILOBYTE + 1), headers={"Content-Type": "application/json"}
    )

    assert fits.status_code == 201
    assert (refused.status_code, refused.json()["code"]) == (413, "body_too_large")
    assert refused.headers["content-type"] == MEDIA_TYPE
    assert refused.headers["x-request-id"]


@pytest.mark.parametrize("length", [b"1025", b"999999999999"])
async def test_announced_body_is_refused_before_any_of_it_is_sent(small: Service, length: bytes) -> None:
    """A client that asks whether it may send is told no; it is not told to go on first."""
    async with on_a_socket(small.app) as port:
        head, document = await answer_to(
            port,
            b"POST /patients HTTP/1.1\r\nHost: x\r\n" + JSON,
            b"Content-Length: " + length + b"\r\nExpect: 100-continue\r\n\r\n",
        )

    assert head.startswith(b"HTTP/1.1 413")
    assert document["code"] == "body_too_large"


async def test_chunks_are_refused_where_they_pass_the_limit(small: Service) -> None:
    """A body without a length is not read to its end, which never comes here."""
    chunk = b"200\r\n" + b" " * 0x200 + b"\r\n"
    async with on_a_socket(small.app) as port:
        head, document = await answer_to(
            port,
            b"POST /patients HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + JSON + b"\r\n",
            chunk * 3,
        )

    assert head.startswith(b"HTTP/1.1 413")
    assert document["code"] == "body_too_large"


async def test_large_body_is_answered_to_a_client_that_sends_all_of_it(service: Service) -> None:
    """An ordinary client, which looks for an answer when it has sent everything, gets it."""
    async with on_a_socket(service.app) as port, httpx.AsyncClient(trust_env=False) as client:
        url = f"http://127.0.0.1:{port}/patients"
        answers = [
            await client.post(url, content=b"x" * size, headers={"Content-Type": "application/json"})
            for size in (1_100_000, 5_300_000)
        ]

    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(413, "body_too_large")] * 2


async def test_slow_body_is_over_in_time(small: Service) -> None:
    """The time is for all of it: a byte now and then does not prolong it."""

    async def drip(writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(b" ")
            await asyncio.sleep(0.05)

    async with on_a_socket(small.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /patients HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n" + JSON + b"\r\n{")
        dripping = asyncio.create_task(drip(writer))
        received = b""
        # A byte that comes after the answer, when the server has closed, is answered by a reset.
        async with asyncio.timeout(10):
            with suppress(ConnectionResetError):
                while block := await reader.read(65_536):
                    received += block
        dripping.cancel()
        writer.close()

    assert received.startswith(b"HTTP/1.1 408")
    assert b'"code":"body_too_slow"' in received
    assert small.sample("http_requests_total", method="POST", route="/patients", status="408") == 1


async def test_values_are_counted_before_they_are_parsed(small: Service) -> None:
    """Ten values are read, eleven are not; what is no JSON is not counted."""
    headers = {"Content-Type": "application/json"}

    ten = await small.client.post("/patients", content=json.dumps(dict.fromkeys("abcdefghij")), headers=headers)
    eleven = await small.client.post("/patients", content=json.dumps(dict.fromkeys("abcdefghijk")), headers=headers)
    prose = await small.client.post("/patients", content="well, " * 20, headers={"Content-Type": "text/plain"})

    assert (ten.status_code, len(ten.json()["errors"])) == (422, 13)
    assert (eleven.status_code, eleven.json()["code"]) == (413, "body_too_large")
    assert (prose.status_code, prose.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize(
    "headers",
    [
        [("Content-Type", "Application/JSON")],
        [("Content-Type", "application/problem+Json; charset=utf-8")],
        [("Content-Type", "application/json"), ("Content-Type", "text/plain")],
    ],
)
async def test_values_are_counted_however_json_is_spelt(small: Service, headers: list[tuple[str, str]]) -> None:
    """What FastAPI takes for JSON is counted as JSON."""
    body = json.dumps(dict.fromkeys("abcdefghijk"))

    answer = await small.client.post("/patients", content=body, headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


async def test_route_may_take_more(small: Service) -> None:
    """FastAPI's own `max_body_size` of a route goes before the setting, either way."""

    async def take(request: Request) -> int:
        return len(await request.body())

    small.app.add_api_route("/more", take, methods=["POST"], max_body_size=4 * KILOBYTE)
    small.app.add_api_route("/less", take, methods=["POST"], max_body_size=10)

    more = await small.client.post("/more", content=b"x" * 3 * KILOBYTE)
    less = await small.client.post("/less", content=b"x" * 11)

    assert (more.json(), less.status_code) == (3 * KILOBYTE, 413)


async def test_body_that_nobody_reads_is_not_waited_for(small: Service) -> None:
    """A path that leads nowhere says so at once, however much is announced."""
    async with on_a_socket(small.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
        writer.close()

    assert head.startswith(b"HTTP/1.1 404")


async def test_answer_to_many_mistakes_is_short(database: Database) -> None:
    """As many mistakes as a body may hold, each with a name as long as can be: twenty are told, and shortened."""
    unknown = {f"{number:03}" + "k" * 900: 1 for number in range(990)}

    async with serving(database.settings(replica=False, request_body_bytes=1_048_576)) as service:
        answer = await service.client.post("/patients", json=unknown)

    document = answer.json()
    assert (answer.status_code, document["code"]) == (422, "invalid_request")
    assert len(document["errors"]) == ERRORS_TOLD
    assert document["omitted"] == 993 - ERRORS_TOLD
    assert len(answer.content) < 10_000


async def test_sentence_of_an_error_is_short(service: Service) -> None:
    """What a route repeats of the request in its own error is cut off, and says so."""

    async def fail(name: str) -> None:
        raise NotFound(f"There is no {name}.")

    service.app.add_api_route("/fail", fail)

    answer = await service.client.get("/fail", params={"name": "x" * 5000})

    detail = answer.json()["detail"]
    assert (answer.status_code, len(detail), detail[-2:]) == (404, DETAIL_CHARACTERS + 1, "x…")


async def test_pool_that_a_client_makes_up_is_not_repeated(service: Service) -> None:
    """An operator's order for a pool with a name without end is refused before anybody looks for it."""
    answer = await service.client.post("/debug/drain", params={"pool": "x" * 5000})

    assert (answer.status_code, len(answer.content) < 1000) == (422, True)


class Anything(BaseModel):
    """A body that lets everything through."""

    value: Any


HOSTILE = {
    "64 kB of brackets": b"[" * 65_536,
    "64 kB of braces": b'{"":' * 16_384,
    "brackets in half a string": b'{"value":"' + b'[\\"' * 20_000,
    "deeper than serializers go": b'{"value":' + b"[" * 300 + b"]" * 300 + b"}",
    "deep array": b'{"value":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"value":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    "long integer": b'{"value":' + b"9" * 5000 + b"}",
    "long string": b'{"value":"' + b"x" * 1_000_000 + b'"}',
    "large float": b'{"value":1e999}',
    "NaN": b'{"value":NaN}',
    "Infinity": b'{"value":-Infinity}',
    "no UTF-8": b'{"value":"\xff\xfe"}',
    "half a surrogate pair": b'{"value":"\\ud800"}',
    "NUL": b'{"value":"\\u0000"}',
    "raw NUL": b'{"value":"\0"}',
    "UTF-16": '{"value":1}'.encode("utf-16"),
    "nothing": b"",
    "not JSON": b"{",
    "twice the same": b'{"value":1,"value":2}',
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_body_is_the_clients_mistake(service: Service, name: str) -> None:
    """Neither routes that are strict nor one that lets anything through and stores it fails by a body: never a 500."""

    async def keep(session: ReadDB, body: Anything) -> str:
        result = await session.execute(text("SELECT CAST(:value AS text)"), {"value": str(body.value)})
        return str(result.scalar_one())[:10]

    service.app.add_api_route("/anything", keep, methods=["POST"])
    headers = {"Content-Type": "application/json"}

    started = time.process_time()
    strict = [
        await service.client.request(method, path, content=HOSTILE[name], headers=headers)
        for method, path in (("POST", "/patients"), ("PATCH", "/patients/1"), ("POST", "/users"))
    ]
    lenient = await service.client.post("/anything", content=HOSTILE[name], headers=headers)

    assert {answer.status_code for answer in strict} <= {400, 413, 422}
    assert lenient.status_code in {200, 400, 413, 422}, lenient.text
    # Of this process, whatever else the machine does: four requests, each of which takes milliseconds.
    assert time.process_time() - started < 2
    for answer in [*strict, lenient]:
        assert len(answer.content) < 10_000
        assert answer.status_code == 200 or answer.headers["content-type"] == MEDIA_TYPE
    assert service.sample("http_requests_total", method="POST", route="/anything", status="500") == 0


@pytest.mark.parametrize("depth", [100, 101])
async def test_json_nests_as_deep_as_may_be(service: Service, depth: int) -> None:
    """At the limit a route takes any JSON and gives it back; one deeper is refused before it is parsed."""

    async def echo(body: list[Any]) -> Any:
        return body

    service.app.add_api_route("/echo", echo, methods=["POST"], response_model=Any)
    text = b"[" * depth + b'"' + b"[" * 200 + b'"' + b"]" * depth

    answer = await service.client.post("/echo", content=text, headers={"Content-Type": "application/json"})

    assert (answer.status_code, answer.content == text) == ((200, True) if depth == 100 else (413, False))


async def test_depth_is_counted_over_chunks(small: Service) -> None:
    """A body that comes bracket by bracket is refused at the one that is too many, and not at its end."""

    async def take(body: list[Any]) -> None:
        """Take any JSON."""

    small.app.add_api_route("/take", take, methods=["POST"])
    piece = b"1\r\n[\r\n"
    deep = small.app.state.databases.settings.request_body_values + 1
    async with on_a_socket(small.app) as port:
        head, document = await answer_to(
            port, b"POST /take HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + JSON + b"\r\n", *[piece] * deep
        )

    assert head.startswith(b"HTTP/1.1 413")
    assert document["code"] == "body_too_large"


@pytest.mark.parametrize("separate", [False, True])
async def test_depth_is_counted_however_a_body_comes(database: Database, *, separate: bool) -> None:
    """In one piece or in many: three in each other are too many where two may be, and beside each other not."""
    async with serving(database.settings(replica=False, request_body_depth=2)) as service:

        async def take(body: list[Any]) -> Any:
            return body

        async def pieces(text: bytes) -> AsyncIterator[bytes]:
            for byte in text:
                yield bytes([byte])

        service.app.add_api_route("/take", take, methods=["POST"], response_model=Any)
        answers = [
            await service.client.post(
                "/take", content=pieces(text) if separate else text, headers={"Content-Type": "application/json"}
            )
            for text in (b'[[1],[2],["[[["]]', b"[[[1]]]")
        ]

    assert [answer.status_code for answer in answers] == [200, 413]
    assert answers[1].json()["detail"] == "The body nests more than 2 deep."


@pytest.mark.parametrize(
    ("sql", "value"),
    [
        ("SELECT CAST(:value AS text)", "a\0b"),
        ("SELECT CAST(:value AS text)", "\ud800"),
        ("SELECT CAST(:value AS bigint)", 2**63),
        ("SELECT CAST(:value AS integer) + 1", 2**31 - 1),
        ("SELECT CAST(:value AS jsonb)", '"\\u0000"'),
    ],
)
async def test_value_that_cannot_be_stored_is_the_clients_mistake(service: Service, sql: str, value: object) -> None:
    """A schema that lets through what PostgreSQL cannot store makes a 422, not a 500."""

    async def ask(session: ReadDB) -> str:
        return str((await session.execute(text(sql), {"value": value})).scalar_one())

    service.app.add_api_route("/ask", ask)

    answer = await service.client.get("/ask")

    assert (answer.status_code, answer.json()["code"]) == (422, "unstorable_value")


async def test_value_of_the_wrong_type_is_a_bug(service: Service) -> None:
    """A query that was given a string for a number is our mistake, whatever the client sent."""

    async def ask(session: ReadDB) -> str:
        return str((await session.execute(text("SELECT CAST(:value AS bigint)"), {"value": "x"})).scalar_one())

    service.app.add_api_route("/ask", ask)

    assert (await service.client.get("/ask")).status_code == 500


@pytest.mark.parametrize(
    "path",
    [
        f"/patients/{2**63}",
        f"/patients/{'9' * 5000}",
        "/patients/%00",
        "/patients/1%00",
        "/patients/NaN",
        "/patients?name=%00",
        "/patients?name=%ED%A0%80",
        "/patients?mrn=%FF",
        "/patients?limit=1e9",
        f"/patients?limit={'9' * 5000}",
        "/patients?after=%00",
        "/patients?" + "&".join(f"p{number}=1" for number in range(2000)),
        "/patients?" + "&".join("limit=1" for _ in range(2000)),
        "/patients?name=" + "x" * 20_000,
        "/patients?;&&==&%&%zz",
    ],
    ids=lambda path: path[:24],
)
async def test_hostile_url_is_the_clients_mistake(service: Service, path: str) -> None:
    """Whatever stands in a path or a query is answered, shortly, and never with a 500."""
    answer = await service.client.get(httpx.URL("http://test" + path))

    assert answer.status_code in {200, 404, 414, 422}
    assert len(answer.content) < 10_000


async def test_url_at_the_limit_is_read_and_one_byte_more_is_not(service: Service) -> None:
    """Path and query together, as they came; and a thousand parameters, and not one more."""
    most = service.databases.settings.request_url_bytes
    urls = [
        "/patients?" + "a" * (most - len("/patients")),
        "/patients?" + "a" * (most - len("/patients") + 1),
        "/patients?" + "&" * 999,
        "/patients?" + "&" * 1000,
        "/" + "%41" * 2800,
    ]

    answers = [await service.client.get(url) for url in urls]

    assert [answer.status_code for answer in answers] == [200, 414, 200, 414, 414]
    assert {answer.json()["code"] for answer in answers if answer.status_code == 414} == {"url_too_long"}


async def test_many_cookies_are_nothing(service: Service) -> None:
    """A thousand cookies, and one that is the service's own, are read past."""
    cookies = "; ".join(f"c{number}=1" for number in range(1000)) + "; consistency_token=zz/zz"

    answer = await service.client.get("/patients", headers={"Cookie": cookies})

    assert answer.status_code == 200
