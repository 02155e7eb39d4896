"""Users: a table, its queries and its routes."""

from app.users.routes import router, sync_router

__all__ = ["router", "sync_router"]
