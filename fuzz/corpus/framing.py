"""Framing: where a request ends, what a method may be, other protocols, and two requests that look like one."""

from collections.abc import Iterator

from fuzz.corpus.requests import REFUSED, Known, dumped
from fuzz.wire import Case

BAD = frozenset({400, 431})
METHODS = (
    "TRACE", "CONNECT", "OPTIONS", "HEAD", "PUT", "get", "Get", "post", "PROPFIND", "MKCOL", "SEARCH", "QUERY", "PURGE", "LINK", "SOURCE",
    "M-SEARCH", "PRI", "NOTIFY", "SUBSCRIBE", "ACL", "BREW", "X" * 10_000, "G" * 60, "GET\0", "\0", "\xff", "G3T", "GET\t", " GET", "", "(GET)", "GET,POST",
)  # fmt: skip
# What stands after the head of a POST with these framing headers; one answer, and no second request, may come of it.
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
TWICE: dict[str, tuple[tuple[bytes, ...], bytes]] = {
    "CL and TE": ((b"Content-Length: 4", CHUNKED), b"0\r\n\r\n" + SMUGGLED),
    "TE and CL": ((CHUNKED, b"Content-Length: 4"), b"0\r\n\r\n" + SMUGGLED),
    "two lengths": ((b"Content-Length: 0", b"Content-Length: %d" % len(SMUGGLED)), SMUGGLED),
    "two equal lengths": ((b"Content-Length: 2", b"Content-Length: 2"), b"{}"),
    "two lengths in one": ((b"Content-Length: 0, %d" % len(SMUGGLED),), SMUGGLED),
    "TE twice": ((CHUNKED, CHUNKED), b"0\r\n\r\n" + SMUGGLED),
    "TE identity": ((b"Transfer-Encoding: identity", b"Content-Length: 0"), SMUGGLED),
    "TE chunked, identity": ((b"Transfer-Encoding: chunked, identity",), b"0\r\n\r\n" + SMUGGLED),
    "TE gzip, chunked": ((b"Transfer-Encoding: gzip, chunked",), b"0\r\n\r\n"),
    "TE with a tab": ((b"Transfer-Encoding:\tchunked", b"Content-Length: 3"), b"0\r\n\r\n" + SMUGGLED),
    "TE with a space before": ((b" Transfer-Encoding: chunked", b"Content-Length: 0"), b"0\r\n\r\n" + SMUGGLED),
    "TE with a space after": ((b"Transfer-Encoding : chunked", b"Content-Length: 0"), b"0\r\n\r\n" + SMUGGLED),
    "TE folded": ((b"Transfer-Encoding:\r\n chunked", b"Content-Length: 0"), b"0\r\n\r\n" + SMUGGLED),
    "TE xchunked": ((b"Transfer-Encoding: xchunked", b"Content-Length: 0"), SMUGGLED),
    "TE in quotes": ((b'Transfer-Encoding: "chunked"', b"Content-Length: 0"), SMUGGLED),
    "TE behind NUL": ((b"Transfer-Encoding: \0chunked", b"Content-Length: 0"), SMUGGLED),
    "TE behind a line feed": ((b"X: y\nTransfer-Encoding: chunked", b"Content-Length: 0"), SMUGGLED),
    "TE behind a carriage return": ((b"X: y\rTransfer-Encoding: chunked", b"Content-Length: 0"), SMUGGLED),
    "TE upper case": ((b"TRANSFER-ENCODING: CHUNKED",), b"0\r\n\r\n"),
    "CL folded": ((b"Content-Length:\r\n 0",), SMUGGLED),
    "CL +0": ((b"Content-Length: +0",), SMUGGLED),
    "CL -1": ((b"Content-Length: -1",), SMUGGLED),
    "CL 0x0": ((b"Content-Length: 0x0",), SMUGGLED),
    "CL 1e1": ((b"Content-Length: 1e1",), SMUGGLED),
    "CL 0_0": ((b"Content-Length: 0_0",), SMUGGLED),
    "CL empty": ((b"Content-Length: ",), SMUGGLED),
    "CL in other digits": ((b"Content-Length: \xd9\xa0",), SMUGGLED),
    "CL 2**64": ((b"Content-Length: 18446744073709551616",), SMUGGLED),
    "CL of 400 digits": ((b"Content-Length: " + b"9" * 400,), SMUGGLED),
    "CL with a space in": ((b"Content-Length: 0 0",), SMUGGLED),
}  # fmt: skip
CHUNKS = {
    "no number": b"zz\r\n{}\r\n0\r\n\r\n", "negative": b"-1\r\n{}\r\n0\r\n\r\n", "0x": b"0x2\r\n{}\r\n0\r\n\r\n", "huge": b"f" * 400 + b"\r\n{}",
    "2**64": b"10000000000000000\r\n{}", "extension": b"2;a=b\r\n{}\r\n0\r\n\r\n", "a long extension": b"2;" + b"a" * 80_000 + b"\r\n{}\r\n0\r\n\r\n",
    "no end of line": b"2\r\n{}0\r\n\r\n", "line feeds": b"2\n{}\n0\n\n", "longer than said": b"1\r\n{}\r\n0\r\n\r\n", "trailers": b"2\r\n{}\r\n0\r\nX: y\r\n\r\n",
    "a trailer with a length": b"2\r\n{}\r\n0\r\nContent-Length: 99\r\n\r\n", "many trailers": b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    "bytes one by one": b"1\r\n{\r\n" + b"1\r\n \r\n" * 5000 + b"1\r\n}\r\n0\r\n\r\n", "zeros": b"0" * 500 + b"2\r\n{}\r\n0\r\n\r\n", "a space": b"2 \r\n{}\r\n0\r\n\r\n",
    "a second request": b"0\r\n\r\n" + SMUGGLED, "an endless trailer": b"0\r\nX: " + b"y" * 80_000,
}  # fmt: skip
RAW = {
    "HTTP/0.9": b"GET /patients\r\n", "HTTP/0.9 with a version": b"GET /patients HTTP/0.9\r\n\r\n", "HTTP/1.0": b"GET /health/live HTTP/1.0\r\n\r\n",
    "HTTP/1.2": b"GET /health/live HTTP/1.2\r\nHost: x\r\nConnection: close\r\n\r\n", "HTTP/2.0": b"GET /health/live HTTP/2.0\r\nHost: x\r\n\r\n",
    "HTTP/11": b"GET /health/live HTTP/11\r\n\r\n", "HTTP/1.10": b"GET /health/live HTTP/1.10\r\nHost: x\r\n\r\n", "http/1.1": b"GET /health/live http/1.1\r\nHost: x\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), "HTTP/2 frames": bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]) * 10,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), "TLS 2": b"\x80\x2e\x01\x03\x01" + bytes(40), "SSH": b"SSH-2.0-OpenSSH_9\r\n",
    "SMTP": b"EHLO x\r\nMAIL FROM:<>\r\n", "PostgreSQL": b"\x00\x00\x00\x08\x04\xd2\x16\x2f", "PostgreSQL, a start": b"\x00\x00\x00\x10\x00\x03\x00\x00user\0a\0\0",
    "Redis": b"*1\r\n$4\r\nPING\r\n", "memcached": b"get x\r\n", "RTSP": b"OPTIONS rtsp://x RTSP/1.0\r\nCSeq: 1\r\n\r\n", "SIP": b"INVITE sip:x SIP/2.0\r\n\r\n",
    "ICY": b"SOURCE /x ICE/1.0\r\n\r\n", "PROXY": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET /health/live HTTP/1.1\r\nHost: x\r\n\r\n",
    "PROXY 2": b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes(12), "NULs": bytes(10_000), "line feeds": b"\n" * 10_000, "ends of lines": b"\r\n" * 10_000,
    "carriage returns": b"\r" * 10_000, "all bytes": bytes(range(256)) * 10, "an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "spaces": b" " * 10_000,
    "two spaces": b"GET  /health/live  HTTP/1.1\r\nHost: x\r\n\r\n", "a tab": b"GET\t/health/live\tHTTP/1.1\r\nHost: x\r\n\r\n", "no version": b"GET /health/live\r\nHost: x\r\n\r\n",
    "no target": b"GET HTTP/1.1\r\nHost: x\r\n\r\n", "line feeds for ends": b"GET /health/live HTTP/1.1\nHost: x\nConnection: close\n\n",
    "carriage returns for ends": b"GET /health/live HTTP/1.1\rHost: x\r\r", "folded": b"GET /health/live HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\nConnection: close\r\n\r\n",
    "folded first": b"GET /health/live HTTP/1.1\r\n Host: x\r\n\r\n", "no colon": b"GET /health/live HTTP/1.1\r\nHost x\r\n\r\n", "ends of lines before": b"\r\n\r\nGET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "UTF-16": "GET /health/live HTTP/1.1\r\n\r\n".encode("utf-16"), "byte order mark": b"\xef\xbb\xbfGET /health/live HTTP/1.1\r\nHost: x\r\n\r\n",
}  # fmt: skip


def cases(known: Known) -> Iterator[Case]:
    """Return the cases."""
    for number, method in enumerate(METHODS):
        for path in ("/patients/1", "/patients", "/health/live", "/nothing", "*"):
            yield Case(f"method {number} {method[:20]!a} {path}", (known.request(method, path),))
    body = dumped(known.patient())
    for name, (lines, rest) in TWICE.items():
        sent = known.request("POST", "/patients", b"Content-Type: application/json", *lines)
        yield Case(f"framing: {name}", (sent + rest,), end="half", statuses=REFUSED)
        kept = known.request("POST", "/patients", b"Content-Type: application/json", *lines, keep=True)
        # An honest server answers the second of two requests, if it takes them for two; none of it may be a 5xx.
        yield Case(f"framing, kept: {name}", (kept + rest,), end="half", answers=2)
    for name, chunks in CHUNKS.items():
        sent = known.request("POST", "/patients", b"Content-Type: application/json", CHUNKED)
        yield Case(f"chunks: {name}", (sent + chunks,), end="half", statuses=REFUSED)
    for name, raw in RAW.items():
        yield Case(f"raw: {name}", (raw,), end="half")
    yield from _pipelined(known, body)
    yield from _upgrades(known)


def _pipelined(known: Known, body: bytes) -> Iterator[Case]:
    live = known.request("GET", "/health/live", keep=True)
    last = known.request("GET", "/health/live")
    post = known.request("POST", "/patients", body=body, keep=True)
    for name, rest in {
        "garbage": b"\0\xff garbage\r\n\r\n",
        "a half head": b"GET /pati",
        "HTTP/2": RAW["HTTP/2 preface"],
    }.items():
        yield Case(f"pipelined: {name} behind a read", (live + rest,), end="half", answers=2)
        yield Case(f"pipelined: {name} behind a write", (post + rest,), end="half", answers=2)
        yield Case(f"pipelined: {name} later", (live, rest), end="half", answers=2)
    yield Case("pipelined: 50", (live * 49 + last,), answers=50)
    yield Case("pipelined: 150", (live * 149 + last,), end="half", answers=150)
    yield Case("pipelined: more behind the last", (last + live,), answers=1)
    yield Case("pipelined: writes", (post * 20 + last,), answers=21)
    yield Case(
        "pipelined, byte by byte", tuple(bytes([byte]) for byte in known.request("GET", "/health/live", token=False))
    )
    half = len(post) - 10
    yield Case("body in two pieces", (post[:half], post[half:] + last), answers=2)


def _upgrades(known: Known) -> Iterator[Case]:
    websocket = (b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
    for path in ("/patients/1", "/patients", "/health/live", "/debug/pools", "/nothing", "*"):
        sent = known.request("GET", path, b"Connection: Upgrade", *websocket, keep=True)
        yield Case(f"WebSocket {path}", (sent,), end="half")
        yield Case(
            f"WebSocket without a token {path}",
            (known.request("GET", path, b"Connection: Upgrade", *websocket, keep=True, token=False),),
            end="half",
        )
        yield Case(f"WebSocket {path}, frames at once", (sent + b"\x81\x80\0\0\0\0" * 100,), end="half")
    for name, lines in {
        "no key": websocket[:2], "version 99": (websocket[0], b"Sec-WebSocket-Version: 99", websocket[2]), "a short key": (*websocket[:2], b"Sec-WebSocket-Key: x"),
        "extensions": (*websocket, b"Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=99"), "protocols": (*websocket, b"Sec-WebSocket-Protocol: " + b"a," * 900),
        "h2c": (b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"), "TLS/1.0": (b"Upgrade: TLS/1.0",),
    }.items():  # fmt: skip
        yield Case(
            f"upgrade, {name}",
            (known.request("GET", known.one, b"Connection: Upgrade", *lines, keep=True),),
            end="half",
        )
        post = known.request("POST", "/patients", b"Connection: Upgrade", *lines, body=b"{}", keep=True)
        yield Case(f"upgrade of a write, {name}", (post,), end="half")
