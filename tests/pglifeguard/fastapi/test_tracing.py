"""Traces of requests, as an OTLP receiver gets them from the service on real databases."""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from opentelemetry import trace as trace_api
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from sqlalchemy import func, select, text

from app.logs import RequestId, json_formatter
from pglifeguard import Query
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import ConnectionLost
from pglifeguard.fastapi import ReadDB, WriteDB, current_trace
from pglifeguard.fastapi.tracing import TraceRequests
from pglifeguard.otel import OpenTelemetry
from pglifeguard.testing.faults import exhausted
from pglifeguard.testing.serving import Running, listening
from tests.conftest import Database, Execute
from tests.exported import Exported, Trace
from tests.service import ADA, Service, quiet

# Nothing listens on port 1.
AWAY = "postgresql://app_rw:none@127.0.0.1:1/none"
SLEEP = Query(select(func.pg_sleep(60).label("slept")))
READ = ["GET /patients/{patient_id}", "acquire replica", "SELECT patients"]


@pytest.fixture
async def service(database: Database, exported: Exported) -> AsyncIterator[Service]:
    """Give a service that exports, and whose monitors look once."""
    assert exported.url
    async with quiet(database.settings()) as running:
        yield running


def traced(flags: str = "01") -> tuple[str, dict[str, str]]:
    """Return the id of a new trace, and the header by which a client begins it."""
    trace = secrets.token_hex(16)
    return trace, {"traceparent": f"00-{trace}-{'c' * 16}-{flags}"}


async def came(exported: Exported, trace: str, *, name: str = "") -> Trace:
    """Return the spans of a trace when its request's, the last one, is there; or another one of this name."""

    async def there() -> bool:
        found = exported.trace(trace).spans
        return any(span.name == name if name else span.kind == "SERVER" for span in found)

    assert await eventually(there, 10), exported.spans()
    return exported.trace(trace)


async def stored(service: Service, database: Database) -> int:
    """Store a patient, on the replica too, and forget the token; return the id."""
    answer = await service.client.post("/patients", json=ADA)
    service.client.cookies.clear()
    await database.cluster.wait_replayed()
    return int(answer.json()["id"])


async def test_read_is_one_trace(service: Service, database: Database, exported: Exported) -> None:
    """A GET is a span by its route, beneath the client's; beneath it are the acquisition and the query, in its time."""
    number = await stored(service, database)
    trace, headers = traced()

    answer = await service.client.get(f"/patients/{number}", headers=headers)

    found = await came(exported, trace)
    request, acquire, query = found.spans
    assert [span.name for span in found.spans] == READ
    assert (request.kind, request.parent, request.failed) == ("SERVER", "c" * 16, False)
    assert request.attributes == {
        "http.request.method": "GET",
        "http.route": "/patients/{patient_id}",
        "http.response.status_code": 200,
        "url.path": f"/patients/{number}",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "server.address": "test",
        "lifeguard.request_id": answer.headers["x-request-id"],
        "lifeguard.read_reason": "replica",
    }
    assert found.beneath(request) == READ[1:]
    assert acquire.attributes == {"db.client.connection.pool.name": "replica"}
    assert query.kind == "CLIENT"
    told = query.attributes.pop("db.query.text")
    assert told.startswith("SELECT patients.id, ")
    assert told.endswith(" FROM patients WHERE patients.id = $1::BIGINT")
    assert query.attributes == {
        "db.system.name": "postgresql",
        "db.namespace": database.name,
        "db.query.summary": "SELECT patients",
        "db.operation.name": "SELECT",
        "db.collection.name": "patients",
        "db.client.connection.pool.name": "replica",
        "server.address": "127.0.0.1",
        "server.port": database.cluster.replica.port,
    }
    assert request.began <= acquire.began <= acquire.ended <= query.ended <= request.ended
    assert request.resource["service.name"] == "pglifeguard"
    assert len(request.resource["service.instance.id"]) == 36


async def test_write_shows_its_round_trips(service: Service, exported: Exported) -> None:
    """A POST shows BEGIN, the INSERT, COMMIT and the question for the LSN, and nothing of the patient."""
    trace, headers = traced()

    await service.client.post("/patients?note=Lovelace", json=ADA, headers=headers)

    found = await came(exported, trace)
    assert [span.name for span in found.spans] == [
        "POST /patients", "acquire primary", "BEGIN", "INSERT patients", "COMMIT", "written LSN",
    ]  # fmt: skip
    assert {span.parent for span in found.spans[1:]} == {found.root.id}
    commit = found.one("COMMIT")
    assert (commit.kind, commit.attributes["db.operation.name"]) == ("CLIENT", "COMMIT")
    written = json.dumps([span.attributes for span in found.spans])
    assert not {word for word in (*ADA.values(), "Lovelace") if word in written}


async def test_refused_statement_is_named_by_its_state(
    service: Service, database: Database, exported: Exported
) -> None:
    """A violated constraint is an error of its query by SQLSTATE, and the transaction is rolled back; 409 is none."""
    await stored(service, database)
    trace, headers = traced()

    await service.client.post("/patients", json=ADA, headers=headers)

    found = await came(exported, trace)
    query = found.one("INSERT patients")
    assert query.failed
    assert (query.attributes["error.type"], query.attributes["db.response.status_code"]) == ("23505", "23505")
    assert found.spans[-1].name == "ROLLBACK"
    assert (found.root.failed, found.root.attributes["http.response.status_code"]) == (False, 409)


async def test_commit_that_fails_is_shown(service: Service, execute: Execute, exported: Exported) -> None:
    """A constraint that is checked at the end fails COMMIT, and its span says so."""
    await execute("CREATE TABLE late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    await execute("GRANT ALL ON late TO app_rw")

    @service.app.post("/late")
    async def write_twice(db: WriteDB) -> None:
        await db.execute(text("INSERT INTO late VALUES (1), (1)"))

    trace, headers = traced()

    await service.client.post("/late", headers=headers)

    commit = (await came(exported, trace)).one("COMMIT")
    assert (commit.failed, commit.attributes["error.type"]) == (True, "23505")


async def test_cancelled_statement_is_shown(service: Service, exported: Exported) -> None:
    """The query of a request that is cancelled is an error by the name of what ended it."""

    @service.app.get("/sleep")
    async def sleep(db: ReadDB) -> None:
        await db.rows(SLEEP)

    trace, headers = traced()

    request = asyncio.create_task(service.client.get("/sleep", headers=headers))

    async def asked() -> bool:
        return any(each.asked_at is not None for each in service.databases.replicas[0].pool._out.values())

    assert await eventually(asked, 5)
    request.cancel()
    with suppress(asyncio.CancelledError):
        await request

    found = await came(exported, trace)
    query = found.one("SELECT")
    assert (query.failed, query.attributes["error.type"]) == (True, "CancelledError")
    assert "db.response.status_code" not in query.attributes


async def test_retry_on_the_primary_is_a_span(service: Service, exported: Exported) -> None:
    """What the replica does not have is looked for beneath a span that says why."""
    trace, headers = traced()

    await service.client.get("/patients/999999", headers=headers)

    found = await came(exported, trace)
    retry = found.one("retry on the primary")
    assert retry.attributes == {"lifeguard.reason": "not_found"}
    assert found.beneath(found.root) == ["acquire replica", "SELECT patients", "retry on the primary"]
    assert found.beneath(retry) == ["acquire primary", "BEGIN", "SELECT patients", "ROLLBACK"]
    assert found.root.attributes["lifeguard.read_reason"] == "primary_only"


async def test_retry_on_another_replica_is_an_event(database: Database, exported: Exported) -> None:
    """Where the primary is busy too, the request's span says that another replica was asked."""
    url = {"url": database.replica_url(), "pool_min_size": 1}
    async with quiet(database.settings(replicas=(url, url))) as service:
        asked = list[str]()

        @service.app.get("/fails-once")
        async def fail_once(db: ReadDB) -> None:
            await db.execute(text("SELECT 1"))
            asked.append(db._database.name)
            if len(asked) == 1:
                raise ConnectionLost("cut")

        trace, headers = traced()
        async with exhausted(service.databases.primary):
            answer = await service.client.get("/fails-once", headers=headers)

    found = await came(exported, trace)
    assert answer.status_code == 200
    assert found.root.events == {
        "retry on another replica": {"lifeguard.reason": "connection_lost", "lifeguard.failed": asked[0]}
    }
    assert [span.name for span in found.spans if span.name.startswith("acquire")] == [f"acquire {one}" for one in asked]


async def test_question_to_the_replica_is_a_span(service: Service, database: Database, exported: Exported) -> None:
    """A read with a token shows how long the replica was asked for the write."""
    # In a new database the first question for an LSN sets hint bits of the catalog, whose pages go into the log after
    # the commit: the token is then ahead of what is sent to the replica at once.
    await service.client.post("/patients", json=ADA | {"mrn": "A-0"})
    answer = await service.client.post("/patients", json=ADA)
    # On a busy machine that may take longer than a read asks the replica for.
    await database.cluster.wait_replayed()
    trace, headers = traced()

    await service.client.get(answer.headers["location"], headers=headers)

    found = await came(exported, trace)
    assert [span.name for span in found.spans] == [*READ[:2], "replayed LSN", READ[2]]


async def test_time_in_the_queue_is_told_apart(database: Database, exported: Exported) -> None:
    """A request that waits for a release shows `wait` beneath its acquisition."""
    async with quiet(database.settings(replica=False, pool_size=1, max_overflow=0, pool_timeout=5)) as service:
        trace, headers = traced()
        async with exhausted(service.databases.primary):
            request = asyncio.create_task(service.client.get("/patients", headers=headers))
            assert await eventually(lambda: _waits(service), 5)
        await request

    found = await came(exported, trace)
    acquire = found.one("acquire primary")
    assert found.beneath(acquire) == ["wait"]
    assert not acquire.failed


async def _waits(service: Service) -> bool:
    return service.databases.primary.pool.figures().waiting == 1


async def test_login_of_a_queued_request_is_told_apart(database: Database, exported: Exported) -> None:
    """A request that waits for a release, and then for a login in place of what was released, shows both."""
    async with quiet(database.settings(replica=False, pool_size=1, max_overflow=0, pool_timeout=20)) as service:
        trace, headers = traced()
        async with exhausted(service.databases.primary):
            request = asyncio.create_task(service.client.get("/patients", headers=headers))
            assert await eventually(lambda: _waits(service), 5)
            service.databases.primary.pool.dispose()
        await request

    found = await came(exported, trace)
    wait, connect = (found.one(name) for name in ("wait", "connect"))
    assert found.beneath(found.one("acquire primary")) == ["wait", "connect"]
    assert wait.ended <= connect.began < connect.ended


async def test_refused_acquisition_says_why(database: Database, exported: Exported) -> None:
    """A request that is refused at its deadline shows the wait and the reason, and is counted as a timeout."""
    async with quiet(database.settings(replica=False, pool_size=1, max_overflow=0, pool_timeout=0.05)) as service:
        trace, headers = traced()
        async with exhausted(service.databases.primary):
            await service.client.get("/patients", headers=headers)

        found = await came(exported, trace)
        acquire = found.one("acquire primary")
        assert (acquire.failed, found.beneath(acquire)) == (True, ["wait"])
        assert acquire.attributes["error.type"] == "PoolExhausted"
        assert acquire.attributes["lifeguard.reason"] == "timeout"
        assert (found.root.failed, found.root.attributes["error.type"]) == (True, "503")

        async def counted() -> bool:
            points = exported.points("db.client.connection.timeouts")
            return bool(points) and points["primary",].as_int >= 1

        assert await eventually(counted, 10)


async def test_login_and_probe_are_told_apart(database: Database, exported: Exported) -> None:
    """A request that waits for a login shows `connect`, and one whose idle connection is probed shows `check`."""
    settings = database.settings(replica=False, pool_min_size=0, pool_check_after_seconds=0)
    async with quiet(settings) as service:
        shown = []
        for _ in range(2):
            trace, headers = traced()
            await service.client.get("/patients", headers=headers)
            found = await came(exported, trace)
            shown.append(found.beneath(found.one("acquire primary")))

    assert shown == [["connect"], ["check"]]


async def test_failed_login_is_told(database: Database, exported: Exported) -> None:
    """A request that waits for a login in vain shows `connect` in an acquisition that failed."""
    away = database.settings(replica=False, pool_min_size=0, primary={"url": AWAY})
    async with quiet(away) as service:
        trace, headers = traced()
        await service.client.get("/patients", headers=headers)

    found = await came(exported, trace)
    acquire = found.one("acquire primary")
    assert (acquire.attributes["error.type"], found.beneath(acquire)) == ("DatabaseUnreachable", ["connect"])


async def test_sqlalchemys_lane_is_traced(service: Service, exported: Exported) -> None:
    """Statements, failures and transactions of SQLAlchemy are spans as those of the driver are."""

    @service.app.post("/by-sqlalchemy")
    async def by_sqlalchemy(db: WriteDB) -> None:
        await db.execute(text("SELECT 1 FROM patients"))
        async with db.begin_nested():
            await db.execute(text("SELECT 'Ada'::text"))
        await db.execute(text("SELECT 1 / (SELECT count(*) FROM users)"))

    trace, headers = traced()

    answer = await service.client.post("/by-sqlalchemy", headers=headers)

    found = await came(exported, trace)
    assert (answer.status_code, found.root.attributes["error.type"]) == (500, "500")
    assert [span.name for span in found.spans] == [
        "POST /by-sqlalchemy", "acquire primary", "BEGIN", "SELECT patients", "SAVEPOINT", "SELECT", "RELEASE",
        "SELECT", "ROLLBACK",
    ]  # fmt: skip
    assert found.named("SELECT")[0].attributes["db.query.text"] == "SELECT ?::text"
    assert found.named("SELECT")[1].attributes["error.type"] == "22012"


async def test_collision_is_an_event(service: Service, exported: Exported) -> None:
    """A transaction that is run again is seen in the span of its request."""
    attempts = []

    @service.app.post("/collide")
    async def collide() -> None:
        async def work(session: Any) -> None:
            attempts.append(session)
            if len(attempts) == 1:
                await session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$"))

        await service.databases.run_transaction(work)

    trace, headers = traced()

    await service.client.post("/collide", headers=headers)

    found = await came(exported, trace)
    assert found.root.events == {"transaction run again": {"lifeguard.reason": "serialization_failure"}}


@pytest.mark.parametrize("flags", ["00", "01"])
async def test_client_decides_what_is_sampled(service: Service, exported: Exported, flags: str) -> None:
    """A trace that its client does not sample is not exported: no query, no retry and no wait."""
    trace, headers = traced(flags)
    other, sampled = traced()
    telemetry = service.databases.telemetry
    assert isinstance(telemetry, OpenTelemetry)
    service.databases.primary.pool.dispose()
    service.app.get("/sampled")(lambda: telemetry.sampled_tracer is not None)

    is_asked = (await service.client.get("/sampled", headers=headers)).json()
    await service.client.get("/patients/999999", headers=headers)
    await service.client.get("/patients", headers=sampled)

    await came(exported, other)
    # The SDK would make no span either, after more work.
    assert is_asked == (flags == "01")
    assert bool(exported.trace(trace).spans) == (flags == "01")


async def test_trace_is_in_the_log_lines(service: Service, exported: Exported) -> None:
    """A line of a traced request has the ids of its trace and span, as a line of JSON too; others have none."""
    lines = []

    @service.app.get("/logging")
    async def write_line() -> dict[str, str] | None:
        record = logging.LogRecord("app", logging.INFO, "", 1, "here", None, None)
        RequestId().filter(record)
        lines.append(json.loads(json_formatter().format(record)))
        return current_trace()

    trace, headers = traced()
    _, unsampled = traced("00")

    ids = (await service.client.get("/logging", headers=headers)).json()
    none = (await service.client.get("/logging", headers=unsampled)).json()

    found = await came(exported, trace)
    assert ids == {"trace_id": trace, "span_id": found.root.id}
    assert ids.items() <= lines[0].items()
    assert none is None
    assert "trace_id" not in lines[1]


async def scraped(service: Service, accept: str) -> tuple[str, str]:
    """Return content type and text of a scrape that accepts this format."""
    answer = await service.client.get("/metrics", headers={"accept": accept})
    return answer.headers["content-type"], answer.text


def exemplars(families: list[Metric]) -> dict[str, set[str]]:
    """Return the traces that the buckets of each histogram name."""
    return {
        family.name: {sample.exemplar.labels["trace_id"] for sample in family.samples if sample.exemplar}
        for family in families
        if family.type == "histogram"
    }


async def test_histograms_name_traces(service: Service, database: Database) -> None:
    """Whoever asks for OpenMetrics finds the trace of a request in the buckets that it fell into; others, none."""
    number = await stored(service, database)
    trace, headers = traced()
    _, unsampled = traced("00")
    # More series of one family than are written at once.
    for count in range(30):
        service.databases.metrics.http_seconds.labels("GET", f"/{count}").observe(1)
    await service.client.get(f"/patients/{number}", headers=headers)
    await service.client.get(f"/patients/{number}", headers=unsampled)

    kind, text = await scraped(service, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    plain_kind, plain = await scraped(service, "text/plain")

    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    families = list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]  # It annotates only parts.
    found = exemplars(families)
    named = {name for name, traces in found.items() if trace in traces}
    assert named == {
        "db_connection_acquire_seconds", "db_query_seconds", "http_request_seconds",
    }  # fmt: skip
    assert plain_kind.startswith("text/plain")
    assert trace not in plain


async def test_scrape_without_traces_is_plain_text(database: Database) -> None:
    """Where nothing is exported, the format stays what it was, whatever the scraper accepts."""
    async with quiet(database.settings()) as service:
        kind, text = await scraped(service, "application/openmetrics-text")

    assert kind.startswith("text/plain")
    assert "# EOF" not in text


async def test_span_around_is_kept(service: Service, exported: Exported) -> None:
    """Where something else traces the request, its span is the parent, and there is no second one."""
    telemetry = service.databases.telemetry
    assert isinstance(telemetry, OpenTelemetry)
    assert telemetry.tracer is not None

    with telemetry.tracer.start_as_current_span("outside") as outside:
        await service.client.get("/patients")

    trace = trace_api.format_trace_id(outside.get_span_context().trace_id)
    found = await came(exported, trace, name="outside")
    assert [span.name for span in found.spans] == ["outside", *READ[1:]]


async def test_requests_of_one_connection_are_apart(service: Service, exported: Exported) -> None:
    """Requests that are pipelined belong to the traces that their clients began, and to none of another request."""
    traces = [traced() for _ in range(3)]
    heads = [
        f"GET /patients?limit={number} HTTP/1.1\r\nHost: test\r\ntraceparent: {headers['traceparent']}\r\n\r\n"
        for number, (_, headers) in enumerate(traces, 1)
    ]
    async with listening(Running(service.app)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write("".join(heads).encode())
        for _ in heads:
            await reader.readuntil(b"\r\n\r\n[]")
        writer.close()

    for trace, _ in traces:
        found = await came(exported, trace)
        assert [span.name for span in found.spans] == ["GET /patients", *READ[1:]]
        assert found.root.parent == "c" * 16


@pytest.mark.parametrize("scope", [{}, {"lifeguard.traced": True}])
async def test_request_in_the_context_of_another_one(
    service: Service, exported: Exported, scope: dict[str, Any]
) -> None:
    """A span that a context has kept of another request is no parent; an application inside another one has none."""
    first, headers = traced()
    second, later = traced()

    async def again(_scope: Any, _receive: Any, _send: Any) -> None:
        sent = [(b"traceparent", later["traceparent"].encode())]
        await played(service.databases.telemetry, served, headers=sent, path="/second", **scope)

    async def served(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    await played(service.databases.telemetry, again, headers=[(b"traceparent", headers["traceparent"].encode())])

    assert len((await came(exported, first)).spans) == 1
    if not scope:
        assert (await came(exported, second)).root.attributes["url.path"] == "/second"
    assert bool(exported.trace(second).spans) is not bool(scope)


async def test_method_of_a_clients_own_names_no_span(service: Service, exported: Exported) -> None:
    """A word that no route has as its method, and a path that no route has, are in no span's name."""
    trace, headers = traced()

    await service.client.request("BREW", "/no-such-place", headers=headers)

    found = await came(exported, trace)
    assert (found.root.name, found.root.attributes["http.request.method"]) == ("HTTP", "_OTHER")
    assert "http.route" not in found.root.attributes


async def played(telemetry: Any, app: Any, **scope: Any) -> None:
    """Let an application answer one request behind the layer under test, from a server without an address."""

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        pass

    _, headers = traced()
    request = {
        "type": "http", "method": "GET", "path": "/", "scheme": "http", "http_version": "2",
        "headers": [(b"traceparent", headers["traceparent"].encode())],
    }  # fmt: skip
    await TraceRequests(app, telemetry)(request | scope, receive, send)


async def test_client_that_left_is_no_error(service: Service, exported: Exported) -> None:
    """An answer that was not sent to its end is marked, and is no error."""

    async def half(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": True})

    trace, headers = traced()
    await played(service.databases.telemetry, half, headers=[(b"traceparent", headers["traceparent"].encode())])

    root = (await came(exported, trace)).root
    assert (root.failed, root.attributes["lifeguard.client_left"]) == (False, True)
    assert "server.address" not in root.attributes


async def test_request_that_ends_without_an_answer_is_an_error(service: Service, exported: Exported) -> None:
    """What is cut at the end of the grace shows what ended it."""

    async def cut(_scope: Any, _receive: Any, _send: Any) -> None:
        raise asyncio.CancelledError

    trace, headers = traced()
    with pytest.raises(asyncio.CancelledError):
        await played(service.databases.telemetry, cut, headers=[(b"traceparent", headers["traceparent"].encode())])

    root = (await came(exported, trace)).root
    assert (root.failed, root.attributes["error.type"]) == (True, "CancelledError")
    assert "http.response.status_code" not in root.attributes


async def test_what_is_no_request_passes(service: Service) -> None:
    """A WebSocket and the lifespan have no span."""
    seen = []

    async def note(scope: Any, _receive: Any, _send: Any) -> None:
        seen.append(scope["type"])

    await played(service.databases.telemetry, note, type="websocket")

    assert seen == ["websocket"]
