"""The floor with what a service needs that may still fail after its statement: BEGIN and COMMIT around each write."""

from typing import Any

from bench.variants.floor import Floor


class FloorInTransaction(Floor):
    """The application."""

    async def _store(self, connection: Any, new: dict[str, str]) -> Any:
        async with connection.transaction():
            return await super()._store(connection, new)


def create_app() -> FloorInTransaction:
    """Make the application, as `uvicorn --factory` wants it."""
    return FloorInTransaction()
