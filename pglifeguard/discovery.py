"""Finding replicas by DNS: the addresses of a name (A, AAAA), or its SRV records; and which of them a process prefers.

What DNS answers is where a server may be, and not who it is: connections go to the address, and a certificate is
compared with the name in the URL (see `Dialling`). A lookup is bounded in time, and no request waits for one.
"""

import asyncio
import ipaddress
import math
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

from pglifeguard.database_url import Host
from pglifeguard.lookup import Lookups, is_address

Records = Literal["dns", "srv"]
# Seconds for one lookup. The system's resolver alone may take 5 for each of its servers.
LOOKUP_SECONDS = 2.0


class LookupFailed(OSError):
    """DNS gave no answer, or one that says that there is nothing; the text says which."""


class Found(NamedTuple):
    """A replica as DNS names it. Of SRV records those of the lowest priority go first, the others in their absence.

    `weight` is its share beside others of the same priority.
    """

    host: Host
    priority: int = 0
    weight: int = 1

    @property
    def key(self) -> str:
        """Address and port, which tell it from the others of its name."""
        return str(Host(self.host.dialled, self.host.port))


class Finder:
    """Looks the replicas of one name up."""

    def __init__(self, host: Host, records: Records) -> None:
        self._host = host
        self._records = records
        self._lookups = Lookups()
        self._version: int | None = None

    async def find(self, seconds: float = LOOKUP_SECONDS) -> list[Found]:
        """Return what DNS answers within `seconds`, without repetition.

        Raises: OSError, also where the answer is empty.
        """
        found = await (self._services(seconds) if self._records == "srv" else self._addresses(seconds))
        if not found:
            raise LookupFailed(f"{self._host.name} has no such records")
        return list({one.key: one for one in found}.values())

    async def _addresses(self, seconds: float) -> list[Found]:
        deadline = asyncio.get_running_loop().time() + seconds
        addresses = await self._lookups.addresses(self._host.name, deadline)
        # A server on both protocols has an address of each, and must not get two pools. The system sorts those that it
        # can reach to the front (RFC 6724), so the first one decides. Later answers that lack the protocol of one
        # resolver's query do not change it.
        by_version = {ipaddress.ip_address(each.partition("%")[0]).version for each in addresses}
        if self._version not in by_version:
            self._version = ipaddress.ip_address(addresses[0].partition("%")[0]).version
        return [
            Found(Host(self._host.name, self._host.port, address))
            for address in addresses
            if ipaddress.ip_address(address.partition("%")[0]).version == self._version
        ]

    async def _services(self, seconds: float) -> list[Found]:
        import dns.asyncresolver  # noqa: PLC0415  # An extra of the library: only those who use it have it.
        import dns.exception  # noqa: PLC0415

        try:
            # Made anew, so that a changed /etc/resolv.conf is read.
            resolver = dns.asyncresolver.Resolver()
            answer: Any = await resolver.resolve(self._host.name, "SRV", lifetime=seconds, search=True)
        except dns.exception.DNSException as error:
            raise LookupFailed(str(error) or type(error).__name__) from error
        name = service_name(self._host.name)
        return [
            Found(Host(name, record.port, record.target.to_text(omit_final_dot=True)), record.priority, record.weight)
            for record in answer
            if record.target.labels != (b"",)  # The root stands for "no such service" (RFC 2782).
        ]


def service_name(name: str) -> str:
    """Return the name that a certificate has to hold: "_postgresql._tcp.orders.example" is that of orders.example."""
    labels = name.split(".")
    while len(labels) > 1 and labels[0].startswith("_"):
        labels.pop(0)
    return ".".join(labels)


# Preference.


def read_zones(text: str) -> dict[str, str]:
    """Read "10.0.1.0/24=a, *.b.example=b": networks, addresses and host names, with the zone of each.

    Raises: ValueError, with a sentence.
    """
    zones = {}
    for entry in text.split(","):
        what, equals, zone = (part.strip() for part in entry.partition("="))
        if not (what and equals and zone):
            raise ValueError(
                f"{entry.strip()!r} is no network=zone or name=zone; write 10.0.1.0/24=zone-a,10.0.2.0/24=zone-b"
            )
        if "/" in what or is_address(what):
            try:
                ipaddress.ip_network(what)
            except ValueError as error:
                raise ValueError(f"{what} is no network: {error}") from None
        zones[what] = zone
    return zones


def zone_of(found: Found, zones: Mapping[str, str]) -> str | None:
    """Return the zone of the first entry that fits the replica's address or name; None without one."""
    at = found.host.dialled.partition("%")[0]
    for what, zone in zones.items():
        if is_address(at) and ("/" in what or is_address(what)):
            if ipaddress.ip_address(at) in ipaddress.ip_network(what):
                return zone
        elif fnmatchcase(at.lower(), what.lower()):
            return zone
    return None


def rank_of(found: Found, zone: str | None, zones: Mapping[str, str]) -> int:
    """Return how far a replica comes after the best ones, 0: by its priority, then whether it is in another zone."""
    return 2 * found.priority + (zone is not None and zone_of(found, zones) != zone)


def chosen(listed: Iterable[Found], most: int, lot: str, ranks: Mapping[str, int], unfit: Collection[str]) -> list[str]:
    """Choose the replicas that a process uses, at most `most`; return their keys, the best ones first.

    Those of a low rank come first, and those that were found unfit last. Among equals the process's `lot` decides, by
    rendezvous hashing: each process draws for each replica, weighted. So processes spread over the replicas without
    knowing of each other, and a change of the list moves only those that drew the replica that came or went.
    """

    def order(found: Found) -> tuple[bool, int, float]:
        return found.key in unfit, ranks[found.key], _draw(lot, found)

    return [found.key for found in sorted(listed, key=order)[:most]]


def _draw(lot: str, found: Found) -> float:
    digest = blake2b(f"{lot} {found.key}".encode(), digest_size=8).digest()
    drawn = (int.from_bytes(digest) + 1) / 2**64  # Above 0, at most 1.
    return -math.log(drawn) / max(found.weight, 1)


class Dialling:
    """The event loop for one login: a connection to the host's name goes to the address at which it was found.

    The driver knows one name for all that it does: to connect, to look a password up in a file, and to check a
    certificate. libpq has `hostaddr` beside `host` for that. The connection keeps this loop, so that a request to
    cancel a statement finds the same server.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, address: str) -> None:
        self._loop = loop
        self._address = address

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._loop, name)
        # The driver asks for some of them with each statement: from now on they are attributes.
        setattr(self, name, found)
        return found

    async def create_connection(self, protocol: Any, host: str, port: int, **options: Any) -> Any:
        """Connect to the address; TLS, if it begins at once, is with the name."""
        if options.get("ssl"):
            options.setdefault("server_hostname", host)
        return await self._loop.create_connection(protocol, self._address, port, **options)
