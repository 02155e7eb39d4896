"""The audit trail: a line for each access and each refusal, a row for each change, and no health data in either."""

import json
import logging
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import SecretStr
from sqlalchemy import text

from app.audit import MAX_BYTES, AuditTrail
from app.logs import configure_logs
from app.security import issue_token, needs
from local.setup import create_roles
from pglifeguard.fastapi import write_session
from pglifeguard.testing import RoundTrips
from tests.conftest import Database, Execute
from tests.service import Service, quiet, serving

SECRET = "s" * 32
ADA = {"mrn": "K-1", "full_name": "Ada Example", "birth_date": "1980-05-17"}
TRAIL = "SELECT string_agg(concat_ws(' ', subject, action, relation, row_id), ', ' ORDER BY id) FROM audit_trail"


def bearer(*scopes: str, secret: str = SECRET) -> dict[str, str]:
    """Give the header of a token of Grace."""
    token = issue_token(SecretStr(secret), subject="grace", scopes=list(scopes), lifetime=timedelta(hours=1))
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
async def audited(database: Database, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Service]:
    """Give a guarded service that writes lines and rows."""
    caplog.set_level(logging.INFO, "app.audit")
    async with serving(database.settings(auth_secret=SECRET, audit="table")) as service:
        service.client.headers.update(bearer("patients:read", "patients:write"))
        yield service


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the fields of the lines so far, and forget them."""
    names = ("subject", "action", "resource", "ids", "related", "outcome", "status", "ids_read")
    found = [{name: vars(r)[name] for name in names} for r in caplog.records if r.name == "app.audit"]
    caplog.clear()
    return found


def line(action: str, outcome: str, status: int, ids: list[str], **others: Any) -> dict[str, Any]:
    """Build the line of an access to patients by Grace."""
    usual = {"subject": "grace", "resource": "patients", "related": {}, "ids_read": True}
    return {"action": action, "outcome": outcome, "status": status, "ids": ids} | usual | others


async def test_each_access_is_a_line(audited: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Who, what, which ids and the outcome: of reads, lists, searches, changes, failures and what is not there."""
    await audited.client.post("/patients", json=ADA)
    await audited.client.post("/patients", json=ADA | {"mrn": "K-2"})
    for path in (
        "/patients/1",
        "/patients",
        "/patients?mrn=K-2",
        "/patients?name=ada",
        "/patients?name=x",
        "/patients/9",
    ):
        await audited.client.get(path, headers={"X-Consistency-Token": "FFFFFFFF/0"})
    await audited.client.post("/patients", json=ADA)
    await audited.client.patch("/patients/1", json={"full_name": "Other"})
    await audited.client.delete("/patients/1")

    assert lines(caplog) == [
        line("POST", "allowed", 201, ["1"]),
        line("POST", "allowed", 201, ["2"]),
        line("GET", "allowed", 200, ["1"]),
        line("GET", "allowed", 200, ["1", "2"]),
        line("GET", "allowed", 200, ["2"]),
        line("GET", "allowed", 200, ["1", "2"]),
        line("GET", "allowed", 200, []),
        line("GET", "not_found", 404, ["9"]),
        line("POST", "failed", 409, []),
        line("PATCH", "allowed", 200, ["1"]),
        line("DELETE", "allowed", 204, ["1"]),
    ]


async def test_refusals_are_lines(audited: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Without a token, with a foreign one, without the scope; also on routes that are no domain's."""
    requests: list[tuple[str, str, dict[str, str]]] = [
        ("GET", "/patients/7", {"Authorization": ""}),
        ("GET", "/patients/7", bearer("patients:read", secret="x" * 32)),
        ("DELETE", "/patients/7", bearer("patients:read")),
        ("GET", "/debug/pool-stats", bearer("patients:read")),
        ("GET", "/nothing/of/ours", {"Authorization": ""}),
    ]
    for method, path, headers in requests:
        await audited.client.request(method, path, headers=headers)

    assert lines(caplog) == [
        line("GET", "refused", 401, ["7"], subject=None),
        line("GET", "refused", 401, ["7"], subject=None),
        line("DELETE", "refused", 403, ["7"]),
        line("GET", "refused", 403, [], resource=None),
        line("GET", "refused", 401, [], resource=None, subject=None),
    ]


async def test_operations_are_no_accesses(audited: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Probes, scrapes and unknown paths write nothing."""
    for path in ("/health/live", "/health/ready", "/metrics", "/nothing"):
        await audited.client.get(path)

    assert lines(caplog) == []


async def test_lines_hold_no_health_data(database: Database, root: logging.Logger) -> None:
    """Neither name, number nor birth date; with LOG_LEVEL=ERROR the lines are written all the same, as JSON."""
    logging.getLogger("app.audit").setLevel(logging.NOTSET)
    configure_logs("ERROR", "json", access_log=False)
    written: list[str] = []
    handler = root.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.stream = type("Stream", (), {"write": lambda _, line: written.append(line), "flush": lambda _: None})()

    async with serving(database.settings(audit="table")) as service:
        await service.client.post("/patients", json=ADA, headers={"X-Request-ID": "request-of-a-test"})
        await service.client.get("/patients?mrn=K-1&name=Ada")
        await service.client.get("/patients/Ada Example")

    texts = [each for each in written if "app.audit" in each]
    assert len(texts) == 3
    first = json.loads(texts[0])
    assert (first["logger"], first["level"], first["request_id"]) == ("app.audit", "INFO", "request-of-a-test")
    assert first["time"]
    assert not [value for value in (*ADA.values(), "Ada") if value in "".join(texts)]
    connection = await asyncpg.connect(database.url("postgres"))
    rows = await connection.fetch("SELECT t::text FROM audit_trail t")
    await connection.close()
    assert len(rows) == 1
    assert "request-of-a-test" in rows[0][0]
    assert not [value for value in (*ADA.values(), "Ada") if value in rows[0][0]]


async def test_failures_and_related_ids(audited: Service, caplog: pytest.LogCaptureFixture) -> None:
    """An exception is a line; so is a long answer, whose ids are not read; other ids of an answer have their names."""
    router = APIRouter(prefix="/patients", dependencies=[needs(read="patients:read", write="patients:write")])

    @router.get("/broken/now")
    async def broken() -> None:
        raise RuntimeError

    @router.get("/long/now")
    async def long() -> StreamingResponse:
        return StreamingResponse(iter([b"[", b" " * MAX_BYTES, b'{"id": 1}', b"]"]), media_type="application/json")

    @router.get("/text/now")
    async def plain() -> StreamingResponse:
        return StreamingResponse(iter(["Ada"]))

    @router.get("/booked/now")
    async def booked() -> list[Any]:
        uuid = "0190163d-8694-739b-aea5-966c26f8ad91"
        return [{"id": uuid, "patient_id": 10, "passport_id": "123"}, {"id": 2, "patient_id": 9, "name": "Ada"}, "x"]

    audited.app.include_router(router)

    for path in ("broken", "long", "text", "booked"):
        await audited.client.get(f"/patients/{path}/now")

    assert lines(caplog) == [
        line("GET", "failed", 500, [], ids_read=False),
        line("GET", "allowed", 200, [], ids_read=False),
        line("GET", "allowed", 200, []),
        line("GET", "allowed", 200, ["2", "0190163d-8694-739b-aea5-966c26f8ad91"], related={"patient_id": ["9", "10"]}),
    ]


async def test_what_is_no_http_passes() -> None:
    """A WebSocket and the lifespan go to the application as they are."""
    seen: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["type"], receive, send))

    async def unused(*_: Any) -> Any: ...

    await AuditTrail(inner, domains=frozenset())({"type": "websocket"}, unused, unused)

    assert seen == [("websocket", unused, unused)]


async def test_answer_that_is_no_text_is_said_to_be_unread(caplog: pytest.LogCaptureFixture) -> None:
    """A server may send a file by itself: what was in it is not known here."""
    caplog.set_level(logging.INFO, "app.audit")
    sent = []

    async def file(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.pathsend", "path": "/export.json"})

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def receive() -> Any: ...

    scope = {"type": "http", "method": "GET", "path": "/patients", "state": {"caller": "grace"}}
    await AuditTrail(file, domains=frozenset({"patients"}))(scope, receive, send)

    assert sent == ["http.response.start", "http.response.pathsend"]
    assert lines(caplog) == [line("GET", "allowed", 200, [], ids_read=False)]


# The table


async def test_each_change_is_a_row(audited: Service, execute: Execute) -> None:
    """Of the caller, in the transaction of the change; reads, refusals and what was rolled back leave none."""
    await audited.client.post("/patients", json=ADA, headers={"Idempotency-Key": "one"})
    await audited.client.post("/patients", json=ADA, headers={"Idempotency-Key": "one"})
    await audited.client.post("/patients", json=ADA)
    await audited.client.get("/patients/1")
    await audited.client.patch("/patients/1", json={"full_name": "Other"})
    await audited.client.delete("/patients/1", headers=bearer("patients:read"))
    await audited.client.delete("/patients/1")

    assert await execute(TRAIL) == "grace insert patients 1, grace update patients 1, grace delete patients 1"


@pytest.mark.parametrize("audit", ["off", "log"])
async def test_without_the_table_there_are_no_rows(database: Database, execute: Execute, audit: str) -> None:
    """Only AUDIT=table marks transactions."""
    async with serving(database.settings(audit=audit)) as service:
        await service.client.post("/patients", json=ADA)

    assert await execute(TRAIL) is None


async def test_off_installs_nothing(database: Database) -> None:
    """A service without the trail has no layer of it, and its routes no dependency: a request costs what it did."""
    counts = {}
    for audit in ("off", "log", "table"):
        async with serving(database.settings(audit=audit)) as service:
            layers: list[Any] = [layer.cls for layer in service.app.user_middleware]
            counts[audit] = layers.count(AuditTrail)

    assert counts == {"off": 0, "log": 1, "table": 1}


@pytest.mark.parametrize(("audit", "trips"), [("off", 4), ("log", 4), ("table", 5)])
async def test_cost_of_a_change(database: Database, round_trips: RoundTrips, audit: str, trips: int) -> None:
    """A row costs one round trip, the one that names caller and request; a line costs none."""
    async with quiet(database.settings(audit=audit)) as service:
        await service.client.post("/patients", json=ADA)
        with round_trips() as counted:
            await service.client.post("/patients", json=ADA | {"mrn": "K-2"})

    assert counted.primary == trips


async def test_overridden_session_is_marked(audited: Service, execute: Execute) -> None:
    """A session that a test gives to the service is the one that is marked."""
    async with audited.databases.writing() as session:
        audited.app.dependency_overrides[write_session] = lambda: session
        await audited.client.post("/patients", json=ADA)

        assert await session.scalar(text("SELECT current_setting('app.audit_subject')")) == "grace"
    assert await execute(TRAIL) == "grace insert patients 1"


async def test_caller_without_a_token_is_anonymous(database: Database, execute: Execute) -> None:
    """A service without a guard says so in each row; what is changed beside it, if asked for, has the role's name."""
    async with serving(database.settings(audit="table")) as service:
        await service.client.post("/patients", json=ADA)
    await execute(f"ALTER DATABASE \"{database.name}\" SET app.audit = 'on'")
    connection = await asyncpg.connect(database.url())
    await connection.execute("DELETE FROM patients")
    await connection.close()

    assert await execute(TRAIL) == "anonymous insert patients 1, role app_rw delete patients 1"


@pytest.mark.parametrize("again", [False, True], ids=["migrated", "roles.sql run again"])
async def test_trail_is_added_to_and_nothing_else(database: Database, again: bool) -> None:  # noqa: FBT001  # A case.
    """The service's role can neither read, change nor empty it; app_ro nothing at all, on primary and replica."""
    if again:
        await create_roles(database.cluster.primary, database.name, database.cluster.passwords)
    writer = await asyncpg.connect(database.url())
    readers = [await asyncpg.connect(database.url("app_ro")), await asyncpg.connect(database.replica_url())]
    row = "INSERT INTO audit_trail (subject, action, relation, row_id) VALUES ('job', 'export', 'patients', '1')"

    await writer.execute(row)
    for statement in ("SELECT FROM audit_trail", "UPDATE audit_trail SET subject = 'x'", "DELETE FROM audit_trail",
                      "TRUNCATE audit_trail", "DROP TABLE audit_trail", "ALTER TABLE audit_trail ADD x text",
                      "ALTER TABLE patients DISABLE TRIGGER audit_change"):  # fmt: skip
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await writer.execute(statement)
    for reader in readers:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await reader.execute("SELECT FROM audit_trail")

    for connection in (writer, *readers):
        await connection.close()
