"""Key-set paging: a page starts after the last key of the one before, so page 1,000 costs what page 1 costs.

Lists are plain JSON arrays; the next page is in the Link header (RFC 8288). The cursor in it is opaque to clients.
"""

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Query, Request, Response

from app.errors import ServiceError

PAGE_LIMIT = 200
RowT = TypeVar("RowT")


class InvalidCursor(ServiceError):
    """`after` is not a cursor of this list."""

    status = 422
    code = "invalid_cursor"


Limit = Annotated[int, Query(ge=1, le=PAGE_LIMIT, description="Items on a page.")]
After = Annotated[
    str | None, Query(max_length=2000, description="Cursor of the Link header; leave it out for the first page.")
]


def encode_cursor(*key: Any) -> str:
    """Turn the last key of a page into a cursor."""
    return base64.urlsafe_b64encode(json.dumps(key, separators=(",", ":")).encode()).rstrip(b"=").decode()


def decode_cursor(after: str | None, *types: type) -> list[Any] | None:
    """Turn a cursor back into a key with parts of these types; None for the first page.

    Raises: InvalidCursor when it is not one that this list gave.
    """
    if after is None:
        return None
    try:
        padded = after.encode() + b"=" * (-len(after) % 4)
        key = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError):
        key = None
    if (
        not isinstance(key, list)
        or [type(part) for part in key] != list(types)
        or any(isinstance(part, str) and "\0" in part for part in key)
        or any(isinstance(part, int) and not 0 < part < 2**63 for part in key)
    ):
        raise InvalidCursor("The cursor `after` is not one that this list gave.")
    return key


def cut_page(
    request: Request, response: Response, rows: Sequence[RowT], limit: int, key: Callable[[RowT], tuple[Any, ...]]
) -> Sequence[RowT]:
    """Return the first `limit` rows; when there are more, name the next page in the Link header."""
    page = rows[:limit]
    if len(rows) > limit:
        url = request.url.include_query_params(after=encode_cursor(*key(page[-1])))
        response.headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    return page
