"""Every answer of the service says what a browser may do with it, and the cookie that it comes with stays on HTTPS."""

import httpx
import pytest
from fastapi import FastAPI, Response

from pglifeguard.fastapi import AnswerHeaders, Lifeguard
from pglifeguard.testing.serving import Running, listening, running
from tests.conftest import Database
from tests.service import ADA, Service, serving

pytestmark = pytest.mark.shares_service
PRIVATE = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
HSTS = "strict-transport-security"


def by_https(service: Service) -> httpx.AsyncClient:
    """Give a client that has come by HTTPS, as the server says."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="https://test")


async def test_every_answer_is_private(service: Service) -> None:
    """Of routes, of errors about them, of what is no route, of HEAD, and of the last resort."""

    async def fail() -> None:
        raise ZeroDivisionError

    service.app.add_api_route("/fail", fail)
    created = await service.client.post("/patients", json=ADA)
    path = f"/patients/{created.json()['id']}"
    answers = [
        created,
        *[await service.client.get(one) for one in (path, "/patients", "/patients/999999", "/nothing", "/fail")],
        *[await service.client.get(one) for one in ("/health/ready", "/metrics", "/openapi.json", "/patients?limit=x")],
        await service.client.get(
            path, headers={"If-None-Match": "*", "If-Modified-Since": "Mon, 01 Jan 2035 00:00:00 GMT"}
        ),
        await service.client.head(path),
        await service.client.request("TRACE", path),
        await service.client.post("/patients", content=b"{", headers={"Content-Type": "application/json"}),
        await service.client.post("/patients", json="x" * 70_000),
        await service.client.get("/patients?" + "a" * 9000),
        await service.client.delete(path),
    ]

    assert {answer.status_code for answer in answers} == {200, 201, 204, 404, 405, 413, 414, 422, 500}
    for answer in answers:
        assert {name: answer.headers.get_list(name) for name in PRIVATE} == {n: [v] for n, v in PRIVATE.items()}
        assert HSTS not in answer.headers


async def test_route_has_the_last_word(service: Service) -> None:
    """A header that an endpoint sets stands alone, in whatever case it wrote it."""

    async def look(response: Response) -> None:
        response.headers["CACHE-CONTROL"] = "public, max-age=60"

    service.app.add_api_route("/look", look)

    answer = await service.client.get("/look")

    assert answer.headers.get_list("cache-control") == ["public, max-age=60"]
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_browsers_stay_on_https(database: Database) -> None:
    """Over HTTPS, errors included, they are told to come by it alone, for as long as the setting says."""
    async with serving(database.settings(replica=False, hsts_seconds=3600)) as service, by_https(service) as client:
        answers = [await client.get("/patients"), await client.get("/nothing")]
    async with serving(database.settings(replica=False, hsts_seconds=0)) as service, by_https(service) as client:
        silent = await client.get("/patients")

    assert [answer.headers[HSTS] for answer in answers] == ["max-age=3600"] * 2
    assert HSTS not in silent.headers
    assert silent.headers["cache-control"] == "no-store"


async def test_cookie_of_https_stays_there(service: Service) -> None:
    """It is Secure where the client came by HTTPS, and where it did not, it still works."""
    async with by_https(service) as client:
        secure = await client.post("/patients", json=ADA)
    plain = await service.client.post("/patients", json=ADA | {"mrn": "A-2"})

    assert secure.headers["set-cookie"].endswith("; Path=/; Secure; HttpOnly; SameSite=Lax")
    assert plain.headers["set-cookie"].endswith("; Path=/; HttpOnly; SameSite=Lax")


@pytest.mark.parametrize(("trusted", "secure"), [("127.0.0.1", True), ("192.0.2.1", False)])
async def test_only_a_trusted_proxy_says_that_it_was_https(service: Service, trusted: str, *, secure: bool) -> None:
    """Behind one that ends TLS the cookie is Secure and HSTS is there; anybody else may claim what he likes."""
    served = Running(service.app)
    async with (
        listening(served, proxy_headers=True, forwarded_allow_ips=trusted) as url,
        httpx.AsyncClient(base_url=url, headers={"X-Forwarded-Proto": "https"}, trust_env=False) as client,
    ):
        answer = await client.post("/patients", json=ADA)

    assert ("; Secure" in answer.headers["set-cookie"], HSTS in answer.headers) == (secure, secure)


async def test_library_adds_nothing_unasked(database: Database) -> None:
    """A service that installs the library gets the headers that it asks for, and none without."""
    plain, asked = Lifeguard(database.settings(replica=False)), Lifeguard(database.settings(replica=False))
    answers = []
    for lifeguard, headers in ((plain, None), (asked, AnswerHeaders(http=((b"x-own", b"1"),), https=()))):
        app = FastAPI(lifespan=lifeguard.lifespan)
        lifeguard.install(app, answer_headers=headers)
        async with (
            running(app) as served,
            httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://test") as client,
        ):
            answers.append(await client.get("/health/live"))

    assert [set(answer.headers) for answer in answers] == [
        {"content-length", "content-type", "x-request-id"},
        {"content-length", "content-type", "x-request-id", "x-own"},
    ]
