"""The routes of reports."""

from fastapi import APIRouter

from app.reports import queries
from app.reports.schemas import Day, Decade, Summary
from app.security import needs
from pglifeguard.fastapi import AnalyticsDB, documented

router = APIRouter(
    prefix="/reports",
    tags=["reports"],
    dependencies=[needs("reports:read")],
    responses=documented(401, 403, 503, 504),
)


@router.get("/summary")
async def get_summary(session: AnalyticsDB) -> Summary:
    """Count patients by decade of birth and by day of registration."""
    counts = await queries.count_patients(session)
    decades = [Decade.model_validate(row) for row in counts.by_decade]
    days = [Day.model_validate(row) for row in counts.by_day]
    patients = sum(decade.patients for decade in decades)
    return Summary(as_of=counts.as_of, patients=patients, by_decade=decades, by_day=days)
