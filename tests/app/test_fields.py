"""The OpenAPI document tells clients what the fields' types refuse, and which answers a body may get."""

import re
from typing import Any

import pytest

from app.fields import Change, Line
from app.main import create_app
from tests.conftest import Database


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


async def test_each_body_may_be_refused(database: Database) -> None:
    """Whatever reads a body can be told that it is no JSON, late, or too large."""
    paths = create_app(database.settings()).openapi()["paths"]

    declared = [set(one["responses"]) for path in paths.values() for one in path.values() if "requestBody" in one]
    assert len(declared) >= 2
    assert all({"400", "408", "413"} <= statuses for statuses in declared)
