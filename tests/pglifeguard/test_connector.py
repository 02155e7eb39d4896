"""One connection is opened at the first of several hosts that will do, in time, and its kernel watches over it."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pglifeguard.connector import Connector, KeptAliveConnection
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.database_url import Host
from pglifeguard.errors import DatabaseUnreachable
from pglifeguard.fence import Fence
from pglifeguard.testing.proxy import Proxy, _Link
from tests.conftest import Database, Execute
from tests.pglifeguard.conftest import sessions_end
from tests.stopwatch import Stopwatch


def connector(url: str, *, writable: bool = True, **settings: Any) -> Connector:
    """Return a connector to `url`."""
    return Connector(DatabaseSettings(url=url, **settings), writable=writable)


def several(database: Database, *ports: int) -> str:
    """Return the URL of one database at several ports."""
    hosts = "&".join(f"host=127.0.0.1:{port}" for port in ports)
    credentials = database.url().removeprefix("postgresql://").partition("@")[0]
    return f"postgresql://{credentials}@/{database.name}?{hosts}"


@asynccontextmanager
async def opened(to: Connector, seconds: float = 5) -> AsyncIterator[KeptAliveConnection]:
    """Open a connection and close it again."""
    connection = await to.open(asyncio.get_running_loop().time() + seconds)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("rest", "hosts"),
    [
        ("db.example:6432/x", [Host("db.example", 6432)]),
        ("db.example/x", [Host("db.example", 5432)]),
        ("a:1,b/x", [Host("a", 1), Host("b", 5432)]),
        ("[::1]:6432,[::2]/x", [Host("::1", 6432), Host("::2", 5432)]),
        ("%2Fvar%2Frun%2Fpostgresql/x", [Host("/var/run/postgresql", 5432)]),
        (":6432/x?host=/run/postgresql", [Host("/run/postgresql", 6432)]),
        ("/x?host=a:1&host=b:2", [Host("a", 1), Host("b", 2)]),
        ("/x?host=a:1,b:2", [Host("a", 1), Host("b", 2)]),
        ("/x?host=a&host=b", [Host("a", 5432), Host("b", 5432)]),
        ("/x?host=[::1]:6432", [Host("::1", 6432)]),
        ("/x?host=::1", [Host("::1", 5432)]),
        ("/x?host=a,b&port=1,2", [Host("a", 1), Host("b", 2)]),
        ("/x?host=a,b&port=1", [Host("a", 1), Host("b", 1)]),
        ("/x?hostaddr=127.0.0.1&port=1", [Host("127.0.0.1", 1)]),
        ("elsewhere:1/x?host=here", [Host("here", 1)]),
        ("/x?host=/var/run/postgresql", [Host("/var/run/postgresql", 5432)]),
    ],
)
def test_hosts_are_listed_in_the_order_of_the_url(rest: str, hosts: list[Host]) -> None:
    """Every way in which PostgreSQL's own URLs name hosts is understood."""
    assert Connector(DatabaseSettings(url=f"postgresql://a:b@{rest}"), writable=True).hosts == tuple(hosts)


async def test_kernel_keeps_the_connection_alive(database: Database) -> None:
    """The socket has keepalive and a limit for unacknowledged data, which asyncpg sets neither of."""
    async with opened(connector(database.url())) as connection:
        sock: socket.socket = connection._transport.get_extra_info("socket")

        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        values = [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, option)) for option in options]
        assert values == [30, 5, 3, 30_000]


async def test_options_that_a_system_lacks_are_left_out(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """MacOS has no TCP_USER_TIMEOUT, and is served all the same."""
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")

    async with opened(connector(database.url())) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_unix_socket_is_reached(database: Database, proxy: Proxy, tmp_path: Path) -> None:
    """A directory as host is a local socket, which needs no keepalive."""
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(lambda: _Link(proxy), tmp_path / ".s.PGSQL.5432")
    credentials = database.url().removeprefix("postgresql://").partition("@")[0]

    async with opened(connector(f"postgresql://{credentials}@/{database.name}?host={tmp_path}")) as connection:
        assert await connection.fetchval("SELECT 1") == 1
        assert str(connection.encryption) == "none, stays on this machine"
    server.close()


async def test_odd_characters_in_a_password(database: Database, execute: Execute) -> None:
    """A password reaches the server as it is, whatever a URL makes of its characters."""
    odd = "p@ss:w/o?r#d %41"
    await execute(f"CREATE ROLE odd LOGIN PASSWORD '{odd}'")
    try:
        url = database.url().partition("@")[2]
        async with opened(connector(f"postgresql://odd:{quote(odd, safe='')}@{url}")) as connection:
            assert await connection.fetchval("SELECT current_user") == "odd"
    finally:
        await execute("DROP ROLE odd")


async def test_url_says_what_else_the_session_is(database: Database) -> None:
    """Options go to the server, the name of the application is the URL's, and keepalive is set on the socket."""
    url = database.url() + (
        "?options=-c%20work_mem%3D5MB&application_name=told&keepalives_idle=77&tcp_user_timeout=9000&connect_timeout=5"
        "&sslmode=prefer&channel_binding=prefer&target_session_attrs=read-write"
    )

    async with opened(connector(url)) as connection:
        sock: socket.socket = connection._transport.get_extra_info("socket")
        assert await connection.fetchval("SELECT current_setting('work_mem')") == "5MB"
        assert await connection.fetchval("SELECT current_setting('application_name')") == "told"
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 9000


async def test_server_without_tls_is_not_talked_to_in_the_clear(database: Database) -> None:
    """`sslmode=require` against a server that has no TLS is unreachable, and never a plain connection."""
    with pytest.raises(DatabaseUnreachable, match="the server offers no TLS"):
        await connector(f"{database.url()}?sslmode=require").open(asyncio.get_running_loop().time() + 5)


async def test_password_may_be_in_a_file(database: Database, tmp_path: Path) -> None:
    """Without a password in the URL the file that it names is asked, as by every client of PostgreSQL."""
    parameters = connector(database.url()).parameters
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    passwords.write_text(f"*:*:*:app_rw:{parameters.password}\n", encoding="utf-8")

    url = f"postgresql://app_rw@{parameters.location}?passfile={passwords}"

    async with opened(connector(url)) as connection:
        assert await connection.fetchval("SELECT current_user") == "app_rw"


async def test_session_is_named_and_tuned(database: Database) -> None:
    """The application's name and the caches come from the settings."""
    to = connector(database.url(), application_name="told-apart", statement_cache_size=7, command_timeout_seconds=31)

    async with opened(to) as connection:
        assert await connection.fetchval("SELECT current_setting('application_name')") == "told-apart"
        assert connection._config.statement_cache_size == 7  # type: ignore[attr-defined]  # The stubs lack it.
        assert connection._config.command_timeout == 31  # type: ignore[attr-defined]  # The same.


async def test_refused_host_is_passed_over_and_the_good_one_remembered(
    database: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """The second host serves, it is said once, and the first is not tried again while the second is good."""
    async with Proxy(database.cluster.primary.port) as second:
        proxy.refuse()
        to = connector(several(database, proxy.port, second.port))

        async with opened(to):
            pass
        await proxy.accept()
        async with opened(to):
            pass

        assert (proxy.connections, second.connections) == (0, 2)
    changes = [record for record in caplog.records if record.message == "database host changed"]
    assert [vars(record)["host"] for record in changes] == [f"127.0.0.1:{second.port}"]


async def test_standby_is_passed_over_for_writes(database: Database) -> None:
    """Whoever writes is led past a standby; whoever reads is not."""
    cluster = database.cluster
    url = several(database, cluster.replica.port, cluster.primary.port)

    async with opened(connector(url, writable=True)) as writer, opened(connector(url, writable=False)) as reader:
        assert await writer.fetchval("SELECT pg_is_in_recovery()") is False
        assert await reader.fetchval("SELECT pg_is_in_recovery()") is True


async def test_only_a_standby_is_left_is_unreachable(database: Database) -> None:
    """Two hosts that take no writes are no primary, and no session stays at either."""
    port = database.cluster.replica.port

    with pytest.raises(DatabaseUnreachable, match="takes no writes"):
        await connector(several(database, port, port)).open(asyncio.get_running_loop().time() + 5)

    replica = await database.cluster.replica.connect()
    left = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1"
    assert await replica.fetchval(left, database.name) == 0
    await replica.close()


async def test_asking_whether_it_is_a_standby_is_bounded(
    database: Database, proxy: Proxy, stopwatch: Stopwatch
) -> None:
    """A host that lets in and then is silent is passed over in its time, and no session stays there."""
    async with Proxy(database.cluster.primary.port) as second:
        proxy.fates["pg_postmaster_start_time"] = "hang"
        to = connector(several(database, proxy.port, second.port), connect_timeout_seconds=0.3)

        started = stopwatch.seconds
        async with opened(to):
            assert stopwatch.seconds - started < 2
            assert (proxy.connections, second.connections) == (1, 1)

    assert await sessions_end(database)


async def test_deadline_that_is_over_opens_nothing(database: Database, proxy: Proxy) -> None:
    """No time is no attempt."""
    with pytest.raises(DatabaseUnreachable, match="no time was left"):
        await connector(proxy.url(database.url())).open(asyncio.get_running_loop().time())

    assert proxy.connections == 0


async def test_unreachable_says_why(database: Database, proxy: Proxy) -> None:
    """The last host's failure is in the sentence and is the cause."""
    proxy.refuse()

    with pytest.raises(DatabaseUnreachable, match="Connect call failed") as refused:
        await connector(proxy.url(database.url())).open(asyncio.get_running_loop().time() + 5)

    assert isinstance(refused.value.__cause__, ConnectionRefusedError)


@pytest.mark.parametrize(
    "function",
    ["pg_postmaster_start_time() RETURNS timestamptz", "pg_current_wal_insert_lsn() RETURNS pg_lsn"],
    ids=["identity", "timeline"],
)
async def test_server_that_fails_to_say_who_it_is_is_left(database: Database, execute: Execute, function: str) -> None:
    """A failure that is no missing feature is a failure of the login, and no session stays there."""
    await execute("CREATE SCHEMA shadow")
    await execute("GRANT USAGE ON SCHEMA shadow TO PUBLIC")
    body = "BEGIN RAISE EXCEPTION 'broken' USING ERRCODE = '58000'; END"
    await execute(f"CREATE FUNCTION shadow.{function} LANGUAGE plpgsql AS $${body}$$")
    await execute(f"ALTER DATABASE {database.name} SET search_path = shadow, pg_catalog, public")

    with pytest.raises(DatabaseUnreachable, match="broken"):
        async with opened(Connector(DatabaseSettings(url=database.url()), writable=True, fence=Fence())):
            pass
