"""What a URL says about TLS is what happens, for everything that connects: service, listener, jobs and commands."""

import asyncio
from asyncio.trsock import TransportSocket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from app.settings import Settings
from pglifeguard.connector import Connector
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.environment import SettingsError
from pglifeguard.errors import DatabaseUnreachable
from pglifeguard.tls import EXPOSED
from tests.app.test_cli import MODULE, run, served
from tests.chaos import pooler
from tests.chaos.pooler import pooling
from tests.conftest import Database
from tests.interpreter import python
from tests.pglifeguard.conftest import service_settings
from tests.service import ADA, serving
from tests.tls import NAME, Authority, Certificate, Tls, program

pytestmark = pytest.mark.skipif(program() is None, reason="openssl is not installed: apt-get install openssl")
needs_pgbouncer = pytest.mark.skipif(
    pooler.program() is None, reason="PgBouncer is not installed: apt-get install pgbouncer"
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Give an authority that nobody knows."""
    return Authority(tmp_path_factory.mktemp("tls") / "one")


@pytest.fixture(scope="module")
def certificate(authority: Authority) -> Certificate:
    """Give a certificate of that authority for NAME."""
    return authority.issue(NAME)


@pytest.fixture
async def encrypted(database: Database, certificate: Certificate) -> AsyncIterator[Tls]:
    """Give TLS in front of the primary."""
    async with Tls(database.cluster.primary.port, certificate) as running:
        yield running


def through(database: Database, to: Tls, parameters: str, *, host: str = NAME, role: str = "app_rw") -> str:
    """Return the way to the database through TLS."""
    password = database.cluster.passwords[role]
    return f"postgresql://{role}:{password}@{host}:{to.port}/{database.name}?{parameters}"


async def connects(url: str) -> None:
    """Open a connection as the service does, use it and close it."""
    connector = Connector(DatabaseSettings(url=url, connect_timeout_seconds=5), writable=True)
    connection = await connector.open(asyncio.get_running_loop().time() + 5)
    assert await connection.fetchval("SELECT current_user") == "app_rw"
    await connection.close()


async def test_authorities_of_the_system_are_believed(
    database: Database, encrypted: Tls, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sslrootcert=system` believes whom OpenSSL believes here, and nobody else; a new list counts at once."""
    url = through(database, encrypted, "sslmode=verify-full&sslrootcert=system")

    with pytest.raises(DatabaseUnreachable, match="an authority that is not believed"):
        await connects(url)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    await connects(url)


async def test_everything_that_connects_verifies(
    database: Database, encrypted: Tls, authority: Authority, certificate: Certificate
) -> None:
    """Pools, monitors, replica, analytics and listener, then migrations and doctor: each connection is encrypted."""
    verified = f"sslmode=verify-full&sslrootcert={authority.certificate}"
    url = through(database, encrypted, verified)
    owner = through(database, encrypted, verified, role="app_owner")
    async with Tls(database.cluster.replica.port, certificate) as replica:
        read = through(database, replica, verified, role="app_ro")
        one = {"pool_size": 1, "pool_min_size": 1, "max_overflow": 0}
        writing, reading = {"url": url} | one, {"url": read} | one
        pools: dict[str, Any] = {"primary": writing, "replicas": (reading,), "analytics": reading}
        settings = database.settings(**pools, listen_url=url)
        async with serving(settings) as service, service.databases.listen("news") as news:
            assert await anext(news) is None
            async with service.databases.writing() as session:
                await session.execute(text("SELECT pg_notify('news', 'encrypted')"))
            assert await anext(news) == "encrypted"
            path = (await service.client.post("/patients", json=ADA)).headers["location"]
            assert (await service.client.get(path)).status_code == 200
            latest = service.databases.primary.connector.latest
            described = (await service.client.get("/health/db")).json()["databases"].values()
        migrated = await python("-m", "migrations", environment={"MIGRATIONS_URL": owner, "DATABASE_REPLICA_URL": read})
        examined = await run("doctor", DATABASE_URL=url, DATABASE_REPLICA_URL=read)

    assert migrated[0] == 0, migrated[1]
    assert examined.exit_code == 1, examined.output  # No fsync.
    assert examined.output.count("TLSv1.3, name verified") == 3
    assert latest is not None
    assert str(latest.encryption) == "TLSv1.3, name verified"
    assert {(each["tls"], each["tls_verified"], each["hop"]) for each in described} == {("TLSv1.3", "name", "server")}
    # A pool, a monitor, the listener, the job and the doctor; two pools, two monitors, the job, and the doctor twice.
    assert (encrypted.encrypted, replica.encrypted) == (encrypted.connections, replica.connections)
    assert encrypted.encrypted >= 5
    assert replica.encrypted >= 6


async def test_certificate_that_fails_is_named_to_everybody(
    database: Database, encrypted: Tls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets 503 database_unreachable, the log, the migrations and the doctor say TLS and why."""
    another = Authority(tmp_path / "another")
    verified = f"sslmode=verify-full&sslrootcert={another.certificate}"
    url = through(database, encrypted, verified)
    reason = f"TLS with {NAME}:{encrypted.port}: the server's certificate is signed by an authority that is not"
    settings = database.settings(replica=False, primary={"url": url}, analytics={"url": url}, listen_url=url)
    async with serving(settings, settled=False) as service:
        answer = await service.client.get("/patients")
        health = (await service.client.get("/health/db")).json()
        with pytest.raises(DatabaseUnreachable, match=reason):
            async with service.databases.listen("news"):
                raise AssertionError("it listens")
    migrated = await python(
        "-m", "migrations", environment={"MIGRATIONS_URL": through(database, encrypted, verified, role="app_owner")}
    )
    examined = await run("doctor", DATABASE_URL=url)

    assert (answer.status_code, answer.json()["code"]) == (503, "database_unreachable")
    said = {str(vars(record).get("reason")) for record in caplog.records if record.msg.startswith("database ")}
    assert said
    assert all(reason in line for line in said)
    assert reason in health["databases"]["primary"]["error"]
    assert migrated[0] != 0
    assert reason in migrated[1]
    assert examined.exit_code == 2
    assert "TLS with" in examined.output
    assert encrypted.encrypted == 0


def copied(source: Path, directory: Path) -> Path:
    """Copy a file to where PgBouncer's account can read it."""
    copy = directory / source.name
    copy.write_bytes(source.read_bytes())
    copy.chmod(0o644)
    return copy


@needs_pgbouncer
async def test_console_and_clients_of_pgbouncer_verify(
    database: Database, authority: Authority, certificate: Certificate, open_directory: Path, tmp_path: Path
) -> None:
    """Through PgBouncer with TLS the service works and its console takes RECONNECT; another authority is refused."""
    shown = {
        "client_tls_sslmode": "require",
        "client_tls_cert_file": copied(certificate.certificate, open_directory),
        "client_tls_key_file": copied(certificate.key, open_directory),
    }
    another = Authority(tmp_path / "another")

    async with pooling(database.cluster, open_directory, size=2, more=shown) as port:

        def pooled(believed: Authority, role: str, name: str) -> str:
            url = make_url(database.url(role)).set(host=NAME, port=port, database=name)
            query = {"sslmode": "verify-full", "sslrootcert": str(believed.certificate)}
            return url.set(query=query).render_as_string(hide_password=False)

        url = pooled(authority, "app_rw", database.name)
        one = {"url": url, "statement_cache_size": pooler.statement_cache_size()}
        async with serving(database.settings(replica=False, primary=one, analytics=one)) as service:
            assert (await service.client.get("/patients")).status_code == 200
            primary = (await service.client.get("/health/db")).json()["databases"]["primary"]
        job = {"MIGRATIONS_URL": database.url("app_owner")}
        believed, refused = [
            await python(
                "-m", "migrations",
                environment={**job, "PGBOUNCER_ADMIN_URL": pooled(known, "app_owner", "pgbouncer")},
            )
            for known in (authority, another)
        ]  # fmt: skip

    assert (primary["tls"], primary["tls_verified"], primary["hop"]) == ("TLSv1.3", "name", "pooler")
    assert believed[0] == 0, believed[1]
    assert refused[0] != 0
    assert f"TLS with {NAME}:{port}: the server's certificate is signed by an authority" in refused[1]


async def test_host_with_a_bad_certificate_is_passed_over(
    database: Database, encrypted: Tls, authority: Authority
) -> None:
    """Of several hosts the one whose certificate holds is used; when none holds, each is named with its reason."""
    expired = authority.issue(NAME, file="expired", days=-1)
    verified = f"sslmode=verify-full&sslrootcert={authority.certificate}"
    account = f"app_rw:{database.cluster.passwords['app_rw']}"
    async with Tls(database.cluster.primary.port, expired) as bad:
        await connects(f"postgresql://{account}@{NAME}:{bad.port},{NAME}:{encrypted.port}/{database.name}?{verified}")
        with pytest.raises(DatabaseUnreachable) as refused:
            await connects(
                f"postgresql://{account}@{NAME}:{bad.port},127.0.0.1:{encrypted.port}/{database.name}?{verified}"
            )

    assert f"TLS with {NAME}:{bad.port}: the server's certificate has expired" in str(refused.value)
    assert f"127.0.0.1:{encrypted.port}: the server's certificate is not valid for '127.0.0.1'" in str(refused.value)


async def test_direct_tls_needs_no_question(database: Database, authority: Authority, certificate: Certificate) -> None:
    """`sslnegotiation=direct` begins with TLS, which any proxy understands; its certificate is verified as well."""
    direct = f"sslmode=verify-full&sslnegotiation=direct&sslrootcert={authority.certificate}"
    async with Tls(database.cluster.primary.port, certificate, direct=True) as running:
        await connects(through(database, running, direct))
        with pytest.raises(DatabaseUnreachable, match=r"not valid for '127\.0\.0\.1'"):
            await connects(through(database, running, direct, host="127.0.0.1"))

    assert running.connections == 1


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ("sslrootcert={none}", "names {none} as sslrootcert, which is not there or cannot be read"),
        ("sslrootcert={text}", "names {text} as sslrootcert, in which there is nothing of that kind"),
        ("sslcert={crt}&sslkey={other}", "names {other} as sslkey, which is not the key of {crt}"),
        ("sslcert={closed}&sslkey={closed_key}", "the key has a password and sslpassword does not say it"),
        ("sslcert={closed}&sslkey={closed_key}&sslpassword=hunter2", "which cannot be opened"),
    ],
)
def test_files_are_opened_at_the_start(
    authority: Authority, certificate: Certificate, tmp_path: Path, parameters: str, sentence: str
) -> None:
    """A file that is missing, of another kind or locked ends the start with a sentence that repeats no password."""
    closed = authority.issue("closed", password="correct")
    files = {
        "none": tmp_path / "none",
        "text": tmp_path / "text",
        "crt": certificate.certificate,
        "other": authority.issue("other").key,
        "closed": closed.certificate,
        "closed_key": closed.key,
    }
    files["text"].write_text("no certificate", encoding="utf-8")

    with pytest.raises(SettingsError) as error:
        service_settings(f"postgresql://u:hunter2@db/x?sslmode=require&{parameters.format(**files)}")

    assert sentence.format(**files) in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every peer seem to be on another machine, of a private network."""
    monkeypatch.setattr(TransportSocket, "getpeername", lambda _: ("10.1.2.3", 5432))


async def warned(settings: Settings, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Start a service that listens too, and list the databases that the log warns about."""
    async with serving(settings) as service, service.databases.listen("news"):
        await service.databases.primary.pool.warm_up()
    return sorted(vars(record)["database"] for record in caplog.records if record.msg == EXPOSED)


@pytest.mark.usefixtures("far_away")
async def test_production_warns_of_what_others_can_read(
    database: Database, encrypted: Tls, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """Without TLS, each database and the listener are named once; in development, and with TLS, there is no word."""
    production: dict[str, Any] = {"environment": "production", "auth_secret": "0123456789abcdef0123456789abcdef"}
    secret = through(database, encrypted, f"sslmode=verify-full&sslrootcert={authority.certificate}")
    safe: dict[str, Any] = {
        "primary": {"url": secret},
        "analytics": {"url": secret},
        "replica": False,
        "listen_url": secret,
    }

    assert not await warned(database.settings(listen_url=database.url()), caplog)
    assert not await warned(database.settings(**production, **safe), caplog)
    open_to_all = database.settings(**production, listen_url=database.url(), pool_min_size=2)
    assert await warned(open_to_all, caplog) == ["analytics", "listener", "primary", "replica"]


async def test_loopback_needs_no_warning(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """What stays on the machine is not encrypted, and nobody else can read it."""
    assert not await warned(database.settings(warn_unencrypted=True, listen_url=database.url()), caplog)


async def test_service_serves_https(
    database: Database, authority: Authority, certificate: Certificate, tmp_path: Path
) -> None:
    """With TLS_CERTIFICATE and TLS_KEY the service itself answers by HTTPS, and by nothing else."""
    environment = {
        "DATABASE_URL": database.url(),
        "TLS_CERTIFICATE": str(certificate.certificate),
        "TLS_KEY": str(certificate.key),
    }
    assert database.settings(tls_certificate=certificate.certificate, tls_key=certificate.key).tls_key is not None
    believed = authority.believed()
    async with served(tmp_path, environment, *MODULE, verify=believed) as server:
        answer = await server.client.get("/patients")
        async with httpx.AsyncClient() as plain:
            with pytest.raises(httpx.RemoteProtocolError):
                await plain.get(server.url.replace("https://", "http://"))

    assert answer.status_code == 200
