"""What schemathesis cannot read in the OpenAPI document. It loads this file in its own environment, .venv-fuzz."""

import uuid
from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Any

import schemathesis
from hypothesis import strategies

TOKEN, KEY, CURSOR = "X-Consistency-Token", "Idempotency-Key", "after"
_newest: dict[str, str] = {}

# What fields of a body promise each other, as that one is later than the other, no JSON Schema can say: by method and
# path, values that keep it. A body that fits the document gets them.
BETWEEN_FIELDS: Mapping[str, Mapping[str, Any]] = {
}  # fmt: skip

# Of dates and times JSON Schema can say no bounds, and of an address not that its domain may exist: `.test` is refused.
# Others are in the hostile corpus.
schemathesis.openapi.format("date", strategies.dates(date(1850, 1, 1), date(2026, 1, 1)).map(str))
schemathesis.openapi.format(
    "date-time",
    strategies.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1), timezones=strategies.just(UTC)).map(  # noqa: DTZ001
        datetime.isoformat
    ),
)
schemathesis.openapi.format("email", strategies.from_regex(r"[a-z0-9]{1,20}@[a-z]{2,20}\.(com|org)", fullmatch=True))


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Send what a client that keeps the service's rules sends; what is meant to be wrong stays as it is."""
    del context, kwargs
    # Without its token a client may read from a replica that has not replayed the client's own write.
    if _newest:
        case.headers[TOKEN] = _newest[TOKEN]
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    # No two requests have the same key, and nobody can make up a cursor: to the schema both are any text.
    if KEY in case.headers:
        case.headers[KEY] = uuid.uuid4().hex
    case.query.pop(CURSOR, None)
    if isinstance(case.body, dict):
        case.body |= BETWEEN_FIELDS.get(f"{case.method} {case.path}", {})


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Keep the token of the newest write."""
    del context, case
    if tokens := response.headers.get(TOKEN.lower()):
        _newest[TOKEN] = tokens[-1]
