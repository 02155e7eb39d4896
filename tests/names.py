"""DNS as a test has it: the addresses of one name, and a name server on loopback for SRV records."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import dns.asyncresolver
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest

from pglifeguard.embedded.postgres import HOST

NAME = "replicas.example"


@dataclass
class Names:
    """What the system's resolver answers for `NAME`; everything else it answers by itself."""

    addresses: list[str] = field(default_factory=list)
    asked: int = 0

    def look_up(self, system: Any, name: Any, port: Any, *rest: Any, **options: Any) -> Any:
        """Stand in for socket.getaddrinfo."""
        if name != NAME:
            return system(name, port, *rest, **options)
        self.asked += 1
        if not self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [each for address in self.addresses for each in system(address, port, *rest, **options)]


@contextmanager
def answering(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> Iterator[Names]:
    """Let the system's resolver answer these addresses."""
    names = Names(list(addresses))
    monkeypatch.setattr(socket, "getaddrinfo", partial(names.look_up, socket.getaddrinfo))
    yield names


class NameServer(asyncio.DatagramProtocol):
    """A name server for SRV records: `records` are "priority weight port target", by name."""

    def __init__(self) -> None:
        self.records: dict[str, list[str]] = {}
        self.silent = False
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the socket."""
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """Answer a question."""
        assert self._transport is not None
        if self.silent:
            return
        answer = dns.message.make_response(dns.message.from_wire(data))
        name = answer.question[0].name
        records = self.records.get(name.to_text(omit_final_dot=True))
        if records is None:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif records:
            answer.answer.append(dns.rrset.from_text(name, 1, "IN", "SRV", *records))
        self._transport.sendto(answer.to_wire(), addr)


@asynccontextmanager
async def name_server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NameServer]:
    """Run a name server on loopback, and lead the resolver of SRV records there."""
    server = NameServer()
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: server, local_addr=(HOST, 0))
    port = transport.get_extra_info("sockname")[1]
    resolver = dns.asyncresolver.Resolver

    def here() -> dns.asyncresolver.Resolver:
        made = resolver(configure=False)
        made.nameservers, made.port = [HOST], port
        return made

    monkeypatch.setattr(dns.asyncresolver, "Resolver", here)
    try:
        yield server
    finally:
        transport.close()
