"""What a session costs on the wire, what it refuses, and that nothing is answered 2xx that was not committed."""

import asyncio
import logging
from contextlib import AsyncExitStack
from datetime import date
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, HTTPException, Response
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from app.patients import queries
from app.patients.models import Patient
from app.patients.schemas import PatientIn
from app.settings import Settings
from pglifeguard.databases import Databases
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import ConnectionLost
from pglifeguard.fastapi.sessions import AnalyticsDB, ReadDB, WriteDB, consistency_of, databases_of, route_of
from pglifeguard.server_position import WRITTEN
from pglifeguard.sessions import ReadSession, WriteSession
from pglifeguard.testing.proxy import Fate, Proxy
from tests.conftest import Database, Execute
from tests.pglifeguard.conftest import sessions_end
from tests.service import Service, quiet, serving

ADA = {"mrn": "A-1", "full_name": "Ada Lovelace", "birth_date": "1915-12-10"}
ADD_ADA = text("INSERT INTO patients (mrn, full_name, birth_date) VALUES ('A-1', 'Ada Lovelace', '1915-12-10')")
PATIENTS = "SELECT count(*) FROM patients"


async def _second(session: WriteDB) -> WriteSession:
    return session


SecondDB = Annotated[WriteSession, Depends(_second)]
Opened = Annotated[Databases, Depends(databases_of)]


def through(database: Database, proxy: Proxy, replica_proxy: Proxy | None = None, **changes: Any) -> Settings:
    """Return settings whose primary, and replica if there is one, are behind a proxy."""
    settings = {"primary": {"url": proxy.url(database.url())}, "replicas": ()} | changes
    if replica_proxy is not None:
        settings["replicas"] = ({"url": replica_proxy.url(database.replica_url())},)
    return database.settings(replica=False, **settings)


async def trips(service: Service, proxy: Proxy, method: str, path: str, **request: Any) -> tuple[int, int]:
    """Send a request twice, a POST with another mrn, and return the second one's status and round trips."""
    await service.client.request(method, path, **request)
    proxy.round_trips = 0
    if method == "POST":
        request["json"] = request["json"] | {"mrn": request["json"]["mrn"] + "-again"}
    response = await service.client.request(method, path, **request)
    return response.status_code, proxy.round_trips


def in_transaction(service: Service) -> str:
    """Add a route that stores a patient in a transaction; return its path."""

    @service.app.post("/transacted", status_code=201)
    async def transacted(session: WriteDB, new: PatientIn) -> None:
        await queries.add_patient(session, vars(new))

    return "/transacted"


# On the wire.


async def test_read_on_the_replica_is_one_round_trip(database: Database, proxy: Proxy, replica_proxy: Proxy) -> None:
    """A hot GET costs one turn at the replica and none at the primary."""
    async with quiet(through(database, proxy, replica_proxy)) as service:
        created = await service.client.post("/patients", json=ADA)
        service.client.cookies.clear()
        await database.cluster.wait_replayed()
        proxy.round_trips = 0

        assert await trips(service, replica_proxy, "GET", created.headers["Location"]) == (200, 1)
        assert proxy.round_trips == 0


async def test_read_on_the_primary_is_three_round_trips(database: Database, proxy: Proxy) -> None:
    """BEGIN READ ONLY, the statement and ROLLBACK."""
    async with quiet(through(database, proxy)) as service:
        await service.client.post("/patients", json=ADA)

        assert await trips(service, proxy, "GET", "/patients/1") == (200, 3)
        assert proxy.statements[-2:] == ["BEGIN READ ONLY;", "ROLLBACK;"]


async def test_write_is_three_round_trips_and_a_token_the_fourth(
    database: Database, proxy: Proxy, replica_proxy: Proxy
) -> None:
    """BEGIN, INSERT and COMMIT; with a replica the position that COMMIT reached is asked afterwards."""
    async with quiet(through(database, proxy)) as service:
        assert await trips(service, proxy, "POST", in_transaction(service), json=ADA) == (201, 3)
    async with quiet(through(database, proxy, replica_proxy)) as service:
        path = in_transaction(service)
        assert await trips(service, proxy, "POST", path, json=ADA | {"mrn": "A-3"}) == (201, 4)


@pytest.mark.parametrize(
    ("request_line", "body", "expected"),
    [
        ("POST /patients", {"mrn": ""}, (422, 0)),
        ("GET /patients/nobody", None, (422, 0)),
        ("GET /patients?limit=0", None, (422, 0)),
        ("GET /patients/999999", None, (404, 3)),
        ("PATCH /patients/1", {"full_name": "Ada King"}, (404, 3)),
        ("GET /health/live", None, (200, 0)),
        ("GET /health/ready", None, (200, 0)),
    ],
)
async def test_what_a_refusal_costs(
    database: Database, proxy: Proxy, request_line: str, body: Any, expected: tuple[int, int]
) -> None:
    """What is wrong in itself costs no connection; what only the database can know costs a transaction."""
    method, path = request_line.split()
    async with quiet(through(database, proxy)) as service:
        if expected[1]:
            await service.client.request(method, path, json=body)
        proxy.round_trips, before = 0, service.sample("db_connection_acquire_seconds_count", pool="primary")

        answer = await service.client.request(method, path, json=body)

        assert (answer.status_code, proxy.round_trips) == expected
        taken = service.sample("db_connection_acquire_seconds_count", pool="primary") - before
        assert taken == (1 if expected[1] else 0)


async def test_read_in_pieces_on_the_replica_is_one_transaction(
    database: Database, proxy: Proxy, replica_proxy: Proxy
) -> None:
    """Through SQLAlchemy's session a read is a transaction, as on the primary: BEGIN and ROLLBACK beside it."""
    async with quiet(through(database, proxy, replica_proxy)) as service:
        for _ in range(2):
            replica_proxy.round_trips = 0
            replica_proxy.statements.clear()
            async with service.databases.reading() as session:
                for _ in range(2):
                    await session.execute(text("SELECT 1"))
                pool = service.databases.replicas[0].pool
                assert pool.figures().checked_out == 1
                assert await session.rows(queries.BY_ID, patient_id=1) == []
                assert pool.figures().checked_out == 1

        assert replica_proxy.round_trips == 5
        assert replica_proxy.statements[0] == "BEGIN READ ONLY;"
        assert replica_proxy.statements[-1] == "ROLLBACK;"


async def test_session_without_a_statement_takes_nothing(service: Service) -> None:
    """A session is lazy: opened, entered and left, it costs no connection."""
    for session in (service.databases.reading(), service.databases.writing(), service.databases.reporting()):
        async with session:
            assert session.connection_held is None
        async with session:
            assert not session.sync_session.in_transaction()

    for pool in ("primary", "replica", "analytics"):
        assert service.sample("db_connection_acquire_seconds_count", pool=pool) == 0


async def test_one_request_holds_one_connection(service: Service) -> None:
    """Dependencies of one request share its session, and the session its connection."""

    @service.app.post("/twice")
    async def twice(session: WriteDB, second: SecondDB, databases: Opened) -> int:
        assert session is second
        await session.execute(text("SELECT 1"))
        await second.execute(text("SELECT 2"))
        return databases.primary.pool.figures().checked_out

    assert (await service.client.post("/twice")).json() == 1
    assert service.databases.primary.pool.figures().checked_out == 0
    assert service.sample("db_connection_hold_seconds_count", pool="primary", route="/twice") == 1


async def test_shared_session_is_committed_once(database: Database, proxy: Proxy) -> None:
    """A route that honours Idempotency-Key gives its own session to the endpoint: one connection, one COMMIT."""
    async with quiet(through(database, proxy)) as service:
        proxy.statements.clear()

        answer = await service.client.post("/patients", json=ADA, headers={"Idempotency-Key": "k-1"})

        assert answer.status_code == 201
        assert [statement for statement in proxy.statements if statement in {"BEGIN;", "COMMIT;"}] == [
            "BEGIN;",
            "COMMIT;",
        ]
        assert service.sample("db_connection_hold_seconds_count", pool="primary", route="/patients") == 1


@pytest.mark.usefixtures("no_autovacuum")
async def test_report_sees_one_snapshot(service: Service, database: Database, execute: Execute) -> None:
    """What is committed between two statements of a report is in neither or in both."""

    @service.app.get("/snapshot")
    async def snapshot(session: AnalyticsDB) -> list[int]:
        first = (await session.execute(text(PATIENTS))).scalar_one()
        await execute(str(ADD_ADA))
        await database.cluster.wait_replayed()
        return [first, (await session.execute(text(PATIENTS))).scalar_one()]

    assert (await service.client.get("/snapshot")).json() == [0, 0]
    assert (await service.client.get("/snapshot")).status_code == 409  # The patient is there by now.


# Refusing to write.


@pytest.mark.parametrize("where", ["replica", "primary"])
async def test_write_in_a_read_session_is_refused(
    database: Database, execute: Execute, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The database refuses it wherever it reads; the client reads 500, for it is a bug."""
    async with serving(database.settings(replica=where == "replica")) as service:

        @service.app.get("/sly")
        async def sly(session: ReadDB) -> None:
            await session.execute(ADD_ADA)

        answer = await service.client.get("/sly")

        assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
        assert "A read session was asked to write" in caplog.text
        assert await execute(PATIENTS) == 0
        # The connection is as good as before.
        assert service.sample("db_connection_invalidations_total", pool=where, reason="error") == 0


async def test_write_in_a_report_is_refused(service: Service, execute: Execute) -> None:
    """The analytics pool reads too."""

    @service.app.get("/sly")
    async def sly(session: AnalyticsDB) -> None:
        await session.execute(ADD_ADA)

    assert (await service.client.get("/sly")).status_code == 500
    assert await execute(PATIENTS) == 0


async def test_types_refuse_a_write_in_a_read_session(service: Service) -> None:
    """Each line is a mistake to mypy, which would object to the comment if it were not; and it fails when it is run."""
    async with service.databases.reading() as session:
        patient = Patient(**ADA)
        with pytest.raises(TypeError, match="a ReadSession does not write: Patient"):
            session.add(patient)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="a ReadSession does not write: list"):
            session.add_all([patient])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="a ReadSession does not write: Patient"):
            await session.delete(patient)  # type: ignore[arg-type]
        with pytest.raises(Exception, match="A read session was asked to write"):
            await queries.add_patient(session, ADA | {"birth_date": None})  # type: ignore[arg-type]


async def test_objects_are_written_by_a_write_session(service: Service, execute: Execute) -> None:
    """What a session was given is stored at the end of its block, what it was told to delete is gone."""
    names = [Patient(mrn=f"A-{n}", full_name="Ada", birth_date=date(1915, 12, 10)) for n in range(3)]
    async with service.databases.writing() as session:
        session.add(names[0])
        session.add_all(names[1:])
    assert await execute(PATIENTS) == 3

    async with service.databases.writing() as session:
        found = (await session.execute(select(Patient).where(Patient.mrn == "A-1"))).scalar_one()
        await session.delete(found)
    assert await execute(PATIENTS) == 2


async def test_unknown_attribute_of_a_session(service: Service) -> None:
    """A session that was not used yet has no more attributes than one that was."""
    async with service.databases.reading() as session:
        with pytest.raises(AttributeError, match="wieght"):
            session.wieght  # type: ignore[attr-defined]  # noqa: B018  # That it is not there is the point.


# Committing.


async def test_handler_that_raises_is_rolled_back(service: Service, execute: Execute) -> None:
    """An exception, one for HTTP too, takes back what the request did."""

    @service.app.post("/raising/{how}")
    async def raising(session: WriteDB, how: str) -> None:
        await session.execute(ADD_ADA)
        raise HTTPException(418) if how == "http" else RuntimeError("a bug")

    assert (await service.client.post("/raising/http")).status_code == 418
    assert (await service.client.post("/raising/bug")).status_code == 500
    assert await execute(PATIENTS) == 0


async def test_handler_that_returns_an_error_is_committed(service: Service, execute: Execute) -> None:
    """Only what is raised rolls back: an answer that was returned says what was done."""

    @service.app.post("/returning")
    async def returning(session: WriteDB) -> Response:
        await session.execute(ADD_ADA)
        return Response(status_code=409)

    assert (await service.client.post("/returning")).status_code == 409
    assert await execute(PATIENTS) == 1


async def test_commit_that_fails_is_never_2xx(service: Service, execute: Execute) -> None:
    """A constraint that is checked at COMMIT is a conflict, and nothing is stored."""
    await execute("ALTER TABLE patients ADD CONSTRAINT late UNIQUE (full_name) DEFERRABLE INITIALLY DEFERRED")

    first = await service.client.post("/patients", json=ADA)
    second = await service.client.post("/patients", json=ADA | {"mrn": "A-2"})

    assert (first.status_code, second.status_code) == (201, 409)
    assert second.json()["code"] == "conflict"
    assert "X-Consistency-Token" not in second.headers
    assert await execute(PATIENTS) == 1


async def test_backend_killed_before_commit_is_never_2xx(service: Service, execute: Execute) -> None:
    """A connection that was lost before COMMIT has committed nothing, and the answer says that."""

    @service.app.post("/killed")
    async def killed(session: WriteDB) -> None:
        await session.execute(ADD_ADA)
        pid = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await execute("SELECT pg_terminate_backend($1)", pid)
        driver = session.sync_session.get_bind().connection.driver_connection

        async def noticed() -> bool:
            return driver is not None and bool(driver.is_closed())

        assert await eventually(noticed, 5)

    answer = await service.client.post("/killed")

    assert (answer.status_code, answer.json()["code"]) == (503, "connection_lost")
    assert answer.headers["Retry-After"] == "1"
    assert await execute(PATIENTS) == 0


@pytest.mark.parametrize(("fate", "stored"), [("lose_request", 0), ("lose_answer", 1), ("hang", 0)])
async def test_connection_lost_during_commit_is_an_unknown_outcome(
    database: Database, proxy: Proxy, execute: Execute, fate: Fate, stored: int
) -> None:
    """Whether COMMIT arrived or not, the answer is the same, because the service cannot know."""
    primary = {"url": proxy.url(database.url()), "command_timeout_seconds": 0.3}
    async with quiet(through(database, proxy, primary=primary, statement_timeout_seconds=0.2)) as service:
        path = in_transaction(service)
        proxy.fates["COMMIT"] = fate

        answer = await service.client.post(path, json=ADA)

        assert (answer.status_code, answer.json()["code"]) == (503, "outcome_unknown")
        assert answer.headers["Retry-After"] == "1"
        assert await execute(PATIENTS) == stored
        proxy.fates.clear()
        proxy.resume()
        assert (await service.client.post(path, json=ADA | {"mrn": "A-2"})).status_code == 201


async def test_swallowed_failure_is_never_2xx(service: Service, execute: Execute) -> None:
    """After a statement failed, COMMIT would be a silent ROLLBACK: the client reads 500, not 2xx."""

    @service.app.post("/swallowing")
    async def swallowing(session: WriteDB) -> None:
        await session.execute(ADD_ADA)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1 / 0"))

    assert (await service.client.post("/swallowing")).status_code == 500
    assert await execute(PATIENTS) == 0


async def test_failure_inside_a_savepoint_may_be_swallowed(service: Service, execute: Execute) -> None:
    """What a savepoint took back leaves the rest of the transaction whole."""

    @service.app.post("/careful")
    async def careful(session: WriteDB) -> None:
        await session.execute(ADD_ADA)
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await session.execute(ADD_ADA)

    assert (await service.client.post("/careful")).status_code == 200
    assert await execute(PATIENTS) == 1


async def test_swallowed_flush_is_never_2xx(service: Service, execute: Execute) -> None:
    """An object that could not be stored is not forgotten because its error was."""

    @service.app.post("/flushing")
    async def flushing(session: WriteDB) -> None:
        await session.execute(ADD_ADA)
        session.add(Patient(mrn="A-1", full_name="Another Ada"))
        with pytest.raises(DBAPIError):
            await session.flush()

    assert (await service.client.post("/flushing")).status_code == 500
    assert await execute(PATIENTS) == 0


async def test_flush_at_the_end_that_fails_is_no_unknown_outcome(service: Service, execute: Execute) -> None:
    """What objects still owe is asked for before COMMIT, and a lost connection there is not a lost outcome."""

    @service.app.post("/late")
    async def late(session: WriteDB) -> None:
        pid = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await session.execute(insert(Patient).values(mrn="A-0", full_name="A", birth_date=text("current_date")))
        session.add(Patient(mrn="A-1", full_name="Ada", birth_date=text("current_date")))
        await execute("SELECT pg_terminate_backend($1)", pid)

    answer = await service.client.post("/late")

    assert (answer.status_code, answer.json()["code"]) == (503, "connection_lost")
    assert await execute(PATIENTS) == 0


async def test_swallowed_loss_is_never_2xx(service: Service, execute: Execute) -> None:
    """A handler that goes on after its connection was lost does not get a second one for the rest."""

    @service.app.post("/lost")
    async def lost(session: WriteDB) -> None:
        await session.execute(ADD_ADA)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    assert (await service.client.post("/lost")).status_code >= 500
    assert await execute(PATIENTS) == 0


async def test_token_that_cannot_be_had_does_not_undo_the_write(
    database: Database,
    proxy: Proxy,
    replica_proxy: Proxy,
    execute: Execute,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A write that is committed is answered so; without its position the client has no token."""
    async with quiet(through(database, proxy, replica_proxy)) as service:
        proxy.fates[WRITTEN] = "lose_request"

        answer = await service.client.post("/patients", json=ADA)

        assert (answer.status_code, "X-Consistency-Token" in answer.headers) == (201, False)
        assert await execute(PATIENTS) == 1
        assert "no consistency token" in caplog.text


async def test_background_task_opens_a_session_of_its_own(service: Service, execute: Execute) -> None:
    """The request's session has ended when its tasks run; outside a request one is opened by hand."""
    held: list[int] = []

    @service.app.post("/later")
    async def later(session: WriteDB, tasks: BackgroundTasks) -> None:
        await session.execute(text("SELECT 1"))
        tasks.add_task(task)

    async def task() -> None:
        held.append(service.databases.primary.pool.figures().checked_out)
        async with service.databases.writing(label="later") as session:
            await session.execute(ADD_ADA)

    assert (await service.client.post("/later")).status_code == 200
    assert held == [0]
    assert await execute(PATIENTS) == 1
    assert service.sample("db_connection_hold_seconds_count", pool="primary", route="later") == 1


async def test_thousand_requests_on_two_connections_leave_nothing(
    database: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Reads, writes, conflicts and misses, a hundred at a time: every one is answered, and all figures are back."""
    caplog.set_level(logging.ERROR)
    primary = {"url": proxy.url(database.url()), "pool_size": 2, "max_overflow": 0, "pool_timeout": 20.0}
    async with quiet(through(database, proxy, primary=primary)) as service:
        kinds = [("POST", "/patients"), ("GET", "/patients/1"), ("GET", "/patients/999999"), ("GET", "/patients")]

        async def one(number: int) -> int:
            method, path = kinds[number % 4]
            body = ADA | {"mrn": f"A-{number // 8}"} if method == "POST" else None
            return (await service.client.request(method, path, json=body)).status_code

        statuses = []
        for start in range(0, 1000, 100):
            statuses += await asyncio.gather(*(one(number) for number in range(start, start + 100)))

        figures = service.databases.primary.pool.figures()
        assert (figures.checked_out, figures.waiting, figures.connecting, figures.available) == (0, 0, 0, 2)
        assert figures.checked_in <= 2
        assert proxy.connections <= 3  # The monitor has the third.
        assert (statuses.count(201), statuses.count(409)) == (125, 125)
        assert set(statuses) <= {200, 201, 404, 409}
        for name in ("db_connection_hold_seconds", "db_connection_idle_hold_seconds"):
            counts = [
                sample.value
                for metric in service.databases.metrics.registry.collect()
                for sample in metric.samples
                if sample.name == f"{name}_count"
            ]
            assert sum(counts) == 1000
    assert await sessions_end(database)


# Where a request's session comes from.


def test_route_is_named_by_its_template() -> None:
    """What matched is the label, and what matched nothing has one label for all."""
    assert route_of({}) == "unmatched"
    assert route_of({"route": object()}) == "unmatched"


def test_scope_without_the_middleware_has_no_wishes() -> None:
    """An application that leaves the middleware out reads wherever it may."""
    assert consistency_of({}).wanted is None
    assert consistency_of({"state": {"consistency": "?"}}).primary_only is False


async def test_session_outside_a_request_reads_where_it_may(service: Service) -> None:
    """Without a request nothing is wished for: the replica serves."""
    async with service.databases.reading() as session:
        assert isinstance(session, ReadSession)
        assert (await session.execute(text("SELECT pg_is_in_recovery()"))).scalar_one() is True


async def test_write_connection_is_asked_nothing_after_it_was_lost(service: Service, execute: Execute) -> None:
    """Closing a session whose connection is gone is quiet."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(service.databases.writing())
        pid = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await execute("SELECT pg_terminate_backend($1)", pid)
        # The server's last words, or the end of the socket, whichever is seen first.
        with pytest.raises((DBAPIError, ConnectionLost)):
            await session.execute(ADD_ADA)
        await session.rollback()

    assert service.databases.primary.pool.figures().available == service.databases.primary.settings.capacity
