"""Clients that leave: in the head, in a body, while a 100 Continue is due, behind a whole request; by FIN and by RST."""

from collections.abc import Iterator

from fuzz.corpus.requests import Known, dumped
from fuzz.wire import Case, End

MEDIA_TYPES = (b"application/json", b"multipart/form-data; boundary=x", b"application/octet-stream")
ENDS: tuple[End, ...] = ("close", "reset", "half")


def cases(known: Known) -> Iterator[Case]:
    """Return the cases."""
    for end in ENDS:
        for name, pieces in _broken(known):
            yield Case(f"leaves ({end}) {name}", pieces, end=end, answers=b"".join(pieces).count(b" HTTP/1.1\r\n"))


def _broken(known: Known) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    whole = known.post(dumped(known.patient()), b"Idempotency-Key: leaving")
    for share in (1, 3, 16, len(whole) // 4, len(whole) // 2, len(whole) - 1, len(whole)):
        yield f"after {share} bytes", (whole[:share],)
    yield "before anything", ()
    routes = (
        *known.written,
        ("GET", known.one),
        ("DELETE", "/patients/999999"),
        ("POST", "/nothing"),
        ("PUT", "/patients"),
        ("POST", "/debug/resume"),
    )
    for method, path in routes:
        for media_type in MEDIA_TYPES:
            for key in (b"", b"Idempotency-Key: broken"):
                said = f"{method} {path}, {media_type.decode()[:20]}{', with a key' if key else ''}"
                lines = (b"Content-Type: " + media_type, *([key] if key else []))
                length = known.request(method, path, *lines, b"Content-Length: 100")
                yield f"in a body not begun: {said}", (length,)
                yield f"in a body: {said}", (length + b'{"mrn": ',)
                yield f"in the second piece of a body: {said}", (length, b'{"mrn": ', b'"A')
                chunked = known.request(method, path, *lines, b"Transfer-Encoding: chunked")
                yield f"before the first chunk: {said}", (chunked,)
                yield f"in a chunk: {said}", (chunked + b"5\r\n{",)
                yield f"after a chunk: {said}", (chunked, b"1\r\n{\r\n")
                yield f"in the last chunk: {said}", (chunked, b"1\r\n{\r\n0\r\n")
    for name, framing in {
        "by length": b"Content-Length: 100",
        "by chunks": b"Transfer-Encoding: chunked",
        "of 10 GB": b"Content-Length: 10000000000",
    }.items():
        expecting = known.request(
            "POST", "/patients", b"Content-Type: application/json", b"Expect: 100-continue", framing
        )
        yield f"that expects 100, {name}", (expecting,)
        yield (
            f"that expects 100, {name}, without a token",
            (known.request("POST", "/patients", b"Expect: 100-continue", framing, token=False),),
        )
        yield f"that expects more, {name}", (known.request("POST", "/patients", b"Expect: 200-ok", framing),)
        yield f"without a token, {name}", (known.request("POST", "/patients", framing, token=False), b"{")
    yield (
        "in a body of 500 kB",
        (
            known.request("POST", "/patients", b"Content-Type: application/json", b"Content-Length: 900000"),
            b" " * 500_000,
        ),
    )
    yield (
        "in a body that is too long",
        (
            known.request("POST", "/patients", b"Content-Type: application/json", b"Content-Length: 9000000"),
            b" " * 2_000_000,
        ),
    )
    last = known.request("GET", known.one)
    for path in known.paths:
        yield f"behind a whole request: {path}", (known.request("GET", path),)
    yield "behind 20 requests", (known.request("GET", "/patients?limit=200", keep=True) * 19 + last,)
    yield (
        "in the body behind a request",
        (known.request("GET", known.one, keep=True) + known.request("POST", "/patients", b"Content-Length: 9") + b"{",),
    )
