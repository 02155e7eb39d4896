"""The hosts by whose names the service may be asked: ALLOWED_HOSTS.

A browser sends whatever name led it here, so a name that a stranger has pointed at this service (DNS rebinding), or one
that a client makes up, would otherwise stand in links and caches.
"""

import re
from ipaddress import ip_address
from typing import NamedTuple, Self

from prometheus_client import Counter
from starlette._utils import get_route_path
from starlette.types import ASGIApp, Receive, Scope, Send

from pglifeguard import ServiceError

# Kubelets, balancers and Prometheus ask for these by an instance's address, and no answer depends on a name.
_OF_PROBES = re.compile(r"/metrics|/health/.*")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\.?(?::([0-9]{0,5}))?")
_PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}


class HostNotAllowed(ServiceError):
    """The request names a host that is not one of ALLOWED_HOSTS."""

    status = 400
    code = "host_not_allowed"


class Authority(NamedTuple):
    """A host, in small letters and an IPv6 address in its shortest form, and a port, None where none is named."""

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read what a `Host` header may be; None for anything else."""
        found = _AUTHORITY.fullmatch(text)
        if found is None:
            return None
        host, port = found[1].lower(), int(found[2]) if found[2] else None
        if host.startswith("["):
            try:
                host = f"[{ip_address(host[1:-1]).compressed}]"
            except ValueError:
                return None
        return cls(host, port)


class AllowedHosts:
    """The entries of ALLOWED_HOSTS: names and addresses, with or without a port; `*.` before a name is all beneath it.

    An entry without a port allows all of them. An entry with one also allows a request that names none and has come
    to the port of its scheme.

    Raises: ValueError, with a sentence, when an entry is none.
    """

    def __init__(self, text: str) -> None:
        self._exact: set[Authority] = set()
        self._beneath: set[Authority] = set()
        for entry in (part.strip() for part in text.split(",")):
            name = entry.removeprefix("*.")
            authority = Authority.parse(name)
            if authority is None or (name != entry and authority.host.startswith("[")):
                raise ValueError(
                    f"has {entry!r}, which is no host: write names or addresses, separated by commas, such as "
                    "clinic.example, *.clinic.example, clinic.example:8443 or [::1]; leave it out to allow every host"
                )
            (self._exact if name == entry else self._beneath).add(authority)

    def allow(self, authority: Authority, scheme: str) -> bool:
        """Say whether a request may name this host."""
        port = _PORTS[scheme] if authority.port is None else authority.port
        host, dot, above = authority.host.partition(".")
        if self._has(self._exact, host + dot + above, port):
            return True
        while dot:
            if self._has(self._beneath, above, port):
                return True
            _, dot, above = above.partition(".")
        return False

    @staticmethod
    def _has(entries: set[Authority], host: str, port: int) -> bool:
        return Authority(host, None) in entries or Authority(host, port) in entries


class HostGuard:
    """Refuse a request for a host that is not allowed, before anything else is done.

    It stands where the guard of tokens does, and outside of it. The operator's commands ask this machine by its own
    address, which is allowed them.
    """

    def __init__(self, app: ASGIApp, hosts: AllowedHosts, refused: Counter) -> None:
        self._app = app
        self._hosts = hosts
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        if scope["type"] != "lifespan" and not self._allows(scope):
            self._refused.labels(HostNotAllowed.code).inc()
            raise HostNotAllowed("The service is not asked by this name of a host.")
        await self._app(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        if _OF_PROBES.fullmatch(get_route_path(scope)):
            return True
        named = [value for name, value in scope["headers"] if name == b"host"]
        # RFC 9112, section 3.2: a request with none or several is a bad one.
        authority = Authority.parse(named[0].decode("latin-1")) if len(named) == 1 else None
        if authority is None:
            return False
        client = scope.get("client")
        from_here = client is not None and f"[{client[0]}]" in {"[127.0.0.1]", "[::1]"}
        return (from_here and authority.host in LOOPBACK) or self._hosts.allow(authority, scope["scheme"])
