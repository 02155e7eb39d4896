"""A crowd of equal lines is one line and a count, at the sampler and in what the service writes."""

import asyncio
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import func, select, text

from app.logs import configure_logs
from pglifeguard import databases as engines
from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi.sessions import WriteDB
from pglifeguard.query import Query
from pglifeguard.sampling import Repeats, Sampler, origin
from pglifeguard.testing.faults import exhausted
from pglifeguard.testing.serving import Running, listening
from tests.conftest import Database
from tests.pglifeguard.conftest import Clock
from tests.service import Service, serving

logger = logging.getLogger("app.test")
CANCEL = Query(select(func.pg_cancel_backend(func.pg_backend_pid())))
REFUSED = {"pool": "primary", "reason": "queue_full", "route": "/patients"}


@pytest.fixture
def clock() -> Clock:
    """Give a clock that stands still."""
    return Clock()


@pytest.fixture
def sampler(clock: Clock) -> Sampler:
    """Give a sampler of ten seconds."""
    return Sampler(10, clock)


def refuse(sampler: Sampler, times: int = 1, **by: str) -> None:
    """Write a line as often."""
    for number in range(times):
        sampler.log(logger, logging.WARNING, "%s: %s", "pool_exhausted", "all at work", by=REFUSED | by, number=number)


def lines(caplog: pytest.LogCaptureFixture, name: str = "app.test") -> list[dict[str, Any]]:
    """List what a logger wrote."""
    return [vars(record) for record in caplog.records if record.name == name]


# The sampler.


def test_first_line_is_written_at_once_and_the_others_are_counted(
    sampler: Sampler, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A burst of 15,048 is its first line and, when the time is over, one with the count, pool, reason and route."""
    refuse(sampler, 15_048)
    (first,) = lines(caplog)
    clock.now += 10
    sampler.flush()

    counted = lines(caplog)[1]
    assert (first["message"], "repeated" in first) == ("pool_exhausted: all at work", False)
    assert counted["message"] == "pool_exhausted: all at work (repeated 15047 times in 10 s)"
    assert {name: counted[name] for name in REFUSED} == REFUSED
    assert (counted["repeated"], counted["over_seconds"], counted["number"]) == (15_047, 10.0, 15_047)
    assert len(lines(caplog)) == 2


def test_every_line_is_written_or_counted(sampler: Sampler, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the rhythm, first lines and counts add up to what came."""
    came = 0
    for pause in (0, 0.1, 3, 9.9, 10, 10.1, 35, 0, 0, 11, 4):
        clock.now += pause
        sampler.flush()
        refuse(sampler, 7)
        came += 7
    sampler.flush(everything=True)

    assert sum(line.get("repeated", 1) for line in lines(caplog)) == came


def test_count_does_not_wait_for_a_flush(sampler: Sampler, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A line that comes after the time is over brings the count with it."""
    refuse(sampler, 3)
    clock.now += 10
    refuse(sampler)

    assert [line.get("repeated") for line in lines(caplog)] == [None, 3]


def test_burst_that_goes_on_is_told_again_and_one_that_ended_begins_anew(
    sampler: Sampler, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Each ten seconds of a burst have a line; after ten quiet ones the next line is a first one."""
    for _ in range(3):
        refuse(sampler, 5)
        clock.now += 10
        sampler.flush()
    clock.now += 10
    sampler.flush()
    refuse(sampler)

    assert [line.get("repeated") for line in lines(caplog)] == [None, 4, 5, 5, None]


def test_what_differs_is_told_apart(sampler: Sampler, caplog: pytest.LogCaptureFixture) -> None:
    """Another pool, route or reason has a first line of its own; what is not known is no field."""
    refuse(sampler, 2)
    refuse(sampler, 2, route="/users")
    refuse(sampler, 2, reason="timeout")
    sampler.log(logger, logging.ERROR, "bare", by={"pool": None})

    assert len(lines(caplog)) == 4
    assert "pool" not in lines(caplog)[-1]


def test_flush_before_the_time_writes_nothing(sampler: Sampler, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A count is due after the seconds, unless everything is wanted."""
    refuse(sampler, 2)
    clock.now += 9
    sampler.flush()
    before = len(lines(caplog))
    sampler.flush(everything=True)

    assert (before, len(lines(caplog))) == (1, 2)


def test_origin_is_where_it_was_raised() -> None:
    """Two bugs of one route have two origins; an exception that was never raised has its kind only."""

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError) as failed:
        fail()

    assert origin(failed.value).startswith("KeyError in tests.pglifeguard.test_sampling:")
    assert origin(KeyError()) == "KeyError"


# What others write.


@pytest.fixture
def repeating(clock: Clock) -> Iterator[logging.Logger]:
    """Give a logger that is not ours, sampled."""
    foreign = logging.getLogger("uvicorn.test")
    repeats = Repeats(10, clock)
    foreign.addFilter(repeats)
    yield foreign
    foreign.removeFilter(repeats)


async def test_warnings_of_others_are_counted(
    repeating: logging.Logger, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The first of equal warnings passes, the next after the time brings the count; what is no warning passes."""
    caplog.set_level(logging.INFO)
    for _ in range(3):
        repeating.warning("Invalid HTTP request received.")
        repeating.info("started")
    clock.now += 10
    repeating.warning("Invalid HTTP request received.")

    written = [line for line in lines(caplog, "uvicorn.test") if line["levelname"] == "WARNING"]
    assert [line.get("repeated") for line in written] == [None, 3]
    assert len(lines(caplog, "uvicorn.test")) == 5


def test_warnings_outside_a_loop_and_tracebacks_are_counted(
    repeating: logging.Logger, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a loop the next line writes the count; a traceback is told apart by where it was raised."""
    for number in range(4):
        try:
            int("of course")
        except ValueError:
            repeating.exception("failed in <Task %s>", number)
    clock.now += 10
    repeating.error("another")

    assert [line["message"] for line in lines(caplog, "uvicorn.test")] == ["failed in <Task 0>", "another"]


async def test_count_of_others_is_written_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    """No further line is needed: the event loop writes the count when the time is over."""
    foreign, repeats = logging.getLogger("uvicorn.alone"), Repeats(0.01)
    foreign.addFilter(repeats)
    for _ in range(3):
        foreign.warning("Invalid HTTP request received.")

    async def counted() -> bool:
        return bool(sum(line.get("repeated", 1) for line in lines(caplog, "uvicorn.alone")) == 3)

    assert await eventually(counted, 5)


async def test_garbage_does_not_fill_the_log(
    service: Service, root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    """A client that does not speak HTTP writes one line of ours, however often it comes."""
    configure_logs("INFO", "json", access_log=False)
    async with listening(Running(service.app)) as url:
        address = httpx.URL(url)
        for _ in range(20):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(b"\x16\x03\x01 this is TLS\r\n\r\n")
            await reader.read()
            writer.close()

    assert capsys.readouterr().err.count("Invalid HTTP request") == 1
    assert root.handlers


# What the service writes.


def of_failures(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """List what was written of requests that failed."""
    return lines(caplog, "pglifeguard.fastapi.failure_log")


async def test_refusals_are_one_line_and_a_count(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred refused requests are two lines: the first, and at the end of the service the count; each says where."""
    monkeypatch.setattr(engines, "UPKEEP_SECONDS", 3600)
    settings = database.settings(replica=False, pool_size=1, max_overflow=0, pool_min_size=0, pool_max_waiting=0)
    async with serving(settings) as service, exhausted(service.databases.primary):
        answers = await asyncio.gather(*(service.client.get("/patients/1") for _ in range(100)))
        other = await service.client.get("/users/1")

    assert {answer.status_code for answer in (*answers, other)} == {503}
    first, other_route, counted = of_failures(caplog)
    where = {"pool": "primary", "code": "pool_exhausted", "reason": "queue_full", "route": "/patients/{patient_id}"}
    assert where.items() <= first.items()
    assert first["message"].startswith("pool_exhausted: All 1 connections are at work")
    assert other_route["route"] == "/users/{user_id}"
    assert (counted["repeated"], counted["pool"], counted["route"]) == (99, "primary", "/patients/{patient_id}")


async def test_upkeep_writes_the_counts(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the service runs, counts do not wait for another line."""
    monkeypatch.setattr(engines, "UPKEEP_SECONDS", 0.01)
    async with serving(database.settings(replica=False)) as service:
        service.databases.sampler._seconds = 0.05
        refuse(service.databases.sampler, 3)

        async def counted() -> bool:
            return bool(sum(line.get("repeated", 1) for line in lines(caplog)) == 3)

        assert await eventually(counted, 5)


async def test_outage_is_one_line_for_each_route_and_pool(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Requests to a database that is down do not write a line each, whatever lane they take."""
    primary = {"url": f"postgresql://a@127.0.0.1:{free_port()}/x"}
    async with serving(database.settings(replica=False, primary=primary), settled=False) as service:
        for _ in range(10):
            answer = await service.client.get("/patients/1")
        assert answer.json()["code"] == "database_unreachable"

    first, counted = of_failures(caplog)
    assert (first["pool"], first["route"]) == ("primary", "/patients/{patient_id}")
    assert counted["repeated"] == 9


@pytest.mark.parametrize("lane", ["driver", "sqlalchemy"])
async def test_failure_of_the_server_has_its_pool(
    service: Service, caplog: pytest.LogCaptureFixture, lane: str
) -> None:
    """A failure that the server reports says which of the databases reported it."""

    @service.app.post("/cancelled")
    async def cancelled(session: WriteDB) -> None:
        await (session.rows(CANCEL) if lane == "driver" else session.execute(CANCEL.statement))

    await service.client.post("/cancelled")

    (line,) = of_failures(caplog)
    assert (line["code"], line["pool"], line["route"]) == ("statement_timeout", "primary", "/cancelled")


async def test_bugs_have_one_traceback_for_each_place(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """A client that has found a bug cannot rotate the log away; another bug of the same route is written whole."""

    @service.app.get("/bug/{which}")
    async def bug(which: str) -> None:
        if which == "one":
            raise RuntimeError("a bug")
        raise RuntimeError("another bug")

    for which in ("one",) * 5 + ("two",) * 5:
        assert (await service.client.get(f"/bug/{which}")).status_code == 500

    tracebacks = [line["exc_info"][1].args for line in of_failures(caplog) if line["exc_info"]]
    assert tracebacks == [("a bug",), ("another bug",)]
    assert len(of_failures(caplog)) == 2


async def test_bug_of_a_mounted_application_is_logged(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """What is mounted beneath has no sampler of its own: ours writes its bugs down too."""
    beneath = FastAPI()

    @beneath.get("/bug")
    async def bug() -> None:
        raise RuntimeError("beneath")

    service.app.mount("/beneath", beneath)

    with pytest.raises(RuntimeError, match="beneath"):  # It answered by itself, as applications do, and raised then.
        await service.client.get("/beneath/bug")

    (line,) = of_failures(caplog)
    assert line["exc_info"][1].args == ("beneath",)


async def test_slow_statements_are_counted_by_statement(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """A flood of one slow statement does not hide the other."""
    async with serving(database.settings(replica=False, slow_query_seconds=1e-6)) as service:
        for _ in range(5):
            await service.client.get("/patients")
        await service.client.get("/users")

    slow = [line for line in lines(caplog, "pglifeguard.checkout") if line["route"] in {"/patients", "/users"}]
    assert [(line["route"], line.get("repeated")) for line in slow] == [
        ("/patients", None),
        ("/users", None),
        ("/patients", 4),
    ]


async def test_idle_hold_is_logged_with_its_route(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """A route that waits for somebody else with a connection in its hand is told by its first request.

    Its next request tells the line that took the connection as well.
    """
    async with serving(database.settings(replica=False, idle_hold_seconds=0.5)) as service:

        @service.app.post("/calling")
        async def calling(session: WriteDB) -> None:
            await session.execute(text("SELECT 1"))
            await asyncio.sleep(0.5)

        @service.app.post("/asking")
        async def asking(session: WriteDB) -> None:
            await session.execute(text("SELECT pg_sleep(0.5)"))

        await service.client.post("/asking")
        await service.client.post("/calling")
        await service.client.post("/calling")

    first, second = (
        line for line in lines(caplog, "pglifeguard.checkout") if line["message"] == "connection held idle"
    )
    for line in (first, second):
        assert (line["pool"], line["route"]) == ("primary", "/calling")
        assert line["held_seconds"] >= line["idle_seconds"] >= 0.5
    assert "taken_in" not in first
    assert re.fullmatch(r"tests\.pglifeguard\.test_sampling:\d+ in calling", second["taken_in"])
