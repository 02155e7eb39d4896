"""The OpenAPI document tells clients what the fields' types refuse, and which answers a body may get."""

import re
from datetime import time
from decimal import Decimal
from typing import Annotated, Any

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from app.fields import AsText, Change, Clock, Day, Key, Line, Moment, PastDay
from app.main import create_app
from tests.conftest import Database

WEIGHT = Annotated[Decimal, AsText(r"[0-9]{1,6}(\.[0-9]{1,2})?", "12.50")]


class ThingChange(Change):
    """The fields of a thing to change."""

    name: Line | None = None
    size: int | str | None = None
    anything: Any = None


def test_change_tells_that_it_refuses_null() -> None:
    """By its types alone a PATCH would take null, and no field at all."""
    described = ThingChange.model_json_schema()

    assert described["minProperties"] == 1
    assert described["properties"]["name"]["type"] == "string"
    assert [kind["type"] for kind in described["properties"]["size"]["anyOf"]] == ["integer", "string"]
    assert "null" not in str(described)
    assert "default" not in str(described)


@pytest.mark.parametrize(
    ("text", "fits"), [("Ada", True), (" Ada ", True), ("", False), (" ", False), ("\t", False), ("A\0", False)]
)
def test_line_tells_that_it_refuses_spaces_alone(text: str, fits: bool) -> None:  # noqa: FBT001  # A column of the table.
    """The pattern of the document refuses what is empty without the spaces around it."""
    pattern = ThingChange.model_json_schema()["properties"]["name"]["pattern"]

    assert (re.search(pattern, text) is not None) is fits


@pytest.mark.parametrize(
    "kind", [Annotated[WEIGHT, Field(gt=0)], Annotated[Decimal, Field(gt=0), AsText("[0-9]{1,6}", "12")]]
)
def test_bound_that_the_document_would_not_tell_is_refused(kind: Any) -> None:
    """A value that fits the pattern would be a 422. The sentence says how to write the bound."""
    with pytest.raises(TypeError, match=r"gt beside AsText would not be told .* refuses every zero"):
        TypeAdapter(kind).json_schema()


def taken(kind: Any, value: object) -> str | None:
    """Return what a field of this type makes of a value of JSON, as text; None when it is refused."""
    try:
        return str(TypeAdapter(kind).validate_python(value))
    except ValidationError:
        return None


@pytest.mark.parametrize(
    ("kind", "value", "made"),
    [
        (Day, "2026-01-31", "2026-01-31"),
        *(
            (Day, wrong, None)
            for wrong in (0, "0", True, None, "2026-02-30", "2026-1-31", "20260131", "2026-01-31T00:00:00Z")
        ),
        (PastDay, "1915-12-10", "1915-12-10"),
        (PastDay, "9999-12-31", None),
        (Moment, "2026-01-31T09:30:00Z", "2026-01-31 09:30:00+00:00"),
        (Moment, "2026-01-31t09:30:00.5z", "2026-01-31 09:30:00.500000+00:00"),
        (Moment, "2026-01-31T09:30:00+01:00", "2026-01-31 09:30:00+01:00"),
        *((Moment, wrong, None) for wrong in (0, "0", "2026-01-31", "2026-01-31T09:30Z", "2026-01-31T09:30:00")),
        # Each is a time, and in UTC none that Python has.
        *((Moment, wrong, None) for wrong in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:00:00-14:00")),
        (Clock, "09:30", "09:30:00"),
        (Clock, "23:59:59.5", "23:59:59.500000"),
        # As the database gives it, for an answer.
        (Clock, time(9, 30), "09:30:00"),
        *((Clock, wrong, None) for wrong in (0, 3600.0, True, "24:00", "9:30", "09:30:00Z", "09:30\n")),
        (WEIGHT, "12.50", "12.50"),
        *((WEIGHT, wrong, None) for wrong in (12, 12.5, True, "", "1e3", "-1", "12.505", "NaN", "12.50 ", "12.50\n")),
        (Key, 1, "1"),
        (Key, 7.0, "7"),
        (Key, 2**53 - 1, str(2**53 - 1)),
        *((Key, wrong, None) for wrong in (0, -1, 1.5, True, "1", None, 2**53, 1e300, float("inf"), float("nan"))),
    ],
)
def test_field_takes_what_the_document_says(kind: Any, value: object, made: str | None) -> None:
    """A date is written as one, a time has its zone, and 7.0 is an integer: as JSON Schema has it, no more, no less."""
    assert taken(kind, value) == made


async def test_each_body_may_be_refused(database: Database) -> None:
    """Whatever reads a body can be told that it is no JSON, late, or too large."""
    paths = create_app(database.settings()).openapi()["paths"]

    declared = [set(one["responses"]) for path in paths.values() for one in path.values() if "requestBody" in one]
    assert len(declared) >= 2
    assert all({"400", "408", "413"} <= statuses for statuses in declared)
