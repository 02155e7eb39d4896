"""Headers: tokens, keys, consistency tokens, conditions, preferences, cookies, and names and values of all sorts."""

import base64
import json
from collections.abc import Iterator

from fuzz.corpus.requests import REFUSED, Known, dumped
from fuzz.wire import Case

UNAUTHORIZED = frozenset({400, 401, 431})
TOO_MUCH = frozenset({431})
TOO_LONG = frozenset({414})
KEYS = (
    b"", b" ", b"a b", b"a\tb", b"\x01", b"\x7f", b"\xff", b"\xc3\xa4", b"a" * 255, b"a" * 256, b"a" * 8000, b'"quoted"', b"'; DROP TABLE x; --",
    b"../..", b"%00", b"{}", b"null", b"0", b"-1", b"550e8400-e29b-41d4-a716-446655440000", b"\xe2\x80\x8b", b"a,b", b"a;b",
)  # fmt: skip
CONSISTENCY = (
    b"", b" ", b"0", b"0/0", b"0/1", b"FFFFFFFF/FFFFFFFF", b"1-FFFFFFFF/FFFFFFFF", b"x", b"1.1.1", b"-1", b"\xff", b"\x01", b"0" * 8000, b"NaN", b"1e400",
    b"7-1-0/3000060", b"7" * 20 + b"-1-FFFFFFFF/FFFFFFFF", b"18446744073709551616-4294967296-0/0", b"'", b"%00", b"a=b", b"0/3000060; x=y",
)  # fmt: skip
# The default of CONSISTENCY_COOKIE_NAME.
COOKIE = b"Cookie: consistency_token="
# Names of headers that something may act upon, each with values that it should not believe.
VALUES = {
    b"Accept": (b"", b"text/html", b"application/xml", b"*/*;q=0", b"application/json;q=0", b"\xff", b"a/b," * 900, b"image/*", b"application/problem+json"),
    b"Accept-Encoding": (b"", b"gzip", b"br;q=1.0, *;q=0", b"identity;q=0", b"\xff", b"gzip," * 900),
    b"Accept-Language": (b"", b"\xff", b"xx-" * 900, b"*"),
    b"Accept-Charset": (b"utf-16", b"\xff"),
    b"Prefer": (b"", b"return=minimal", b"respond-async", b"wait=-1", b"wait=1e400", b"handling=strict", b"\xff", b"a=b," * 900),
    b"Range": (b"bytes=0-0", b"bytes=-1", b"bytes=5-1", b"bytes=0-" + b"9" * 400, b"bytes=" + b"0-1," * 900, b"x=1", b"", b"bytes=a-b"),
    b"If-Match": (b"*", b'"x"', b'W/"x"', b"", b"x" * 6000),
    b"If-None-Match": (b"*", b'"x"', b"", b'"' * 6000),
    b"If-Modified-Since": (b"", b"x", b"Thu, 01 Jan 1970 00:00:00 GMT", b"Thu, 99 Foo 99999 99:99:99 GMT"),
    b"If-Range": (b'"x"', b""),
    b"X-Request-ID": (b"", b" ", b"a" * 64, b"a" * 65, b"a\tb", b"\xff", b"'", b"%0d%0a", b"{}", b"a b"),
    b"traceparent": (b"", b"00-0-0-0", b"00-" + b"f" * 32 + b"-" + b"f" * 16 + b"-ff", b"\xff", b"0" * 6000),
    b"tracestate": (b"a=b," * 900, b"\xff"),
    b"baggage": (b"a=b," * 900, b"\xff"),
    b"Origin": (b"null", b"https://evil.example", b"\xff", b""),
    b"Referer": (b"\xff", b"javascript:alert(1)", b"x" * 6000),
    b"User-Agent": (b"", b"\xff", b"() { :; }; echo x", b"${jndi:ldap://127.0.0.1/x}", b"x" * 6000),
    b"X-Forwarded-For": (b"", b"127.0.0.1", b"::1", b"unknown", b"\xff", b"1.2.3.4," * 900, b"999.1.1.1", b"[::1]:x", b"1.2.3.4:99999", b"'"),
    b"X-Forwarded-Proto": (b"", b"https", b"javascript", b"\xff", b"https,http", b"x" * 6000),
    b"X-Forwarded-Host": (b"evil.example", b"\xff", b""),
    b"X-Forwarded-Port": (b"99999", b"x"),
    b"X-Forwarded-Prefix": (b"/../..", b"\xff"),
    b"Forwarded": (b"for=_x;proto=https;host=evil", b"\xff", b"for=" * 900),
    b"X-HTTP-Method-Override": (b"DELETE", b"TRACE"),
    b"X-Original-URL": (b"/debug/pool-stats",),
    b"X-Rewrite-URL": (b"/debug/pool-stats",),
    b"Max-Forwards": (b"0", b"-1", b"9" * 400),
    b"TE": (b"trailers", b"gzip;q=x"),
    b"Via": (b"1.1 x," * 900,),
    b"Cache-Control": (b"only-if-cached", b"max-age=" + b"9" * 400),
    b"Date": (b"x",),
    b"Connection": (b"Authorization", b"keep-alive, close", b"x" * 6000, b""),
    b"Keep-Alive": (b"timeout=" + b"9" * 400,),
    b"Upgrade": (b"h2c", b"websocket", b"x", b""),
    b"HTTP2-Settings": (b"AAMAAABkAAQAAP__", b"\xff"),
    b"Content-Length": (b"0",),
    b"Content-Language": (b"\xff",),
    b"Content-Range": (b"bytes 0-1/*",),
    b"Trailer": (b"Authorization", b"Content-Length"),
    b"Proxy": (b"http://127.0.0.1:1",),
    b"Sec-WebSocket-Key": (b"x",),
    b"X-Injected": (b"a\rb", b"a\nb", b"a\0b", b"a\x0bb", b"a\x7fb", b"\xc4\x8d\xc4\x8a"),
}  # fmt: skip
NAMES = (
    b"",
    b" ",
    b"a b",
    b"a\tb",
    b"\xff",
    b"\0",
    b"a\0",
    b"(",
    b"@",
    b"{}",
    b'"',
    b"a" * 5000,
    b"Host ",
    b" Host",
    b":",
    b"a/b",
    b"\x7f",
)


def cases(known: Known) -> Iterator[Case]:
    """Return the cases."""
    yield from _tokens(known)
    yield from _keys(known)
    for number, value in enumerate(CONSISTENCY):
        for place, before in (("header", b"X-Consistency-Token: "), ("cookie", COOKIE)):
            for method in ("GET", "PATCH"):
                body = b'{"full_name": "Ada"}' if method == "PATCH" else None
                sent = known.request(method, known.one, before + value, body=body)
                yield Case(f"consistency {number} in a {place}: {method} {value[:30]!r}", (sent,))
    for name, values in VALUES.items():
        for number, value in enumerate(values):
            header = name + b": " + value
            said = f"{name.decode()} {number}: {value[:30]!r}"
            yield Case(
                f"{said}, read",
                (known.request("GET", known.one, header, keep=name == b"Connection"), _CLOSE),
                answers=2,
            )
            yield Case(
                f"{said}, write", (known.request("POST", "/patients", header, body=dumped(known.patient())),), answers=2
            )
    for number, strange in enumerate(NAMES):
        sent = known.request("GET", known.one, strange + b": x")
        yield Case(f"header's name {number}: {strange[:30]!r}", (sent,))
    yield from _many(known)


_CLOSE = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def _tokens(known: Known) -> Iterator[Case]:
    head, claims, signature = known.token.split(".")
    none = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
    found = base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4))
    more = base64.urlsafe_b64encode(json.dumps(json.loads(found) | {"scope": "ops"}).encode()).rstrip(b"=").decode()
    wrong = {
        "none": b"", "scheme alone": b"Bearer", "space": b"Bearer ", "no scheme": known.token.encode(), "basic": b"Basic YTpi",
        "digest": b"Digest x=y", "cut": f"Bearer {known.token[:-2]}".encode(), "two": f"Bearer {known.token} {known.token}".encode(),
        "algorithm none": f"Bearer {none}.{claims}.".encode(), "none, and a signature": f"Bearer {none}.{claims}.{signature}".encode(),
        "other claims": f"Bearer {head}.{more}.{signature}".encode(), "no signature": f"Bearer {head}.{claims}.".encode(),
        "no claims": f"Bearer {head}..{signature}".encode(), "dots": b"Bearer ..", "many dots": b"Bearer " + b"." * 6000,
        "NUL": b"Bearer \0", "bytes": b"Bearer \xff\xfe.\xff.\xff", "long": b"Bearer " + b"a" * 6000, "JSON": b'Bearer {"alg":"none"}',
        "null": b"Bearer null", "five parts": b"Bearer a.b.c.d.e", "deep": b"Bearer " + base64.urlsafe_b64encode(b"[" * 4000) + b".e30.x",
        "deep claims": f"Bearer {head}.".encode() + base64.urlsafe_b64encode(b'{"a":' * 900) + b".x",
        "key of a file": b"Bearer " + base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"../../../../dev/null","jku":"http://127.0.0.1:1/"}') + b".e30.x",
        "number": b"Bearer " + base64.urlsafe_b64encode(b"1") + b".MQ.MQ", "a list": b"Bearer W10.W10.W10",
        "a lone surrogate": b"Bearer " + base64.urlsafe_b64encode(b'{"alg":"\\ud800"}') + b".e30.x",
    }  # fmt: skip
    for name, value in wrong.items():
        for method, path in (("GET", known.one), ("POST", "/patients"), ("GET", "/debug/pool-stats")):
            sent = known.request(
                method, path, b"Authorization: " + value, body=b"{}" if method == "POST" else None, token=False
            )
            yield Case(f"token {name}: {method} {path}", (sent,), statuses=UNAUTHORIZED)
    twice = known.request("GET", known.one, b"Authorization: Bearer x")
    yield Case("token: a right one and a wrong one", (twice,))
    in_query = known.request("GET", f"{known.one}?access_token={known.token}", token=False)
    yield Case("token in the query", (in_query,), statuses=UNAUTHORIZED)


def _keys(known: Known) -> Iterator[Case]:
    for number, key in enumerate(KEYS):
        header = b"Idempotency-Key: " + key
        body = dumped(known.patient())
        for method, path, sent in (("POST", "/patients", body), ("PATCH", known.one, b'{"full_name": "Ada"}')):
            asked = known.request(method, path, header, body=sent)
            yield Case(f"key {number}: {method} {key[:30]!r}", (asked,))
            again = known.request(method, path, header, body=sent, keep=True)
            yield Case(f"key {number}, pipelined: {method} {key[:30]!r}", (again + asked,), answers=2)
        yield Case(
            f"key {number}, another body", (known.request("POST", "/patients", header, body=b"{}"),), statuses=REFUSED
        )
        yield Case(f"key {number} of a read", (known.request("GET", known.one, header),))
    two = known.request(
        "POST", "/patients", b"Idempotency-Key: one", b"Idempotency-Key: two", body=dumped(known.patient())
    )
    yield Case("two keys", (two,), statuses=REFUSED)


def _many(known: Known) -> Iterator[Case]:
    for number in (50, 90, 101, 1000):
        lines = [b"X-%d: 1" % each for each in range(number)]
        yield Case(f"{number} headers", (known.request("GET", known.one, *lines),))
        yield Case(f"{number} equal headers", (known.request("GET", known.one, *([b"X-Same: 1"] * number)),))
    yield Case("a cookie of 8 kB", (known.request("GET", known.one, b"Cookie: a=" + b"b" * 8192),))
    yield Case("a thousand cookies", (known.request("GET", known.one, b"Cookie: " + b"a=b; " * 1000),))
    yield Case("cookies of no form", (known.request("GET", known.one, b'Cookie: ;;=;=";a;\xff=\xff; \x01'),))
    yield Case("a header of 80 kB", (known.request("GET", known.one, b"X: " + b"y" * 80_000),), statuses=TOO_MUCH)
    yield Case("a target of 80 kB", (known.request("GET", "/" + "y" * 80_000),), statuses=TOO_LONG)
    yield Case("a query of 80 kB", (known.request("GET", "/patients?" + "a=b&" * 20_000),), statuses=TOO_LONG)
    for host in (b"", b"x:99999", b"a b", b"[::1", b"evil.example/", b"\xff", b"x@y", b"x" * 6000, b"127.0.0.1:1, x"):
        sent = known.request("GET", "/patients?limit=1").replace(b"fuzz.example", host)
        yield Case(f"host {host[:30]!r}", (sent,))
    yield Case("no host", (known.request("GET", "/patients?limit=1").replace(b"Host: fuzz.example\r\n", b""),))
    yield Case("two hosts", (known.request("GET", "/patients?limit=1", b"Host: other.example"),))
