"""On PostgreSQL with TLS of its own: each sslmode does what libpq's does, and each failure has a name."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import psycopg
import pytest

from pglifeguard.connector import Connector, KeptAliveConnection
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.errors import DatabaseUnreachable
from tests import tls_server
from tests.tls import NAME, Authority, Certificate, Fate, Tls, program
from tests.tls_server import DIRECT, MISSING, TlsServer

pytestmark = [
    pytest.mark.skipif(program() is None, reason="openssl is not installed: apt-get install openssl"),
    pytest.mark.skipif(tls_server.programs() is None, reason=MISSING),
]
MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
ENCRYPTED = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"


@dataclass(frozen=True)
class Kit:
    """A server with TLS, its authority, and another one."""

    server: TlsServer
    authority: Authority
    another: Authority
    certificate: Certificate

    def verified(self, mode: str = "verify-full") -> str:
        """Return what a URL says to verify the server."""
        return f"sslmode={mode}&sslrootcert={self.authority.certificate}"


@pytest.fixture(scope="module")
async def kit(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Kit]:
    """Give the server that the tests of this module share; each leaves it with its first certificate."""
    directory = tmp_path_factory.mktemp("tls")
    authority, another = Authority(directory / "one"), Authority(directory / "another")
    certificate = authority.issue(NAME)
    async with tls_server.running(authority, certificate) as server:
        yield Kit(server, authority, another, certificate)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep ~/.postgresql out of the tests: both drivers look there."""
    monkeypatch.setenv("HOME", str(tmp_path))


@asynccontextmanager
async def shown(kit: Kit, certificate: Certificate) -> AsyncIterator[None]:
    """Let the server show another certificate for a while."""
    await kit.server.present(certificate)
    try:
        yield
    finally:
        await kit.server.present(kit.certificate)


async def opened(url: str) -> KeptAliveConnection:
    """Open a connection as the service does; the caller closes it."""
    connector = Connector(DatabaseSettings(url=url, connect_timeout_seconds=5), writable=True)
    return await connector.open(asyncio.get_running_loop().time() + 5)


async def reason(url: str) -> str:
    """Return why a connection cannot be opened."""
    with pytest.raises(DatabaseUnreachable) as refused:
        await opened(url)
    return str(refused.value)


async def ours(url: str) -> str:
    """Tell how the service's connection comes about: "P" plain, "E" encrypted, "-" not at all."""
    try:
        connection = await opened(url)
    except DatabaseUnreachable:
        return "-"
    try:
        return "P" if connection.encryption.version is None else "E"
    finally:
        connection.terminate()


def libpqs(url: str) -> str:
    """Tell the same of libpq's."""
    try:
        with psycopg.connect(url, connect_timeout=5) as connection:
            return "E" if connection.pgconn.ssl_in_use else "P"
    except psycopg.OperationalError:
        return "-"


@pytest.mark.parametrize(
    ("situation", "outcomes"),
    [
        ("the right certificate", "PPEEEE"),
        ("another name", "PPEEE-"),
        ("another authority", "PPEE--"),
        ("expired", "PPEE--"),
        ("takes TLS only", "-EEEEE"),
        ("takes no TLS", "PPP---"),
        ("proxy: end", "PPEEEE"),
        ("proxy: strip", "PPP---"),
        ("proxy: cut", "PP----"),
        ("proxy: error", "PP----"),
    ],
)
async def test_each_mode_does_what_libpqs_does(kit: Kit, situation: str, outcomes: str) -> None:
    """The six modes against a server or a proxy: encrypted, plain or refused, as psql would be."""
    role = {"takes TLS only": "only_tls", "takes no TLS": "only_plain"}.get(situation, "app_rw")
    host = "127.0.0.1" if situation == "another name" else NAME
    believed = kit.another if situation == "another authority" else kit.authority
    url = kit.server.url(role=role, host=host)
    async with AsyncExitStack() as stack:
        if situation.startswith("proxy: "):
            proxy = await stack.enter_async_context(Tls(kit.server.port, kit.certificate))
            proxy.fate = cast("Fate", situation.removeprefix("proxy: "))
            url = url.replace(f":{kit.server.port}/", f":{proxy.port}/")
        if situation == "expired":
            await stack.enter_async_context(shown(kit, kit.authority.issue(NAME, file="expired", days=-1)))
        urls = [
            f"{url}sslmode={mode}" + (f"&sslrootcert={believed.certificate}" if "verify" in mode else "")
            for mode in MODES
        ]
        of_libpq = await asyncio.to_thread(lambda: "".join(map(libpqs, urls)))
        of_the_service = "".join([await ours(url) for url in urls])

    assert of_the_service == outcomes
    assert of_libpq == outcomes


async def test_connection_says_what_the_server_says(kit: Kit) -> None:
    """Version and encryption are those of pg_stat_ssl; what was verified is what the URL asks for."""
    found = {}
    for mode in ("disable", "require", "verify-ca", "verify-full"):
        connection = await opened(kit.server.url(kit.verified(mode) if "verify" in mode else f"sslmode={mode}"))
        version = await connection.fetchval("SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        assert version == connection.encryption.version
        assert await connection.fetchval(ENCRYPTED) == (version is not None)
        found[mode] = connection.encryption.verified
        ends = connection.encryption.certificate_ends
        in_words = str(connection.encryption)
        connection.terminate()

    assert found == {"disable": "nothing", "require": "nothing", "verify-ca": "authority", "verify-full": "name"}
    assert in_words == f"{version}, name verified"
    assert ends is not None
    assert 86_400 < ends - time.time() <= 2 * 86_400


async def test_failures_say_tls_and_why(kit: Kit) -> None:
    """The sentence that log, health and doctor show names the host, TLS, and what to do."""
    server, verified = kit.server, kit.verified()
    here = f"TLS with {NAME}:{server.port}: the server"

    assert f"{here}'s certificate is signed by an authority that is not believed" in await reason(
        server.url(f"sslmode=verify-ca&sslrootcert={kit.another.certificate}")
    )
    assert "the server's certificate is not valid for '127.0.0.1'" in await reason(
        server.url(verified, host="127.0.0.1")
    )
    assert "no encryption" in await reason(server.url("sslmode=disable", role="only_tls"))
    async with shown(kit, kit.authority.issue(NAME, file="expired", days=-1)):
        assert f"{here}'s certificate has expired: renew it there" in await reason(server.url(verified))
    async with Tls(server.port, kit.certificate) as proxy:
        proxy.fate = "strip"
        there = server.url("sslmode=require").replace(f":{server.port}/", f":{proxy.port}/")
        assert "the server offers no TLS, or something on the way says so, and sslmode=require" in await reason(there)
        proxy.fate = "cut"
        assert "the server hung up when it was asked for TLS" in await reason(there)
        proxy.fate = "leave"
        own = kit.authority.issue("app_rw").parameters
        assert "or does not take the certificate in sslcert" in await reason(f"{there}&{own}")
        proxy.fate = "error"
        assert "the server answered the request for TLS with an error" in await reason(there)


async def test_client_certificates(kit: Kit) -> None:
    """The right one logs in without a password; each other one is refused with what is wrong about it."""
    server, verified = kit.server, kit.verified()
    right, locked = (
        kit.authority.issue("by_certificate"),
        kit.authority.issue("by_certificate", file="locked", password="pw12"),
    )
    someone = kit.authority.issue("someone")
    expired = kit.authority.issue("by_certificate", file="old", days=-1)
    unknown = kit.another.issue("by_certificate")

    def url(presented: str, role: str = "by_certificate") -> str:
        return server.url(f"{verified}&{presented}", role=role)

    for parameters in (right.parameters, f"{locked.parameters}&sslpassword=pw12"):
        connection = await opened(url(parameters))
        assert await connection.fetchval("SELECT current_user") == "by_certificate"
        connection.terminate()
    connection = await opened(url(someone.parameters, role="by_both"))
    connection.terminate()
    assert "connection requires a valid client certificate" in await reason(url(""))
    assert "connection requires a valid client certificate" in await reason(url("", role="by_both"))
    assert 'certificate authentication failed for user "by_certificate"' in await reason(url(someone.parameters))
    # With TLS 1.3 the server may hang up before its reason is read.
    within_handshake = "&ssl_max_protocol_version=TLSv1.2"
    for wrong, said in ((expired, " has expired: renew it"), (unknown, "the authority that signed the certificate")):
        assert said in await reason(url(wrong.parameters + within_handshake))
        assert "the certificate in sslcert" in await reason(url(wrong.parameters))


async def test_certificates_are_rotated_without_a_restart(kit: Kit, tmp_path: Path) -> None:
    """Files that are replaced in their place count from the next connection on; connections that are open go on."""
    server, believed = kit.server, tmp_path / "believed.crt"
    of_another = kit.another.issue(NAME)
    replace(believed, kit.authority.certificate)
    connector = Connector(
        DatabaseSettings(url=server.url(f"sslmode=verify-full&sslrootcert={believed}")), writable=True
    )

    async def connects() -> None:
        (await connector.open(asyncio.get_running_loop().time() + 5)).terminate()

    first = await connector.open(asyncio.get_running_loop().time() + 5)
    async with shown(kit, of_another):
        with pytest.raises(DatabaseUnreachable, match="an authority that is not believed"):
            await connects()
        # Both are believed while one takes the other's place.
        replace(believed, kit.authority.certificate, kit.another.certificate)
        await connects()
    await connects()
    assert await first.fetchval(ENCRYPTED)
    first.terminate()
    await connector.close()


async def test_revoked_certificate_is_refused(kit: Kit) -> None:
    """With `sslcrl` a certificate on its authority's list is refused, and one whose authority has no list in it."""
    verified = f"{kit.verified()}&sslcrl="

    of_nobody = kit.authority.revoke()
    (await opened(kit.server.url(f"{verified}{of_nobody}"))).terminate()
    of_another = kit.another.revoke()
    assert "sslcrl holds no list of the authority" in await reason(kit.server.url(f"{verified}{of_another}"))
    of_this_one = kit.authority.revoke(kit.certificate)
    assert "the server's certificate was revoked" in await reason(kit.server.url(f"{verified}{of_this_one}"))


@pytest.mark.parametrize("believes", ["a file", "the system"])
async def test_own_certificate_is_renewed_without_a_restart(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, believes: str
) -> None:
    """A client certificate and key that are renewed in their place are used by the next connection."""
    monkeypatch.setenv("SSL_CERT_FILE", str(kit.authority.certificate))
    own = Certificate(tmp_path / "own.crt", tmp_path / "own.key")
    verified = kit.verified() if believes == "a file" else "sslmode=verify-full&sslrootcert=system"
    old, new = kit.authority.issue("someone"), kit.authority.issue("by_certificate")
    replace(own.certificate, old.certificate)
    replace(own.key, old.key)
    connector = Connector(
        DatabaseSettings(url=kit.server.url(f"{verified}&{own.parameters}", role="by_certificate")), writable=True
    )

    with pytest.raises(DatabaseUnreachable, match="certificate authentication failed"):
        await connector.open(asyncio.get_running_loop().time() + 5)
    own.key.unlink()
    with pytest.raises(DatabaseUnreachable, match=rf"the URL names {own.key} as sslkey, which is not there"):
        await connector.open(asyncio.get_running_loop().time() + 5)
    replace(own.certificate, new.certificate)
    replace(own.key, new.key)
    connection = await connector.open(asyncio.get_running_loop().time() + 5)

    assert await connection.fetchval("SELECT current_user") == "by_certificate"
    connection.terminate()
    await connector.close()


async def test_direct_tls_is_for_new_servers(kit: Kit) -> None:
    """PostgreSQL 17 takes `sslnegotiation=direct`; an older one hangs up, and the sentence says so."""
    url = kit.server.url(f"{kit.verified()}&sslnegotiation=direct")

    if kit.server.version >= DIRECT:
        connection = await opened(url)
        assert await connection.fetchval(ENCRYPTED)
        connection.terminate()
    else:
        assert "sslnegotiation=direct takes PostgreSQL 17 or newer" in await reason(url)


def replace(path: Path, *sources: Path) -> None:
    """Put a file in the place of another at once, as a tool that renews certificates does."""
    half = path.with_suffix(".half")
    half.write_bytes(b"".join(source.read_bytes() for source in sources))
    half.rename(path)
