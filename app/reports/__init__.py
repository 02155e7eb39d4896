"""Reports: on the analytics database, in a small pool of their own, never in the way of the other routes."""

from app.reports.routes import router

__all__ = ["router"]
