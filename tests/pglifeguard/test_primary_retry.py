"""A GET that the replica failed, or that found nothing there, gets the primary's answer; and what is not run again."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Annotated

import asyncpg
import httpx
import pytest
from fastapi import Depends, HTTPException, Request, Response
from sqlalchemy import text

from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import DatabaseUnreachable, NotFound
from pglifeguard.fastapi.sessions import AnalyticsDB, ReadDB, consistency_of
from pglifeguard.sessions import ReadSession
from pglifeguard.testing.faults import exhausted
from tests.conftest import Database
from tests.service import Service, serving, write

ON_REPLICA = text("SELECT pg_is_in_recovery()")


async def _translating(session: ReadDB) -> AsyncIterator[ReadSession]:
    try:
        yield session
    except NotFound as error:
        raise HTTPException(404) from error


# A session whose dependency makes another error of "not found" at its end.
TranslatingDB = Annotated[ReadSession, Depends(_translating, scope="function")]


async def test_row_that_exists_is_never_404(behind: Service) -> None:
    """A patient that the replica has not seen yet is found on the primary, without any token."""
    created = await write(behind)

    found = await behind.client.get(created.headers["Location"])
    missing = await behind.client.get("/patients/4711")

    assert (found.status_code, found.json()) == (200, created.json())
    assert missing.status_code == 404
    assert behind.sample("db_reads_retried_total", reason="not_found") == 2


@pytest.mark.parametrize("way", ["raised", "raised as HTTP's", "answered"])
async def test_not_found_is_looked_for_on_the_primary(service: Service, way: str) -> None:
    """However an endpoint says 404, it says it of the primary; what the first attempt opened is over by then."""
    replica, held = service.databases.replicas[0].pool, []

    async def find(session: TranslatingDB) -> Response:
        on_replica = (await session.execute(ON_REPLICA)).scalar_one()
        held.append(replica.figures().checked_out)
        if not on_replica:
            return Response("found")
        match way:
            case "raised":
                raise NotFound("Not here.")
            case "raised as HTTP's":
                raise HTTPException(404)
            case _:
                return Response(status_code=404)

    service.app.add_api_route("/find", find)

    answer = await service.client.get("/find")

    assert (answer.status_code, answer.text) == (200, "found")
    assert held == [1, 0]
    assert service.sample("db_reads_retried_total", reason="not_found") == 1


async def test_missing_on_both_is_answered_as_the_endpoint_says(service: Service) -> None:
    """The primary has the last word, and it is the endpoint's own."""

    async def find(session: ReadDB) -> Response:
        await session.execute(ON_REPLICA)
        return Response("nothing", status_code=404)

    service.app.add_api_route("/find", find)
    service.app.add_api_route("/posted", find, methods=["POST"])

    answers = [await service.client.get("/find"), await service.client.post("/posted")]

    assert [(answer.status_code, answer.text) for answer in answers] == [(404, "nothing")] * 2
    assert service.sample("db_reads_retried_total", reason="not_found") == 1


async def test_not_found_without_a_read_is_final(service: Service) -> None:
    """An endpoint that asked no replica has nothing to ask the primary."""
    ran = []

    async def find() -> Response:
        ran.append(1)
        return Response(status_code=404)

    service.app.add_api_route("/find", find)

    assert (await service.client.get("/find")).status_code == 404
    assert ran == [1]


async def test_not_found_is_503_while_the_primary_has_no_room(database: Database) -> None:
    """Half of the primary's capacity helps out; who waits too long for a turn is not told "not found"."""

    async def slow_on_primary(session: ReadDB) -> None:
        asked = text("SELECT pg_is_in_recovery(), pg_sleep(CASE WHEN NOT pg_is_in_recovery() THEN 2 END)")
        if (await session.execute(asked)).one()[0]:
            raise NotFound("Not here.")

    async with serving(database.settings(pool_size=2, max_overflow=0, pool_timeout=0.2)) as service:
        service.app.add_api_route("/slow", slow_on_primary)
        first = asyncio.create_task(service.client.get("/slow"))

        async def has_the_turn() -> bool:
            return service.databases.primary.pool.figures().checked_out == 1

        assert await eventually(has_the_turn, 5)
        second = await service.client.get("/patients/1")
        answered = await first

    assert (second.status_code, second.json()["code"]) == (503, "replica_unavailable")
    assert second.headers["retry-after"] == "1"
    assert answered.status_code == 200


async def test_replica_that_dies_in_mid_query_is_not_noticed(service: Service, database: Database) -> None:
    """The backend that runs the read is killed: the client gets its answer from the primary."""

    async def slow(session: ReadDB) -> bool:
        row = (
            await session.execute(
                text("SELECT pg_is_in_recovery(), pg_sleep(CASE WHEN pg_is_in_recovery() THEN 20 END)")
            )
        ).one()
        return bool(row[0])

    service.app.add_api_route("/slow", slow)
    admin = await asyncpg.connect(database.replica_url("postgres"))
    asked = asyncio.create_task(service.client.get("/slow"))

    async def killed() -> bool:
        kill = """
            SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
            WHERE query LIKE '%pg_sleep(CASE%' AND pid <> pg_backend_pid()
        """
        return bool(await admin.fetchval(kill))

    assert await eventually(killed, 5)
    answer = await asked
    await admin.close()

    assert (answer.status_code, answer.json()) == (200, False)
    assert service.sample("db_reads_retried_total", reason="connection_lost") == 1


async def test_bug_on_the_replica_is_not_run_again(service: Service) -> None:
    """Only the replica's own failures go to the primary; a bug would be one there, too."""
    ran = []

    async def fail(session: ReadDB) -> None:
        ran.append(1)
        await session.execute(text("SELECT * FROM nowhere"))

    service.app.add_api_route("/fail", fail)

    answer = await service.client.get("/fail")

    assert (answer.status_code, len(ran)) == (500, 1)


async def test_slow_or_crowded_replica_is_no_reason(database: Database) -> None:
    """A statement that takes too long would do so on the primary; a crowd in one pool must not fill the next."""

    async def slow(session: ReadDB) -> None:
        await session.execute(text("SELECT set_config('statement_timeout', '50', false)"))
        await session.execute(text("SELECT pg_sleep(5)"))

    async with serving(database.settings(pool_size=1, max_overflow=0, pool_timeout=0.05)) as service:
        service.app.add_api_route("/slow", slow)
        timed_out = await service.client.get("/slow")
        async with exhausted(service.databases.replicas[0]):
            crowded = await service.client.get("/patients")

    assert (timed_out.status_code, timed_out.json()["code"]) == (504, "statement_timeout")
    assert (crowded.status_code, crowded.json()["code"]) == (503, "pool_exhausted")
    assert service.sample("db_query_seconds_count", pool="primary") == 0


async def test_write_is_never_run_again(service: Service) -> None:
    """A method that is not safe runs once, whatever it read and where."""
    ran = []

    async def post(request: Request, session: ReadDB) -> None:
        ran.append(request.method)
        await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    service.app.add_api_route("/post", post, methods=["POST"])

    answer = await service.client.post("/post")

    assert (answer.status_code, answer.json()["code"], ran) == (503, "connection_lost", ["POST"])


async def test_falling_back_can_be_switched_off(database: Database) -> None:
    """Without it the primary never sees a read: 404 stays 404, and a replica that is broken is a 503."""
    async with serving(database.settings(replica_fallback=False)) as service:
        missing = await service.client.get("/patients/1")
        service.databases.router.replicas[0].trip()
        broken = await service.client.get("/patients/1")

    assert missing.status_code == 404
    assert (broken.status_code, broken.json()["code"]) == (503, "replica_unavailable")
    assert service.sample("db_query_seconds_count", pool="primary") == 0


async def test_replica_that_lets_nobody_in_is_left_alone(database: Database) -> None:
    """A read that finds the replica closed is served by the primary, and the next ones do not try."""
    admin = await asyncpg.connect(database.url("postgres"))
    async with serving(database.settings(pool_min_size=0)) as service:
        await admin.execute("ALTER ROLE app_ro NOLOGIN")
        try:
            await database.cluster.wait_replayed()
            answer = await service.client.get("/patients")
            state = service.databases.router.replicas[0].state
        finally:
            await admin.execute("ALTER ROLE app_ro LOGIN")
            await database.cluster.wait_replayed()
    await admin.close()

    assert answer.status_code == 200
    assert state == "broken"
    assert service.sample("db_reads_retried_total", reason="database_unreachable") == 1


async def test_failure_is_forgotten_with_its_request(service: Service) -> None:
    """What is thrown into dependencies collects their frames, and so it lives no longer than they do."""

    async def find(session: TranslatingDB) -> Response:
        sessions.add(session)
        await session.execute(ON_REPLICA)
        return Response(status_code=404)

    sessions: weakref.WeakSet[ReadSession] = weakref.WeakSet()
    service.app.add_api_route("/find", find)

    for _ in range(5):
        await service.client.get("/find")
    gc.collect()

    assert len(sessions) == 0
    assert service.sample("db_reads_retried_total", reason="not_found") == 5


async def test_other_database_that_is_down_accuses_no_replica(database: Database) -> None:
    """A request that read from a replica fails for the analytics database: running it again would mend nothing."""
    analytics = {"url": f"postgresql://a:b@127.0.0.1:{free_port()}/x", "pool_min_size": 0}
    ran = []

    async def both(session: ReadDB, report: AnalyticsDB) -> None:
        ran.append(1)
        await session.execute(ON_REPLICA)
        await report.execute(ON_REPLICA)

    async with serving(database.settings(analytics=analytics)) as service:
        service.app.add_api_route("/both", both)
        answer = await service.client.get("/both")
        state = service.databases.router.replicas[0].state

    assert (answer.status_code, answer.json()["code"]) == (503, "database_unreachable")
    assert (ran, state) == ([1], "usable")


async def test_dependencies_end_before_the_second_attempt(service: Service) -> None:
    """Those that would live until the answer was sent, too: what they hold, the second attempt needs."""
    said = []

    async def lasting() -> AsyncIterator[None]:
        said.append("begin")
        yield
        said.append("end")

    async def find(session: ReadDB) -> None:
        said.append("find")
        if (await session.execute(ON_REPLICA)).scalar_one():
            said.remove("find")
            raise NotFound("Not here.")

    service.app.add_api_route("/find", find, dependencies=[Depends(lasting)])

    assert (await service.client.get("/find")).status_code == 200
    assert said == ["begin", "begin", "find", "end"]


async def test_one_read_on_the_replica_is_enough(service: Service) -> None:
    """A request that read from the replica and then from the primary has read from the replica."""
    ran = []

    async def find(request: Request, session: ReadDB) -> None:
        ran.append(1)
        on_replica = (await session.execute(ON_REPLICA)).scalar_one()
        service.databases.router.replicas[0].trip()
        async with service.databases.reading(consistency_of(request.scope)) as another:
            await another.execute(ON_REPLICA)
        if on_replica:
            raise NotFound("Not here.")

    service.app.add_api_route("/find", find)

    assert (await service.client.get("/find")).status_code == 200
    assert ran == [1, 1]


@pytest.mark.parametrize("nested", [False, True])
async def test_failure_out_of_a_task_group_is_run_again(service: Service, *, nested: bool) -> None:
    """What a TaskGroup raises because of a replica is the replica's failure."""

    async def find(session: ReadSession) -> bool:
        if (await session.execute(ON_REPLICA)).scalar_one():
            raise NotFound("Not here.")
        return True

    @service.app.get("/find")
    async def gather(session: ReadDB) -> bool:
        async with asyncio.TaskGroup() as outer:
            if not nested:
                return await outer.create_task(find(session))
            async with asyncio.TaskGroup() as inner:
                return await inner.create_task(find(session))

    assert (await service.client.get("/find")).json() is True
    assert service.sample("db_reads_retried_total", reason="not_found") == 1


async def test_service_that_was_opened_again_accuses_its_own_replica(database: Database) -> None:
    """Databases that are opened anew have a new router, and it is that one which is told of a replica that is away."""

    async def away(session: ReadDB) -> None:
        if (await session.execute(ON_REPLICA)).scalar_one():
            raise DatabaseUnreachable("It is away.", database="replica")

    async with serving(database.settings()) as before:
        pass
    before.app.add_api_route("/away", away)
    transport = httpx.ASGITransport(app=before.app)
    async with (
        before.app.router.lifespan_context(before.app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        replica = before.databases.router.replicas[0]

        async def usable() -> bool:
            return replica.state == "usable"

        assert await eventually(usable, 10)
        answer = await client.get("/away")

        assert (answer.status_code, replica.state) == (200, "broken")
