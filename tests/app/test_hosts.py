"""Only the hosts of ALLOWED_HOSTS are served, and whoever probes an instance by its address gets in."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from app.hosts import AllowedHosts, Authority
from pglifeguard.errors import MEDIA_TYPE
from tests.app.test_cli import MODULE, served
from tests.app.test_security import bearer
from tests.conftest import Database
from tests.service import Service, serving

NAMES = "clinic.example, *.Clinic.example,other.example:8443 ,[::1]:8000, [2001:DB8::0:1], 192.0.2.1,*.wards.example:81"
ELSEWHERE = ("192.0.2.9", 1)


@pytest.fixture
async def named(database: Database) -> AsyncIterator[Service]:
    """Give a service that is asked by some names."""
    async with serving(database.settings(replica=False, allowed_hosts=NAMES)) as running:
        yield running


async def ask(
    service: Service, *hosts: str, path: str = "/patients", client: tuple[str, int] | None = ELSEWHERE, **scope: Any
) -> tuple[int, Any]:
    """Send a request with these Host headers, and return the status and the first body or close code of its answer."""
    answers: list[Message] = []
    full: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", host.encode("latin-1")) for host in hosts],
        "client": client,
        "server": ("192.0.2.1", 80),
    }

    async def receive() -> Message:
        return {"type": "http.request" if full["type"] == "http" else "websocket.connect", "body": b""}

    async def send(message: Message) -> None:
        answers.append(message)

    full |= scope
    await service.app(full, receive, send)
    first = answers[0]
    return first.get("status") or first.get("code", 0), answers[-1]


NAMED = [
    "clinic.example", "CLINIC.Example", "clinic.example.", "clinic.example:80", "clinic.example:8000",
    "clinic.example:", "a.clinic.example", "a.b.clinic.example:99", "other.example:8443", "[::1]:8000",
    "[0:0:0:0:0:0:0:1]:8000", "[2001:db8::1]", "[2001:db8:0::1]:9", "192.0.2.1", "192.0.2.1:8000",
    "a.wards.example:81",
]  # fmt: skip
OTHERS = [
    "evil.example", "clinic.example.evil.example", "evilclinic.example", "example", ".clinic.example",
    "other.example", "other.example:8444", "a.other.example:8443", "wards.example:81", "a.wards.example",
    "[::1]", "::1", "[::1]:8001", "[::2]:8000", "[::1", "[zz]:8000", "[:::]:8000", "192.0.2.10", "192.0.2.1:x",
    "clinic.example:123456", "clinic.example@evil.example", "evil.example#clinic.example",
    "clinic.example, evil.example", "clinic.example/", "", " ", "*", "*.clinic.example", "clinic..example",
    "clinic.example..", "clinic.example\0", "clínic.example", "localhost", "127.0.0.1", "[::1]:80",
]  # fmt: skip


async def test_host_that_is_named_is_served(named: Service) -> None:
    """In any case, as a name, below one, as an address, with the port that is asked for or any."""
    for host in NAMED:
        assert (await ask(named, host))[0] == 200, host


async def test_other_host_is_refused(named: Service) -> None:
    """Strangers' names, lookalikes, other ports and what is no host; the answer repeats none of it."""
    for host in OTHERS:
        status, body = await ask(named, host)

        assert (status, b'"code":"host_not_allowed"' in body["body"]) == (400, True), host
        assert len(host) < 5 or host.encode() not in body["body"]
    assert named.sample("http_requests_refused_total", reason="host_not_allowed") == len(OTHERS)


async def test_one_host_is_named(named: Service) -> None:
    """A request with none or with several, whatever they are, is refused: two servers might believe two of them."""
    statuses = [(await ask(named, *hosts))[0] for hosts in ((), ("clinic.example",) * 2, ("clinic.example", "evil"))]

    assert statuses == [400] * 3


async def test_port_of_the_scheme_need_not_be_named(database: Database) -> None:
    """Browsers leave out 80 and 443, so an entry with these allows a name without a port."""
    async with serving(database.settings(replica=False, allowed_hosts="a.example:443,b.example:80")) as service:
        statuses = [
            (await ask(service, host, scheme=scheme))[0]
            for scheme in ("http", "https")
            for host in ("a.example", "b.example")
        ]

    assert statuses == [400, 200, 200, 400]


async def test_probes_and_prometheus_ask_by_an_address(named: Service) -> None:
    """A kubelet sends the pod's address, the balancer's check none at all, and both get the figures."""
    for path in ("/health/live", "/health/ready", "/health/db", "/metrics"):
        statuses = [(await ask(named, *hosts, path=path))[0] for hosts in (("10.1.2.3:8000",), (), ("evil.example",))]

        assert statuses == [200] * 3, path


async def test_nothing_else_is_asked_by_an_address(named: Service) -> None:
    """Neither what begins alike nor pages and the document."""
    for path in ("/metricsx", "/metrics/", "/healthy", "/debug/pool-stats", "/docs", "/openapi.json", "/"):
        assert (await ask(named, "10.1.2.3:8000", path=path))[0] == 400, path


async def test_this_machine_asks_itself(named: Service) -> None:
    """The operator's commands ask by the loopback's name, and from there alone it is one."""
    here = [("127.0.0.1", 1), ("::1", 1)]
    for host in ("127.0.0.1:8000", "localhost:8000", "[::1]:9", "localhost"):
        assert [(await ask(named, host, client=client))[0] for client in here] == [200, 200], host
    for client in (None, ELSEWHERE, ("127.0.0.11", 1)):
        assert (await ask(named, "localhost", client=client))[0] == 400, client
    assert (await ask(named, "evil.example", client=here[0]))[0] == 400


async def test_websocket_names_its_host_too(named: Service) -> None:
    """A page of a stranger opens one across origins: it is closed before it is accepted."""

    async def talk(websocket: Any) -> None:
        await websocket.accept()

    named.app.router.add_websocket_route("/talk", talk)
    refused = await ask(named, "evil.example", path="/talk", type="websocket", scheme="ws")
    served = await ask(named, "clinic.example", path="/talk", type="websocket", scheme="ws")

    assert (refused[1]["type"], served[1]["type"]) == ("websocket.close", "websocket.accept")


async def test_host_comes_before_the_token(database: Database) -> None:
    """A refused host learns nothing of tokens, and a right one still needs its token."""
    settings = database.settings(replica=False, allowed_hosts="clinic.example", auth_secret="0123456789abcdef" * 4)
    async with serving(settings) as service:
        refused = await service.client.get("/patients", headers=bearer("patients:read"))
        asked = await service.client.get("/patients", headers={"Host": "clinic.example"})
        served_ = await service.client.get("/patients", headers=bearer("patients:read") | {"Host": "clinic.example"})

    assert [answer.status_code for answer in (refused, asked, served_)] == [400, 401, 200]
    assert refused.headers["content-type"] == MEDIA_TYPE
    assert (refused.headers["cache-control"], bool(refused.headers["x-request-id"])) == ("no-store", True)


async def test_target_of_a_request_counts(database: Database, tmp_path: Path) -> None:
    """`serve` is not deceived by a right header beside a whole URL of another host."""
    environment = {"DATABASE_URL": database.url(), "ALLOWED_HOSTS": "clinic.example"}
    async with served(tmp_path, environment, *MODULE) as server:
        answers = []
        for target in ("http://evil.example/patients", "http://clinic.example/patients", "/patients"):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
            writer.write(f"GET {target} HTTP/1.1\r\nHost: clinic.example\r\nConnection: close\r\n\r\n".encode())
            answers.append((await reader.read()).split(b" ")[1])
            writer.close()
        live = (await server.client.get("/health/live", headers={"Host": "10.0.0.1"})).status_code

    assert (answers, live) == ([b"400", b"200", b"200"], 200)


@pytest.mark.parametrize(
    "text",
    ["*", "", "clinic.example,", "https://clinic.example", "a*.example", "*.*.example", "*.[::1]", "*clinic.example",
     "clinic.example/x", "clínic.example", "::1", "[::g]", "clinic.example:http", "a b"],
)  # fmt: skip
def test_entry_that_is_no_host_is_refused(text: str) -> None:
    """A wildcard that allows everything, a URL, and what would never match anything."""
    with pytest.raises(ValueError, match="which is no host: write names or addresses"):
        AllowedHosts(text)


def test_authority_is_compared_by_what_it_means() -> None:
    """Letters, zeros and a dot at the end do not tell two hosts apart."""
    assert Authority.parse("[2001:DB8:0:0::1]:80") == Authority.parse("[2001:db8::0001]:80")
    assert Authority.parse("[2001:DB8:0:0::1]:80") == Authority("[2001:db8::1]", 80)
    # Python 3.13 writes the end of such an address as one of IPv4.
    assert Authority.parse("[::FFFF:0:1]") == Authority.parse("[0::ffff:0.0.0.1]")
    assert Authority.parse("A.example.:") == Authority("a.example", None)
