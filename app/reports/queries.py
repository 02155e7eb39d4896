"""The statements of the reports. They read other domains' tables by name and import none of their code."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime

from sqlalchemy import Row, text

from pglifeguard import ReadSession

# Oldest first; days without a patient are left out.
BY_DECADE = text("""
    SELECT (extract(year FROM birth_date)::int / 10) * 10 AS decade, count(*) AS patients
    FROM patients GROUP BY decade ORDER BY decade
""")
BY_DAY = text("""
    SELECT (created_at AT TIME ZONE 'UTC')::date AS day, count(*) AS patients
    FROM patients GROUP BY day ORDER BY day
""")


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of one snapshot: rows of (decade, patients) and of (day, patients)."""

    as_of: datetime
    by_decade: Sequence[Row[int, int]]
    by_day: Sequence[Row[date, int]]


async def count_patients(session: ReadSession) -> Counts:
    """Count patients by decade of birth and by day of registration, in the session's one snapshot."""
    as_of: datetime = (await session.execute(text("SELECT now()"))).scalar_one()
    decades, days = await session.execute(BY_DECADE), await session.execute(BY_DAY)
    return Counts(as_of, decades.all(), days.all())
