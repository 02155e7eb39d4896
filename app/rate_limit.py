"""A limit of requests for each client: RATE_LIMIT_PER_SECOND, off by default.

It is of this process. Workers and instances do not tell each other, so a client whose requests reach all of them may
send as many times the rate as there are; a balancer that keeps a client at one instance keeps it at one rate.
"""

import re
import time
from collections.abc import Callable
from ipaddress import IPv6Address

from prometheus_client import Counter
from starlette._utils import get_route_path
from starlette.types import ASGIApp, Receive, Scope, Send

from pglifeguard import ServiceError
from pglifeguard.fastapi import client_key

# Clients in each of two dictionaries. Of more the oldest are forgotten, and begin with a full bucket.
MAX_REMEMBERED = 100_000
# Less than this many seconds is what floating-point numbers make of nothing.
_ROUNDING = 1e-6
# Probes, Prometheus and operators come through, whatever trouble a client makes.
_UNLIMITED = re.compile(r"/metrics|/(health|debug)/.*")


class RateLimited(ServiceError):
    """The client has sent more requests than it may."""

    status = 429
    code = "rate_limited"

    def __init__(self, detail: str, *, retry_after_seconds: float) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds


class Buckets:
    """A token bucket for each client, that holds `burst` requests and gets `per_second` new ones.

    Of a bucket is kept when it will be full again, one number; one that is full is not kept. (This is the generic cell
    rate algorithm.) Two dictionaries take turns: whoever is in the older one and is not asked for until the younger
    one is a refill old has a full bucket, and is dropped with it, whatever the number of clients.
    """

    def __init__(
        self, *, per_second: float, burst: int, limit: int = MAX_REMEMBERED, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds_each = 1 / per_second
        self._refill_seconds = burst / per_second
        self._limit = limit
        self._clock = clock
        self._young: dict[str, float] = {}
        self._old: dict[str, float] = {}
        self._turn_at = clock() + self._refill_seconds

    def __len__(self) -> int:
        """Return how many clients are remembered."""
        return len(self._young.keys() | self._old.keys())

    def take(self, client: str) -> float:
        """Take one request out of a client's bucket; returns 0, or in how many seconds there will be one."""
        now = self._clock()
        if now >= self._turn_at or len(self._young) >= self._limit:
            self._old, self._young = self._young, {}
            self._turn_at = now + self._refill_seconds
        full_at = self._young.get(client)
        if full_at is None:
            full_at = self._old.get(client, now)
        taken = max(full_at, now) + self._seconds_each
        wait = taken - now - self._refill_seconds
        if wait > _ROUNDING:
            self._young[client] = max(full_at, now)
            return wait
        self._young[client] = taken
        return 0.0


class RateLimit:
    """Refuse a request whose client has sent too many, by the token's subject or, without one, by its address.

    It stands inside the guard of tokens, which finds out who the client is; whom nobody can tell apart is not limited.
    """

    def __init__(self, app: ASGIApp, buckets: Buckets, refused: Counter) -> None:
        self._app = app
        self._buckets = buckets
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        client = client_key.get()
        if client is not None and scope["type"] != "lifespan" and not _UNLIMITED.fullmatch(get_route_path(scope)):
            wait = self._buckets.take(_network_of(client) if "caller" not in scope.get("state", {}) else client)
            if wait:
                self._refused.labels(RateLimited.code).inc()
                raise RateLimited("More requests than one client may send.", retry_after_seconds=wait)
        await self._app(scope, receive, send)


def _network_of(address: str) -> str:
    """Return the /64 of an IPv6 address: whoever has one of it has them all."""
    if ":" not in address:
        return address
    try:
        return IPv6Address(address.partition("%")[0]).packed[:8].hex()
    except ValueError:
        return address
