"""The statements of the reports. They read other domains' tables by name and import none of their code."""

from datetime import datetime

from sqlalchemy import text

from app.db.sessions import ReadSession
from app.reports.schemas import Day, Decade, Summary

# Oldest first; days without a patient are left out.
BY_DECADE = text("""
    SELECT (extract(year FROM birth_date)::int / 10) * 10 AS decade, count(*) AS patients
    FROM patients GROUP BY decade ORDER BY decade
""")
BY_DAY = text("""
    SELECT (created_at AT TIME ZONE 'UTC')::date AS day, count(*) AS patients
    FROM patients GROUP BY day ORDER BY day
""")


async def summarise(session: ReadSession) -> Summary:
    """Count patients by decade of birth and by day of registration, in the session's one snapshot."""
    as_of: datetime = (await session.execute(text("SELECT now()"))).scalar_one()
    decades = [Decade(decade=row.decade, patients=row.patients) for row in await session.execute(BY_DECADE)]
    days = [Day(day=row.day, patients=row.patients) for row in await session.execute(BY_DAY)]
    return Summary(as_of=as_of, patients=sum(d.patients for d in decades), by_decade=decades, by_day=days)
