"""Key-set paging: a page starts after the last key of the page before, so page 1,000 is as cheap as page 1.

Lists are plain JSON arrays; the next page is in the Link header (RFC 8288). The cursor in it is opaque to clients.
"""

import base64
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar, cast

from fastapi import Query, Request, Response

from pglifeguard import ServiceError
from pglifeguard.fastapi import public_path

PAGE_LIMIT = 200
# Enough for a name of 200 characters of four bytes, in base64, and an id.
CURSOR_CHARACTERS = 2000
RowT = TypeVar("RowT")


class InvalidCursor(ServiceError):
    """`after` is not a cursor of this list."""

    status = 422
    code = "invalid_cursor"


Limit = Annotated[int, Query(ge=1, le=PAGE_LIMIT, description="Items on a page.")]
After = Annotated[
    str | None,
    Query(max_length=CURSOR_CHARACTERS, description="Cursor of the Link header; leave it out for the first page."),
]


def encode_cursor(*key: Any) -> str:
    """Turn the last key of a page into a cursor."""
    text = json.dumps(key, separators=(",", ":"), ensure_ascii=False)
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def decode_cursor(after: str | None, *types: type) -> list[Any] | None:
    """Turn a cursor back into a key with parts of these types; None for the first page.

    Raises: InvalidCursor when it is not one that this list gave.
    """
    if after is None:
        return None
    try:
        padded = after.encode() + b"=" * (-len(after) % 4)
        key: Any = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        # This also refuses half of a surrogate pair, which JSON can express and PostgreSQL cannot store.
        ours = isinstance(key, list) and encode_cursor(*key) == after
    except (ValueError, RecursionError):
        ours = False
    if (
        not ours
        or [type(part) for part in key] != list(types)
        or any(isinstance(part, str) and "\0" in part for part in key)
        or any(isinstance(part, int) and not 0 < part < 2**63 for part in key)
    ):
        raise InvalidCursor("The cursor `after` is not one that this list gave.")
    return cast("list[Any]", key)


def cut_page(
    request: Request, response: Response, rows: Sequence[RowT], limit: int, key: Callable[[RowT], tuple[Any, ...]]
) -> Sequence[RowT]:
    """Return the first `limit` rows; when there are more, name the next page in the Link header."""
    page = rows[:limit]
    if len(rows) > limit:
        url = request.url.include_query_params(after=encode_cursor(*key(page[-1])))
        response.headers["Link"] = f'<{public_path(request)}?{url.query}>; rel="next"'
    return page
