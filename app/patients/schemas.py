"""The JSON of patients: what clients send and receive."""

import re
from datetime import UTC, date, datetime, timedelta
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from app.fields import Change, Line

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


def _written_as_date(value: object) -> object:
    # Pydantic would read 0 and "0" as 1970-01-01.
    if not isinstance(value, str) or _DATE.fullmatch(value) is None:
        raise ValueError("must be a date, written as YYYY-MM-DD")
    return value


def _not_in_future(birth_date: date) -> date:
    # East of UTC it may be tomorrow already.
    if birth_date > datetime.now(UTC).date() + timedelta(days=1):
        raise ValueError("must not be in the future")
    return birth_date


Mrn = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,32}$")]
BirthDate = Annotated[
    date,
    BeforeValidator(_written_as_date),
    # JSON Schema has no bounds for dates.
    Field(ge=date(1850, 1, 1), description="From 1850-01-01 to today."),
    AfterValidator(_not_in_future),
]


class PatientIn(BaseModel):
    """A new patient."""

    model_config = ConfigDict(extra="forbid")

    mrn: Mrn
    full_name: Line
    birth_date: BirthDate


class PatientChange(Change):
    """The fields of a patient to change."""

    mrn: Mrn | None = None
    full_name: Line | None = None
    birth_date: BirthDate | None = None


class PatientOut(BaseModel):
    """A patient as stored."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    mrn: str
    full_name: str
    birth_date: date
    created_at: datetime
    updated_at: datetime
