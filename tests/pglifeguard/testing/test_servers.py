"""The databases of tests are made on servers of their own, and on those that the environment names."""

import secrets

import asyncpg
import pytest
from sqlalchemy.engine import make_url

from pglifeguard.embedded.account import EmbeddedError
from pglifeguard.embedded.databases import ask
from pglifeguard.testing import Database, DatabaseServers, servers
from pglifeguard.testing.servers import database_servers_of_this_run


async def test_role_of_the_application_is_a_plain_one(database: Database) -> None:
    """It owns its database, so that it can make tables, and what only a superuser may do fails as in production."""
    assert await database.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
    assert await database.execute("CREATE TABLE things ()") is None
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await database.execute("ALTER SYSTEM SET work_mem = '1GB'")


async def test_connection_that_make_tables_leaves_is_told(
    database: Database, database_servers: DatabaseServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once and at once: PostgreSQL would wait for five seconds in each test, and not know who it is."""
    monkeypatch.setattr(servers, "LEAVE_SECONDS", 0.1)
    connection = await asyncpg.connect(database.url)

    with pytest.raises(EmbeddedError, match="close the connections that make_tables opens"):
        await database_servers.wait_left(database.name)

    await connection.close()
    await database_servers.wait_left(database.name)


async def test_replica_that_falls_behind_is_told(
    database: Database, database_servers: DatabaseServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the position that it has reached, and the one that it has not."""
    superuser = make_url(database_servers.maintenance)
    assert database.replica_url is not None
    replica = superuser.set(port=make_url(database.replica_url).port).render_as_string(hide_password=False)
    await ask(replica, "SELECT pg_wal_replay_pause()")
    monkeypatch.setattr(servers, "REPLAY_SECONDS", 0.1)

    try:
        with pytest.raises(TimeoutError, match=r"has replayed 0/\w+, not yet 0/\w+"):
            await database.execute("INSERT INTO books (title) VALUES ('Notes')")
    finally:
        await ask(replica, "SELECT pg_wal_replay_resume()")


@pytest.mark.parametrize("replica", [True, False])
async def test_servers_that_are_there_are_used(
    database_servers: DatabaseServers, monkeypatch: pytest.MonkeyPatch, *, replica: bool
) -> None:
    """By a role that may make databases; URLs may name a driver, as SQLAlchemy's do."""
    name, password = f"tester_{replica:d}", secrets.token_hex()
    await ask(database_servers.maintenance, f"CREATE ROLE {name} LOGIN CREATEDB PASSWORD '{password}'")
    await database_servers.wait_replayed()
    primary, other = (
        make_url(url).set(drivername="postgresql+asyncpg", username=name, password=password)
        for url in (database_servers.primary, database_servers.replica or "")
    )
    monkeypatch.setenv(servers.PRIMARY, primary.render_as_string(hide_password=False))
    if replica:
        monkeypatch.setenv(servers.REPLICA, other.render_as_string(hide_password=False))

    async with database_servers_of_this_run() as there, there.network() as network:
        await there.create(f"of_{name}")
        database = Database(f"of_{name}", there, network)
        found = await ask(database.url, "SELECT current_user || ' ' || current_database()")
        await there.drop(f"of_{name}")

    assert found == f"{name} of_{name}"
    assert (database.replica_url is not None, "DATABASE_REPLICA_URL" in database.variables) == (replica, replica)
    assert (network.replica is not network.primary) == replica
    assert make_url(database.url).port == network.primary.port
