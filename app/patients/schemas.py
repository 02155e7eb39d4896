"""What clients send and get."""

from datetime import UTC, date, datetime, timedelta
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from app.fields import Change, Line


def _not_in_future(birth_date: date) -> date:
    # Somewhere on earth it is already tomorrow.
    if birth_date > datetime.now(UTC).date() + timedelta(days=1):
        raise ValueError("must not be in the future")
    return birth_date


Mrn = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,32}$")]
BirthDate = Annotated[date, Field(ge=date(1850, 1, 1)), AfterValidator(_not_in_future)]


class PatientIn(BaseModel):
    """A new patient."""

    model_config = ConfigDict(extra="forbid")

    mrn: Mrn
    full_name: Line
    birth_date: BirthDate


class PatientChange(Change):
    """What to change of a patient."""

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
