"""The service with a route of the kind that two alerts are about: it takes a connection, and then waits for others."""

import asyncio

from fastapi import FastAPI
from sqlalchemy import text

from app import main
from pglifeguard.fastapi import WriteDB


def create_app() -> FastAPI:
    """Build the service and the route beside its own."""
    app = main.create_app()
    app.add_api_route("/careless", careless, methods=["POST"], status_code=204)
    return app


async def careless(session: WriteDB) -> None:
    """Hold a connection for six seconds, five of them longer than an idle checkout may."""
    await session.execute(text("SELECT 1"))
    await asyncio.sleep(6)
