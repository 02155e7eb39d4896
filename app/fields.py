"""Types of request fields, for every domain. Each refuses what its JSON Schema refuses, and takes what that takes."""

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any, Self

from fastapi import Path
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic_core.core_schema import CoreSchema, no_info_before_validator_function

LARGEST_ID = 2**63 - 1
_BOUNDS = {"gt", "ge", "lt", "le", "multiple_of", "max_digits", "decimal_places"}
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}:\d{2}(\.\d+)?([Zz]|[+-]\d{2}:\d{2})")


def _written_as_date(value: object) -> object:
    # Pydantic would read 0 and "0" as 1970-01-01.
    if not isinstance(value, str) or _DATE.fullmatch(value) is None:
        raise ValueError("must be a date, written as YYYY-MM-DD")
    return value


def _written_as_time(value: object) -> object:
    # The same, and to the schema a time has its seconds and its zone.
    if not isinstance(value, str) or _TIME.fullmatch(value) is None:
        raise ValueError("must be a time with its zone, written as 2026-01-31T09:30:00Z")
    return value


def _not_in_future(day: date) -> date:
    # East of UTC it may be tomorrow already.
    if day > datetime.now(UTC).date() + timedelta(days=1):
        raise ValueError("must not be in the future")
    return day


def _whole(value: object) -> object:
    # JSON has one kind of number: 7.0 is an integer there, and not in Python.
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class AsText:
    r"""In JSON a value of this type is text of one form, of which the OpenAPI document gives the pattern.

    Pydantic reads a decimal or a time of day from numbers too, and describes them as any number, or as any text. The
    pattern is of the whole text, without ^ and $: in Python $ lets a line's end pass, in JSON Schema it does not. It is
    all that the document tells, so bounds stand in it: `(?!0+(\.0+)?$)` in front refuses every zero.

    Raises: TypeError for a bound of `Field` beside it, when the model is made, or where it stands behind, the document.
    """

    pattern: str
    example: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Refuse what is written in another way, before Pydantic reads it."""
        schema = handler(source)
        self._refuse(_BOUNDS.intersection(schema))
        return no_info_before_validator_function(self._written_so, schema)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, _handler: object) -> dict[str, Any]:
        """Describe the text, in requests and in answers."""
        self._refuse(_BOUNDS.intersection(schema.get("metadata", {}).get("pydantic_js_updates", ())))
        return {"type": "string", "pattern": f"^({self.pattern})$", "examples": [self.example]}

    def _refuse(self, bounds: set[str]) -> None:
        if bounds:
            raise TypeError(
                f"{', '.join(sorted(bounds))} beside AsText would not be told in the OpenAPI document. Write the bound "
                r"into the pattern: (?!0+(\.0+)?$) in front of it refuses every zero."
            )

    def _written_so(self, value: object) -> object:
        # An answer is made of values as the database gives them.
        written = isinstance(value, str) and re.fullmatch(self.pattern, value) is not None
        if isinstance(value, str | int | float) and not written:
            raise ValueError(f"must be text, written as {self.example}")
        return value


# One line of text without control characters: PostgreSQL cannot store NUL, and the others make text unreadable. That
# it holds more than spaces is what `min_length` demands after they are taken off, and what the pattern tells clients.
Line = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True,
        min_length=1,
        max_length=200,
        pattern=r"^[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]*$",
    ),
]
# A day of the calendar, and a moment. In whatever zone it is written, the years are those of Python.
Day = Annotated[date, BeforeValidator(_written_as_date)]
PastDay = Annotated[Day, AfterValidator(_not_in_future)]
Moment = Annotated[
    AwareDatetime,
    BeforeValidator(_written_as_time),
    Field(ge=datetime(1, 1, 2, tzinfo=UTC), lt=datetime(9999, 12, 31, tzinfo=UTC)),
]
# A time of day, without a zone.
Clock = Annotated[time, AsText(r"([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\.[0-9]{1,6})?)?", "09:30:00")]
# An integer takes it at the end: `Annotated[int, Field(strict=True, ge=0), WHOLE]`. Of Pydantic's own, one would take
# "1" and true, and the strict one refuse 7.0. The document would not tell bounds that stand behind it.
WHOLE = BeforeValidator(_whole)
# A primary key in a path. Larger numbers do not fit into PostgreSQL's bigint.
Id = Annotated[int, Path(ge=1, le=LARGEST_ID)]
# A primary key in JSON, whose readers may have no larger integers (RFC 8259).
Key = Annotated[int, Field(strict=True, ge=1, le=2**53 - 1), WHOLE]


def _describe_change(schema: dict[str, Any]) -> None:
    """Say in the OpenAPI document what `Change` demands: by their types alone its fields would take null."""
    schema["minProperties"] = 1
    for described in schema["properties"].values():
        described.pop("default", None)
        kinds = [kind for kind in described.pop("anyOf", ()) if kind != {"type": "null"}]
        described.update(kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})


class Change(BaseModel):
    """The body of a PATCH: a field left out stays as it is, null is refused, and something must change."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_describe_change)

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.changes():
            raise ValueError("names nothing to change")
        for name, value in self.changes().items():
            if value is None:
                raise ValueError(f"{name} cannot be null; leave it out to keep it")
        return self

    def changes(self) -> dict[str, Any]:
        """Return the fields that were sent."""
        return {name: getattr(self, name) for name in self.model_fields_set}
