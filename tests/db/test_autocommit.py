"""A write that is one query: what it costs on the wire, what it promises, and what it refuses to be."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import date
from typing import Annotated, Any

import asyncpg
import pytest
from fastapi import Depends
from sqlalchemy import func, literal, select, text

from app.db.dependencies import AutocommitDB, ReadDB, WriteDB
from app.db.query import Query
from app.db.server import WRITTEN
from app.db.sessions import Consistency, WriteSession
from app.errors import NotFound
from app.patients import queries
from app.patients.models import Patient
from local.waiting import eventually
from tests.conftest import Database, Execute
from tests.proxy import Fate, Proxy
from tests.service import Service, quiet, serving

OPEN_TRANSACTIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND usename = 'app_rw' AND xact_start IS NOT NULL
"""
ADA = {"mrn": "A-1", "full_name": "Ada Lovelace", "birth_date": date(1915, 12, 10)}
AS_JSON = ADA | {"birth_date": "1915-12-10"}
USER = {"email": "ada@example.com", "full_name": "Ada Lovelace"}
# Ends whoever waits for a lock in this database.
END_WAITING = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
"""
ADD_SOMEBODY = text("INSERT INTO patients (mrn, full_name, birth_date) VALUES (gen_random_uuid()::text, 'x', now())")
MRNS = "SELECT coalesce(string_agg(mrn, ',' ORDER BY mrn), '') FROM patients"


def again(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body with another value where values are unique."""
    return {name: f"again-{value}" if name in {"mrn", "email"} else value for name, value in body.items()}


@pytest.mark.parametrize(("path", "body"), [("/patients", AS_JSON), ("/users", USER)])
@pytest.mark.parametrize("replica", [False, True], ids=["alone", "with a replica"])
async def test_write_is_one_round_trip_and_a_token_the_second(
    database: Database, proxy: Proxy, path: str, body: dict[str, Any], *, replica: bool
) -> None:
    """The query alone, without BEGIN and COMMIT; with a replica the position that it reached is asked afterwards."""
    primary = {"url": proxy.url(database.url())}
    async with quiet(database.settings(replica=replica, primary=primary)) as service:
        await service.client.post(path, json=body)
        proxy.round_trips = 0
        proxy.statements.clear()

        answer = await service.client.post(path, json=again(body))

        assert (answer.status_code, proxy.round_trips) == (201, 1 + replica)
        assert ("X-Consistency-Token" in answer.headers) == replica
        assert not [s for s in proxy.statements if s.startswith(("BEGIN", "COMMIT"))]


async def test_connection_is_free_before_the_answer_is_made(service: Service) -> None:
    """What the endpoint does after its query holds nobody up."""

    @service.app.post("/once")
    async def once(session: AutocommitDB) -> int:
        await queries.add_patient(session, ADA)
        return service.databases.primary.pool.figures().checked_out

    assert (await service.client.post("/once")).json() == 0
    assert service.sample("db_connection_idle_hold_seconds_sum", pool="primary", route="/once") < 0.05


@pytest.mark.parametrize(("fate", "stored"), [("lose_request", "A-1"), ("lose_answer", "A-1,A-2"), ("hang", "A-1")])
async def test_connection_lost_meanwhile_is_an_unknown_outcome(
    database: Database, proxy: Proxy, execute: Execute, fate: Fate, stored: str
) -> None:
    """Whether the query arrived or not, the answer is the same, because the service cannot know."""
    primary = {"url": proxy.url(database.url()), "command_timeout_seconds": 0.3}
    settings = database.settings(replica=False, primary=primary, statement_timeout_seconds=0.2)
    async with quiet(settings) as service:
        await service.client.post("/patients", json=AS_JSON)
        proxy.fates["INSERT INTO patients"] = fate

        answer = await service.client.post("/patients", json=AS_JSON | {"mrn": "A-2"})

        assert (answer.status_code, answer.json()["code"]) == (503, "outcome_unknown")
        assert answer.headers["Retry-After"] == "1"
        assert await execute(MRNS) == stored
        proxy.fates.clear()
        proxy.resume()
        assert (await service.client.post("/patients", json=AS_JSON | {"mrn": "A-3"})).status_code == 201


async def test_refused_query_is_no_unknown_outcome(service: Service, execute: Execute) -> None:
    """What the server says of a query is certain, and the connection stays good."""
    answers = [await service.client.post("/patients", json=AS_JSON) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [201, 409]
    assert answers[1].json()["code"] == "mrn_taken"
    assert "X-Consistency-Token" not in answers[1].headers
    assert await execute(MRNS) == "A-1"
    assert service.sample("db_connection_invalidations_total", pool="primary", reason="error") == 0


async def test_server_that_stops_says_that_nothing_was_stored(
    service: Service, database: Database, execute: Execute
) -> None:
    """A backend that is told to go while its query waits has taken it back: it may be sent again."""
    locker = await asyncpg.connect(database.url("postgres"))
    try:
        async with locker.transaction():
            await locker.execute("LOCK TABLE patients IN EXCLUSIVE MODE")
            asked = asyncio.create_task(service.client.post("/patients", json=AS_JSON))

            async def ended() -> bool:
                return bool(await locker.fetchval(END_WAITING))

            assert await eventually(ended, 5)
            answer = await asked
    finally:
        await locker.close()

    assert (answer.status_code, answer.json()["code"]) == (503, "connection_lost")
    assert await execute(MRNS) == ""


async def test_query_without_a_connection_was_not_run(database: Database, proxy: Proxy, execute: Execute) -> None:
    """Where no connection is to be had, nothing is unknown."""
    primary = {"url": proxy.url(database.url()), "pool_min_size": 0}
    async with serving(database.settings(replica=False, primary=primary)) as service:
        proxy.refuse()
        proxy.cut()

        answer = await service.client.post("/patients", json=AS_JSON)

        assert (answer.status_code, answer.json()["code"]) == (503, "database_unreachable")
    assert await execute(MRNS) == ""


async def test_cancelled_query_gives_its_connection_back(database: Database, proxy: Proxy) -> None:
    """Nobody waits for the answer any more, and the server is told so."""
    primary = {"url": proxy.url(database.url()), "pool_size": 1, "max_overflow": 0}
    async with quiet(database.settings(replica=False, primary=primary)) as service:
        await service.client.post("/patients", json=AS_JSON)
        proxy.freeze()

        async def store() -> None:
            async with service.databases.autocommitting() as session:
                await queries.add_patient(session, ADA | {"mrn": "A-2"})

        storing = asyncio.create_task(store())
        pool = service.databases.primary.pool

        async def at_work() -> bool:
            return pool.figures().checked_out == 1

        assert await eventually(at_work, 5)
        storing.cancel()

        with pytest.raises(asyncio.CancelledError):
            await storing
        assert pool.figures().checked_out == 0
        assert (await service.client.post("/patients", json=AS_JSON | {"mrn": "A-3"})).status_code == 201


@pytest.mark.parametrize("end", ["timed out", "cancelled"])
async def test_look_at_the_lsn_that_fails_spoils_nobody(database: Database, proxy: Proxy, end: str) -> None:
    """Its connection serves nobody else, who would have to wait for what it left behind."""
    primary = {"url": proxy.url(database.url()), "pool_size": 1, "max_overflow": 0, "command_timeout_seconds": 0.5}
    async with quiet(database.settings(primary=primary, statement_timeout_seconds=0.4)) as service:
        await service.client.post("/patients", json=AS_JSON)
        proxy.fates[WRITTEN] = "hang"
        asked = asyncio.create_task(_store(service, Consistency(), "A-2"))

        async def looking() -> bool:
            return any(link.frozen for link in proxy.links)

        assert await eventually(looking, 5)
        if end == "cancelled":
            asked.cancel()
        await asyncio.wait([asked])
        proxy.fates.clear()

        assert asked.cancelled() == (end == "cancelled")
        assert (await service.client.post("/patients", json=AS_JSON | {"mrn": "A-3"})).status_code == 201


async def test_stale_plan_is_made_anew(database: Database, execute: Execute) -> None:
    """After a migration changed a column's type the query is run once, and its row is read as ever."""
    async with quiet(database.settings(replica=False)) as service:
        await service.client.post("/patients", json=AS_JSON)
        await execute("ALTER TABLE patients ALTER COLUMN full_name TYPE varchar(300)")

        answer = await service.client.post("/patients", json=AS_JSON | {"mrn": "A-2"})

        assert (answer.status_code, answer.json()["full_name"]) == (201, "Ada Lovelace")
        assert await execute(MRNS) == "A-1,A-2"


async def test_value_of_the_wrong_kind_leaves_nothing_open(database: Database, execute: Execute) -> None:
    """It is a bug, not an unknown outcome, and the server is not left waiting in a transaction."""
    async with quiet(database.settings(replica=False)) as service:

        @service.app.post("/bug")
        async def bug(session: AutocommitDB) -> None:
            await queries.add_patient(session, ADA | {"birth_date": "1915-12-10"})

        assert (await service.client.post("/bug")).status_code == 500

        async def nothing_open() -> bool:
            return bool(await execute(OPEN_TRANSACTIONS) == 0)

        assert await eventually(nothing_open, 2)
        assert service.databases.primary.pool.figures().checked_out == 0


@pytest.mark.parametrize("how", ["rows", "gather", "execute", "add", "savepoint", "begin", "ended"])
async def test_second_query_is_refused(service: Service, execute: Execute, how: str) -> None:
    """Two would not be stored together or not at all: that takes a transaction, and the author is told."""

    async def use(session: WriteSession) -> None:
        match how:
            case "rows":
                await queries.add_patient(session, ADA)
                await queries.add_patient(session, ADA | {"mrn": "A-2"})
            case "gather":
                both = (queries.add_patient(session, ADA | {"mrn": mrn}) for mrn in ("A-1", "A-2"))
                _, second = await asyncio.gather(*both, return_exceptions=True)
                assert isinstance(second, RuntimeError)
                raise second
            case "execute":
                await session.execute(text("DELETE FROM patients"))
            case "add":
                session.add(Patient(**ADA))
            case "savepoint":
                async with session.begin_nested():
                    await queries.add_patient(session, ADA)
            case "begin":
                async with session.begin():
                    await queries.add_patient(session, ADA)

    async def misuse() -> None:
        async with service.databases.autocommitting() as session:
            await use(session)
        await queries.add_patient(session, ADA)

    with pytest.raises(RuntimeError, match="one query" if how != "ended" else "ended"):
        await misuse()

    assert await execute(MRNS) == ("A-1" if how in {"rows", "gather"} else "")
    assert service.databases.primary.pool.figures().checked_out == 0


async def test_session_that_ended_while_it_waited_writes_nothing(database: Database, execute: Execute) -> None:
    """Who left the session before it had its connection was told so, and must not find the row afterwards."""
    async with serving(database.settings(replica=False, pool_size=1, max_overflow=0)) as service:
        pool = service.databases.primary.pool

        async def queued() -> bool:
            return pool.figures().waiting == 1

        async with service.databases.primary.engine.connect(), service.databases.autocommitting() as session:
            late = asyncio.create_task(queries.add_patient(session, ADA))
            assert await eventually(queued, 5)

        with pytest.raises(RuntimeError, match="ended"):
            await late
        assert await execute(MRNS) == ""
        assert pool.figures().checked_out == 0


async def test_what_comes_after_it_takes_nothing_back(service: Service, execute: Execute) -> None:
    """The price: an endpoint that fails afterwards has stored its query all the same."""

    @service.app.post("/fails")
    async def fails(session: AutocommitDB) -> None:
        await queries.add_patient(session, ADA)
        raise NotFound("Nothing is here.")

    assert (await service.client.post("/fails")).status_code == 404
    assert await execute(MRNS) == "A-1"


async def test_query_that_is_stored_cannot_be_rolled_back(service: Service, execute: Execute) -> None:
    """Who asks for that is told, and not left to believe that it was done; before the query it does no harm."""

    async def misuse() -> None:
        async with service.databases.autocommitting() as session:
            await session.rollback()
            await queries.add_patient(session, ADA)
            await session.rollback()

    with pytest.raises(RuntimeError, match="cannot take its query back"):
        await misuse()

    assert await execute(MRNS) == "A-1"
    assert service.databases.primary.pool.figures().checked_out == 0


async def test_query_joins_a_transaction_that_is_open(service: Service, execute: Execute) -> None:
    """Where a dependency names `WriteDB`, the query is part of its transaction, and is taken back with it."""

    async def audited(session: WriteDB, veto: bool) -> AsyncIterator[None]:  # noqa: FBT001  # FastAPI names it.
        yield
        await queries.add_patient(session, ADA | {"mrn": "AUDIT"})
        if veto:
            raise NotFound("Not allowed.")

    @service.app.post("/audited", dependencies=[Depends(audited, scope="function")])
    async def once(session: AutocommitDB) -> None:
        await queries.add_patient(session, ADA)

    assert (await service.client.post("/audited?veto=true")).status_code == 404
    assert await execute(MRNS) == ""
    assert (await service.client.post("/audited?veto=false")).status_code == 200
    assert await execute(MRNS) == "A-1,AUDIT"


async def test_transaction_after_it_is_refused(service: Service, execute: Execute) -> None:
    """Two sessions that write, in one request, could wait for each other; the author is told."""

    @service.app.post("/both")
    async def both(once: AutocommitDB, session: WriteDB) -> None:
        await queries.add_patient(session, ADA)
        await queries.add_patient(once, ADA | {"mrn": "A-2"})

    assert (await service.client.post("/both")).status_code == 500
    assert await execute(MRNS) == ""


async def test_transaction_before_it_takes_it_in(service: Service, execute: Execute) -> None:
    """Where a WriteDB is there first, its query is part of that transaction, and is taken back with it."""

    @service.app.post("/both/{number}")
    async def both(session: WriteDB, once: AutocommitDB, number: int) -> None:
        await queries.add_patient(session, ADA)
        await queries.add_patient(once, ADA | {"mrn": f"A-{number}"})

    assert (await service.client.post("/both/1")).status_code == 409
    assert await execute(MRNS) == ""
    assert (await service.client.post("/both/2")).status_code == 200
    assert await execute(MRNS) == "A-1,A-2"


async def test_dependency_may_name_it(service: Service, execute: Execute) -> None:
    """In a dependency it is the same as in an endpoint."""

    async def stored(session: AutocommitDB) -> queries.PatientRow:
        return await queries.add_patient(session, ADA)

    @service.app.post("/depends")
    async def depends(patient: Annotated[Any, Depends(stored)]) -> str:
        return str(patient.mrn)

    assert (await service.client.post("/depends")).json() == "A-1"
    assert await execute(MRNS) == "A-1"


async def test_get_that_wrote_is_not_run_once_more(service: Service, execute: Execute) -> None:
    """A 404 from the replica is not asked of the primary when that would write twice."""

    @service.app.get("/visited")
    async def visited(session: ReadDB, once: AutocommitDB) -> None:
        with suppress(queries.MrnTaken):
            await queries.add_patient(once, ADA)
        await queries.get_patient(session, 999)

    answer = await service.client.get("/visited")

    assert answer.status_code == 404
    assert await execute(MRNS) == "A-1"
    assert service.sample("db_query_seconds_count", pool="primary") == 1


async def test_get_that_committed_is_not_run_once_more(database: Database, proxy: Proxy, execute: Execute) -> None:
    """Nor when the position of its commit could not be asked, so that there is no token to tell."""
    primary = {"url": proxy.url(database.url()), "command_timeout_seconds": 0.5}
    async with quiet(database.settings(primary=primary, statement_timeout_seconds=0.4)) as service:

        @service.app.get("/visited")
        async def visited(session: ReadDB, log: WriteDB) -> None:
            await log.execute(ADD_SOMEBODY)
            await log.commit()
            await queries.get_patient(session, 999)

        proxy.fates[WRITTEN] = "hang"
        answer = await service.client.get("/visited")

    assert (answer.status_code, "X-Consistency-Token" in answer.headers) == (404, False)
    assert await execute("SELECT count(*) FROM patients") == 1


async def test_get_that_has_not_written_yet_is_run_once_more(behind: Service, execute: Execute) -> None:
    """That it might write is no reason for a 404 of a row that exists."""

    @behind.app.get("/visited/{patient_id}")
    async def visited(session: ReadDB, once: AutocommitDB, patient_id: int) -> str:
        patient = await queries.get_patient(session, patient_id)
        await queries.add_patient(once, ADA | {"mrn": "SEEN"})
        return str(patient.mrn)

    created = await behind.client.post("/patients", json=AS_JSON)
    behind.client.cookies.clear()

    answer = await behind.client.get(created.headers["Location"].replace("/patients", "/visited"))

    assert (answer.status_code, answer.json()) == (200, "A-1")
    assert await execute(MRNS) == "A-1,SEEN"


async def _store(service: Service, consistency: Consistency, mrn: str) -> None:
    async with service.databases.autocommitting(consistency) as session:
        await queries.add_patient(session, ADA | {"mrn": mrn})


async def test_what_its_query_left_behind_is_undone(database: Database) -> None:
    """A parameter that the query set for the session is not there for the next one on its connection."""
    set_one = Query(select(func.set_config("app.tenant", "a", literal(False)).label("tenant")))
    get_one = Query(select(func.current_setting("app.tenant", literal(True)).label("tenant")))
    one = {"pool_size": 1, "max_overflow": 0}
    async with serving(database.settings(replica=False, **one)) as service:
        async with service.databases.autocommitting() as session:
            assert (await session.rows(set_one))[0].tenant == "a"
        async with service.databases.writing() as session:
            assert not (await session.rows(get_one))[0].tenant
