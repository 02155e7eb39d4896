"""Types of request fields that more than one domain uses."""

from typing import Annotated, Any, Self

from fastapi import Path
from pydantic import BaseModel, ConfigDict, StringConstraints, model_validator

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
# A primary key. Larger numbers do not fit into PostgreSQL's bigint.
Id = Annotated[int, Path(ge=1, le=2**63 - 1)]


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
