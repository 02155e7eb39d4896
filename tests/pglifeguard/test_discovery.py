"""What DNS answers is read as it is meant, and each process prefers its own few of the replicas found."""

import asyncio
import ipaddress
import ssl
import time
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from pglifeguard.connector import Connector
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.database_url import Host
from pglifeguard.discovery import Dialling, Finder, Found, chosen, rank_of, read_zones, service_name, zone_of
from pglifeguard.errors import DatabaseUnreachable
from tests import tls_server
from tests.conftest import Database
from tests.names import NAME, answering, name_server
from tests.tls import Authority, program
from tests.tls_server import MISSING

SERVICE = "_postgresql._tcp.orders.example"


def at(address: str, priority: int = 0, weight: int = 1) -> Found:
    """Make a replica that was found at an address."""
    return Found(Host(NAME, 5432, address), priority, weight)


def keys(found: list[Found]) -> list[str]:
    """Return addresses and ports."""
    return [one.key for one in found]


async def test_each_address_is_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """The addresses of a name are replicas of the URL's port, each once, and keep the name for certificates."""
    with answering(monkeypatch, "127.0.0.2", "127.0.0.3", "127.0.0.2"):
        found = await Finder(Host(NAME, 6432), "dns").find()

    assert found == [Found(Host(NAME, 6432, "127.0.0.2")), Found(Host(NAME, 6432, "127.0.0.3"))]
    assert str(found[0].host) == f"{NAME}:6432 at 127.0.0.2"


async def test_server_on_both_protocols_is_one_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of the protocol that the system prefers count, and go on to count in another order."""
    with answering(monkeypatch, "::1", "127.0.0.1") as names:
        finder = Finder(Host(NAME, 5432), "dns")
        first = keys(await finder.find())
        names.addresses = ["127.0.0.1", "::1"]
        second = keys(await finder.find())
        names.addresses = ["127.0.0.1"]
        third = keys(await finder.find())

    assert (first, second, third) == (["[::1]:5432"], ["[::1]:5432"], ["127.0.0.1:5432"])


async def test_records_of_a_service_are_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """SRV records say host, port, priority and weight; the certificate has to hold the service's own name."""
    async with name_server(monkeypatch) as server:
        server.records[SERVICE] = ["10 60 5433 a.orders.example.", "20 0 5434 b.orders.example."]
        found = await Finder(Host(SERVICE, 5432), "srv").find()

    assert sorted(found, key=lambda one: one.key) == [
        Found(Host("orders.example", 5433, "a.orders.example"), 10, 60),
        Found(Host("orders.example", 5434, "b.orders.example"), 20, 0),
    ]
    assert service_name("_tcp") == "_tcp"


@pytest.mark.parametrize(
    ("records", "reason"),
    [(None, "does not exist"), ([], "does not contain an answer"), (["0 0 0 ."], "has no such records")],
)
async def test_service_without_records_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, records: list[str] | None, reason: str
) -> None:
    """A name that is not known, one without records, and one that says that there is no service."""
    async with name_server(monkeypatch) as server:
        if records is not None:
            server.records[SERVICE] = records
        with pytest.raises(OSError, match=reason):
            await Finder(Host(SERVICE, 5432), "srv").find()


async def test_lookup_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that says nothing is given up."""
    async with name_server(monkeypatch) as server:
        server.silent = True
        with pytest.raises(OSError, match=r"timed out after 0\.0\d+ seconds"):
            await Finder(Host(SERVICE, 5432), "srv").find(0.05)


# Zones.


def test_zone_is_known_by_network_or_name() -> None:
    """The first entry that fits says the zone: a network, an address, or a name with a *."""
    zones = read_zones("10.0.1.0/24=a, 10.0.2.7=b,fd00::/64=c,*.b.example=b")

    where = {text: zone_of(at(text), zones) for text in ("10.0.1.9", "10.0.2.7", "10.0.3.1", "fd00::1%eth0")}
    assert where == {"10.0.1.9": "a", "10.0.2.7": "b", "10.0.3.1": None, "fd00::1%eth0": "c"}
    assert (zone_of(at("one.B.example"), zones), zone_of(at("one.c.example"), zones)) == ("b", None)


@pytest.mark.parametrize(
    ("text", "reason"), [("a", "is no network=zone"), ("10.0.0.0/8=", "is no network=zone"), ("10.0.1.1/8=a", "is no")]
)
def test_wrong_zones_are_refused(text: str, reason: str) -> None:
    """What is no mapping says how one looks."""
    with pytest.raises(ValueError, match=reason):
        read_zones(text)


def test_own_zone_comes_first_and_priority_before() -> None:
    """Replicas in the own zone come before others of their priority; without a zone all are alike."""
    zones = read_zones("10.0.1.0/24=a,10.0.2.0/24=b")
    listed = [at("10.0.2.1"), at("10.0.1.1"), at("10.0.1.2", priority=1), at("10.0.9.1")]
    ranks = {one.key: rank_of(one, "a", zones) for one in listed}

    assert list(ranks.values()) == [1, 0, 2, 1]
    assert [rank_of(one, None, zones) for one in listed] == [0, 0, 2, 0]
    assert chosen(listed, 1, "lot", ranks, ()) == ["10.0.1.1:5432"]
    assert chosen(listed, 4, "lot", ranks, ())[-1] == "10.0.1.2:5432"
    assert chosen(listed, 3, "lot", ranks, {"10.0.1.1:5432"})[-1] == "10.0.1.2:5432"


# The lots of many processes.


def subsets(addresses: list[Found], *, processes: int, most: int) -> list[list[str]]:
    """Let each process choose."""
    ranks = dict.fromkeys(keys(addresses), 0)
    return [chosen(addresses, most, f"process {number}", ranks, ()) for number in range(processes)]


def network(count: int, **fields: int) -> list[Found]:
    """Make replicas at addresses of one network."""
    hosts = ipaddress.ip_network("10.0.0.0/24").hosts()
    return [at(str(next(hosts)), **fields) for _ in range(count)]


def test_processes_spread_evenly() -> None:
    """Of 1,000 processes that use 3 of 10 replicas, each replica gets 300, give or take what chance does to 1,000."""
    counts = Counter(key for each in subsets(network(10), processes=1000, most=3) for key in each)

    # Drawn without replacement the deviation is sqrt(1000 x 0.3 x 0.7) = 14.5: four of these.
    assert len(counts) == 10
    assert all(abs(count - 300) < 58 for count in counts.values()), counts


def test_changed_list_moves_few() -> None:
    """A replica that leaves moves the processes that used it, by one replica each; one that comes takes its share."""
    replicas = network(10)
    before = subsets(replicas, processes=500, most=3)
    after = subsets(replicas[1:], processes=500, most=3)
    more = subsets(network(11), processes=500, most=3)

    gone = keys(replicas[:1])[0]
    for old, new in zip(before, after, strict=True):
        assert len(set(old) - set(new)) == (gone in old)
    moved = [len(set(new) - set(old)) for old, new in zip(before, more, strict=True)]
    assert set(moved) == {0, 1}
    assert mean(moved) == pytest.approx(3 / 11, abs=0.08)


def test_weights_are_proportions() -> None:
    """A replica of twice the weight is the first choice of twice as many processes; 0 counts as the least weight."""
    listed = [at("10.0.0.1", weight=20), at("10.0.0.2", weight=10), at("10.0.0.3", weight=0)]
    counts = Counter(each[0] for each in subsets(listed, processes=3000, most=1))

    heavy, light, least = (counts[key] for key in keys(listed))
    assert heavy / light == pytest.approx(2, rel=0.15)
    assert least < 200


# Connections to an address.


async def test_connection_goes_to_the_address(database: Database) -> None:
    """Nobody knows the name, and the connection comes about; a statement that is cancelled ends on that server."""
    settings = DatabaseSettings(url=database.url().replace("127.0.0.1", "no.such.host.invalid"))
    connector = Connector(
        settings.at(Host("no.such.host.invalid", database.cluster.primary.port, "127.0.0.1")), writable=True
    )
    connection = await connector.open(asyncio.get_running_loop().time() + 5)
    started = time.monotonic()

    with pytest.raises(TimeoutError):
        await connection.fetchval("SELECT pg_sleep(60)", timeout=0.1)

    assert await connection.fetchval("SELECT 1") == 1
    assert time.monotonic() - started < 50
    await connection.close()
    await connector.close()


@pytest.mark.skipif(program() is None, reason="openssl is not installed: apt-get install openssl")
@pytest.mark.skipif(tls_server.programs() is None, reason=MISSING)
async def test_certificate_is_compared_with_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """verify-full at an address that DNS answered takes a certificate of the URL's name, and no other one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    authority = Authority(tmp_path / "authority")
    opened: list[str] = []
    async with tls_server.running(authority, authority.issue("orders.example")) as server:
        settings = DatabaseSettings(url=server.url(f"sslmode=verify-full&sslrootcert={authority.certificate}"))
        for name in ("orders.example", "others.example"):
            connector = Connector(settings.at(Host(name, server.port, "127.0.0.1")), writable=True)
            try:
                connection = await connector.open(asyncio.get_running_loop().time() + 5)
                opened.append(connection.encryption.verified)
                await connection.close()
            except DatabaseUnreachable as error:
                opened.append(str(error))
            await connector.close()

    assert opened[0] == "name"
    assert "certificate is not valid for 'others.example'" in opened[1]


@pytest.mark.skipif(program() is None, reason="openssl is not installed: apt-get install openssl")
async def test_tls_from_the_first_byte_is_with_the_name(tmp_path: Path) -> None:
    """With sslnegotiation=direct, too, the certificate is compared with the name: `Dialling` passes it on."""
    authority = Authority(tmp_path / "authority")
    certificate = authority.issue("orders.example")
    shown = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    shown.load_cert_chain(certificate.certificate, certificate.key)
    believed = authority.believed()
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=shown)
    port = server.sockets[0].getsockname()[1]
    dialling = Dialling(loop, "127.0.0.1")

    transport, _ = await dialling.create_connection(asyncio.Protocol, "orders.example", port, ssl=believed)
    transport.close()
    with pytest.raises(ssl.SSLCertVerificationError, match=r"others\.example"):
        await dialling.create_connection(asyncio.Protocol, "others.example", port, ssl=believed)

    server.close()
    await server.wait_closed()
