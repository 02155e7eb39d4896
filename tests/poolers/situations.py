"""The situations that a service meets behind a pooler: each is played for real, and returns a note for the table.

A note says how it works where that is not the same everywhere; None is "works". What fails is an AssertionError.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import date
from itertools import count
from typing import Any, TypeAlias

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.patients import queries as patients
from pglifeguard import Databases, DatabaseUnavailable, SettingsError
from pglifeguard.embedded.waiting import eventually
from tests.poolers.scene import POOL, Scene, found_by, settings
from tests.service import ADA, serving

Situation: TypeAlias = Callable[[Scene], Awaitable[str | None]]
# What goes on at the same time in one situation: more than the pooler has server connections for.
AT_ONCE = 24
# Seconds in which something has to have happened, on a machine that does other things too.
PATIENCE = 20
# Sessions at work, or in a transaction, whose last statement is like this.
BUSY = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = $1 AND pid <> pg_backend_pid() AND query LIKE $2 AND state <> 'idle'
"""
END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename IN ('app_rw', 'app_ro')"
SET_BY_OTHERS = "SELECT current_setting('app.leaked', true)"
RENEWED = "until the pooler's server connections are renewed (PgBouncer: `RECONNECT`)"

_numbers = count(1)


async def finding(scene: Scene) -> str | None:
    """Compare what the service found at its start with how the pooler is set up."""
    assert scene.found.mode == scene.mode
    assert not scene.found.splits
    return str(scene.found)


async def statements(scene: Scene) -> str | None:
    """Run statements of two processes at once, by both lanes, on few server connections."""

    async def use(databases: Databases, number: int) -> None:
        async with databases.writing() as session:
            assert await patients.list_patients(session, limit=5) is not None
            assert (await session.execute(text("SELECT CAST(:n AS int)"), {"n": number})).scalar_one() == number

    async with Databases(settings(scene.pooler, scene.database)) as other:
        await asyncio.gather(*(use(each, n) for n in range(AT_ONCE) for each in (scene.service.databases, other)))
    kept = scene.service.databases.primary.connector.statement_cache_size > 0
    return None if kept else "works, and keeps none: a round trip more for each"


async def schema_change(scene: Scene) -> str | None:
    """Change a column's type, and back, while requests read it."""
    await _write(scene)
    stop, failures, renewed = asyncio.Event(), set[str](), False

    async def load() -> None:
        while not stop.is_set():
            answer = await _read(scene)
            if not answer.is_success:
                failures.add(answer.json()["code"])

    async def all_well() -> bool:
        return all([(await _read(scene)).is_success for _ in range(2 * AT_ONCE)])

    readers = [asyncio.create_task(load()) for _ in range(4)]
    async with scene.server() as server:
        for kind in ("varchar(300)", "text"):
            await server.execute(f"ALTER TABLE patients ALTER COLUMN full_name TYPE {kind}")
            await scene.database.cluster.wait_replayed()
            if not await eventually(all_well, 3):
                renewed = True
                await _end_sessions(scene)
            assert await eventually(all_well, PATIENCE), failures
    stop.set()
    await asyncio.gather(*readers)
    assert failures <= {"schema_changed", "connection_lost", "database_unreachable"}, failures
    return f"503 `schema_changed` {RENEWED}" if renewed else None


async def cancelled(scene: Scene) -> str | None:
    """Cancel a request; the server must not run its statement on."""

    async def work() -> None:
        async with scene.service.databases.writing() as session:
            await session.execute(text("SELECT pg_sleep(60) /* cancelled */"))

    task = asyncio.create_task(work())
    assert await eventually(lambda: _is_busy(scene, "%/* cancelled */"), PATIENCE)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await eventually(lambda: _rests(scene, "%/* cancelled */"), PATIENCE), "the server runs it on"
    assert await _well(scene)
    return None


async def dropped(scene: Scene) -> str | None:
    """Cut the connection of an open transaction; the server must roll it back."""
    await _write(scene)

    async def change() -> None:
        async with scene.service.databases.writing() as session:
            await session.execute(text("UPDATE patients SET full_name = 'dropped' /* dropped */"))
            raw = await (await session.connection()).get_raw_connection()
            driver: Any = raw.driver_connection
            driver.cut()
            await session.execute(text("SELECT 1"))

    with pytest.raises((DatabaseUnavailable, DBAPIError)):
        await change()
    assert await eventually(lambda: _rests(scene, "%/* dropped */"), PATIENCE), "the transaction stays open"
    async with scene.server() as server:
        assert await server.fetchval("SELECT count(*) FROM patients WHERE full_name = 'dropped'") == 0
    return None


async def session_state(scene: Scene) -> str | None:
    """Try to leave something in the server's session, and set something for a transaction."""
    for sql in ("SET app.tenant = 'a'", "DISCARD ALL", "PREPARE mine AS SELECT 1", "CREATE TEMP TABLE t (i int)"):
        async with scene.service.databases.writing() as session:
            with pytest.raises(RuntimeError, match="behind a pooler"):
                await session.execute(text(sql))
    for _ in range(2 * POOL["pool_size"]):
        async with scene.service.databases.writing() as session:
            assert (await session.execute(text("SELECT current_setting('app.own', true)"))).scalar_one() in {None, ""}
            await session.execute(text("SET LOCAL app.own = 'a'"))
    return "refused, with the way that works; `SET LOCAL` works, and nothing is left"


async def leaking(scene: Scene) -> str | None:
    """Let another client of the pooler leave a setting in the session that it had."""
    seen = set[str | None]()

    async def look() -> None:
        async with scene.service.databases.writing() as session:
            seen.add((await session.execute(text(SET_BY_OTHERS))).scalar_one())

    async with scene.client() as client:
        await client.execute("SET app.leaked = 'theirs'")
        await asyncio.gather(*(look() for _ in range(AT_ONCE)))
    if seen <= {None, ""}:
        return None
    await _end_sessions(scene)
    return "reaches this service: every client has to write `SET LOCAL`"


async def own_writes(scene: Scene) -> str | None:
    """Read what was just written, with the token, while the replica lags and when it does not."""
    client, cluster = scene.service.client, scene.database.cluster
    client.cookies.clear()
    assert await eventually(lambda: _replica_serves(scene), PATIENCE)
    await cluster.pause_replay()
    try:
        path = await _write(scene)
        before = _routed(scene, "primary", "behind_token")
        assert (await client.get(path)).is_success, "the own write is not found"
        assert _routed(scene, "primary", "behind_token") > before, _reasons(scene)
    finally:
        await cluster.resume_replay()

    async def on_the_replica() -> bool:
        before = _routed(scene, "replica", "replica")
        assert (await client.get(path)).is_success
        return _routed(scene, "replica", "replica") > before

    assert await eventually(on_the_replica, PATIENCE)
    client.cookies.clear()
    return None if scene.pooler.shape.on_replica else "works; `DATABASE_REPLICA_URL` leads past the pooler"


async def single_reads(scene: Scene) -> str | None:
    """Read on the replica outside of a transaction, many at once."""
    path = await _write(scene)
    await scene.database.cluster.wait_replayed()
    scene.service.client.cookies.clear()
    assert await eventually(lambda: _replica_serves(scene), PATIENCE)
    before = _routed(scene, "replica", "replica")
    answers = await asyncio.gather(*(scene.service.client.get(path) for _ in range(AT_ONCE)))
    assert {answer.status_code for answer in answers} == {200}
    assert _routed(scene, "replica", "replica") == before + AT_ONCE, _reasons(scene)
    return None


async def listening(scene: Scene) -> str | None:
    """Listen through the pooler and past it."""

    async def hears(url: str) -> bool:
        async with Databases(settings(scene.pooler, scene.database, listen_url=url)) as databases:
            try:
                async with databases.listen("news") as news:
                    assert await anext(news) is None
                    async with scene.service.databases.writing() as session:
                        await session.execute(text("SELECT pg_notify('news', 'hello')"))
                    return await asyncio.wait_for(anext(news), PATIENCE) == "hello"
            except RuntimeError as refused:
                if "LISTEN_URL leads to a pooler" not in str(refused):
                    raise
                return False

    assert await hears(scene.database.url())
    through = await hears(scene.url)
    if scene.program.kind == "pgpool-II":
        # It depends on whether it gives the listener an old connection to the server: then it does not show itself.
        return "`LISTEN` is refused, or works: let `LISTEN_URL` lead past the pooler; `NOTIFY` works"
    assert not through
    return "`LISTEN` is refused, and works by a `LISTEN_URL` past the pooler; `NOTIFY` works"


async def advisory_locks(scene: Scene) -> str | None:
    """Take advisory locks of the session and of the transaction."""
    databases = scene.service.databases
    async with databases.writing() as session:
        with pytest.raises(RuntimeError, match="pg_advisory_xact_lock"):
            await session.execute(text("SELECT pg_advisory_lock(7)"))
    try_lock = text("SELECT pg_try_advisory_xact_lock(7)")
    async with databases.writing() as first:
        assert (await first.execute(try_lock)).scalar_one() is True
        async with databases.writing() as second:
            assert (await second.execute(try_lock)).scalar_one() is False
    async with databases.writing() as third:
        assert (await third.execute(try_lock)).scalar_one() is True
    return "those of the session are refused; those of the transaction work"


async def copying(scene: Scene) -> str | None:
    """Copy rows into a table."""
    rows = [(f"C-{next(_numbers)}", "Copied", date(1980, 1, 1)) for _ in range(500)]
    async with scene.service.databases.writing() as session:
        columns = ("mrn", "full_name", "birth_date")
        assert await session.copy_records("patients", rows, columns=columns) == len(rows)
    return None


async def time_limits(scene: Scene) -> str | None:
    """Let a statement and an idle transaction exceed the limits that the server has for them."""

    async def slow() -> None:
        async with scene.service.databases.writing() as session:
            await session.execute(text("SET LOCAL statement_timeout = '50ms'"))
            await session.execute(text("SELECT pg_sleep(60)"))

    async def idle() -> None:
        async with scene.service.databases.writing() as session:
            await session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '50ms'"))
            await session.execute(text("SELECT 1 /* idles */"))
            assert await eventually(lambda: _rests(scene, "%/* idles */"), PATIENCE)
            await session.execute(text("SELECT 1"))

    with pytest.raises(DBAPIError, match="statement timeout"):
        await slow()
    with pytest.raises((DatabaseUnavailable, DBAPIError)):
        await idle()
    assert await eventually(lambda: _well(scene), PATIENCE)
    return None


async def no_server_connection(scene: Scene) -> str | None:
    """Hold all server connections, so that a request waits in PgBouncer's queue."""
    if scene.program.kind != "PgBouncer" or scene.mode != "transaction":
        return "not played"
    async with scene.client() as one, scene.client() as two, scene.client() as three:
        for client in (one, two, three):
            await client.execute("BEGIN; SELECT 1")
        answer = await scene.service.client.post("/users", json=_user())
    assert (answer.status_code, answer.json()["code"]) == (503, "connection_lost"), answer.text
    assert await eventually(lambda: _well(scene), PATIENCE)
    return "503 `connection_lost`, nothing is stored; then works again"


async def start_parameters(scene: Scene) -> str | None:
    """Ask for a setting by the URL."""
    one = {"url": f"{scene.url}?options=-c%20work_mem%3D8MB", **POOL}
    try:
        async with serving(scene.database.settings(replica=False, primary=one, analytics=one)) as service:
            async with service.databases.writing() as session:
                in_force = (await session.execute(text("SHOW work_mem"))).scalar_one() == "8MB"
            assert ("work_mem" in found_by(service).lost) != in_force
            return "in force" if in_force else "dropped, and named in the log"
    except SettingsError as refused:
        if "refuses the start-up parameter" not in str(refused):
            raise
        return "**refused** at the start: names it, and `ALTER ROLE … SET`"


async def pooler_restarts(scene: Scene) -> str | None:
    """End the pooler, and start it again."""
    await scene.pooler.stop()
    answer = await scene.service.client.post("/users", json=_user())
    assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE, answer.text
    await scene.pooler.start()
    assert await eventually(lambda: _well(scene), PATIENCE)
    assert all([await _well(scene) for _ in range(AT_ONCE)])
    return None


async def server_restarts(scene: Scene) -> str | None:
    """Restart the server behind the pooler."""
    await scene.database.cluster.primary.restart()
    assert await eventually(lambda: _well(scene), PATIENCE)

    async def all_well() -> bool:
        return all([await _well(scene) for _ in range(AT_ONCE)])

    assert await eventually(all_well, PATIENCE)
    return None


# In the order of the table, with what it calls them. Restarts come last.
SITUATIONS: dict[Situation, str] = {
    finding: "What the service finds at its start",
    statements: "Prepared statements, in both lanes, of two processes that share server connections",
    schema_change: "DDL under load that changes a column's type while plans are cached",
    cancelled: "A request is cancelled in the middle of a statement",
    dropped: "A connection is lost in the middle of a transaction",
    session_state: "`SET`, `DISCARD`, `PREPARE` and temporary tables of this service",
    leaking: "`SET` of another client of the pooler",
    own_writes: "Reading one's own write by its token, on a replica that lags and on one that does not",
    single_reads: "Reads of one round trip, outside a transaction, on the replica",
    listening: "`LISTEN` and `NOTIFY`",
    advisory_locks: "Advisory locks",
    copying: "`COPY`",
    time_limits: "The server's limits of time for a statement and for an idle transaction",
    no_server_connection: "No server connection becomes free within PgBouncer's `query_wait_timeout`",
    start_parameters: "A start-up parameter in the URL: `options=-c work_mem=8MB`",
    pooler_restarts: "The pooler ends and is started again",
    server_restarts: "The server behind the pooler is restarted",
}


def _user() -> dict[str, str]:
    return {"email": f"user-{next(_numbers)}@example.com", "full_name": "Ada"}


async def _write(scene: Scene) -> str:
    answer = await scene.service.client.post("/patients", json=ADA | {"mrn": f"W-{next(_numbers)}"})
    assert answer.is_success, answer.text
    return str(answer.headers["location"])


async def _read(scene: Scene) -> httpx.Response:
    scene.service.client.cookies.clear()
    return await scene.service.client.get("/patients", params={"limit": 3})


async def _well(scene: Scene) -> bool:
    """Tell whether a write and a read work."""
    return (await scene.service.client.post("/users", json=_user())).is_success and (await _read(scene)).is_success


async def _replica_serves(scene: Scene) -> bool:
    """Tell whether the replica is believed; after it lost its connections it is not, for a second."""
    return scene.service.databases.router.serves_reads


def _routed(scene: Scene, target: str, reason: str) -> float:
    return scene.service.sample("db_reads_routed_total", target=target, reason=reason)


def _reasons(scene: Scene) -> dict[str, float]:
    """Return how many reads were sent where, and why, since the start."""
    (metric,) = scene.service.databases.metrics.reads_routed.collect()
    return {f"{one.labels['target']}: {one.labels['reason']}": one.value for one in metric.samples if one.value}


async def _busy(scene: Scene, pattern: str) -> int:
    async with scene.server() as server:
        return int(await server.fetchval(BUSY, scene.database.name, pattern))


async def _is_busy(scene: Scene, pattern: str) -> bool:
    return await _busy(scene, pattern) > 0


async def _rests(scene: Scene, pattern: str) -> bool:
    return await _busy(scene, pattern) == 0


async def _end_sessions(scene: Scene) -> None:
    """End the pooler's server connections, on both servers, and whatever was left in them."""
    for server in (scene.database.cluster.primary, scene.database.cluster.replica):
        connection = await server.connect(scene.database.name)
        await connection.execute(END_SESSIONS)
        await connection.close()
    assert await eventually(lambda: _well(scene), PATIENCE)
