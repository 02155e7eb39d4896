"""A connection that somebody keeps is found, with the one who keeps it."""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi.sessions import WriteDB
from pglifeguard.testing.serving import Running, listening
from tests.chaos import FULL, in_time
from tests.chaos.load import ask
from tests.conftest import Database
from tests.service import serving
from tests.watching import alert_state, needs_prometheus, running_prometheus

SELECT = text("SELECT 1")


async def test_leak_is_logged_once_and_listed(
    database: Database, caplog: pytest.LogCaptureFixture, measured: Callable[[str], None]
) -> None:
    """A checkout held beyond the setting is one log line with route, seconds and place, and is listed meanwhile."""
    settings = database.settings(replica=False, leak_after_seconds=0.2, environment="development")
    async with serving(settings) as service, service.databases.reading(label="/leaky") as session:
        await session.execute(SELECT)

        def lines() -> list[logging.LogRecord]:
            return [record for record in caplog.records if record.message == "connection held for long"]

        async def found() -> bool:
            return bool(lines())

        assert await eventually(found, 5)
        first = service.sample("db_connection_long_held_total", pool="primary", route="/leaky")
        await asyncio.sleep(1.5)  # Another round of upkeep, which must not say it again.
        held = (await ask(service.app, "GET", "/debug/connections")).json()["primary"]["held"]

    line = vars(lines()[0])
    measured(f"found {line['held_seconds']} s after it was taken, in {line['taken_in']}")
    assert (len(lines()), first) == (1, 1)
    assert (line["route"], line["pool"]) == ("/leaky", "primary")
    assert line["held_seconds"] >= line["idle_seconds"] >= 0.1
    assert "test_leaks" in line["taken_in"]
    assert [holding["holder"] for holding in held] == ["/leaky"]


async def test_slow_call_shows_as_idle_hold_where_a_connection_is_held(
    database: Database, measured: Callable[[str], None]
) -> None:
    """A slow call to somebody else costs nothing unless a connection is held meanwhile; then the metric has it."""

    async def slow_call() -> None:
        await asyncio.sleep(0.3)

    async with serving(database.settings(replica=False)) as service:
        async with service.databases.reading(label="wrong") as session:
            await session.execute(SELECT)
            await slow_call()
        async with service.databases.reading(label="right") as session:
            await session.execute(SELECT)
        await slow_call()
        wrong, right = (
            service.sample("db_connection_idle_hold_seconds_sum", pool="primary", route=route)
            for route in ("wrong", "right")
        )

    measured(f"held idle for {wrong:.2f} s around the call, {right:.2f} s before it")
    assert wrong >= 0.3
    assert right < wrong
    in_time(right < 0.1, right)


@needs_prometheus
async def test_route_that_holds_a_connection_idle_is_told(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture, measured: Callable[[str], None]
) -> None:
    """A route that waits for somebody else with a connection in its hand is in the log at once, and an alert in 2 min.

    In the short form the rates are over five seconds in place of two minutes.
    """
    hold_seconds, window = (10.0, "2m") if FULL else (1.0, "5s")
    async with serving(database.settings(replica=False)) as service:

        @service.app.post("/calling")
        async def calling(session: WriteDB) -> None:
            await session.execute(SELECT)
            await asyncio.sleep(hold_seconds)

        async def call_for_ever() -> None:
            while True:
                assert (await ask(service.app, "POST", "/calling")).status == 200

        async with (
            listening(Running(service.app)) as url,
            running_prometheus(url, tmp_path, interval_seconds=5 if FULL else 0.25, window=window) as prometheus,
        ):
            started, task = time.monotonic(), asyncio.create_task(call_for_ever())

            async def fires() -> bool:
                assert not task.done(), task
                labels = {"pool": "primary", "route": "/calling"}
                return await alert_state(prometheus, "ConnectionsHeldIdle", **labels) == "firing"

            try:
                assert await eventually(fires, 300)
            finally:
                told = time.monotonic() - started
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    first = next(vars(record) for record in caplog.records if record.message == "connection held idle")
    assert (first["pool"], first["route"]) == ("primary", "/calling")
    measured(f"log after the first request, alert after {told:.0f} s")
    in_time(told < 120, told)
