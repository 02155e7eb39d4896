"""The depth of JSON is counted as a parser would, in whatever pieces it comes."""

import time

from hypothesis import given
from hypothesis import strategies as st

from pglifeguard.fastapi.json_depth import Nesting


def depth_of(text: bytes) -> int:
    """Count the slow and plain way, byte by byte."""
    depth = deepest = 0
    in_string = escaped = False
    for byte in text:
        if in_string:
            in_string = escaped or byte != ord('"')
            escaped = not escaped and byte == ord("\\")
        elif byte == ord('"'):
            in_string = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


@given(st.lists(st.binary(max_size=8).map(lambda chunk: bytes(b'[]{}"\\a,'[byte % 8] for byte in chunk)), max_size=8))
def test_depth_is_that_of_the_whole_text(pieces: list[bytes]) -> None:
    """Strings, escapes and brackets in them may be cut anywhere."""
    deepest = depth_of(b"".join(pieces))

    for limit in range(deepest + 1):
        nesting = Nesting()
        # All of them, also after the one that is too deep.
        found = [nesting.exceeds(limit, piece) for piece in pieces]
        assert any(found) == (limit < deepest)


def test_hostile_text_is_read_once() -> None:
    """A string without an end, full of escaped quotes, takes no square of the time."""
    started = time.process_time()
    for text in (b'"' + b'\\"' * 500_000, b'"' * 1_000_000, b"\\" * 1_000_000, b"[]" * 500_000):
        Nesting().exceeds(100, text)

    assert time.process_time() - started < 5
