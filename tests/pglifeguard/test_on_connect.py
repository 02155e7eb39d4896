"""`on_connect`: once for each connection of a pool, within the login's time, with a name for its failures."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Text, bindparam, literal_column, select, text
from sqlalchemy.types import UserDefinedType

from pglifeguard.database import Database as PoolDatabase
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.databases import Databases
from pglifeguard.embedded.postgres import HOST, Server
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import DatabaseUnreachable
from pglifeguard.metrics import Metrics
from pglifeguard.pool import OnConnect
from pglifeguard.query import Query
from pglifeguard.sampling import Sampler
from tests import contrib
from tests.chaos import pooler
from tests.conftest import Database
from tests.pglifeguard.conftest import service_settings

SOON = 10.0


def database_with(database: Database, on_connect: OnConnect, url: str = "", **pool: Any) -> PoolDatabase:
    """Return the primary of a service that nobody runs, with this hook."""
    settings = DatabaseSettings(url=url or database.url(), **({"pool_min_size": 0, "pool_timeout": 0.3} | pool))
    return PoolDatabase(
        "primary", "primary", settings, service_settings(database.url()), Metrics(), Sampler(), on_connect
    )


async def close(made: PoolDatabase) -> None:
    """End it."""
    made.pool.close()
    await made.engine.dispose()
    await made.monitor.close()


async def test_hook_runs_once_for_each_connection_of_a_pool(database: Database) -> None:
    """Primary, replica and analytics run it; their monitors and what is kept from a request to the next do not."""
    seen: Counter[tuple[str, int]] = Counter()

    async def on_connect(connection: "asyncpg.Connection[Any]") -> None:
        seen[await connection.fetchval("SELECT current_user"), connection.get_server_pid()] += 1
        # A session that sets one closes its connection at the end.
        await connection.set_type_codec("money", schema="pg_catalog", encoder=str, decoder=str)

    async with Databases(database.settings(), on_connect=on_connect) as databases:
        for opened in (databases.writing, databases.reading, databases.reporting) * 3:
            async with opened() as session:
                await session.execute(text("SELECT 1"))
        kept = sum(database.pool.figures().checked_in for database in databases.all())

    assert set(seen.values()) == {1}
    assert len(seen) == kept
    assert {user for user, _ in seen} == {"app_rw", "app_ro"}


async def refused(connection: "asyncpg.Connection[Any]") -> None:
    """Ask for what the server does not know."""
    await connection.set_type_codec("no_such_type", encoder=str, decoder=str)


async def open_transaction(connection: "asyncpg.Connection[Any]") -> None:
    """Leave work to others."""
    await connection.transaction().start()


def plain(_connection: Any) -> Any:
    """Forget to be a coroutine."""


@pytest.mark.parametrize(
    ("on_connect", "sentence"),
    [
        (refused, "on_connect failed: ValueError: unknown type: public.no_such_type"),
        (open_transaction, "on_connect failed: RuntimeError: on_connect has left a transaction open"),
        (plain, "on_connect failed: TypeError: "),
    ],
)
async def test_failure_is_named(
    database: Database, on_connect: OnConnect, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The request gets the reason, no connection is left, and the log has the traceback once."""
    made = database_with(database, on_connect)
    for _ in range(2):
        with pytest.raises(DatabaseUnreachable, match=sentence):
            await made.pool.acquire()

    assert made.pool.figures().checked_in == 0
    (record,) = [record for record in caplog.records if record.message == "on_connect failed"]
    assert record.exc_info is not None
    await close(made)


async def ask_for_long(connection: "asyncpg.Connection[Any]") -> None:
    """Wait for the server."""
    await connection.execute("SELECT pg_sleep(60)")


async def think_for_long(_connection: "asyncpg.Connection[Any]") -> None:
    """Wait for somebody else."""
    await asyncio.Event().wait()


@pytest.mark.parametrize("on_connect", [ask_for_long, think_for_long])
async def test_slowness_is_named(database: Database, on_connect: OnConnect, caplog: pytest.LogCaptureFixture) -> None:
    """The requests of the meantime hear what is waited for, and at the login's end it is over."""
    made = database_with(database, on_connect, connect_timeout_seconds=0.1)
    with pytest.raises(DatabaseUnreachable, match=r"within 0\.3 s: on_connect has not ended"):
        await made.pool.acquire()

    async def told() -> bool:
        return "on_connect failed" in caplog.messages

    assert await eventually(told, SOON)
    with pytest.raises(DatabaseUnreachable, match="on_connect did not end in time"):
        await made.pool.acquire()
    await close(made)


async def test_success_after_a_failure(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """An extension that a migration makes later is found by the next login; a later failure is told again."""
    fails = True

    async def on_connect(_connection: "asyncpg.Connection[Any]") -> None:
        if fails:
            raise LookupError("not yet")

    caplog.set_level(logging.WARNING)
    made = database_with(database, on_connect)
    for fails in (True, False, True):
        if fails:
            with pytest.raises(DatabaseUnreachable, match="LookupError: not yet"):
                await made.pool.acquire()
        else:
            slot = await made.pool.acquire()
            made.pool.release(slot)
            made.pool.dispose()

    assert caplog.messages.count("on_connect failed") == 2
    await close(made)


async def test_hooks_codec_for_json_wins(database: Database) -> None:
    """SQLAlchemy's codecs are set before: JSON is read as the application says, and written as SQLAlchemy does."""

    async def on_connect(connection: "asyncpg.Connection[Any]") -> None:
        read: Any = {"encoder": str, "decoder": lambda value: ["mine", json.loads(value)], "format": "text"}
        for name in ("json", "jsonb"):
            await connection.set_type_codec(name, schema="pg_catalog", **read)

    both: Query[Any, Any] = Query(
        select(literal_column("'[1]'::jsonb").label("one"), literal_column("'[2]'::json").label("two"))
    )
    settings = database.settings(replica=False)
    async with Databases(settings, on_connect=on_connect) as databases, databases.writing() as session:
        (row,) = await session.rows(both)
        through = (await session.execute(both.statement)).one()

    assert tuple(row) == tuple(through) == (["mine", [1]], ["mine", [2]])


@pytest.mark.skipif(pooler.program() is None, reason="pgbouncer is not installed: apt-get install pgbouncer")
async def test_codecs_hold_behind_a_pooler(database: Database, open_directory: Path) -> None:
    """They are the client's, whichever server connection serves it; a SET is refused with what to write."""

    async def on_connect(connection: "asyncpg.Connection[Any]") -> None:
        await connection.set_type_codec(
            "numeric", schema="pg_catalog", encoder=str, decoder=lambda value: f"n{value}", format="text"
        )

    async def on_connect_that_sets(connection: "asyncpg.Connection[Any]") -> None:
        await connection.execute("SET app.tenant = 'a'")

    query: Query[Any, Any] = Query(
        select(literal_column("1.5::numeric", Text).label("n"), literal_column("pg_backend_pid()").label("p"))
    )
    async with pooler.pooling(database.cluster, open_directory, size=2) as port:
        url = database.url().replace(f":{database.cluster.primary.port}/", f":{port}/")
        pool: Any = {"url": url, "statement_cache_size": pooler.statement_cache_size()}
        settings = database.settings(replica=False, primary=pool, analytics=pool)
        async with Databases(settings, on_connect=on_connect) as databases:

            async def read() -> tuple[str, int]:
                async with databases.writing() as session:
                    (row,) = await session.rows(query)
                    through = (await session.execute(query.statement)).one()
                    assert row.n == through.n
                    return row.n, row.p

            answers = await asyncio.gather(*(read() for _ in range(20)))
        refusing = database_with(database, on_connect_that_sets, **pool)
        with pytest.raises(DatabaseUnreachable, match="on_connect failed: RuntimeError: behind a pooler"):
            await refusing.pool.acquire()
        await close(refusing)

    assert {n for n, _ in answers} == {"n1.5"}
    assert len({process for _, process in answers}) == 2


# Real extensions.


class Hstore(UserDefinedType[dict[str, str | None]]):
    """A column of hstore, whose values the driver's codec makes."""

    cache_ok = True
    render_bind_cast = True

    def get_col_spec(self, **_: Any) -> str:
        """Return its name in DDL."""
        return "hstore"


@pytest.fixture(scope="module")
async def extended() -> AsyncIterator[Server]:
    """Give a server with hstore and citext."""
    async with contrib.running() as server:
        connection = await server.connect()
        await connection.execute("CREATE EXTENSION hstore; CREATE EXTENSION citext")
        await connection.execute("CREATE TABLE things (name citext PRIMARY KEY, labels hstore NOT NULL)")
        await connection.close()
        yield server


INSERT: Any = (
    text("INSERT INTO things VALUES (:name, :labels) RETURNING name, labels")
    .bindparams(bindparam("name", type_=Text), bindparam("labels", type_=Hstore()))
    .columns(name=Text, labels=Hstore())
)
SELECT: Any = text("SELECT labels, name FROM things WHERE name = CAST(:name AS citext)").columns(
    labels=Hstore(), name=Text
)
ADD: Any = Query(INSERT)
FIND: Any = Query(SELECT)


@pytest.mark.skipif(contrib.programs() is None, reason=contrib.MISSING)
async def test_hstore_and_citext(database: Database, extended: Server) -> None:
    """A dict goes into hstore and comes out of it, by both lanes; citext finds what differs in case."""

    async def on_connect(connection: "asyncpg.Connection[Any]") -> None:
        await connection.set_builtin_type_codec("hstore", schema="public", codec_name="pg_contrib.hstore")

    url = f"postgresql://postgres:{extended.password}@{HOST}:{extended.port}/postgres"
    labels = {"colour": "blue", "size": None}
    settings = database.settings(replica=False, primary={"url": url}, analytics={"url": url})
    async with Databases(settings, on_connect=on_connect) as databases:
        (added,) = await databases.write_once(ADD, name="Chair", labels=labels)
        async with databases.reading() as session:
            (found,) = await session.rows(FIND, name="CHAIR")
            through = (await session.execute(FIND.statement, {"name": "cHAIR"})).one()

    assert (added.name, added.labels) == ("Chair", labels)
    assert tuple(found) == tuple(through) == (labels, "Chair")
