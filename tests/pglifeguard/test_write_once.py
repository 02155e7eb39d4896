"""`write_once`: what it costs on the wire, what it promises, and what it refuses."""

import asyncio
from contextlib import suppress
from datetime import date
from typing import Any

import asyncpg
import pytest
from fastapi import APIRouter
from sqlalchemy import func, literal, select, text
from sqlalchemy.exc import IntegrityError

from app.patients import queries
from app.patients.schemas import PatientIn
from pglifeguard.consistency import CURRENT, Consistency
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import NotFound
from pglifeguard.fastapi import IdempotentRoute, ReadDB, RequestDatabases, SerializableDB, WriteDB
from pglifeguard.query import Query
from pglifeguard.server_position import WRITTEN
from pglifeguard.testing.proxy import Fate, Proxy
from tests.conftest import Database, Execute
from tests.service import Service, quiet, serving

OPEN_TRANSACTIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND usename = 'app_rw' AND xact_start IS NOT NULL
"""
ADA = {"mrn": "A-1", "full_name": "Ada Lovelace", "birth_date": date(1915, 12, 10)}
AS_JSON = ADA | {"birth_date": "1915-12-10"}
# Ends whoever waits for a lock in this database.
END_WAITING = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
"""
ADD_SOMEBODY = text("INSERT INTO patients (mrn, full_name, birth_date) VALUES (gen_random_uuid()::text, 'x', now())")
MRNS = "SELECT coalesce(string_agg(mrn, ',' ORDER BY mrn), '') FROM patients"


def with_route(service: Service) -> Service:
    """Add POST /once, which stores a patient by `write_once`."""

    @service.app.post("/once", status_code=201)
    async def once(databases: RequestDatabases, new: PatientIn) -> str:
        (patient,) = await databases.write_once(queries.ADD, **vars(new))
        return str(patient.full_name)

    return service


@pytest.mark.parametrize("replica", [False, True], ids=["alone", "with a replica"])
async def test_write_is_one_round_trip_and_a_token_the_second(
    database: Database, proxy: Proxy, *, replica: bool
) -> None:
    """The query alone, without BEGIN and COMMIT; with a replica the position that it reached is asked afterwards."""
    primary = {"url": proxy.url(database.url())}
    async with quiet(database.settings(replica=replica, primary=primary)) as service:
        with_route(service)
        await service.client.post("/once", json=AS_JSON)
        proxy.round_trips = 0
        proxy.statements.clear()

        answer = await service.client.post("/once", json=AS_JSON | {"mrn": "A-2"})

        assert (answer.status_code, proxy.round_trips) == (201, 1 + replica)
        assert ("X-Consistency-Token" in answer.headers) == replica
        assert not [s for s in proxy.statements if s.startswith(("BEGIN", "COMMIT"))]


async def test_connection_is_free_before_the_answer_is_made(service: Service) -> None:
    """What the endpoint does after its query holds nobody up."""

    @service.app.post("/once")
    async def once(databases: RequestDatabases) -> int:
        await databases.write_once(queries.ADD, **ADA)
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
        with_route(service)
        await service.client.post("/once", json=AS_JSON)
        proxy.fates["INSERT INTO patients"] = fate

        answer = await service.client.post("/once", json=AS_JSON | {"mrn": "A-2"})

        assert (answer.status_code, answer.json()["code"]) == (503, "outcome_unknown")
        assert answer.headers["Retry-After"] == "1"
        assert await execute(MRNS) == stored
        proxy.fates.clear()
        proxy.resume()
        assert (await service.client.post("/once", json=AS_JSON | {"mrn": "A-3"})).status_code == 201


async def test_refused_query_is_no_unknown_outcome(service: Service, execute: Execute) -> None:
    """What the server says of a query is certain, and the connection stays good."""
    with_route(service)
    answers = [await service.client.post("/once", json=AS_JSON) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [201, 409]
    assert answers[1].json()["code"] == "conflict"
    assert "X-Consistency-Token" not in answers[1].headers
    assert await execute(MRNS) == "A-1"
    assert service.sample("db_connection_invalidations_total", pool="primary", reason="error") == 0


async def test_server_that_stops_says_that_nothing_was_stored(
    service: Service, database: Database, execute: Execute
) -> None:
    """A backend that is told to go while its query waits has taken it back: it may be sent again."""
    with_route(service)
    locker = await asyncpg.connect(database.url("postgres"))
    try:
        async with locker.transaction():
            await locker.execute("LOCK TABLE patients IN EXCLUSIVE MODE")
            asked = asyncio.create_task(service.client.post("/once", json=AS_JSON))

            async def ended() -> bool:
                # In a transaction, the server's view stays as it was at the first look.
                await locker.execute("SELECT pg_stat_clear_snapshot()")
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
        with_route(service)
        proxy.refuse()
        proxy.cut()

        answer = await service.client.post("/once", json=AS_JSON)

        assert (answer.status_code, answer.json()["code"]) == (503, "database_unreachable")
    assert await execute(MRNS) == ""


async def test_cancelled_query_gives_its_connection_back(database: Database, proxy: Proxy) -> None:
    """Nobody waits for the answer any more, and the server is told so."""
    primary = {"url": proxy.url(database.url()), "pool_size": 1, "max_overflow": 0}
    async with quiet(database.settings(replica=False, primary=primary)) as service:
        with_route(service)
        await service.client.post("/once", json=AS_JSON)
        proxy.freeze()

        async def store() -> None:
            await service.databases.write_once(queries.ADD, **ADA | {"mrn": "A-2"})

        storing = asyncio.create_task(store())
        pool = service.databases.primary.pool

        async def at_work() -> bool:
            return pool.figures().checked_out == 1

        assert await eventually(at_work, 5)
        storing.cancel()

        with pytest.raises(asyncio.CancelledError):
            await storing
        assert pool.figures().checked_out == 0
        assert (await service.client.post("/once", json=AS_JSON | {"mrn": "A-3"})).status_code == 201


@pytest.mark.parametrize("end", ["timed out", "cancelled"])
async def test_look_at_the_lsn_that_fails_spoils_nobody(database: Database, proxy: Proxy, end: str) -> None:
    """Its connection serves nobody else, who would have to wait for what it left behind."""
    primary = {"url": proxy.url(database.url()), "pool_size": 1, "max_overflow": 0, "command_timeout_seconds": 0.5}
    async with quiet(database.settings(primary=primary, statement_timeout_seconds=0.4)) as service:
        with_route(service)
        await service.client.post("/once", json=AS_JSON)
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
        assert (await service.client.post("/once", json=AS_JSON | {"mrn": "A-3"})).status_code == 201


async def test_stale_plan_is_made_anew(database: Database, execute: Execute) -> None:
    """After a migration changed a column's type the query is run once, and its row is read as ever."""
    async with quiet(database.settings(replica=False)) as service:
        with_route(service)
        await service.client.post("/once", json=AS_JSON)
        await execute("ALTER TABLE patients ALTER COLUMN full_name TYPE varchar(300)")

        answer = await service.client.post("/once", json=AS_JSON | {"mrn": "A-2"})

        assert (answer.status_code, answer.json()) == (201, "Ada Lovelace")
        assert await execute(MRNS) == "A-1,A-2"


async def test_value_of_the_wrong_kind_leaves_nothing_open(database: Database, execute: Execute) -> None:
    """It is a bug, not an unknown outcome, and the server is not left waiting in a transaction."""
    async with quiet(database.settings(replica=False)) as service:

        @service.app.post("/bug")
        async def bug(databases: RequestDatabases) -> None:
            await databases.write_once(queries.ADD, **ADA | {"birth_date": "1915-12-10"})

        assert (await service.client.post("/bug")).status_code == 500

        async def nothing_open() -> bool:
            return bool(await execute(OPEN_TRANSACTIONS) == 0)

        assert await eventually(nothing_open, 2)
        assert service.databases.primary.pool.figures().checked_out == 0


async def test_what_comes_after_it_takes_nothing_back(service: Service, execute: Execute) -> None:
    """The price: an endpoint that fails afterwards has stored its query all the same."""

    @service.app.post("/fails")
    async def fails(databases: RequestDatabases) -> None:
        await databases.write_once(queries.ADD, **ADA)
        raise NotFound("Nothing is here.")

    assert (await service.client.post("/fails")).status_code == 404
    assert await execute(MRNS) == "A-1"


async def test_get_that_wrote_is_not_retried_on_the_primary(service: Service, execute: Execute) -> None:
    """A 404 from the replica is not asked of the primary when that would write twice."""

    @service.app.get("/visited")
    async def visited(session: ReadDB, databases: RequestDatabases) -> None:
        with suppress(IntegrityError):
            await databases.write_once(queries.ADD, **ADA)
        await queries.get_patient(session, 999)

    answer = await service.client.get("/visited")

    assert answer.status_code == 404
    assert await execute(MRNS) == "A-1"
    assert service.sample("db_query_seconds_count", pool="primary") == 1


async def test_get_that_committed_is_not_retried_on_the_primary(
    database: Database, proxy: Proxy, execute: Execute
) -> None:
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


async def test_get_that_has_not_written_yet_is_retried_on_the_primary(behind: Service, execute: Execute) -> None:
    """That it might write is no reason for a 404 of a row that exists."""

    @behind.app.get("/visited/{patient_id}")
    async def visited(session: ReadDB, databases: RequestDatabases, patient_id: int) -> str:
        patient = await queries.get_patient(session, patient_id)
        await databases.write_once(queries.ADD, **ADA | {"mrn": "SEEN"})
        return str(patient.mrn)

    created = await behind.client.post("/patients", json=AS_JSON)
    behind.client.cookies.clear()

    answer = await behind.client.get(created.headers["Location"].replace("/patients", "/visited"))

    assert (answer.status_code, answer.json()) == (200, "A-1")
    assert await execute(MRNS) == "A-1,SEEN"


async def _store(service: Service, consistency: Consistency, mrn: str) -> None:
    CURRENT.set(consistency)  # As the middleware does.
    await service.databases.write_once(queries.ADD, **ADA | {"mrn": mrn})


async def test_what_its_query_left_behind_is_undone(database: Database) -> None:
    """A parameter that the query set for the session is not there for the next one on its connection."""
    set_one = Query(select(func.set_config("app.tenant", "a", literal(False)).label("tenant")))
    get_one = Query(select(func.current_setting("app.tenant", literal(True)).label("tenant")))
    one = {"pool_size": 1, "max_overflow": 0}
    async with serving(database.settings(replica=False, **one)) as service:
        with_route(service)
        assert (await service.databases.write_once(set_one))[0].tenant == "a"
        async with service.databases.writing() as session:
            assert not (await session.rows(get_one))[0].tenant


async def test_repeatable_request_is_refused(service: Service, execute: Execute) -> None:
    """With an Idempotency-Key it would be outside the key's transaction, and a repetition would store it twice."""
    router = APIRouter(route_class=IdempotentRoute)

    @router.post("/keyed")
    async def keyed(databases: RequestDatabases) -> None:
        with pytest.raises(RuntimeError, match="Take `WriteDB`"):
            await databases.write_once(queries.ADD, **ADA)

    service.app.include_router(router)

    assert (await service.client.post("/keyed", headers={"Idempotency-Key": "k"})).status_code == 200
    assert await execute(MRNS) == ""


async def test_transaction_that_collides_after_it_is_not_run_again(service: Service, execute: Execute) -> None:
    """What is stored already would be stored twice: the collision is the answer."""
    ran = []

    @service.app.post("/collides")
    async def collides(databases: RequestDatabases, session: SerializableDB) -> None:
        ran.append(1)
        await databases.write_once(queries.ADD, **ADA)
        await session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$"))

    answer = await service.client.post("/collides")

    assert (answer.status_code, answer.json()["code"]) == (503, "serialization_failure")
    assert (len(ran), await execute(MRNS)) == (1, "A-1")


async def test_it_takes_a_query_alone(service: Service) -> None:
    """A statement made for the call is a TypeError that says what runs it; so is a parameter that is missing."""
    made: Any = text("SELECT 1")
    with pytest.raises(TypeError, match=r"databases\.writing\(\)"):
        await service.databases.write_once(made)
    with pytest.raises(TypeError, match="lacks birth_date"):
        await service.databases.write_once(queries.ADD, mrn="A-1", full_name="x")

    assert service.databases.primary.pool.figures().checked_out == 0


@pytest.mark.parametrize("replica", [False, True])
async def test_transaction_that_collides_after_a_session_of_ones_own_is_not_run_again(
    database: Database, execute: Execute, *, replica: bool
) -> None:
    """What `databases.writing()` has stored in the request would be stored twice as well."""
    async with serving(database.settings(replica=replica)) as service:

        @service.app.post("/collides")
        async def collides(databases: RequestDatabases, session: SerializableDB) -> None:
            async with databases.writing() as log:
                await log.execute(ADD_SOMEBODY)
            await session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$"))

        answer = await service.client.post("/collides")

    assert (answer.status_code, answer.json()["code"]) == (503, "serialization_failure")
    assert await execute("SELECT count(*) FROM patients") == 1


async def test_task_that_outlives_its_request_reads_where_others_do(service: Service) -> None:
    """A loop that a POST has started is no part of it for ever: its reads go to the replica, and count for nobody."""
    answered = asyncio.Event()
    tasks: list[asyncio.Task[tuple[str, str]]] = []

    async def read() -> tuple[str, str]:
        session = service.databases.reading()
        return session._database.name, session._label

    async def read_afterwards() -> tuple[str, str]:
        await answered.wait()
        return await read()

    @service.app.post("/starts")
    async def starts(_databases: RequestDatabases) -> tuple[str, str]:
        tasks.append(asyncio.create_task(read_afterwards()))
        return await read()

    within = (await service.client.post("/starts")).json()
    answered.set()

    assert within == ["primary", "/starts"]
    assert await tasks[0] == ("replica", "background")
