"""Reports, on the analytics database and its own small pool, so that they take no connection from other routes."""

from app.reports.routes import router

__all__ = ["router"]
