"""docker-compose.tls.yml: each hop is encrypted, and each server verified by its authority and its name."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.compose.stack import Stack, eventually

PORTS = {"APP_PORT": "18002", "OPERATIONS_PORT": "18407", "PROMETHEUS_PORT": "19092", "ALERTMANAGER_PORT": "19095"}
SERVICES = ("balancer", "replica", "primary-exporter", "pgbouncer-exporter")
EXPORTERS = (("primary-exporter", 9187), ("pgbouncer-exporter", 9127))
# Who comes from outside, and how; the server's own processes have no address.
COMERS = """
    SELECT usename, bool_and(ssl) FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)
    WHERE client_addr IS NOT NULL GROUP BY usename
"""
VERIFIED = {"tls": "TLSv1.3", "tls_verified": "name", "hop": "pooler"}
# Prints the serial number of the certificate that each of some servers shows.
SERIAL = """
import asyncio, asyncpg, sys
async def main():
    for url in sys.argv[1:]:
        connection = await asyncpg.connect(url)
        print(connection._transport.get_extra_info("ssl_object").getpeercert()["serialNumber"])
        connection.terminate()
asyncio.run(main())
"""
RELOAD = ("with-key.sh", "sh", "-c", 'kill -HUP "$(head -n 1 "$PGDATA/postmaster.pid")"')


@pytest.fixture(scope="module")
async def encrypted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Give a project of its own with TLS on every hop: what serves, and the exporters."""
    folder = tmp_path_factory.mktemp("tls") / "certificates"
    for parent in folder.parents[:3]:
        parent.chmod(0o711)
    stack = Stack(
        "lifeguard-test-tls",
        "docker-compose.yml",
        "docker-compose.tls.yml",
        "tests/compose/docker-compose.test.yml",
        CERTIFICATES_DIR=str(folder),
        TEST_RULES="/dev/null",
        **PORTS,
    )
    made, said = await stack.script("deploy/make-certificates.sh", str(folder))
    assert made == 0, said
    try:
        await stack.up("--build", *SERVICES)
        yield stack
    finally:
        await stack.compose("down", "--volumes")


def client(stack: Stack) -> httpx.AsyncClient:
    """Make a client that believes the stack's authority alone."""
    believed = ssl.create_default_context(cafile=Path(stack.environment["CERTIFICATES_DIR"], "client/authority.crt"))
    return httpx.AsyncClient(base_url=f"https://localhost:{PORTS['APP_PORT']}", verify=believed, timeout=30)


@pytest.mark.timeout(240)
async def test_every_hop_is_encrypted(encrypted: Stack) -> None:
    """Balancer, service, PgBouncer, both servers, stream and exporters: the servers themselves say so."""
    async with client(encrypted) as http:
        stored = await http.post("/patients", json={"mrn": "T", "full_name": "T", "birth_date": "1970-01-01"})
        read = await http.get(stored.headers["location"])
        health = (await http.get("/health/db")).json()

    on_primary = dict(await encrypted.psql("primary", COMERS))
    on_replica = dict(await encrypted.psql("replica", COMERS))
    figures = [await scraped(encrypted, *exporter) for exporter in EXPORTERS]
    clients, servers = await encrypted.console("SHOW CLIENTS"), await encrypted.console("SHOW SERVERS")
    assert read.status_code == 200
    assert [each.items() >= VERIFIED.items() for each in health["databases"].values()] == [True] * 3
    assert {"app_rw", "replicator"} <= on_primary.keys()
    assert "app_ro" in on_replica
    assert {*on_primary.values(), *on_replica.values()} == {"t"}
    # The health check and this question come by PgBouncer's own socket.
    assert {row["tls"][:5] for row in clients if row["addr"] != "unix"} == {"TLSv1"}
    assert {row["user"] for row in clients if row["tls"]} >= {"app_rw", "app_ro"}
    assert {row["tls"][:5] for row in servers} == {"TLSv1"}
    # They come in by TLS, or not at all.
    assert "\npg_up 1" in figures[0]
    assert "\npgbouncer_up 1" in figures[1]


async def scraped(stack: Stack, exporter: str, port: int) -> str:
    """Return an exporter's figures; it connects for them."""
    return await stack.compose("exec", "-T", exporter, "wget", "-qO-", f"http://127.0.0.1:{port}/metrics")


@pytest.mark.timeout(120)
async def test_nobody_comes_in_without_tls_or_by_another_authority(encrypted: Stack) -> None:
    """The balancer, PgBouncer and the server refuse plain text; a client with another authority refuses them."""
    async with httpx.AsyncClient(timeout=10) as stranger:
        with pytest.raises(httpx.RemoteProtocolError):
            await stranger.get(f"http://localhost:{PORTS['APP_PORT']}/health/live")
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            await stranger.get(f"https://localhost:{PORTS['APP_PORT']}/health/live")
    plain = [
        await encrypted.compose(
            *("exec", "-T", "-e", "PGPASSWORD=development-app-ro", "-e", "PGSSLMODE=disable", "replica"),
            *("psql", "-X", "-h", host, "-p", port, "-U", "app_ro", "-d", "lifeguard", "-c", "SELECT 1"),
            check=False,
        )
        for host, port in (("primary", "5432"), ("pgbouncer", "6432"))
    ]
    doctor = await encrypted.compose(
        *("run", "--rm", "--no-deps", "-T", "-e", "COLUMNS=250"),
        *("-e", f"DATABASE_URL={url('app_rw', 'primary:5432')}&sslnegotiation=direct"),
        *("-e", f"DATABASE_REPLICA_URL={url('app_ro', 'pgbouncer:6432', believed='system')}", "app", "doctor"),
        check=False,
    )

    assert "no encryption" in plain[0]
    assert "SSL required" in plain[1]
    assert "TLS with pgbouncer:6432: the server's certificate is signed by an authority that is not" in doctor
    assert "TLS with primary" not in doctor


def url(role: str, server: str, *, believed: str = "/certificates/authority.crt") -> str:
    """Return a URL by which a server is verified."""
    login = f"{role}:development-{role.replace('_', '-')}"
    return f"postgresql://{login}@{server}/lifeguard?sslmode=verify-full&sslrootcert={believed}"


@pytest.mark.timeout(120)
async def test_certificates_are_renewed_while_it_runs(encrypted: Stack) -> None:
    """A new authority beside the old one, and new certificates: after docs/tls.md's commands the servers show them."""
    folder = Path(encrypted.environment["CERTIFICATES_DIR"])
    started = await encrypted.psql("primary", "SELECT pg_postmaster_start_time()")
    old = await shown(encrypted)
    renewed, said = await encrypted.script("deploy/make-certificates.sh", "--renew-authority", str(folder))
    for server in ("primary", "replica"):
        await encrypted.compose("exec", "-T", server, *RELOAD)
    await encrypted.console("RELOAD")
    await encrypted.compose("kill", "--signal", "USR2", "balancer")

    async def all_new() -> bool:
        return not set(old) & set(await shown(encrypted))

    assert renewed == 0, said
    assert await eventually(all_new, within=30)
    async with client(encrypted) as http:
        assert (await http.get("/patients")).status_code == 200
    assert await encrypted.psql("primary", "SELECT pg_postmaster_start_time()") == started


async def shown(stack: Stack) -> list[str]:
    """Return the serial numbers of what the primary, PgBouncer and the balancer show."""
    urls = [url("app_rw", server) for server in ("primary:5432", "pgbouncer:6432")]
    printed = await stack.compose("exec", "-T", "app", "python", "-c", SERIAL, *urls)
    believed = ssl.create_default_context(cafile=Path(stack.environment["CERTIFICATES_DIR"], "client/authority.crt"))
    _, writer = await asyncio.open_connection("localhost", int(PORTS["APP_PORT"]), ssl=believed)
    certificate = writer.get_extra_info("ssl_object").getpeercert()
    writer.transport.abort()
    return [*printed.split(), certificate["serialNumber"]]
