"""Ours, with two more routes: a query that waits and a query that computes, on the pools and gates of the service."""

from fastapi import FastAPI
from sqlalchemy import text

from app.db.dependencies import ReadDB
from app.main import create_app as create_service
from bench.variants.patients import COMPUTE, WAIT


def create_app() -> FastAPI:
    """Make the application."""
    app = create_service()

    @app.get("/wait")
    async def wait(session: ReadDB) -> None:
        await session.execute(text(WAIT))

    @app.get("/compute")
    async def compute(session: ReadDB) -> None:
        await session.execute(text(COMPUTE))

    return app
