"""How deep JSON nests, told before it is parsed: parsers and serializers recurse, and fail at depths of their own."""

import re

# A string, or the part of it that is there, or a bracket. Where the quote at the end is missing the string takes the
# rest of the text; otherwise the search would begin again at each escaped quote, and take the square of the time.
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*("?)|[\[\]{}]', re.DOTALL)


class Nesting:
    """The arrays and objects that are open in the part of a JSON text that has arrived, strings left out."""

    def __init__(self) -> None:
        self._depth = 0
        # What the next piece is read behind: the beginning of a string that has no end yet.
        self._before = b""

    def exceeds(self, limit: int, piece: bytes) -> bool:
        """Read on, and say whether more than `limit` were open at once."""
        text, self._before = self._before + piece, b""
        for match in _STRING_OR_BRACKET.finditer(text):
            token = match[0]
            if token in {b"[", b"{"}:
                self._depth += 1
                if self._depth > limit:
                    return True
            elif token in {b"]", b"}"}:
                self._depth -= 1
            elif not match[1]:
                # A backslash at the end belongs to what comes.
                self._before = b'"' + text[match.end() :]
        return False
