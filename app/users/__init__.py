"""Users: a table, its queries and its routes."""

from collections.abc import Iterator

from fastapi import APIRouter

from app.settings import Settings
from app.users.routes import router

__all__ = ["optional_routers", "router"]


def optional_routers(settings: Settings) -> Iterator[APIRouter]:
    """Give the routes that need the user directory, if there is one."""
    if settings.directory_url is not None:
        from app.users import sync  # noqa: PLC0415  # Its HTTP client is an eighth of the service's whole import.

        yield sync.router
