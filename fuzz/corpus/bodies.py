"""Bodies: what JSON can say and PostgreSQL cannot keep, what is no JSON, and what says that it is something else."""

import gzip
import json
import zlib
from collections.abc import Iterator

from fuzz.corpus.requests import JSON, REFUSED, Known, dumped
from fuzz.wire import Case

OK = frozenset({200, 201})
DEEP = 64_000
TEXTS = {
    "empty": "",
    "NUL": "Ada\0Lovelace",
    "NUL alone": "\0",
    "half a surrogate pair": "Ada\ud800",
    "the other half": "\udfff",
    "pair the wrong way round": "\udc00\ud800",
    "last code point": "Ada\U0010ffff",
    "no character": "Ada\uffff\ufffe",
    "byte order mark": "\ufeffAda",
    "right to left": "\u202eadA\u202c",
    "nothing to see": "\u200b\u200c\u200d\u2060",
    "line separators": "Ada\u2028\u2029",
    "next line": "Ada\x85",
    "control characters": "".join(map(chr, range(1, 32))),
    "delete": "Ada\x7f",
    "combining": "Z" + "\u0300" * 190,
    "lower case is longer": "\u0130" * 200,
    "201 characters": "A" * 201,
    "200 characters of four bytes": "\U0001f600" * 200,
    "SQL": "'; DROP TABLE patients; --",
    "SQL in dollars": "$$; SELECT pg_sleep(60); $$",
    "SQL union": "x' UNION SELECT rolpassword FROM pg_authid --",
    "parameter": "$1 :name %(name)s ? @name",
    "format": "%s%n%x%d %(x)s {0} {x.__class__} ${jndi:ldap://127.0.0.1/x}",
    "template": "{{7*7}} <%= 7*7 %> #{7*7}",
    "HTML": "<script>alert(1)</script>",
    "path": "../../../../etc/passwd",
    "header": "Ada\r\nX-Injected: 1",
    "backslashes": "\\" * 199,
    "quotes": "\"'`" * 60,
    "LIKE": "%_%_%",
    "spaces": " " * 200,
}
DATES = (
    "0000-01-01", "0001-01-01", "1849-12-31", "9999-12-31", "10000-01-01", "99999-01-01", "-4713-11-24", "-0001-01-01",
    "+002020-01-01", "infinity", "-infinity", "now", "today", "epoch", "2020-02-30", "2021-02-29", "2020-13-01",
    "2020-00-00", "2020-1-1", "20200101", "2020-W01-1", "2020-001", "2020-05-17T00:00:00Z", "2020-05-17 BC", "0", "-1",
    "1e400", "NaN", "\u0661\u0669\u0668\u0660-\u0660\u0665-\u0661\u0667", "1980-05-17\0", "1980-05-17\n", " 1980-05-17",
    "\uff11\uff19\uff18\uff10-05-17",
)  # fmt: skip
# As they are written in JSON: Python's own writer would not write all of these.
NUMBERS = {
    "1e400": b"1e400",
    "-1e400": b"-1e400",
    "1e-400": b"1e-400",
    "10**400": b"1" + b"0" * 400,
    "10**5000": b"1" + b"0" * 5000,
    "-0.0": b"-0.0",
    "-0": b"-0",
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "-Infinity": b"-Infinity",
    "2**31": b"2147483648",
    "2**63": b"9223372036854775808",
    "-2**63-1": b"-9223372036854775809",
    "2**64": b"18446744073709551616",
    "0x10": b"0x10",
    "01": b"01",
    "1_000": b"1_000",
    ".5": b".5",
    "+1": b"+1",
    "many digits": b"0." + b"1" * 5000,
}
OTHERS = {
    "null": None,
    "true": True,
    "a list": [],
    "an object": {},
    "a list of one": ["x"],
    "nested": {"a": {"b": [1]}},
}
WHOLE = {
    "nothing": b"",
    "a space": b" ",
    "null": b"null",
    "true": b"true",
    "a number": b"1",
    "a text": b'"x"',
    "a list": b"[]",
    "a list of objects": b"[{}]",
    "an empty object": b"{}",
    "half": b'{"mrn": "A-1", "full_na',
    "two": b"{}{}",
    "rest": b"{} x",
    "comment": b"{/* x */}",
    "single quotes": b"{'mrn': 'A-1'}",
    "trailing comma": b'{"mrn": "A-1",}',
    "NUL byte": b"\0",
    "NUL behind": b"{}\0",
    "control character": b'{"mrn": "A\x01"}',
    "bad escape": b'{"mrn": "\\x41"}',
    "short escape": b'{"mrn": "\\u00"}',
    "XML": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY y SYSTEM "file:///etc/passwd">]><x>&y;</x>',
    "YAML": b"mrn: !!python/object/apply:os.system [id]",
    "pickle": b"\x80\x04\x95\x0e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
    "form": b"mrn=A-1&full_name=Ada&birth_date=1980-05-17",
    "lists in lists": b"[" * DEEP,
    "closed lists in lists": b"[" * (DEEP // 2) + b"]" * (DEEP // 2),
    "objects in objects": b'{"a":' * (DEEP // 5),
    "closed objects in objects": b'{"a":' * (DEEP // 6) + b"1" + b"}" * (DEEP // 6),
    "lists in lists of lists": b'[{"a":' * (DEEP // 6),
    "900 deep": b"[" * 900 + b"]" * 900,
    "unknown keys": json.dumps({f"k{number}": 1 for number in range(900)}).encode(),
    "a long key": json.dumps({"k" * 60_000: 1}).encode(),
    "strange keys": dumped(
        {"": 1, "\0": 2, "\ud800": 3, "__proto__": 4, "__class__": 5, "constructor": 6, "$where": 7}
    ),
    "a long text": json.dumps({"mrn": "A" * 60_000}).encode(),
    "commas": b"[" + b"1," * 30_000 + b"1]",
    "escapes": b'{"mrn": "' + b"\\u0041" * 9_000 + b'"}',
    "spaces": b" " * 60_000 + b"{}",
    "2 MB": b" " * 2_000_000 + b"{}",
    "invalid UTF-8": b'{"mrn": "\xff\xfe"}',
    "UTF-8 too long": b'{"mrn": "\xc0\x80"}',
    "UTF-8 of a surrogate": b'{"mrn": "\xed\xa0\x80"}',
    "UTF-8 cut": b'{"mrn": "\xf0\x9f\x98',
}
MEDIA_TYPES = (
    b"", b"application/json; charset=utf-16", b"application/json; charset=latin-1", b"application/json;charset=nothing",
    b"application/json, text/plain", b"application/problem+json", b"APPLICATION/JSON", b"application/jsonx", b"text/json",
    b"text/plain", b"application/xml", b"application/x-www-form-urlencoded", b"multipart/form-data",
    b"multipart/form-data; boundary=", b"multipart/form-data; boundary=x", b"multipart/mixed; boundary=" + b"x" * 4000,
    b"application/octet-stream", b"application/", b"/", b"*/*", b"json", b"application/json; " + b"a=b; " * 500,
    b'application/json; charset="', b"application/json\t; a", b"\xff\xfe", b"application/merge-patch+json",
    b"application/json-patch+json",
)  # fmt: skip
CODINGS = (b"gzip", b"deflate", b"br", b"zstd", b"identity", b"gzip, gzip", b"nothing", b"")


def cases(known: Known) -> Iterator[Case]:
    """Return the cases."""
    yield Case("body: one that is right", (known.post(dumped(known.patient())),), statuses=frozenset({201}))
    yield Case(
        "body: a change that is right",
        (known.request("PATCH", known.one, body=b'{"full_name": "Ada"}'),),
        statuses=frozenset({200}),
    )
    yield from _fields(known)
    for name, body in WHOLE.items():
        for method, path in known.written:
            yield Case(f"body: {name}, {method} {path}", (known.request(method, path, body=body),), statuses=REFUSED)
    yield from _duplicates(known)
    yield from _encoded(known)
    for number, media_type in enumerate(MEDIA_TYPES):
        body = dumped(known.patient())
        yield Case(f"media type {number}: {media_type[:40]!r}", (known.post(body, media_type=media_type),))
        whole = known.request("POST", "/patients", b"Content-Length: %d" % len(body)) + body
        yield Case(f"media type {number} and another", (known.post(body, b"Content-Type: " + media_type),))
        if number == 0:
            yield Case("media type: none", (whole,))


def _fields(known: Known) -> Iterator[Case]:
    for field in ("mrn", "full_name", "birth_date", "id", "unknown"):
        values = {
            **{f"text {name}": dumped(text) for name, text in TEXTS.items()},
            **{f"number {name}": text for name, text in NUMBERS.items()},
            **{f"date {date!a}": dumped(date) for date in DATES if field == "birth_date"},
            **{name: dumped(value) for name, value in OTHERS.items()},
        }
        for name, value in values.items():
            fields = [dumped(key) + b":" + dumped(right) for key, right in known.patient().items() if key != field]
            body = b"{" + b",".join((*fields, dumped(field) + b":" + value)) + b"}"
            statuses = None if field in {"mrn", "full_name"} and name.startswith("text") else REFUSED
            yield Case(f"{field}: {name}", (known.post(body),), statuses=statuses)
            change = b"{" + dumped(field) + b":" + value + b"}"
            yield Case(
                f"{field} of a change: {name}",
                (known.request("PATCH", known.one, body=change),),
                statuses=None if statuses is None else REFUSED,
            )


def _duplicates(known: Known) -> Iterator[Case]:
    right = dumped(known.patient())
    yield Case("body: a key twice", (known.post(right[:-1] + b', "mrn": "OTHER-1"}'),))
    yield Case("body: a key twice, once wrong", (known.post(right[:-1] + b', "mrn": "\\u0000"}'),), statuses=REFUSED)
    yield Case("body: a key 900 times", (known.post(b"{" + b'"mrn": "A",' * 900 + right[1:]),))
    yield Case("body: a key in escapes", (known.post(right[:-1] + b', "\\u006drn": "\\ud800"}'),), statuses=REFUSED)


def _encoded(known: Known) -> Iterator[Case]:
    text = json.dumps(known.patient() | {"full_name": "Zoë"}, ensure_ascii=False)
    bodies = {
        "gzip": gzip.compress(text.encode(), mtime=0),
        "deflate": zlib.compress(text.encode()),
        "JSON": text.encode(),
        # 20 kB of which come 20 MB.
        "a bomb": gzip.compress(bytes(20_000_000), mtime=0),
    }
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "latin-1", "utf-7"):
        yield Case(f"body in {encoding}", (known.post(text.encode(encoding)),))
        media_type = JSON + b"; charset=" + encoding.encode()
        yield Case(f"body in {encoding}, and says so", (known.post(text.encode(encoding), media_type=media_type),))
    yield Case("body in EBCDIC", (known.post(json.dumps(known.patient()).encode("cp037")),), statuses=REFUSED)
    for coding in CODINGS:
        for name, body in bodies.items():
            yield Case(f"body is {name}, said to be {coding!a}", (known.post(body, b"Content-Encoding: " + coding),))
