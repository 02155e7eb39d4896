"""The JSON of patients: what clients send and receive."""

from datetime import date, datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.fields import Change, Line, PastDay

Mrn = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,32}$")]
BirthDate = Annotated[
    PastDay,
    # JSON Schema has no bounds for dates.
    Field(ge=date(1850, 1, 1), description="From 1850-01-01 to today."),
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
