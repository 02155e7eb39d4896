"""What feeds the live page: the page itself, its figures, the servers' sessions, and the order to end one."""

import asyncio
import logging
import re
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from hashlib import sha256
from typing import Any

import asyncpg
import pytest
from fastapi import FastAPI

from app.security import issue_token
from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi import Lifeguard
from tests.conftest import Database
from tests.pglifeguard.fastapi.test_lifeguard import running
from tests.service import Service, serving

# What an open transaction of somebody else may quote.
SECRET = "MRN-900001"
QUOTING = f"SELECT count(*) FROM patients WHERE mrn = '{SECRET}' AND id > 5"  # noqa: S608  # A constant.


@asynccontextmanager
async def session(
    database: Database, statement: str, *, role: str = "app_owner", name: str = "by hand"
) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Leave a transaction open in which this was run."""
    connection = await asyncpg.connect(database.url(role), server_settings={"application_name": name})
    await connection.execute("BEGIN")
    await connection.execute(statement)
    yield connection
    connection.terminate()


async def primary_sessions(service: Service) -> dict[str, Any]:
    """Ask for the sessions of the primary's server."""
    servers = (await service.client.get("/debug/pools/sessions")).json()["servers"]
    found: dict[str, Any] = next(server for server in servers if "primary" in server["pools"])
    return found


async def test_page_is_one_file_that_only_its_own_script_may_run_in(service: Service) -> None:
    """The policy allows what is in it, by hash, and questions to its own origin; nothing is loaded from elsewhere."""
    answer = await service.client.get("/debug/pools")

    page, policy = answer.text, answer.headers["content-security-policy"]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    for kind, directive in (("style", "style-src"), ("script", "script-src")):
        (inside,) = re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = b64encode(sha256(inside.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
        assert len(inside) > 1000
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert re.findall(r"(?:src|href|action)=\"(?!data:)[^\"]*\"| on[a-z]+=", page) == []
    assert re.findall(r"https?://(?!www\.w3\.org/)", page) == []


async def test_figures_are_of_the_process_and_new_to_the_page(service: Service) -> None:
    """A page that names its last sample of this process gets what came after; another process's number says nothing."""
    first = (await service.client.get("/debug/pools/figures")).json()
    key, last = first["now"]["key"], first["samples"][-1][0]
    known = {"known": ["00000000.7", f"{key}.{last}"]}
    service.app.state.history.take()
    second = (await service.client.get("/debug/pools/figures", params=known)).json()
    wrong = await service.client.get("/debug/pools/figures", params={"known": "7"})

    assert [pool["name"] for pool in first["now"]["pools"]] == ["primary", "replica", "analytics"]
    assert first["now"]["acts"] is True
    assert second["samples"][0][0] == last + 1
    assert wrong.status_code == 422


async def test_a_look_takes_no_connection_of_a_pool(service: Service) -> None:
    """Figures and sessions are told while every pool is closed to requests, and count as no acquisition."""
    before = [service.sample("db_connection_acquire_seconds_count", pool=one.name) for one in service.databases.all()]
    service.databases.pause(seconds=60)
    answers = [await service.client.get(f"/debug/pools{path}") for path in ("", "/figures", "/sessions")]
    service.databases.resume()

    after = [service.sample("db_connection_acquire_seconds_count", pool=one.name) for one in service.databases.all()]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert 59 < answers[1].json()["now"]["paused_seconds"] <= 60
    assert before == after


async def test_open_transactions_are_told_without_values(database: Database) -> None:
    """Of every role, the longest first; pools of one database on one server are one entry."""
    async with (
        session(database, "LOCK TABLE users IN ACCESS SHARE MODE", name="older"),
        session(database, QUOTING, role="app_rw"),
        serving(database.settings()) as service,
    ):
        answer = (await service.client.get("/debug/pools/sessions")).json()

    primary, replica = answer["servers"]
    # Other services of the tests are at work on the same server.
    older, younger = (one for one in primary["sessions"] if one["application"] in {"older", "by hand"})
    assert (primary["pools"], replica["pools"]) == (["primary"], ["replica", "analytics"])
    assert (primary["blocked"], primary["error"]) == ([], None)
    assert (older["application"], older["role"], older["state"]) == ("older", "app_owner", "idle in transaction")
    assert older["transaction_seconds"] >= younger["transaction_seconds"] >= younger["state_seconds"] >= 0
    assert older["statement"] == "LOCK TABLE users IN ACCESS SHARE MODE"
    assert younger["statement"] == "SELECT count(*) FROM patients WHERE mrn = ? AND id > ?"
    assert SECRET not in str(answer)


async def test_blocker_is_told_that_has_no_transaction(database: Database) -> None:
    """A session lock outlives its transaction, so its holder is listed for those who wait for it."""
    holder = await asyncpg.connect(database.url("app_owner"), server_settings={"application_name": "holder"})
    await holder.execute("SELECT pg_advisory_lock(7)")
    waiter = await asyncpg.connect(database.url("app_owner"))
    waiting = asyncio.create_task(waiter.execute("SELECT pg_advisory_lock(7)"))
    async with serving(database.settings(replica=False)) as service:

        async def blocked() -> bool:
            return len((await primary_sessions(service))["blocked"]) == 1

        assert await eventually(blocked, 5)
        told = await primary_sessions(service)
    holder.terminate()
    await waiting
    waiter.terminate()

    by_pid = {one["pid"]: one for one in told["sessions"]}
    (pair,) = told["blocked"]
    assert (by_pid[pair["blocker_pid"]]["application"], by_pid[pair["blocker_pid"]]["transaction_seconds"]) == (
        "holder", None,
    )  # fmt: skip
    assert by_pid[pair["pid"]]["statement"] == "SELECT pg_advisory_lock(?)"


async def test_server_that_cannot_be_asked_is_said_to_be(database: Database) -> None:
    """Down is said with the reason; one that sleeps is not woken by a look, nor by an order."""
    gone = {"url": f"postgresql://a@127.0.0.1:{free_port()}/x"}
    async with serving(database.settings(replica=False, primary=gone), settled=False) as service:
        down = await primary_sessions(service)
        refused = await service.client.post("/debug/end", params={"pool": "primary", "pid": 1})
    sleeps = {"url": database.url(), "profile": "sleeping"}
    async with serving(database.settings(replica=False, primary=sleeps), settled=False) as service:
        asleep = await primary_sessions(service)
        left_alone = await service.client.post("/debug/end", params={"pool": "primary", "pid": 1})

    assert (down["sessions"], down["blocked"]) == ([], [])
    assert "cannot be reached" in down["error"]
    assert (refused.status_code, refused.json()["code"]) == (503, "database_unreachable")
    assert "asleep" in asleep["error"]
    assert (left_alone.status_code, left_alone.json()["code"]) == (409, "conflict")


async def test_operator_ends_a_session(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """The one that was seen, and not another one that has its process id by now; the log says who ordered it."""
    settings = database.settings(replica=False, auth_secret="x" * 32)
    assert settings.auth_secret is not None
    token = issue_token(settings.auth_secret, subject="carla", scopes=["ops"], lifetime=timedelta(minutes=1))
    async with session(database, "SELECT 1", role="app_rw") as forgotten, serving(settings) as service:
        service.client.headers["Authorization"] = f"Bearer {token}"
        sessions = (await primary_sessions(service))["sessions"]
        (seen,) = (one for one in sessions if one["application"] == "by hand")
        asked = {"pool": "primary", "pid": seen["pid"], "started": seen["started"]}
        with caplog.at_level(logging.WARNING):
            other = await service.client.post("/debug/end", params=asked | {"started": seen["started"] + 1})
            kept = not forgotten.is_closed()
            ended = await service.client.post("/debug/end", params=asked)
            assert await eventually(lambda: _closed(forgotten), 5)
            again = await service.client.post("/debug/end", params={"pool": "primary", "pid": seen["pid"]})

    lines = [vars(record) for record in caplog.records if record.message.startswith("operator's order")]
    assert (other.status_code, kept) == (404, True)
    assert (ended.status_code, ended.json()["ended"], ended.json()["role"]) == (202, True, "app_rw")
    assert (again.status_code, again.json()["code"]) == (404, "not_found")
    assert [(line["message"], line["operation"], line["by"], line["pid"]) for line in lines] == [
        ("operator's order refused", "end", "carla", seen["pid"]),
        ("operator's order", "end", "carla", seen["pid"]),
        ("operator's order refused", "end", "carla", seen["pid"]),
    ]


async def _closed(connection: "asyncpg.Connection[asyncpg.Record]") -> bool:
    return connection.is_closed()


async def test_session_of_another_role_is_not_the_services_to_end(database: Database) -> None:
    """The answer says what would have to be granted; the connection that asked stays."""
    async with session(database, "SELECT 1") as owners, serving(database.settings(replica=False)) as service:
        asked: dict[str, Any] = {"pool": "primary", "pid": owners.get_server_pid()}
        answer = await service.client.post("/debug/end", params=asked)
        nobody = await service.client.post("/debug/end", params=asked | {"pool": "nobody"})

    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert "pg_signal_backend" in answer.json()["detail"]
    assert nobody.status_code == 404


async def test_service_does_not_end_its_own_monitor(service: Service) -> None:
    """It is the connection that carries the order out."""
    monitor = service.databases.primary.monitor._connection
    assert monitor is not None

    answer = await service.client.post("/debug/end", params={"pool": "primary", "pid": monitor.get_server_pid()})

    assert answer.status_code == 404


async def test_page_of_a_service_without_a_guard_only_shows(database: Database) -> None:
    """Nobody ends a session, and the page is told so."""
    lifeguard = Lifeguard(database.settings(replica=False))
    app = FastAPI(lifespan=lifeguard.lifespan)
    lifeguard.install(app)

    async with running(app) as client:
        page, figures = await client.get("/debug/pools"), await client.get("/debug/pools/figures")
        order = await client.post("/debug/end", params={"pool": "primary", "pid": 1})

    assert (page.status_code, figures.json()["now"]["acts"], order.status_code) == (200, False, 404)
