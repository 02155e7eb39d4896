"""One route blocks the event loop, and with it every other request."""

import time
from collections.abc import Callable

import pytest

from tests.chaos.load import ask
from tests.conftest import Database
from tests.service import serving


async def block() -> None:
    """Do what a route must not."""
    time.sleep(0.6)  # noqa: ASYNC251  # It is the point.


async def test_blocking_call_is_named(
    database: Database, caplog: pytest.LogCaptureFixture, measured: Callable[[str], None]
) -> None:
    """The lag of the loop is a metric, and in development the log has the line that blocked it."""
    async with serving(database.settings(replica=False, environment="development")) as service:
        service.app.add_api_route("/block", block)

        assert (await ask(service.app, "GET", "/block")).status == 200
        assert (await ask(service.app, "GET", "/patients?limit=1")).status == 200

    lines = [vars(record) for record in caplog.records if record.message == "event loop blocked"]
    lag = service.sample("event_loop_lag_seconds_sum")
    where = lines[0]["where"]
    where = where[where.index("tests/") :]
    measured(f"lag {lag:.2f} s; {len(lines)} log line: blocked {lines[0]['seconds']} s in {where}")
    assert len(lines) == 1
    assert lines[0]["where"].endswith("in block")
    assert lag >= 0.4
