"""Users: a table, its queries and its routes."""

from app.users.routes import router

__all__ = ["router"]
