"""The JSON of reports."""

from datetime import date, datetime

from pydantic import BaseModel, ConfigDict


class Decade(BaseModel):
    """Patients born in ten years, `decade` being the first of them."""

    model_config = ConfigDict(from_attributes=True)

    decade: int
    patients: int


class Day(BaseModel):
    """Patients registered on one day, UTC."""

    model_config = ConfigDict(from_attributes=True)

    day: date
    patients: int


class Summary(BaseModel):
    """Counts of one snapshot, so that the parts add up."""

    as_of: datetime
    patients: int
    by_decade: list[Decade]
    by_day: list[Day]
