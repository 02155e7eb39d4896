"""asyncpg's own pool under FastAPI."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import asyncpg
from fastapi import Depends, FastAPI, Request

from bench.variants.patients import BY_ID, MAX_OVERFLOW, POOL_SIZE, SERVER_SETTINGS, WAIT, PatientOut, reader_url


async def connection_of(request: Request) -> AsyncIterator[Any]:
    """Lend a connection for the request."""
    async with request.app.state.pool.acquire() as connection:
        yield connection


Connection = Annotated[Any, Depends(connection_of)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the pool and close it."""
    most = POOL_SIZE + MAX_OVERFLOW
    async with asyncpg.create_pool(reader_url(), min_size=5, max_size=most, server_settings=SERVER_SETTINGS) as pool:
        app.state.pool = pool
        yield


def create_app() -> FastAPI:
    """Make the application."""
    app = FastAPI(lifespan=lifespan)

    @app.get("/patients/{patient_id}")
    async def get_patient(patient_id: int, connection: Connection) -> PatientOut:
        return PatientOut.model_validate(dict(await connection.fetchrow(BY_ID, patient_id)))

    @app.get("/wait")
    async def wait(connection: Connection) -> None:
        await connection.execute(WAIT)

    @app.get("/health/ready")
    async def ready() -> None:
        pass

    return app
