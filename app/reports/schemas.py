"""What clients get."""

from datetime import date, datetime

from pydantic import BaseModel


class Decade(BaseModel):
    """Patients born in ten years, `decade` being the first of them."""

    decade: int
    patients: int


class Day(BaseModel):
    """Patients registered on one day, UTC."""

    day: date
    patients: int


class Summary(BaseModel):
    """Counts of one snapshot: the parts agree with each other."""

    as_of: datetime
    patients: int
    by_decade: list[Decade]
    by_day: list[Day]
