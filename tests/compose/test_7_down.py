"""The end: `docker compose down` under load finishes what was begun, in time. It takes the shared stack with it."""

import asyncio
import json
import time

import httpx
import pytest

from tests.compose.conftest import URL
from tests.compose.stack import Stack, eventually

IN_FLIGHT = 4
# The longest stop_grace_period of the compose file, that of the databases.
GRACE_SECONDS = 60


@pytest.mark.timeout(240)
async def test_down_drops_no_request_in_flight(stack: Stack) -> None:
    """Requests that wait for a lock when the stack is taken down are answered 200; every container ends by itself."""
    async with httpx.AsyncClient(base_url=URL, timeout=60) as client:
        new = {"mrn": "LAST-1", "full_name": "Last One", "birth_date": "1970-01-01"}
        patient = (await client.post("/patients", json=new)).json()["id"]
        # Longer than it takes until the balancer and the service have been told to stop.
        holder = asyncio.create_task(stack.lock_patient(patient, seconds=6))
        await eventually(lambda: _count(stack, "wait_event = 'PgSleep'", 1), within=5)
        changes = [
            asyncio.create_task(client.patch(f"/patients/{patient}", json={"full_name": f"N{n}"}))
            for n in range(IN_FLIGHT)
        ]
        await eventually(lambda: _count(stack, "wait_event_type = 'Lock'", IN_FLIGHT), within=5)
        sent, since = time.monotonic(), int(time.time())

        down = asyncio.create_task(stack.compose("down"))
        answers = await asyncio.gather(*changes)
        answered = time.monotonic()
        await down
        took = time.monotonic() - sent
        await holder

    events = await stack.docker(
        *("events", "--since", str(since), "--until", str(int(time.time()) + 1), "--format", "{{json .}}"),
        *("--filter", "type=container", "--filter", "event=die"),
        *("--filter", f"label=com.docker.compose.project={stack.project}"),
    )
    ends = {
        event["Actor"]["Attributes"]["com.docker.compose.service"]: int(event["Actor"]["Attributes"]["exitCode"])
        for event in map(json.loads, events.splitlines())
    }
    print(f"\ndown in {took:.1f} s; the last answer after {answered - sent:.1f} s; exit codes {ends}")  # noqa: T201
    assert [answer.status_code for answer in answers] == [200] * IN_FLIGHT
    assert took < GRACE_SECONDS
    # 137 is a container that had to be killed.
    assert {name for name, code in ends.items() if code == 137} == set()
    assert {ends[name] for name in ("app", "primary", "replica", "pgbouncer", "balancer")} == {0}


async def _count(stack: Stack, condition: str, least: int) -> bool:
    rows = await stack.psql("primary", f"SELECT count(*) FROM pg_stat_activity WHERE {condition}")  # noqa: S608
    return int(rows[0][0]) >= least
