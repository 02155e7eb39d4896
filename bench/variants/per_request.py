"""A connection for each request: what a first version does."""

from typing import Any

import asyncpg
from fastapi import FastAPI

from bench.variants.patients import BY_ID, SERVER_SETTINGS, WAIT, PatientOut, reader_url


def create_app() -> FastAPI:
    """Make the application."""
    app = FastAPI()

    @app.get("/patients/{patient_id}")
    async def get_patient(patient_id: int) -> PatientOut:
        connection = await asyncpg.connect(reader_url(), server_settings=SERVER_SETTINGS)
        try:
            row: Any = await connection.fetchrow(BY_ID, patient_id)
            return PatientOut.model_validate(dict(row))
        finally:
            await connection.close()

    @app.get("/wait")
    async def wait() -> None:
        connection = await asyncpg.connect(reader_url(), server_settings=SERVER_SETTINGS)
        try:
            await connection.execute(WAIT)
        finally:
            await connection.close()

    @app.get("/health/ready")
    async def ready() -> None:
        pass

    return app
