"""What a request leaves in the server's session never reaches the next one; nothing left behind costs nothing."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import Boolean, Text, bindparam, func, literal_column, select, text
from sqlalchemy.exc import InterfaceError

from pglifeguard.embedded.waiting import eventually
from pglifeguard.lease import fetch_once
from pglifeguard.query import Query
from pglifeguard.sessions import ReadSession, WriteSession
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database, Execute
from tests.pglifeguard.conftest import pooled
from tests.service import Service, quiet, serving

# One connection each, so that what is left behind would be found.
ONE: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_min_size": 0}
TENANT = text("SELECT current_setting('app.tenant', true)")
TENANT_QUERY = Query(
    select(func.current_setting(literal_column("'app.tenant'"), literal_column("true")).label("tenant"))
)
TRUE, FALSE = literal_column("true", Boolean), literal_column("false", Boolean)
NAME = literal_column("'app.tenant'", Text)
SET_LOCAL = Query(select(func.set_config(NAME, bindparam("value", type_=Text), TRUE).label("tenant")))
SET_SESSION = Query(select(func.set_config(NAME, bindparam("value", type_=Text), FALSE).label("tenant")))
UNKNOWN_FUNCTION: Query[Any] = Query(
    select(func.public.remember(literal_column("'a'", Text), type_=Text).label("tenant"))
)
REMEMBER = """
    CREATE FUNCTION public.remember(value text) RETURNS text LANGUAGE sql AS
    $$ SELECT set_config('app.tenant', value, false) $$
"""
# What the session finds of what another one may have left there.
FOUND = """
    SELECT coalesce(nullif(current_setting('app.tenant', true), ''), '-') || ' ' || current_setting('search_path')
        || ' ' || (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())
        || ' ' || (SELECT count(*) FROM pg_cursors WHERE is_holdable)
        || ' ' || (SELECT count(*) FROM pg_listening_channels())
        || ' ' || (SELECT count(*) FROM pg_class WHERE relname = 'scratch')
        || ' ' || (SELECT count(*) FROM pg_prepared_statements WHERE from_sql)
        || ' ' || current_user || ' ' || session_user
"""
RESET_BY = {
    "SET": "SET app.tenant = 'a'",
    "SET SESSION": "SET SESSION search_path = pg_catalog",
    "set_config": "SELECT set_config('app.tenant', 'a', false)",
    "set_config by parameter": "SELECT set_config('app.tenant', 'a', (1 = 0))",
    "function": "SELECT public.remember('a')",
    "block": "DO $$ BEGIN PERFORM public.remember('a'); END $$",
    "advisory lock": "SELECT pg_advisory_lock(7)",
    "cursor": "DECLARE held CURSOR WITH HOLD FOR SELECT 1",
    "listen": "LISTEN channel",
    "temporary table": "CREATE TEMPORARY TABLE scratch (a int)",
    "role": "SET ROLE app_ro",
    "comment": "/* a note */ SET app.tenant = 'a'",
}
CLOSED_BY = {
    "prepare": "PREPARE mine AS SELECT 1",
    "discard": "DISCARD ALL",
}
Use = Callable[[WriteSession, str], Awaitable[Any]]


async def by_execute(session: ReadSession, sql: str) -> None:
    """Send it through SQLAlchemy."""
    await session.execute(text(sql))


async def by_connection(session: ReadSession, sql: str) -> None:
    """Send it through SQLAlchemy's connection."""
    await (await session.connection()).exec_driver_sql(sql)


async def driver_of(session: ReadSession) -> Any:
    """Return the driver's connection, as SQLAlchemy hands it out."""
    return (await (await session.connection()).get_raw_connection()).driver_connection


async def by_driver(session: ReadSession, sql: str) -> None:
    """Send it by the driver, as text."""
    await (await driver_of(session)).execute(sql)


async def by_driver_prepared(session: ReadSession, sql: str) -> None:
    """Send it by the driver, prepared."""
    await (await driver_of(session)).fetch(sql)


@pytest.fixture
async def lonely(database: Database, execute: Execute) -> Any:
    """Give a service with one connection to each database."""
    await execute("GRANT app_ro TO app_rw")
    await execute(REMEMBER)
    await database.cluster.wait_replayed()
    async with serving(database.settings(**ONE)) as running:
        yield running
    await execute("REVOKE app_ro FROM app_rw")


def backend(service: Service, pool: str = "primary") -> float:
    """Count the connections that were replaced for what was left in them."""
    return service.sample("db_connection_invalidations_total", pool=pool, reason="closed") + service.sample(
        "db_connection_invalidations_total", pool=pool, reason="session_state"
    )


@pytest.mark.parametrize("use", [by_execute, by_connection, by_driver, by_driver_prepared])
@pytest.mark.parametrize("how", RESET_BY)
async def test_what_a_session_leaves_is_undone(lonely: Service, how: str, use: Use) -> None:
    """The next one finds the connection as it was, and it is the same connection."""
    async with lonely.databases.writing() as session:
        found = (await session.execute(text(FOUND))).scalar_one()

    for _ in range(2):  # The second time the statement has been prepared.
        async with lonely.databases.writing() as session:
            await use(session, RESET_BY[how])

        async with lonely.databases.writing() as session:
            assert (await session.execute(text(FOUND))).scalar_one() == found
    assert backend(lonely) == 0


@pytest.mark.parametrize("how", CLOSED_BY)
async def test_what_cannot_be_undone_ends_the_connection(lonely: Service, how: str) -> None:
    """Prepared statements are the driver's too, so nobody can say which to drop."""
    async with lonely.databases.writing() as session:
        found = (await session.execute(text(FOUND))).scalar_one()
        if how == "discard":
            with pytest.raises(Exception, match="cannot run inside a transaction block"):
                await session.execute(text(CLOSED_BY[how]))
            await session.rollback()
        else:
            await session.execute(text(CLOSED_BY[how]))

    async with lonely.databases.writing() as session:
        assert (await session.execute(text(FOUND))).scalar_one() == found
    assert backend(lonely) == 1


async def test_what_the_driver_keeps_ends_the_connection(lonely: Service) -> None:
    """Callbacks and codecs live on this side, where nobody can list them."""

    def note(*_arguments: Any) -> None:
        """Hear of something."""

    async def text_codec(driver: Any) -> None:
        await driver.set_type_codec("int4", encoder=str, decoder=lambda v: f"<{v}>", schema="pg_catalog", format="text")

    async def builtin_codec(driver: Any) -> None:
        await driver.set_builtin_type_codec("int4", schema="pg_catalog", codec_name="oid")

    async def no_codec(driver: Any) -> None:
        await driver.reset_type_codec("int4", schema="pg_catalog")

    async def log_listener(driver: Any) -> None:
        driver.add_log_listener(note)

    async def query_logger(driver: Any) -> None:
        driver.add_query_logger(note)

    async def termination_listener(driver: Any) -> None:
        driver.add_termination_listener(note)

    ways = (text_codec, builtin_codec, no_codec, log_listener, query_logger, termination_listener)
    for number, way in enumerate(ways, start=1):
        async with lonely.databases.writing() as session:
            await way(await driver_of(session))
        async with lonely.databases.writing() as session:
            assert (await session.execute(text("SELECT 1"))).scalar_one() == 1

        assert backend(lonely) == number, way


async def test_listener_of_the_driver_hears_nothing_afterwards(lonely: Service, execute: Execute) -> None:
    """LISTEN ends with the session, and so do its callbacks; the next one's are its own."""
    heard: dict[str, list[Any]] = {"first": [], "second": []}

    def listener(name: str) -> Callable[..., None]:
        return lambda *event: heard[name].append(event)

    async with lonely.databases.writing() as session:
        await (await driver_of(session)).add_listener("channel", listener("first"))

    async with lonely.databases.writing() as session:
        await (await driver_of(session)).add_listener("channel", listener("second"))
        await session.commit()
        await execute("NOTIFY channel")

        async def noticed() -> bool:
            await session.execute(text("SELECT 1"))
            await session.commit()
            return bool(heard["second"])

        assert await eventually(noticed, 5)

    assert heard["first"] == []
    assert backend(lonely) == 0


async def test_what_nobody_said_is_seen_by_what_the_server_says(lonely: Service, execute: Execute) -> None:
    """A trigger that changes a setting of which the server tells the driver is noticed, whatever the statement was."""
    await execute(
        "CREATE FUNCTION public.sly() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM set_config('TimeZone', 'Asia/Tokyo', false); RETURN NEW; END $$"
    )
    await execute("CREATE TRIGGER sly BEFORE INSERT ON patients FOR EACH ROW EXECUTE FUNCTION public.sly()")
    async with lonely.databases.writing() as session:
        zone = (await session.execute(text("SHOW TimeZone"))).scalar_one()
        await session.execute(text("INSERT INTO patients (mrn, full_name, birth_date) VALUES ('A', 'A', '2000-01-01')"))
        assert (await session.execute(text("SHOW TimeZone"))).scalar_one() == "Asia/Tokyo"

    async with lonely.databases.writing() as session:
        assert (await session.execute(text("SHOW TimeZone"))).scalar_one() == zone


# On the replica as on the primary.


@pytest.mark.parametrize("where", ["primary", "replica"])
async def test_transaction_setting_holds_for_the_next_query(database: Database, where: str) -> None:
    """`set_config(…, true)` and the query after it see one transaction, on both servers and in both lanes."""
    async with serving(database.settings(replica=where == "replica", **ONE)) as service:
        for _ in range(2):
            async with service.databases.reading() as session:
                await session.execute(text("SELECT set_config('app.tenant', 'a', true)"))
                assert (await session.execute(TENANT)).scalar_one() == "a"
                assert (await session.rows(TENANT_QUERY))[0].tenant == "a"
            async with service.databases.reading() as session:
                await session.rows(SET_LOCAL, value="b")
                assert (await session.rows(TENANT_QUERY))[0].tenant == "b"
                assert (await session.execute(TENANT)).scalar_one() == "b"
            async with service.databases.reading() as session:
                assert (await session.rows(TENANT_QUERY))[0].tenant in {None, ""}
        assert backend(service, where) == 0


@pytest.mark.parametrize("query", [SET_SESSION, UNKNOWN_FUNCTION])
@pytest.mark.parametrize("where", ["primary", "replica"])
async def test_query_of_the_driver_leaves_nothing(
    database: Database, execute: Execute, where: str, query: Query[Any]
) -> None:
    """What a constant query sets is undone too, where it would have had a connection for itself."""
    await execute(REMEMBER)
    await database.cluster.wait_replayed()
    async with serving(database.settings(replica=where == "replica", **ONE)) as service:
        for _ in range(2):
            async with service.databases.reading() as session:
                await session.rows(query, **({"value": "a"} if query is SET_SESSION else {}))
                assert (await session.rows(TENANT_QUERY))[0].tenant == "a"
            async with service.databases.reading() as session:
                assert (await session.rows(TENANT_QUERY))[0].tenant in {None, ""}
        assert backend(service, where) == 0


async def test_query_without_a_transaction_that_leaves_something_is_not_used_again(database: Database) -> None:
    """The pool looks at what it is given, whoever gives it."""
    async with pooled(database.replica_url(), role="replica", **ONE) as p:
        await fetch_once(p.database, SET_SESSION, {"value": "a"})

        assert (await fetch_once(p.database, TENANT_QUERY, {}))[0].tenant is None
        assert p.replaced("session_state") == 1


@pytest.mark.parametrize("way", ["stream", "stream_scalars"])
@pytest.mark.parametrize("where", ["primary", "replica"])
async def test_reads_stream_on_both_servers(database: Database, where: str, way: str) -> None:
    """A cursor needs a transaction, which a read on the replica has too."""
    async with (
        serving(database.settings(replica=where == "replica")) as service,
        service.databases.reading() as session,
    ):
        result = await getattr(session, way)(text("SELECT generate_series(1, 300)"))
        assert len([row async for row in result]) == 300


# What it costs.


async def test_nothing_left_costs_nothing(database: Database, proxy: Proxy) -> None:
    """No round trip is spent on undoing where nothing was done, and one where something was."""
    async with quiet(database.settings(replica=False, primary={"url": proxy.url(database.url()), **ONE})) as service:

        async def trips(sql: str) -> int:
            for _ in range(2):
                proxy.round_trips = 0
                async with service.databases.writing() as session:
                    await session.execute(text(sql))
            return proxy.round_trips

        assert await trips("SELECT 1") == 3
        assert await trips("SELECT set_config('app.tenant', 'a', true)") == 3
        assert await trips("SET LOCAL app.tenant = 'a'") == 3
        assert await trips("SET app.tenant = 'a'") == 4


async def test_undoing_that_hangs_ends_the_connection(database: Database, proxy: Proxy) -> None:
    """A server that does not answer holds nobody up for long, and the connection is not used again."""
    primary = {"url": proxy.url(database.url()), **ONE}
    async with quiet(database.settings(replica=False, primary=primary)) as service:
        async with service.databases.writing() as session:
            await session.execute(text("SET app.tenant = 'a'"))
            driver = await driver_of(session)
            await session.commit()
            proxy.fates["RESET ALL"] = "hang"
            await driver.reset(timeout=0.05)
            assert driver.is_closed()
        proxy.fates.clear()
        proxy.resume()

        async with service.databases.writing() as session:
            assert (await session.execute(TENANT)).scalar_one() is None


async def test_undoing_that_is_cancelled_ends_the_connection(database: Database, proxy: Proxy) -> None:
    """A request that is cancelled meanwhile leaves no connection of which nobody knows what it is."""
    primary = {"url": proxy.url(database.url()), **ONE}
    async with quiet(database.settings(replica=False, primary=primary)) as service:
        async with service.databases.writing() as session:
            await session.execute(text("SET app.tenant = 'a'"))
            driver = await driver_of(session)
            await session.commit()
            proxy.fates["RESET ALL"] = "hang"
            undoing = asyncio.ensure_future(driver.reset())
            await asyncio.sleep(0)
            undoing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await undoing
            assert driver.is_closed()
        proxy.fates.clear()
        proxy.resume()


async def test_copy_under_way_is_not_given_back(lonely: Service) -> None:
    """A COPY that somebody left running ends with its connection, and the next one has another."""
    started = asyncio.Event()

    async def records() -> Any:
        yield b"1\n"
        started.set()
        await asyncio.Event().wait()

    async def leave_it() -> None:
        async with lonely.databases.writing() as session:
            driver = await driver_of(session)
            await session.execute(text("CREATE TEMPORARY TABLE scratch (a int)"))
            copying.append(asyncio.ensure_future(driver.copy_to_table("scratch", source=records())))
            await started.wait()

    copying: list[asyncio.Future[Any]] = []
    # Whoever commits beside it has a bug, and no outage.
    with pytest.raises(InterfaceError, match="another operation is in progress"):
        await leave_it()
    copying[0].cancel()
    await asyncio.gather(*copying, return_exceptions=True)

    async with lonely.databases.writing() as session:
        assert (await session.execute(text("SELECT 1"))).scalar_one() == 1
