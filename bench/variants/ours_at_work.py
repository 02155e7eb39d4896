"""Ours, with a query that waits and a query that computes, on the service's own pools, and a way to resize them."""

from fastapi import FastAPI, Request
from sqlalchemy import text

from app.main import create_app as create_service
from bench.variants.patients import COMPUTE, WAIT
from pglifeguard.databases import Databases
from pglifeguard.fastapi.sessions import ReadDB


def create_app() -> FastAPI:
    """Make the application."""
    app = create_service()

    @app.get("/wait")
    async def wait(session: ReadDB) -> None:
        await session.execute(text(WAIT))

    @app.get("/compute")
    async def compute(session: ReadDB) -> None:
        await session.execute(text(COMPUTE))

    @app.put("/pool/{size}")
    async def resize(size: int, request: Request) -> None:
        databases: Databases = request.app.state.databases
        pool = databases.replicas[0].pool
        pool.settings = pool.settings.model_copy(update={"pool_size": size, "pool_min_size": size})
        pool.abandon()
        await pool.warm_up()

    return app
