"""Requests as bytes, and what the corpus knows of the service: a token, paths, a body that is right."""

import itertools
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

# A status below 500 is right wherever a case does not say more.
REFUSED = frozenset({400, 404, 405, 408, 411, 413, 414, 415, 417, 422, 431, 501})
JSON = b"application/json"


@dataclass
class Known:
    """What is known of the service. Domains other than patients may be left out of a copy, so none is asked for."""

    token: str
    # Of every GET that the OpenAPI document has, with 1 for each id.
    paths: tuple[str, ...] = ()
    # A patient that is there; none of the cases deletes it.
    one: str = "/patients/1"
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(secrets.randbelow(2**32) * 2**20))

    @property
    def written(self) -> tuple[tuple[str, str], ...]:
        """Return where bodies go: method and path."""
        return (("POST", "/patients"), ("PATCH", self.one))

    def patient(self) -> dict[str, object]:
        """Return a patient that nobody has stored, as JSON has it."""
        return {"mrn": f"FUZZ-{next(self._numbers)}", "full_name": "Ada Lovelace", "birth_date": "1980-05-17"}

    def request(  # noqa: PLR0913  # A request has as many parts.
        self,
        method: str | bytes,
        target: str | bytes,
        *headers: bytes,
        body: bytes | None = None,
        media_type: bytes = JSON,
        version: bytes = b"HTTP/1.1",
        keep: bool = False,
        token: bool = True,
    ) -> bytes:
        """Write a request that ends its connection, unless it is told to keep it."""
        lines = [b" ".join((_bytes(method), _bytes(target), version)), b"Host: fuzz.example"]
        if token:
            lines.append(b"Authorization: Bearer " + self.token.encode())
        if not keep:
            lines.append(b"Connection: close")
        if body is not None:
            lines += [b"Content-Type: " + media_type, b"Content-Length: %d" % len(body)]
        return b"\r\n".join((*lines, *headers, b"", body or b""))

    def post(self, body: bytes, *headers: bytes, media_type: bytes = JSON) -> bytes:
        """Write the request that stores a patient."""
        return self.request("POST", "/patients", *headers, body=body, media_type=media_type)


def dumped(value: object) -> bytes:
    """Write JSON, with half surrogate pairs and NaN where they are."""
    return json.dumps(value).encode()


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")
