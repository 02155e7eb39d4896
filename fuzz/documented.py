"""The OpenAPI document: the paths that can be read, and whether an answer of an operation is one that it declares."""

import re
from dataclasses import dataclass
from typing import Any

# From connections whose request has not reached the application, so that no operation declares them.
PROTOCOL = frozenset({"malformed_request", "head_too_large", "head_too_slow"})
_REQUEST = re.compile(rb"([A-Z]+) (/[\w./-]*)(?:\?[\w=&.-]*)? HTTP/1\.1\r\n")


@dataclass(frozen=True)
class Documented:
    """The operations: a pattern of their paths, their method, and the statuses of their answers."""

    operations: tuple[tuple[re.Pattern[str], str, frozenset[str]], ...]
    # Of every GET, with 1 for each parameter of its path.
    readable: tuple[str, ...]
    # All that an operation asks of a token.
    scopes: tuple[str, ...]

    def undeclared(self, request: bytes, status: int, code: str | None) -> str | None:
        """Say that the request's operation does not declare the status; None where it does, or nobody can tell."""
        found = _REQUEST.match(request)
        if found is None or code in PROTOCOL or b"\nUpgrade: websocket" in request:
            return None
        method, path = found[1].decode(), found[2].decode()
        for pattern, known, statuses in self.operations:
            if known == method and pattern.fullmatch(path) and str(status) not in statuses:
                return f"{method} {pattern.pattern} declares no {status} (code {code})"
        return None


def documented(document: dict[str, Any]) -> Documented:
    """Read the document."""
    operations, readable = [], []
    scopes: set[str] = set()
    for path, methods in document["paths"].items():
        pattern = re.compile(re.sub(r"\\\{[^/]+?\\\}", "[^/]+", re.escape(path)))
        operations += [(pattern, method.upper(), frozenset(one["responses"])) for method, one in methods.items()]
        for needed in (needed for one in methods.values() for needed in one.get("security", ())):
            scopes.update(*needed.values())
        if "get" in methods:
            readable.append(re.sub(r"\{[^/]+?\}", "1", path))
    return Documented(tuple(operations), tuple(readable), tuple(sorted(scopes)))
