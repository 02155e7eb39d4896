"""Request targets: paths, ids, queries and cursors."""

import base64
import json
from collections.abc import Iterator
from urllib.parse import quote, quote_from_bytes

from fuzz.corpus.bodies import TEXTS
from fuzz.corpus.requests import Known
from fuzz.wire import Case

IDS = (
    "0", "-1", "+1", "-0", "1.0", "1e0", "1e400", "01", "0x1", "1_000", "NaN", "Infinity", "null", "true", "1;", "1'",
    "1%20OR%201=1", "1--", "*", "%2A", "9223372036854775807", "9223372036854775808", "18446744073709551616",
    "-9223372036854775809", "9" * 400, "9" * 5000, "1%00", "%00", "%00%00", "1%0A", "%0D%0AX-Injected:%201", "%FF", "%C0%AF",
    "%ED%A0%80", "%F0%9F%98", "%EF%BB%BF1", "%", "%%", "%2", "%zz", "%u0031", "%25", "%2500", "%252F", "%2F", "%2F%2F", "%5C",
    ".", "..", "%2E%2E", "%2e%2e%2f", "..%2F..%2Fetc%2Fpasswd", "..%252f", "....//", "/", "//", "/1", "1/", "1//", "1/sync/",
    "%D9%A1", "%EF%BC%91", "\xb9", "1?", "1??", "1#", "1#x", "1;v=2", "1:1", "[1]", "{1}", "|", "^", "`id`", "$(id)", "~",
    "00000000-0000-0000-0000-000000000000", "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF", "{550e8400-e29b-41d4-a716-446655440000}",
    "urn:uuid:550e8400-e29b-41d4-a716-446655440000", "550e8400e29b41d4a716446655440000", "550e8400-e29b-41d4-a716-44665544000g",
    "1%E2%80%AE", "%E2%80%8B1", "1%20", "%201", "1+", "1%09", "self", "me", "count", "x" * 2000, "a/" * 500, "%41" * 1000,
)  # fmt: skip
TARGETS = (
    "*", "/", "//", "///", "/.", "/..", "/../../etc/passwd", "/patients/../users", "/patients/./1", "/patients//1",
    "/%70atients", "/patients%2F1", "/patients%2f%2e%2e", "/patients%3Flimit=1", "/PATIENTS", "/patients/", "/patients;a=b",
    "/patients%00", "/patients%0d%0aX-Injected:%201", "\\patients", "/\\patients", "/patients\\1", "patients", "?limit=1", "#", "",
    "http://fuzz.example/patients", "http://127.0.0.1:22/", "https://fuzz.example", "http:///patients", "http://[::1/patients",
    "http://a:b@fuzz.example/patients", "file:///etc/passwd", "ftp://x/", "javascript:alert(1)", "fuzz.example:443", "://", "//evil/..",
    "/static/../../app/settings.py", "/docs/../docs", "/docs/oauth2-redirect", "/openapi.json/", "/openapi.json?x[]=1", "/metrics/../metrics",
    "/.env", "/.git/config", "/debug", "/debug/", "/debug/x", "/debug/pools/x", "/health", "/health/db/x", "/favicon.ico", "/x" * 1000,
    "/\x7f", "/\xff\xfe", "/\x01", "/patients\t", "/a b", "/%", "/%%%", "/%c0%ae%c0%ae/", "/" + "%2e%2e%2f" * 300, "/" + "a" * 6000,
)  # fmt: skip
QUERIES = (
    "limit=0", "limit=-1", "limit=201", "limit=1e3", "limit=1.0", "limit=1.5", "limit=", "limit", "limit=NaN", "limit=Infinity", "limit=" + "9" * 400,
    "limit=" + "9" * 5000, "limit=9223372036854775808", "limit=1&limit=2", "limit=1&limit=x", "limit[]=1", "limit[0]=1", "limit%00=1", "limit=%00",
    "limit=1%00", "limit=%2B1", "limit=+1", "limit=%201", "limit=0x10", "limit=1_0", "limit=%D9%A1", "limit=true", "limit=null", "LIMIT=1", "=1", "=", "&",
    "&&&&", "?", "?limit=1", ";limit=1", "limit=1;x=2", "%", "%%", "%zz=1", "a=%", "a=%ff", "a=%c3%28", "mrn=", "mrn=%00", "mrn=" + "A" * 33, "mrn=%0a",
    "mrn=A%0a", "mrn=A-1&mrn=B-1", "mrn='%20OR%20'1'='1", "mrn=%ED%A0%80", "name=", "name=%20", "name=%00", "name=%25", "name=_%25", "name=%5C",
    "name=%ED%A0%80", "name=%F4%8F%BF%BF", "name=%EF%BF%BF", "name=%C4%B0", "name=" + "%C4%B0" * 200, "name=" + "A" * 201, "name='", "name=%22",
    "name=a&name=b", "name=%FF", "name=%F0%9F%98%80", "mrn=A-1&name=%00", "mrn=A-1&after=x", "__proto__[x]=1", "x" * 6000, "after", "a=" + "b" * 6000,
    "limit=1&limit=1" * 100,
)  # fmt: skip
PIECES = (
    "1",
    "0",
    "-1",
    "9223372036854775807",
    "9223372036854775808",
    "1e400",
    "NaN",
    "true",
    "null",
    '"a"',
    "[1]",
    "{}",
)


def cases(known: Known) -> Iterator[Case]:
    """Return the cases."""
    for path in known.paths:
        yield Case(f"path {path}", (known.request("GET", path),), statuses=frozenset({200, 404, 422}))
        yield Case(f"path {path}, without a token", (known.request("GET", path, token=False),))
    for number, found in enumerate(IDS):
        for method in ("GET", "DELETE", "PATCH"):
            body = b'{"full_name": "Ada"}' if method == "PATCH" else None
            yield Case(
                f"id {number}: {method} {found[:40]!a}", (known.request(method, f"/patients/{found}", body=body),)
            )
    for number, target in enumerate(TARGETS):
        yield Case(f"target {number}: {target[:40]!a}", (known.request("GET", target),))
        yield Case(f"target {number} without a token", (known.request("GET", target, token=False),))
    queries = {query[:60]: query for query in QUERIES}
    queries |= {
        f"name {name}": f"name={quote_from_bytes(text.encode(errors='surrogatepass'))}" for name, text in TEXTS.items()
    }
    queries |= {
        "3,000 parameters": "&".join(f"p{number}=1" for number in range(700)),
        "one 3,000 times": "limit=1&" * 900,
        "3,000 empty ones": "&" * 6000,
    }
    for name, query in queries.items():
        for path in ("/patients", "/health/db", "/debug/pool-stats"):
            yield Case(f"query of {path}: {name!a}", (known.request("GET", f"{path}?{query}"),))
    for number, cursor in enumerate(_cursors()):
        for query in ("after=", "name=A&after="):
            yield Case(
                f"cursor {number}, {query!r}: {cursor[:30]!a}",
                (known.request("GET", f"/patients?limit=1&{query}{quote(cursor, safe='')}"),),
                statuses=frozenset({200, 422, 431}),
            )


def _cursors() -> Iterator[str]:
    """Give cursors that this list may have given, and what somebody made of them."""
    texts = [f"[{piece}]" for piece in PIECES]
    texts += [f'["ada",{piece}]' for piece in PIECES] + [f"[{piece},1]" for piece in PIECES]
    texts += [
        '["\\u0000",1]',
        '["\\ud800",1]',
        '["' + "a" * 1400 + '",1]',
        "[]",
        "[1,2,3]",
        "1",
        "",
        "x",
        "[1",
        "[[[[1]]]]",
    ]
    texts += ["[" * 1400, '{"a":' * 280, "[1e400]", "[" + "9" * 1400 + "]", "[01]", "[ 1]", "[1]\n"]
    yield from (_encoded(text.encode()) for text in texts)
    right = _encoded(json.dumps([1], separators=(",", ":")).encode())
    yield from (
        right + "=",
        right + "==",
        right[:-1],
        right + "A",
        right.lower(),
        right.swapcase(),
        f" {right}",
        f"{right}\0",
    )
    yield from (
        _encoded(b"\xff\xfe"),
        _encoded(b"[1]".decode().encode("utf-16")),
        _encoded(b"\0"),
        "%",
        "*",
        "=",
        "A" * 1999,
        "A" * 2001,
    )


def _encoded(text: bytes) -> str:
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()
