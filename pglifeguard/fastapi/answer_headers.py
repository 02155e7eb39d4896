"""The headers that every answer of a service gets, unless the route has set a header of the same name itself.

`ObserveRequests` adds them, because it sees every answer on its way out: those of routes, of error handlers, of the
layers inside it and its own. What `serve` answers before there is a request has its own: see
pglifeguard/serving/protocol.py.
"""

from dataclasses import dataclass
from typing import Self, TypeAlias

RawHeaders: TypeAlias = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class AnswerHeaders:
    """Raw headers for answers to requests that came by HTTP, and for those that came by HTTPS."""

    http: RawHeaders
    https: RawHeaders

    @classmethod
    def private(cls, *, hsts_seconds: int) -> Self:
        """Return the headers of a service whose answers are nobody else's business.

        No cache and no disk keeps an answer, no browser guesses its type, no page of another site shows it in a frame,
        and a link in it does not tell where it was. The policy allows an answer that is shown as a page nothing: a page
        brings a policy of its own. `hsts_seconds` is for how long a browser that came by HTTPS comes by HTTPS alone;
        0 leaves that header out, and by HTTP browsers ignore it (RFC 6797, section 7.2).
        """
        every = (
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
        )
        hsts = ((b"strict-transport-security", b"max-age=%d" % hsts_seconds),) if hsts_seconds else ()
        return cls(every, every + hsts)
