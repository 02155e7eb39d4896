"""What pools and engines tell is true, and holds nothing of what was stored."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Text, bindparam, cast, func, literal_column, select, text

from app.logs import RequestId, json_formatter
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import CommandTimeout
from pglifeguard.fastapi.sessions import ReadDB, WriteDB
from pglifeguard.lease import fetch_once
from pglifeguard.query import Query
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database, Execute
from tests.pglifeguard.conftest import pooled
from tests.service import Service, quiet, serving

SECRET = "S3CR3T-MRN"
PATIENT = {"mrn": SECRET, "full_name": "Ada Lovelace", "birth_date": "1915-12-10"}
KINDS = ("idle_hold", "hold")
TAKE_LOCK = Query(select(cast(func.pg_advisory_xact_lock(7), Text)))
SLOW_WORD = Query(select(literal_column("pg_sleep(0.02)::text", Text), bindparam("word", type_=Text)))


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Give the lines of the log with a message, as JSON makes them."""
    caplog.set_level(logging.DEBUG)
    caplog.handler.setFormatter(json_formatter())

    def found(message: str) -> list[dict[str, Any]]:
        written = [json.loads(line) for line in caplog.text.splitlines()]
        return [line for line in written if line["message"] == message]

    with caplog.filtering(RequestId()):
        yield found


# Slow statements.


async def test_slow_statement_is_logged_with_its_route_and_request(
    database: Database, lines: Callable[[str], list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    """The line has statement, seconds, route and request id; what was asked for is in none of them."""
    async with quiet(database.settings(replica=False, slow_query_seconds=1e-6)) as service:
        created = await service.client.post("/patients", json=PATIENT, headers={"X-Request-ID": "r-1"})

        assert created.status_code == 201
        assert service.sample("db_slow_queries_total", pool="primary") == 1
    (line,) = lines("slow query")
    assert line["statement"].startswith("INSERT INTO patients (mrn, full_name, birth_date) VALUES ($1")
    assert (line["pool"], line["route"], line["request_id"]) == ("primary", "/patients", "r-1")
    assert 0 < line["seconds"] + 0.001 < 5
    assert SECRET not in caplog.text


async def test_slow_read_past_sqlalchemy_is_logged_too(
    database: Database, lines: Callable[[str], list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    """The short way to a replica hides nothing."""
    async with quiet(database.settings(slow_query_seconds=0.01)) as service:
        async with service.databases.reading(label="report") as session:
            await session.rows(SLOW_WORD, word=SECRET)

        assert service.sample("db_slow_queries_total", pool="replica") == 1
        assert service.sample("db_query_seconds_count", pool="replica") == 1
        assert service.sample("db_query_seconds_sum", pool="replica") >= 0.02
    (line,) = lines("slow query")
    assert (line["pool"], line["route"]) == ("replica", "report")
    assert line["seconds"] >= 0.02
    assert SECRET not in caplog.text


async def test_long_statement_is_cut_and_a_fast_one_is_not_logged(
    database: Database, lines: Callable[[str], list[dict[str, Any]]]
) -> None:
    """Two hundred characters on one line are enough to find a statement."""
    settings = database.settings(replica=False, slow_query_seconds=0.3)
    async with quiet(settings) as service, service.databases.writing() as session:
        await session.execute(text("SELECT 1"))
        await session.execute(text("SELECT pg_sleep(0.3),\n     " + ", ".join(["1"] * 200)))

    (line,) = lines("slow query")
    assert len(line["statement"]) == 200
    assert line["statement"].startswith("SELECT pg_sleep(0.3), 1, 1")


# What failures say.


@pytest.mark.parametrize("where", ["primary", "replica"])
async def test_failure_says_nothing_of_what_was_stored(
    database: Database, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL quotes whole rows in the details of an error; neither log nor answer repeats them."""
    caplog.handler.setFormatter(json_formatter())
    async with serving(database.settings()) as service:

        @service.app.post("/failing/primary")
        async def fail(session: WriteDB) -> None:
            await session.execute(
                text("INSERT INTO patients (mrn, full_name, birth_date) VALUES (:mrn, 'Ada', NULL)"), {"mrn": SECRET}
            )

        @service.app.post("/failing/replica")
        async def fail_reading(session: ReadDB) -> None:
            await session.execute(text("SELECT 1 / 0, CAST(:mrn AS text)"), {"mrn": SECRET})

        answer = await service.client.post(f"/failing/{where}")

    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "unforeseen failure" in caplog.text
    assert SECRET not in caplog.text + answer.text


async def test_direct_read_says_nothing_of_what_was_stored(database: Database) -> None:
    """The details of a read past SQLAlchemy are forgotten too."""
    word = bindparam("word", type_=Text)
    no_json = Query(select(cast(word.op("::")(literal_column("text::json")), Text)))
    async with pooled(database.url(), role="replica") as p:
        await p.backend()
        with pytest.raises(asyncpg.PostgresError) as failed:
            await fetch_once(p.database, no_json, {"word": SECRET})

    assert (failed.value.detail, SECRET in str(failed.value)) == (None, False)


async def test_conflict_says_nothing_of_what_was_stored(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """The key that exists already is not repeated."""
    caplog.set_level(logging.DEBUG)
    await service.client.post("/patients", json=PATIENT)

    answer = await service.client.post("/patients", json=PATIENT)

    assert answer.status_code == 409
    assert SECRET not in caplog.text + answer.text


# Failures with a name.


async def test_demoted_primary_is_left(database: Database) -> None:
    """A server that takes no writes any more is given up by all connections: the address may lead elsewhere soon."""
    primary = {"url": database.replica_url("app_rw"), "pool_size": 3, "pool_min_size": 3}
    async with serving(database.settings(replica=False, primary=primary), settled=False) as service:
        pool = service.databases.primary.pool
        answer = await service.client.post("/patients", json=PATIENT)

        assert (answer.status_code, answer.json()["code"]) == (503, "database_read_only")
        assert pool.figures().checked_in == 0


async def test_silent_server_is_given_up(database: Database, proxy: Proxy) -> None:
    """A statement without an answer ends after command_timeout_seconds with a name of its own."""
    patience: dict[str, Any] = {"command_timeout_seconds": 0.1, "service": {"statement_timeout_seconds": 5}}
    async with pooled(proxy.url(database.url()), **patience) as p:
        await p.backend()
        proxy.freeze()

        with pytest.raises(CommandTimeout):
            await p.backend()

        assert p.replaced("error") + p.replaced("closed") == 1


# Figures.


async def test_holding_without_asking_is_told_apart(service: Service, execute: Execute) -> None:
    """Time with a connection counts by route, and what of it no statement took counts as idle."""

    @service.app.post("/slow/{where}")
    async def slow(session: WriteDB, where: str) -> None:
        await session.execute(text("SELECT pg_sleep(0.1)" if where == "there" else "SELECT 1"))
        if where == "here":
            await execute("SELECT pg_sleep(0.1)")

    held: dict[str, tuple[float, float]] = {}
    for where in ("there", "here"):
        before = _sums(service)
        await service.client.post(f"/slow/{where}")
        hold, idle = (after - earlier for after, earlier in zip(_sums(service), before, strict=True))
        held[where] = (hold, idle)

    assert held["there"][0] >= 0.1
    assert held["there"][1] < 0.1
    assert min(held["here"]) >= 0.1


@pytest.mark.parametrize("lane", ["driver", "sqlalchemy", "commit"])
async def test_statement_under_way_is_no_idling(service: Service, execute: Execute, lane: str) -> None:
    """Who waits for the database, for a lock or in COMMIT, is not told to hold a connection idle."""
    await execute("CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)")
    await execute("GRANT ALL ON deferred TO app_rw")
    blocker = await asyncpg.connect(service.databases.primary.settings.url.get_secret_value().replace("+asyncpg", ""))
    await blocker.execute("BEGIN; INSERT INTO deferred VALUES (1); SELECT pg_advisory_xact_lock(7)")

    async def wait_for_the_lock() -> None:
        async with service.databases.writing(label="blocked") as session:
            if lane == "driver":
                await session.rows(TAKE_LOCK)
            elif lane == "sqlalchemy":
                await session.execute(text("SELECT pg_advisory_xact_lock(7)"))
            else:
                await session.execute(text("INSERT INTO deferred VALUES (1)"))

    task = asyncio.create_task(wait_for_the_lock())
    try:

        async def blocked() -> bool:
            return bool(await execute("SELECT true FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()"))

        assert await eventually(blocked, 5)
        (first,) = service.databases.primary.pool.holdings()

        async def held_for_longer() -> bool:
            return service.databases.primary.pool.holdings()[0].held_seconds > first.held_seconds + 0.2

        assert await eventually(held_for_longer, 5)
        (later,) = service.databases.primary.pool.holdings()
    finally:
        await blocker.execute("ROLLBACK")
        await blocker.close()
    await task

    held, idle = later.held_seconds - first.held_seconds, later.idle_seconds - first.idle_seconds
    assert idle < held / 2
    idle, held = (
        service.sample(f"db_connection_{kind}_seconds_sum", pool="primary", route="blocked") for kind in KINDS
    )
    assert idle < held / 2


def _sums(service: Service) -> tuple[float, float]:
    labels = {"pool": "primary", "route": "/slow/{where}"}
    return (
        service.sample("db_connection_hold_seconds_sum", **labels),
        service.sample("db_connection_idle_hold_seconds_sum", **labels),
    )


async def test_refusals_have_a_zero_to_start_from(database: Database) -> None:
    """The first refusal is an increase: every reason has a series before it happens."""
    async with pooled(database.url()) as p:
        for reason in ("queue_full", "overload", "timeout", "closing"):
            labels = {"pool": "primary", "reason": reason}
            assert p.metrics.registry.get_sample_value("db_connection_rejected_total", labels) == 0


async def test_first_hold_of_a_route_has_a_zero_to_start_from(service: Service) -> None:
    """A hold counts when it ends; the series are there from its beginning, or a rate would miss the first one."""
    async with service.databases.writing(label="long") as session:
        await session.execute(text("SELECT 1"))
        registry = service.databases.metrics.registry
        labels = {"pool": "primary", "route": "long"}
        begun = [registry.get_sample_value(f"db_connection_{kind}_seconds_sum", labels) for kind in KINDS]

    assert begun == [0, 0]


async def test_reads_that_fall_back_have_a_zero_to_start_from(service: Service) -> None:
    """So have the reasons for which reads fall back, where there is a replica to fall back from."""
    for reason in ("unknown", "lagging", "broken"):
        labels = {"target": "primary", "reason": reason}
        assert service.databases.metrics.registry.get_sample_value("db_reads_routed_total", labels) is not None


async def test_pool_events_are_counted_and_logged(
    database: Database, lines: Callable[[str], list[dict[str, Any]]]
) -> None:
    """Opening, taking and closing a connection leave their figures, and a line each at DEBUG."""
    async with pooled(database.url()) as p:
        await p.backend()
        p.pool.dispose()

        assert p.sample("db_connection_connect_seconds_count") == 1
        assert p.sample("db_connection_acquire_seconds_count") == 1
    assert [line["pool"] for line in lines("connection opened")] == ["primary"]
    assert [line["reason"] for line in lines("connection closed")] == ["disposed"]
