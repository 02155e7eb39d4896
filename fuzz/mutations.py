"""Requests that are right, and then are not: bytes flipped, cut, doubled, put in. The seed repeats them."""

from collections.abc import Iterator
from random import Random

from fuzz.corpus.requests import Known, dumped
from fuzz.wire import Case, End

MOST_EDITS = 4
ENDS: tuple[End, ...] = ("half", "close", "reset")
# What parsers act upon.
TOKENS = (
    b"\0", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b":", b",", b";", b"%", b"%00", b"%0d%0a", b"?", b"#",
    b"&", b"=", b"/", b"..", b"*", b'"', b"'", b"\\", b"\\u0000", b"\\ud800", b"{", b"}", b"[", b"]", b"null", b"NaN",
    b"1e400", b"-1", b"0", b"9223372036854775808", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"chunked",
    b"Transfer-Encoding: chunked\r\n", b"Content-Length: 0\r\n", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n",
    b"HTTP/1.0", b"HTTP/2.0", b"0\r\n\r\n", b"5\r\n", b"HEAD", b"OPTIONS",
)  # fmt: skip


def mutations(known: Known, seed: int) -> Iterator[Case]:
    """Give cases without an end."""
    random = Random(seed)  # noqa: S311  # It is to be repeatable, and no secret.
    number = 0
    while True:
        for request in _right(known):
            edited = request
            for _ in range(random.randint(1, MOST_EDITS)):
                edited = _edited(edited, random)
            end = random.choices(ENDS, (8, 1, 1))[0]
            # Where one request becomes two, both are answered.
            yield Case(f"mutation {number} of seed {seed}", (edited,), end=end, answers=len(edited))
            number += 1


def _right(known: Known) -> Iterator[bytes]:
    body = dumped(known.patient())
    yield known.post(body)
    yield known.post(body, b"Idempotency-Key: mutated")
    yield known.request("POST", "/patients", b"Content-Type: application/json", b"Transfer-Encoding: chunked") + (
        b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    )
    yield known.request("PATCH", known.one, body=b'{"full_name": "Ada"}')
    yield known.request("GET", known.one, b"X-Consistency-Token: 1-0/1")
    yield known.request("GET", "/patients?limit=2&name=A&after=WyJhIiwxXQ")
    yield known.request("GET", "/health/live", keep=True) + known.request("GET", "/patients?limit=1")


def _edited(request: bytes, random: Random) -> bytes:
    at = random.randrange(len(request) + 1)
    end = min(len(request), at + random.choice((1, 1, 2, 8, 60)))
    what = random.randrange(6)
    if what == 0:
        return request[:at] + bytes([random.randrange(256)]) + request[at + 1 :]
    if what == 1:
        return request[:at] + random.choice(TOKENS) + request[at:]
    if what == 2:  # noqa: PLR2004  # The edits are counted.
        return request[:at] + random.choice(TOKENS) + request[end:]
    if what == 3:  # noqa: PLR2004
        return request[:at] + request[end:]
    if what == 4:  # noqa: PLR2004
        return request[:end] + request[at:end] * random.choice((1, 2, 50)) + request[end:]
    return request[:at] or b"\0"
