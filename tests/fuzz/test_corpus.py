"""The corpus and the edits: each kind is there, each time the same."""

import itertools

from fuzz.corpus import corpus
from fuzz.corpus.requests import Known
from fuzz.mutations import mutations
from fuzz.wire import Case

TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"


def known() -> Known:
    """Know the same each time."""
    return Known(TOKEN, ("/patients/1", "/health/live"), _numbers=itertools.count())


def sent(cases: list[Case]) -> bytes:
    """Put all that is sent together."""
    return b"".join(piece for case in cases for piece in case.pieces)


def test_corpus_is_the_same_each_time() -> None:
    """No case depends on chance, so what was found is found again."""
    assert corpus(known()) == corpus(known())


def test_corpus_has_each_kind() -> None:
    """What the page docs/fuzzing.md names is sent."""
    cases = corpus(known())
    every = sent(cases)

    assert len(cases) > 3000
    assert {case.end for case in cases} == {"read", "close", "reset", "half"}
    for hostile in (
        b"\\ud800", b"\\u0000", b"1e400", b"1" + b"0" * 400, b"-0.0", b"NaN", b"-Infinity", b"[" * 64_000,
        b'{"a":' * 12_000, '{"mrn'.encode("utf-16"), b"Content-Encoding: gzip", b"DROP TABLE", b"10000-01-01",
        b'"infinity"', b"9223372036854775808", b"urn:uuid:", b"Idempotency-Key: " + b"a" * 256,
        b"X-Consistency-Token: FFFFFFFF/FFFFFFFF",
        b"Prefer: ", b"Accept: ", b"TRACE ", b"CONNECT ", b"X" * 10_000 + b" /", b"HTTP/0.9", b"PRI * HTTP/2.0",
        b"Content-Length: 4\r\nTransfer-Encoding: chunked", b"Upgrade: websocket", b"Range: bytes=",
        b"Expect: 100-continue", b"%252F", b"%00", b"limit=1&" * 900, b"Cookie: a=" + b"b" * 8192,
    ):  # fmt: skip
        assert hostile in every, hostile


def test_some_cases_are_right() -> None:
    """What is refused for its token alone would show nothing: some cases have to succeed."""
    right = [case for case in corpus(known()) if case.statuses is not None and case.statuses <= {200, 201}]

    assert len(right) >= 2


def test_edits_are_repeated_by_their_seed() -> None:
    """The same seed gives the same bytes, another one others."""
    first, again, other = ([*itertools.islice(mutations(known(), seed), 200)] for seed in (1, 1, 2))

    assert first == again
    assert sent(first) != sent(other)
