"""What a URL says about TLS is what happens, for the service, for `doctor` and for migrations."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pglifeguard import database_url
from pglifeguard.connector import Connector
from pglifeguard.errors import DatabaseUnreachable
from pglifeguard.settings import DatabaseSettings
from tests import tls
from tests.app.test_cli import run
from tests.conftest import Database
from tests.test_migrations import python

pytestmark = pytest.mark.skipif(tls.program() is None, reason="openssl is not installed: apt-get install openssl")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the certificate of an authority that nobody knows."""
    return tls.make_authority(tmp_path_factory.mktemp("tls") / "one")


@pytest.fixture
async def encrypted(database: Database, authority: Path) -> AsyncIterator[tls.Tls]:
    """Give TLS in front of the primary."""
    async with tls.Tls(database.cluster.primary.port, authority) as running:
        yield running


def through(database: Database, to: tls.Tls, parameters: str, *, host: str = tls.NAME, role: str = "app_rw") -> str:
    """Return the way to the database through TLS."""
    password = database.cluster.passwords[role]
    return f"postgresql://{role}:{password}@{host}:{to.port}/{database.name}?{parameters}"


async def connects(url: str) -> None:
    """Open a connection as the service does, use it and close it."""
    connector = Connector(DatabaseSettings(url=url, connect_timeout_seconds=5), writable=True)
    connection = await connector.open(asyncio.get_running_loop().time() + 5)
    assert await connection.fetchval("SELECT current_user") == "app_rw"
    await connection.close()


@pytest.mark.parametrize(
    "parameters", ["", "sslmode=prefer", "sslmode=require", "sslmode=verify-ca&{ca}", "sslmode=verify-full&{ca}"]
)
async def test_certificate_is_believed(
    database: Database, encrypted: tls.Tls, authority: Path, parameters: str
) -> None:
    """Each mode is encrypted where the server can, and those that verify know the authority."""
    await connects(through(database, encrypted, parameters.format(ca=f"sslrootcert={authority}")))

    assert encrypted.encrypted == 1


async def test_disabled_is_not_encrypted(database: Database, encrypted: tls.Tls) -> None:
    """`sslmode=disable` does not ask for TLS."""
    await connects(through(database, encrypted, "sslmode=disable"))

    assert encrypted.encrypted == 0


async def test_certificate_for_another_name_is_refused(database: Database, encrypted: tls.Tls, authority: Path) -> None:
    """`verify-full` looks at the name, and `verify-ca` at the authority alone."""
    by_address = through(database, encrypted, f"sslrootcert={authority}", host="127.0.0.1")

    await connects(f"{by_address}&sslmode=verify-ca")
    with pytest.raises(DatabaseUnreachable, match=r"not valid for '127\.0\.0\.1'"):
        await connects(f"{by_address}&sslmode=verify-full")


async def test_certificate_of_another_authority_is_refused(
    database: Database, encrypted: tls.Tls, tmp_path: Path
) -> None:
    """Only the authority that the URL names is believed, with `require` too, as libpq has it."""
    another = tls.make_authority(tmp_path / "another")

    for mode in ("require", "verify-ca", "verify-full"):
        with pytest.raises(DatabaseUnreachable, match="certificate verify failed"):
            await connects(through(database, encrypted, f"sslmode={mode}&sslrootcert={another}"))


async def test_authorities_of_the_system_are_believed(
    database: Database, encrypted: tls.Tls, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sslrootcert=system` believes whom OpenSSL believes here, and nobody else."""
    url = through(database, encrypted, "sslmode=verify-full&sslrootcert=system")
    database_url._system_context.cache_clear()

    with pytest.raises(DatabaseUnreachable, match="certificate verify failed"):
        await connects(url)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    database_url._system_context.cache_clear()
    await connects(url)
    database_url._system_context.cache_clear()


async def test_migrations_and_doctor_verify_too(database: Database, encrypted: tls.Tls, authority: Path) -> None:
    """The job and the operator's command go the same way as the service."""
    parameters = f"sslmode=verify-full&sslrootcert={authority}"
    owner = through(database, encrypted, parameters, role="app_owner")

    migrated = await python("-m", "migrations", environment={"MIGRATIONS_URL": owner})
    examined = await run("doctor", DATABASE_URL=through(database, encrypted, parameters))

    assert migrated[0] == 0, migrated[1]
    assert examined.exit_code == 0, examined.output
    assert encrypted.encrypted == 3, "one for the job, and one each for primary and analytics"
