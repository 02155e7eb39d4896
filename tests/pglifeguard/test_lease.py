"""A session asks by the driver until SQLAlchemy is needed, and both see one connection and one transaction."""

import asyncio
import gc
import logging
from datetime import date
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Boolean, Integer, Text, bindparam, cast, func, literal_column, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from app.patients import queries
from app.patients.models import Patient
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import DatabaseUnreachable, TransactionAborted
from pglifeguard.fastapi.sessions import RequestDatabases, WriteDB
from pglifeguard.query import Query
from pglifeguard.testing.proxy import Fate, Proxy
from tests.conftest import Database, Execute
from tests.service import Service, quiet, serving

# FATAL 57P01, as it stands on the wire; no ReadyForQuery comes after it.
FAREWELL = b"E\x00\x00\x00\x2aSFATAL\x00VFATAL\x00C57P01\x00Mterminating...\x00\x00"
ADA = {"mrn": "A-1", "full_name": "Ada Lovelace", "birth_date": date(1915, 12, 10)}
COUNT = "SELECT count(*) FROM patients"
MOOD: Query[Any] = Query(select(literal_column("ROW('glad'::public.mood)").label("mood")))
LOCK = Query(select(cast(func.pg_advisory_xact_lock(bindparam("key", type_=Integer)), Text)))
KILL = Query(select(func.pg_terminate_backend(func.pg_backend_pid())))
DEMOTE = Query(select(func.set_config("transaction_read_only", "on", literal_column("true", Boolean))))
FAIL = Query(select((literal_column("1", Integer) / bindparam("zero", type_=Integer)).label("nothing")))


def begun_and_ended(proxy: Proxy) -> list[str]:
    """List what began and ended transactions on the wire."""
    return [s for s in proxy.statements if s.startswith(("BEGIN", "COMMIT", "ROLLBACK"))]


async def test_sqlalchemy_goes_on_where_the_driver_stood(database: Database, proxy: Proxy, execute: Execute) -> None:
    """What the driver wrote is seen by the next statement, and one COMMIT stores all of it."""
    async with quiet(database.settings(replica=False, primary={"url": proxy.url(database.url())})) as service:
        await service.client.get("/patients")
        proxy.statements.clear()
        async with service.databases.writing() as session:
            await queries.add_patient(session, ADA)
            session.add(Patient(**ADA | {"mrn": "A-2"}))
            await session.flush()
            await queries.add_patient(session, ADA | {"mrn": "A-3"})
            assert (await session.execute(text(COUNT))).scalar_one() == 3
            assert await execute(COUNT) == 0
            assert service.databases.primary.pool.figures().checked_out == 1

        assert begun_and_ended(proxy) == ["BEGIN;", "COMMIT;"]
        assert await execute(COUNT) == 3
        assert service.sample("db_connection_hold_seconds_count", pool="primary", route="background") == 1


@pytest.mark.parametrize("first", ["driver", "sqlalchemy"])
async def test_rollback_takes_everything_back(service: Service, execute: Execute, first: str) -> None:
    """A session that was rolled back begins anew, and stores only what came after."""
    async with service.databases.writing() as session:
        if first == "sqlalchemy":
            await session.execute(text("SELECT 1"))
        await queries.add_patient(session, ADA)
        await session.rollback()
        await queries.add_patient(session, ADA | {"mrn": "A-2"})

    assert await execute("SELECT string_agg(mrn, ',') FROM patients") == "A-2"


async def test_closing_early_gives_the_connection_back(service: Service, execute: Execute) -> None:
    """Before slow work a session may be closed: nothing is stored, and nothing held."""
    async with service.databases.writing() as session:
        await queries.add_patient(session, ADA)
        await session.close()
        assert service.databases.primary.pool.figures().checked_out == 0
        await session.execute(text("SELECT 1"))
        await session.close()
        assert service.databases.primary.pool.figures().checked_out == 0

    assert await execute(COUNT) == 0


async def test_session_does_one_thing_at_a_time(database: Database) -> None:
    """A second statement that does not wait for the first one's connection is a mistake, and takes no other."""
    async with serving(database.settings(pool_min_size=0)) as service:
        async with service.databases.writing() as session:
            first = asyncio.create_task(queries.add_patient(session, ADA))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="need a session each"):
                await queries.add_patient(session, ADA | {"mrn": "A-2"})
            await first

        figures = service.databases.primary.pool.figures()
        assert (figures.checked_out, figures.available) == (0, figures.total)
        assert service.sample("db_connection_acquire_seconds_count", pool="primary") == 1


async def test_statement_beside_another_is_refused_and_harms_nothing(service: Service) -> None:
    """Asyncpg refuses the second of two tasks on one session, and the first gets its answer."""
    async with service.databases.writing() as session:
        await session.rows(LOCK, key=1)
        checkout = next(iter(service.databases.primary.pool._out.values()))
        async with service.databases.writing() as other:
            await other.rows(LOCK, key=2)
            first = asyncio.create_task(session.rows(LOCK, key=2))

            async def waits() -> bool:
                return checkout.asked_at is not None

            assert await eventually(waits, 5)
            with pytest.raises(asyncpg.InterfaceError, match="another operation"):
                await session.rows(LOCK, key=3)

        assert len(await first) == 1


async def test_dropped_session_loses_no_permit(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """A session that nobody closes is named, the second time with its line, and its connection is not used again."""
    for _ in range(2):
        session = service.databases.writing(label="forgetful")
        await queries.add_patient(session, ADA)
        with caplog.at_level(logging.ERROR):
            del session
            gc.collect()

    first, second = (
        vars(record) for record in caplog.records if record.message == "session dropped without being closed"
    )
    figures = service.databases.primary.pool.figures()
    assert first["route"] == second["route"] == "forgetful"
    assert second["taken_in"].endswith("in add_patient")
    assert (figures.checked_out, figures.available) == (0, figures.total)
    assert service.sample("db_connection_invalidations_total", pool="primary", reason="closed") == 2


@pytest.mark.parametrize("first", ["driver", "sqlalchemy"])
async def test_conflict_has_one_name(service: Service, execute: Execute, first: str) -> None:
    """A constraint is an IntegrityError both ways, and the row that PostgreSQL quotes is in neither."""
    await execute("INSERT INTO patients (mrn, full_name, birth_date) VALUES ('A-1', 'Ada', '1980-01-01')")

    async with service.databases.writing() as session:
        if first == "sqlalchemy":
            await session.execute(text("SELECT 1"))
        with pytest.raises(IntegrityError) as conflict:
            await session.rows(queries.ADD, **ADA)
        await session.rollback()

    assert "uq_patients_mrn" in str(conflict.value)
    assert "A-1" not in str(conflict.value)


@pytest.mark.parametrize("how", ["swallowed", "swallowed before SQLAlchemy"])
async def test_swallowed_failure_of_the_driver_is_never_committed(service: Service, execute: Execute, how: str) -> None:
    """After a statement failed COMMIT would be a silent ROLLBACK."""

    async def work() -> None:
        async with service.databases.writing() as session:
            await queries.add_patient(session, ADA)
            with pytest.raises(Exception, match="division by zero"):
                await session.rows(FAIL, zero=0)
            if how != "swallowed":
                with pytest.raises(DBAPIError):
                    await session.execute(text("SELECT 1"))

    with pytest.raises(TransactionAborted):
        await work()
    assert await execute(COUNT) == 0


async def test_server_that_ends_a_session_is_answered_503(service: Service) -> None:
    """A backend that is ended says 57P01: a transient failure, and its connection serves no other request."""

    @service.app.post("/killed")
    async def killed(session: WriteDB) -> None:
        await session.rows(KILL)

    answer = await service.client.post("/killed")

    assert (answer.status_code, answer.json()["code"]) == (503, "connection_lost")
    assert service.databases.primary.pool.figures().checked_out == 0
    assert (await service.client.post("/killed")).status_code == 503


@pytest.mark.parametrize(
    ("request_line", "code"),
    [
        ("GET /patients", "connection_lost"),
        ("POST /rows", "connection_lost"),
        ("POST /execute", "connection_lost"),
        ("POST /once", "outcome_unknown"),
    ],
)
async def test_connection_that_the_server_has_just_ended(
    database: Database, proxy: Proxy, execute: Execute, request_line: str, code: str
) -> None:
    """Acquired after the server's last message and before its FIN, it is a transient failure and not used again."""
    primary = {"url": proxy.url(database.url()), "pool_size": 1, "max_overflow": 0, "command_timeout_seconds": 1}
    async with quiet(database.settings(replica=False, primary=primary, statement_timeout_seconds=0.5)) as service:

        @service.app.post("/rows")
        async def rows(session: WriteDB) -> None:
            await queries.list_patients(session, limit=1)

        @service.app.post("/execute")
        async def through_sqlalchemy(session: WriteDB) -> None:
            await session.execute(text("SELECT 1"))

        @service.app.post("/once")
        async def once(databases: RequestDatabases) -> None:
            await databases.write_once(queries.PAGE, after_id=0, limit=1)

        await service.client.request(*request_line.split())
        proxy.say(FAREWELL)
        await execute(COUNT)  # By the time that this is answered the service has heard it.

        answers = [await service.client.request(*request_line.split()) for _ in range(2)]

        assert [answer.status_code for answer in answers] == [503, 200]
        assert answers[0].json()["code"] == code
        assert service.databases.primary.pool.figures().checked_out == 0


async def test_driver_that_cannot_read_an_answer_is_a_bug(database: Database, execute: Execute) -> None:
    """It would be so for ever: not a lost connection, which may be tried again, and the connection is good."""
    await execute("CREATE TYPE public.mood AS ENUM ('glad')")
    async with quiet(database.settings(replica=False)) as service:

        @service.app.post("/bug")
        async def bug(databases: RequestDatabases) -> None:
            await databases.write_once(MOOD)

        assert (await service.client.post("/bug")).status_code == 500
        assert service.sample("db_connection_invalidations_total", pool="primary", reason="closed") == 0


async def test_stale_plan_on_the_replica_is_made_anew(database: Database, service: Service, execute: Execute) -> None:
    """After a migration changed a column's type, rows have their attributes as before, and no others."""
    created = await service.client.post("/patients", json=ADA | {"birth_date": "1915-12-10"})
    service.client.cookies.clear()
    await database.cluster.wait_replayed()
    await service.client.get(created.headers["Location"])
    await execute("ALTER TABLE patients ALTER COLUMN full_name TYPE varchar(300)")
    await database.cluster.wait_replayed()

    async with service.databases.reading() as session:
        patient = await queries.get_patient(session, created.json()["id"])

    assert patient.full_name == "Ada Lovelace"
    assert not hasattr(patient, "nobody")


async def test_demoted_server_is_left(service: Service) -> None:
    """A server that takes no writes is a transient failure, and none of its connections is used again."""

    @service.app.post("/demoted")
    async def demoted(session: WriteDB) -> None:
        await session.rows(DEMOTE)
        await queries.add_patient(session, ADA)

    answer = await service.client.post("/demoted")

    assert (answer.status_code, answer.json()["code"]) == (503, "database_read_only")
    assert service.databases.primary.pool.figures().checked_in == 0


@pytest.mark.usefixtures("no_autovacuum")
async def test_report_by_the_driver_sees_one_snapshot(service: Service, database: Database, execute: Execute) -> None:
    """Queries of a report, by the driver and then by SQLAlchemy, see what was there when the first one started."""
    async with service.databases.reporting() as session:
        before = await queries.list_patients(session, limit=5)
        await execute("INSERT INTO patients (mrn, full_name, birth_date) VALUES ('A-1', 'Ada', '1980-01-01')")
        await database.cluster.wait_replayed()
        after = await queries.list_patients(session, limit=5)
        through_sqlalchemy = (await session.execute(text(COUNT))).scalar_one()

    assert (list(before), list(after), through_sqlalchemy) == ([], [], 0)


@pytest.mark.parametrize("fate", ["lose_request", "hang"])
async def test_rollback_that_fails_changes_no_answer(database: Database, proxy: Proxy, fate: Fate) -> None:
    """A read was answered; that the connection dies while it is given back is nobody's error."""
    primary = {"url": proxy.url(database.url()), "command_timeout_seconds": 0.3}
    async with quiet(database.settings(replica=False, primary=primary, statement_timeout_seconds=0.2)) as service:
        await service.client.get("/patients")
        proxy.fates["ROLLBACK"] = fate

        answer = await service.client.get("/patients")

        assert (answer.status_code, answer.json()) == (200, [])
        assert service.sample("db_connection_invalidations_total", pool="primary", reason="closed") == 1


async def test_begin_that_fails_leaves_nothing(database: Database, proxy: Proxy) -> None:
    """A connection that dies at BEGIN is 503, and its permit is back."""
    async with quiet(database.settings(replica=False, primary={"url": proxy.url(database.url())})) as service:
        await service.client.get("/patients")
        proxy.fates["BEGIN"] = "lose_request"

        answer = await service.client.get("/patients")

        assert (answer.status_code, answer.json()["code"]) == (503, "connection_lost")
        figures = service.databases.primary.pool.figures()
        assert (figures.checked_out, figures.available) == (0, figures.total)


async def test_nothing_is_begun_without_a_connection(database: Database, proxy: Proxy) -> None:
    """A session that got none is left as if it had never been."""
    settings: Any = database.settings(replica=False, primary={"url": proxy.url(database.url()), "pool_min_size": 0})
    async with quiet(settings) as service:
        proxy.refuse()
        with pytest.raises(DatabaseUnreachable):
            async with service.databases.writing() as session:
                await queries.add_patient(session, ADA)

        figures = service.databases.primary.pool.figures()
        assert (figures.checked_out, figures.available) == (0, figures.total)
