"""What providers' servers do otherwise than PostgreSQL, done to real servers; docs/providers.md says what was tried."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from local.cluster import Cluster
from pglifeguard.connector import Connector
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.embedded.postgres import HOST
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import DatabaseUnreachable
from tests import tls
from tests.app.test_cli import run
from tests.conftest import Database
from tests.interpreter import python
from tests.pglifeguard.test_servers import SHADOW
from tests.service import ADA, serving
from tests.standbys import REPLAYS, balancing, second_standby

# What Aurora answers with 0A000, and what a server has that is PostgreSQL by its protocol alone (42883).
OF_THE_LOG = {
    "pg_current_wal_insert_lsn()": "pg_lsn",
    "pg_last_wal_replay_lsn()": "pg_lsn",
    "pg_last_xact_replay_timestamp()": "timestamptz",
    "pg_walfile_name(pg_lsn)": "text",
}


async def answers(url: str) -> str:
    """Open a connection as the service does, and return who it is."""
    connector = Connector(DatabaseSettings(url=url, connect_timeout_seconds=5), writable=True)
    try:
        connection = await connector.open(asyncio.get_running_loop().time() + 5)
        who = await connection.fetchval("SELECT current_user")
        await connection.close()
    finally:
        await connector.close()
    return str(who)


@pytest.fixture(params=["0A000", "42883"], ids=["Aurora", "another server"])
async def without_log(request: pytest.FixtureRequest, database: Database) -> Database:
    """Give a database whose primary and replica tell nothing of their write-ahead log."""
    owner = await database.cluster.primary.connect(database.name)
    for number, (name, returns) in enumerate(OF_THE_LOG.items()):
        made = SHADOW.format(name=name, returns=returns, state=request.param, database=database.name)
        await owner.execute(made if number == 0 else made.replace("CREATE SCHEMA shadow;", ""))
    await owner.close()
    await database.cluster.wait_replayed()
    return database


async def test_aurora_as_the_page_has_it(without_log: Database) -> None:
    """Writer and reader endpoint: reads and writes on the first, reports on the second, and no token."""
    settings = without_log.settings(replica=False, analytics={"url": without_log.replica_url(), "pool_min_size": 0})
    async with serving(settings) as service:
        stored = await service.client.post("/patients", json=ADA)
        read = await service.client.get(stored.headers["location"])
        report = await service.client.get("/reports/summary")
        described = (await service.client.get("/health/db")).json()
        ready = await service.client.get("/health/ready")

    assert [answer.status_code for answer in (stored, read, report, ready)] == [201, 200, 200, 200]
    assert "x-consistency-token" not in stored.headers
    assert described["status"] == "healthy"


async def test_aurora_serves_no_read_of_which_it_cannot_tell_how_old_it_is(without_log: Database) -> None:
    """The reader endpoint as a replica: its state says why, and the writer serves."""
    async with serving(without_log.settings(), settled=False) as service:

        async def judged() -> bool:
            return service.databases.router.replicas[0].state == "unmeasured"

        assert await eventually(judged, 10)
        for turn in range(5):
            path = (await service.client.post("/patients", json=ADA | {"mrn": f"M-{turn}"})).headers["location"]
            assert (await service.client.get(path)).status_code == 200
        assert service.sample("db_reads_routed_total", target="primary", reason="unmeasured") >= 5


async def test_doctor_and_migrations_do_without_the_log_too(without_log: Database) -> None:
    """Neither is an error: they do not need to know how far a server is."""
    examined = await run("doctor", DATABASE_URL=without_log.url())
    migrated = await python("-m", "migrations", environment={"MIGRATIONS_URL": without_log.url("app_owner")})

    assert examined.exit_code in {0, 1}, examined.output  # 1 for findings.
    assert "Traceback" not in examined.output
    assert migrated[0] == 0, migrated[1]


async def test_ro_service_reads_from_each_standby(database: Database, breakable_cluster: Cluster) -> None:
    """One name for two standbys, as CloudNativePG's -ro has it: both are read, and one that ends costs no answer."""
    async with (
        second_standby(breakable_cluster) as other,
        balancing(breakable_cluster.replica.port, other.port) as name,
    ):
        url = f"{name.url(database.replica_url())}?target_session_attrs=standby"
        replica = {"url": url, "pool_min_size": 4, "application_name": "ro"}
        async with serving(database.settings(replicas=(replica,))) as service:
            path = (await service.client.post("/patients", json=ADA)).headers["location"]
            counted = [
                await _sessions(server_url)
                for server_url in (_at(database, breakable_cluster.replica.port), _at(database, other.port))
            ]
            token_reads = [await service.client.get(path) for _ in range(10)]
            await other.kill()
            later = [await service.client.get(path) for _ in range(10)]

    assert all(count >= 1 for count in counted), counted
    assert {answer.status_code for answer in (*token_reads, *later)} == {200}


def _at(database: Database, port: int) -> str:
    return make_url(database.url("postgres")).set(host=HOST, port=port).render_as_string(hide_password=False)


async def _sessions(url: str) -> int:
    connector = Connector(DatabaseSettings(url=url, connect_timeout_seconds=5), writable=False)
    connection = await connector.open(asyncio.get_running_loop().time() + 5)
    try:
        assert await connection.fetchval(REPLAYS)
        return int(await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ro'"))
    finally:
        await connection.close()
        await connector.close()


@pytest.fixture
async def cloud_sql(database: Database) -> AsyncIterator[Path]:
    """Give a socket as Cloud SQL mounts it, whose directory has the instance's name with its colons."""
    passing: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(HOST, database.cluster.primary.port)
        ways = (_pass_on(reader, back), _pass_on(there, writer))
        passing.update(asyncio.create_task(way) for way in ways)

    # A socket's path takes 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="lg") as short:
        directory = Path(short) / "project:europe-west1:orders"
        directory.mkdir()
        server = await asyncio.start_unix_server(accept, directory / ".s.PGSQL.5433")
        yield directory
        server.close()
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def test_cloud_sql_is_reached_by_its_socket(database: Database, cloud_sql: Path) -> None:
    """The colons in the directory's name are no port."""
    password = database.cluster.passwords["app_rw"]

    assert await answers(f"postgresql://app_rw:{password}@/{database.name}?host={cloud_sql}&port=5433") == "app_rw"


@pytest.mark.skipif(tls.program() is None, reason="openssl is not installed: apt-get install openssl")
async def test_channel_binding_is_met_by_verification(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neon's URL connects to a server of a public authority, and to nobody who stands in between."""
    authority = tls.Authority(tmp_path / "public")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    demand = "sslmode=require&channel_binding=require"

    async def through(certificate: tls.Certificate) -> str:
        async with tls.Tls(database.cluster.primary.port, certificate) as server:
            password = database.cluster.passwords["app_rw"]
            return await answers(f"postgresql://app_rw:{password}@{tls.NAME}:{server.port}/{database.name}?{demand}")

    assert await through(authority.issue(tls.NAME)) == "app_rw"
    with pytest.raises(DatabaseUnreachable, match="an authority that is not believed: sslrootcert has to name"):
        await through(tls.Authority(tmp_path / "another").issue(tls.NAME))


async def test_hosts_drawn_by_lot_are_all_found(database: Database) -> None:
    """With `load_balance_hosts=random` the primary is found wherever it stands in the list."""
    here, there = database.cluster.primary.port, database.cluster.replica.port
    password = database.cluster.passwords["app_rw"]
    hosts = f"{HOST}:{there},{HOST}:{here}"
    url = f"postgresql://app_rw:{password}@{hosts}/{database.name}?load_balance_hosts=random"

    connectors = [Connector(DatabaseSettings(url=url), writable=True) for _ in range(20)]

    assert {connector.hosts[0].port for connector in connectors} == {here, there}
    assert await answers(url) == "app_rw"


async def test_service_file_leads_to_the_server(database: Database, tmp_path: Path) -> None:
    """A URL that is nothing but the name of a service."""
    password = database.cluster.passwords["app_rw"]
    lines = f"host={HOST}\nport={database.cluster.primary.port}\nuser=app_rw\npassword={password}"
    (tmp_path / "services").write_text(f"[orders]\n{lines}\ndbname={database.name}\n", encoding="utf-8")

    assert await answers(f"postgresql:///?service=orders&servicefile={tmp_path}/services") == "app_rw"


async def test_prismas_and_jdbcs_words_are_kept(database: Database) -> None:
    """The search path reaches the server, and the pool is as large as the other client's."""
    url = f"{database.url()}?schema=pg_catalog&connection_limit=1&ApplicationName=told"
    settings = DatabaseSettings(url=url, connect_timeout_seconds=5)
    connector = Connector(settings, writable=True)
    connection = await connector.open(asyncio.get_running_loop().time() + 5)

    said = await connection.fetchrow("SELECT current_setting('search_path') p, current_setting('application_name') n")

    await connection.close()
    await connector.close()
    assert said is not None
    assert tuple(said) == ("pg_catalog", "told")
    assert settings.capacity == 1
