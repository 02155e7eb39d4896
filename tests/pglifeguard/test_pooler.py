"""At its start the service finds out what stands in front of a database, adapts to it, or refuses with a sentence."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from uvicorn.config import STARTUP_FAILURE

from pglifeguard import SettingsError, pooler_look
from pglifeguard.connector import Connector
from pglifeguard.database import MUTE_SECONDS
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import DatabaseUnreachable
from pglifeguard.pooler import FORGETS, LOST, NONE, UNTOLD, Pooler, startup_parameters
from pglifeguard.testing.proxy import Proxy
from tests.chaos.pooler import pooling, program, statement_cache_size
from tests.conftest import Database, Execute
from tests.interpreter import python
from tests.pglifeguard.conftest import pooled
from tests.poolers.programs import Running, Shape, installed, running
from tests.service import ADA, Service, serving

needs_pgbouncer = pytest.mark.skipif(program() is None, reason="PgBouncer is not installed: apt-get install pgbouncer")
needs_pgpool = pytest.mark.skipif(installed("pgpool-II") is None, reason="apt-get install pgpool2")


def through(database: Database, port: int) -> str:
    """Return the URL of the database behind the pooler."""
    return make_url(database.url()).set(port=port).render_as_string(hide_password=False)


def alone(database: Database, url: str, **changes: Any) -> Any:
    """Return settings of a service whose primary is at `url`, with one connection to it."""
    one = {"url": url, "pool_size": 1, "max_overflow": 0, **changes}
    return database.settings(replica=False, primary=one, analytics=one | {"pool_min_size": 0})


def said(caplog: pytest.LogCaptureFixture, message: str) -> list[str]:
    """List the databases of which the log says this."""
    return [vars(record)["database"] for record in caplog.records if record.msg == message]


def finding(service: Service) -> Pooler:
    """Return what the service found in front of its primary."""
    look = service.databases.primary.connector.look
    assert look is not None
    return look.found


@pytest.fixture
async def forgetful(database: Database, open_directory: Path) -> AsyncIterator[str]:
    """Give the URL of a PgBouncer that does not keep prepared statements."""
    if program() is None:
        pytest.skip("PgBouncer is not installed: apt-get install pgbouncer")
    async with pooling(database.cluster, open_directory, size=2, keeps_statements=False) as port:
        yield through(database, port)


async def test_no_statement_is_kept_behind_a_pooler_that_forgets(
    database: Database, forgetful: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Both lanes work on whatever server connection they get, and leave no name in it; the log says so once."""
    async with serving(alone(database, forgetful)) as service:
        assert (await service.client.get("/patients")).status_code == 200
        # Another client keeps the server connection that the first read ran on.
        other = await asyncpg.connect(forgetful, statement_cache_size=0)
        await other.execute("BEGIN; SELECT 1")
        try:
            answers = [(await service.client.get("/patients")).status_code]
            async with service.databases.writing() as session:
                await session.execute(text("SELECT CAST(:x AS int)"), {"x": 1})
                names = (await session.execute(text("SELECT name FROM pg_prepared_statements"))).all()
        finally:
            other.terminate()
        described = (await service.client.get("/health/db")).json()["databases"]["primary"]["pooler"]

    assert (answers, names) == ([200], [])
    assert described == "transaction mode, prepared statements not kept"
    assert sorted(said(caplog, FORGETS)) == ["analytics", "primary"]


async def test_statement_that_is_not_kept_follows_the_schema(
    database: Database, forgetful: str, execute: Execute
) -> None:
    """SQLAlchemy keeps no statement either: it would read a column by the type that it had before a migration."""
    await execute("CREATE TABLE kinds AS SELECT 7 AS kind")
    await execute("GRANT SELECT ON kinds TO app_rw")
    kinds = []
    async with serving(alone(database, forgetful)) as service:
        for change in ("SELECT 1", "ALTER TABLE kinds ALTER COLUMN kind TYPE text"):
            await execute(change)
            async with service.databases.writing() as session:
                kinds.append((await session.execute(text("SELECT kind FROM kinds"))).scalar_one())

    assert kinds == [7, "7"]


async def test_look_can_be_switched_off(database: Database, forgetful: str, caplog: pytest.LogCaptureFixture) -> None:
    """Then nothing is asked and nothing adapted; a request that meets it is told what is to be set."""
    async with serving(alone(database, forgetful, pooler_check=False)) as service:
        assert (await service.client.get("/patients")).status_code == 200
        other = await asyncpg.connect(forgetful, statement_cache_size=0)
        await other.execute("BEGIN; SELECT 1")

        answer = await service.client.get("/patients")

        other.terminate()
        described = (await service.client.get("/health/db")).json()["databases"]["primary"]["pooler"]

    assert (answer.status_code, answer.json()["code"]) == (500, "statements_not_kept")
    assert "DATABASE_STATEMENT_CACHE_SIZE=0" in answer.json()["detail"]
    assert described == "not examined"
    assert not said(caplog, FORGETS)


async def test_pooler_that_is_told_of_needs_no_word(
    database: Database, forgetful: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a cache of statements there is nothing to lose."""
    async with serving(alone(database, forgetful, statement_cache_size=0)) as service:
        answers = [(await service.client.get("/patients")).status_code for _ in range(5)]

    assert answers == [200] * 5
    assert not said(caplog, FORGETS)


@needs_pgbouncer
async def test_statements_are_kept_in_session_mode(database: Database, open_directory: Path) -> None:
    """There a server connection belongs to one client, whose statements it keeps."""
    async with (
        pooling(database.cluster, open_directory, size=20, mode="session") as port,
        serving(alone(database, through(database, port))) as service,
    ):
        assert str(finding(service)) == "session mode, prepared statements kept"
        assert service.databases.primary.connector.statement_cache_size == 500


@needs_pgbouncer
async def test_statement_mode_ends_the_start(database: Database, open_directory: Path) -> None:
    """It has no transactions, so a write could be stored by halves; the sentence says what to set, and no password."""
    async with pooling(database.cluster, open_directory, size=2, mode="statement") as port:
        with pytest.raises(SettingsError, match=r"^DATABASE_URL leads to a pooler in statement mode") as refused:
            async with serving(alone(database, through(database, port))):
                pass

    assert "pool_mode = transaction" in str(refused.value)
    assert database.cluster.passwords["app_rw"] not in str(refused.value)


@needs_pgbouncer
async def test_service_that_may_not_start_says_so_in_a_sentence(database: Database, open_directory: Path) -> None:
    """As of every other wrong setting, and without the way through the code that has led to it."""
    async with pooling(database.cluster, open_directory, size=2, mode="statement") as port:
        status, output = await python(
            "-m", "app", "serve", "--port", "0", environment={"DATABASE_URL": through(database, port)}
        )

    assert status == STARTUP_FAILURE
    assert "DATABASE_URL leads to a pooler in statement mode" in output
    assert "Traceback" not in output


@needs_pgbouncer
async def test_refused_parameter_ends_the_start(database: Database, open_directory: Path) -> None:
    """A pooler that takes no `options` lets nobody in; the sentence names the parameter and the way that works."""
    async with pooling(database.cluster, open_directory, size=2) as port:
        with pytest.raises(
            SettingsError, match=r"^DATABASE_URL leads to a pooler that refuses the start-up"
        ) as refused:
            async with serving(alone(database, f"{through(database, port)}?options=-c%20jit%3Doff")):
                pass

    assert "ALTER ROLE" in str(refused.value)


@needs_pgbouncer
async def test_refused_parameter_is_named_without_a_look(database: Database, open_directory: Path) -> None:
    """Operators' commands and jobs connect without one; the sentence is the same."""
    async with pooling(database.cluster, open_directory, size=2) as port:
        url = f"{through(database, port)}?options=-c%20jit%3Doff"
        connector = Connector(DatabaseSettings.model_validate({"url": url}), writable=True)
        with pytest.raises(DatabaseUnreachable, match="refuses the start-up parameter"):
            await connector.open(asyncio.get_running_loop().time() + 5)
        await connector.close()


def test_error_that_says_nothing_of_statements_is_no_finding() -> None:
    """BEGIN may fail for many reasons, and statement mode ends the start."""
    error = asyncpg.PostgresError("the server is shutting down")

    with pytest.raises(asyncpg.PostgresError) as raised:
        pooler_look._only_statements(error)

    assert raised.value is error


@needs_pgbouncer
@pytest.mark.parametrize(("parameter", "starts"), [("jit%3Doff", True), ("app.tenant%3D7", False)])
async def test_dropped_parameter_is_named(
    database: Database, open_directory: Path, caplog: pytest.LogCaptureFixture, parameter: str, *, starts: bool
) -> None:
    """Where the pooler drops it the log says so; a setting that changes what statements mean ends the start."""
    settings: dict[str, object] = {"ignore_startup_parameters": "options"}
    pgbouncer = program()
    assert pgbouncer is not None
    async with running(pgbouncer, Shape(settings=settings), database.cluster, open_directory) as pooler:
        url = f"{pooler.url(database.url())}?options=-c%20{parameter}"
        if not starts:
            with pytest.raises(SettingsError, match=r"sets app\.tenant by its options"):
                async with serving(alone(database, url)):
                    pass
            return
        async with serving(alone(database, url)) as service:
            assert finding(service).lost == ("jit",)

    assert sorted(said(caplog, LOST)) == ["analytics", "primary"]


@needs_pgpool
async def test_split_of_reads_ends_the_start(database: Database, open_directory: Path) -> None:
    """pgpool-II would send a read of the primary, and one behind a token, to the replica."""
    pgpool = installed("pgpool-II")
    assert pgpool is not None
    # The primary has no share of the reads, so that every session has the replica for them.
    shape = Shape("session", settings={"load_balance_mode": "on", "backend_weight0": 0})
    async with running(pgpool, shape, database.cluster, open_directory) as pooler:
        with pytest.raises(SettingsError, match="several servers") as refused:
            async with serving(alone(database, pooler.url(database.url()))):
                pass

    assert "load_balance_mode = off" in str(refused.value)


@needs_pgpool
async def test_session_with_a_split_is_not_used(
    database: Database, open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pgpool-II chooses for each session: one whose reads would go to the replica is noticed at its login."""
    pgpool = installed("pgpool-II")
    assert pgpool is not None
    monkeypatch.setattr(pooler_look, "AGAIN_SECONDS", 60.0)
    async with running(pgpool, Shape("session"), database.cluster, open_directory) as pooler:
        url = pooler.url(database.url())
        async with serving(alone(database, url)) as service:
            assert str(finding(service)) == "session mode, prepared statements kept"
            await restart(pooler, {"load_balance_mode": "on", "backend_weight0": 0})

            async def refused() -> bool:
                return "several servers" in (await service.client.get("/health/db")).text

            assert await eventually(refused, 10)
            answer = await service.client.get("/patients")

    assert (answer.status_code, answer.json()["code"]) == (503, "database_unreachable")


@needs_pgbouncer
async def test_pooler_that_comes_later_is_looked_at_then(
    database: Database, open_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A database that is down keeps nobody from starting; what is wrong with its pooler is a 503 until it is mended."""
    monkeypatch.setattr(pooler_look, "AGAIN_SECONDS", 0.1)
    pgbouncer = program()
    assert pgbouncer is not None
    pooler = Running(pgbouncer, Shape("statement"), database.cluster, open_directory)
    try:
        async with serving(alone(database, pooler.url(database.url())), settled=False) as service:
            assert finding(service).present is None
            await pooler.start()

            async def refused() -> bool:
                return "statement mode" in (await service.client.get("/health/db")).text

            assert await eventually(refused, 10)
            assert (await service.client.get("/patients")).status_code == 503
            await restart(pooler, {"pool_mode": "transaction"})

            async def answered() -> bool:
                return (await service.client.post("/patients", json=ADA)).status_code == 201

            assert await eventually(answered, 15)
            assert finding(service).mode == "transaction"
    finally:
        await pooler.stop()

    assert "primary" in said(caplog, "pooler refused")


async def restart(pooler: Running, settings: dict[str, object]) -> None:
    """Stop a pooler, and start it with these settings at the same port."""
    await pooler.stop()
    pooler.change(settings)
    await pooler.start()


async def test_server_itself_is_known_by_its_login(
    database: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Straight to the server, and behind what rewrites addresses alone, nothing is adapted and nothing said."""
    caplog.set_level(logging.INFO)
    async with serving(database.settings()) as service:
        assert finding(service) == NONE
        assert (await service.client.get("/health/db")).json()["databases"]["primary"]["pooler"] == "none"
    async with serving(alone(database, proxy.url(database.url()))) as service:
        assert finding(service) == NONE

    assert not said(caplog, "pooler found")
    assert not said(caplog, FORGETS)


@needs_pgbouncer
async def test_what_cannot_be_told_is_said(
    database: Database, open_directory: Path, execute: Execute, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind a pooler whose server lacks what the look asks for, the service works, and says that it could not tell."""
    await execute("CREATE SCHEMA without")
    await execute("GRANT USAGE ON SCHEMA without TO PUBLIC")
    await execute(
        "CREATE FUNCTION without.pg_postmaster_start_time() RETURNS timestamptz LANGUAGE plpgsql STABLE AS "
        "$$BEGIN RAISE feature_not_supported; END$$"
    )
    await execute(f"ALTER DATABASE {database.name} SET search_path = without, pg_catalog, public")
    async with (
        pooling(database.cluster, open_directory, size=2) as port,
        serving(alone(database, through(database, port), statement_cache_size=0)) as service,
    ):
        assert str(finding(service)) == "unknown mode"
        assert (await service.client.get("/patients")).status_code == 200

    assert sorted(said(caplog, UNTOLD)) == ["analytics", "primary"]


@needs_pgbouncer
async def test_server_that_lists_no_statements_is_healthy(
    database: Database, open_directory: Path, execute: Execute
) -> None:
    """Where a role sees no prepared statements, whether they are kept stays open, and they are kept here."""
    await execute("CREATE SCHEMA without")
    await execute("GRANT USAGE ON SCHEMA without TO PUBLIC")
    await execute("CREATE VIEW without.pg_prepared_statements AS SELECT ''::text AS name WHERE false")
    await execute("GRANT SELECT ON without.pg_prepared_statements TO PUBLIC")
    await execute(f"ALTER DATABASE {database.name} SET search_path = without, pg_catalog, public")
    async with (
        pooling(database.cluster, open_directory, size=20, mode="session") as port,
        serving(alone(database, through(database, port))) as service,
    ):
        assert str(finding(service)) == "session mode"
        assert service.databases.primary.connector.statement_cache_size == 500


@needs_pgbouncer
async def test_logins_at_once_share_one_look(
    database: Database, open_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever logs in while a look goes on waits for it, and asks nothing."""
    caplog.set_level(logging.INFO)
    async with pooling(database.cluster, open_directory, size=5) as port, pooled(through(database, port)) as p:
        connector = p.database.connector
        deadline = asyncio.get_running_loop().time() + 5
        opened = await asyncio.gather(*(connector.open(deadline) for _ in range(3)))
        for connection in opened:
            connection.terminate()

    assert [connection.pooled for connection in opened] == [True] * 3
    assert said(caplog, "pooler found") == ["primary"]


@needs_pgbouncer
async def test_look_that_gets_no_answer_is_given_up(
    database: Database, open_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In session mode a full pooler has no second connection: after three looks the service goes on without them."""
    monkeypatch.setattr(pooler_look, "LOOK_SECONDS", 0.2)
    async with pooling(database.cluster, open_directory, size=2, mode="session") as port:
        url = through(database, port)
        # One is taken, so that a look has one connection where it wants two.
        other = await asyncpg.connect(url, statement_cache_size=0)
        await other.fetchval("SELECT 1")
        one = {"url": url, "pool_size": 1, "max_overflow": 0, "pool_min_size": 0}
        settings = database.settings(
            replica=False, primary=one, analytics=one | {"url": database.url()}, monitor_interval_seconds=0.05
        )
        async with serving(settings, settled=False) as service:
            assert await eventually(lambda: healthy(service), 10)
            assert str(finding(service)) == "unknown mode"
        other.terminate()

    assert said(caplog, UNTOLD) == ["primary"]


async def healthy(service: Service) -> bool:
    """Tell whether the primary has answered."""
    return service.databases.primary.monitor.last.status == "healthy"


@needs_pgbouncer
async def test_queue_of_a_pooler_is_no_mute_server(database: Database, open_directory: Path, execute: Execute) -> None:
    """When statements that wait for a lock hold all of PgBouncer's connections, no look is answered; nothing is cut."""
    async with pooling(database.cluster, open_directory, size=2) as port:
        url = through(database, port)
        one = {"url": url, "statement_cache_size": statement_cache_size(), "pool_min_size": 0}
        async with serving(database.settings(replica=False, primary=one, analytics=one)) as service:
            path = (await service.client.post("/patients", json=ADA)).headers["location"]
            await execute("BEGIN")
            await execute("SELECT 1 FROM patients FOR UPDATE")
            changes = [asyncio.create_task(service.client.patch(path, json={"full_name": "Ada"})) for _ in range(2)]

            async def mute() -> bool:
                return time.monotonic() - service.databases.primary._answered_at > 1.5 * MUTE_SECONDS

            assert await eventually(mute, 30)
            await execute("COMMIT")

            assert [(await change).status_code for change in changes] == [200, 200]


def test_parameters_of_the_start_are_listed() -> None:
    """Those that `options` holds too, in both of PostgreSQL's ways to write them, and not those for a pooler."""
    options = "-c search_path=a -cjit=off --statement-timeout=3s -c pgdog.role=primary"

    assert startup_parameters({"options": options, "timezone": "UTC"}) == [
        "timezone", "search_path", "jit", "statement_timeout",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (Pooler(), "unknown"),
        (NONE, "none"),
        (Pooler(True, "transaction", keeps_statements=True), "transaction mode, prepared statements kept"),
        (Pooler(True, "session", None, splits=True), "session mode, read/write split"),
        (Pooler(True, None, lost=("jit", "role")), "unknown mode, drops jit, role"),
    ],
)
def test_finding_is_said_in_a_few_words(found: Pooler, sentence: str) -> None:
    """As /health/db and doctor show it."""
    assert str(found) == sentence
