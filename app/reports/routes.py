"""The routes of reports."""

from fastapi import APIRouter

from app.db.sessions import AnalyticsDB
from app.errors import documented
from app.reports import queries
from app.reports.schemas import Summary

router = APIRouter(prefix="/reports", tags=["reports"], responses=documented(401, 403, 503, 504))


@router.get("/summary")
async def get_summary(session: AnalyticsDB) -> Summary:
    """Count patients by decade of birth and by day of registration."""
    return await queries.summarise(session)
