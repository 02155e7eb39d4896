"""The floor's work as FastAPI routes, and nothing else: what the framework takes before a service adds anything."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response

from bench.variants.floor import ADD, GET, LIST, LSN, open_pool
from bench.variants.patients import PatientIn, PatientOut


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the pools and close them."""
    async with await open_pool("DATABASE_REPLICA_URL") as reader, await open_pool("DATABASE_URL") as writer:
        app.state.reader, app.state.writer = reader, writer
        yield


def create_app() -> FastAPI:
    """Make the application."""
    app = FastAPI(lifespan=lifespan)

    @app.get("/patients/{patient_id}", response_model=PatientOut)
    async def get_patient(request: Request, patient_id: int) -> Any:
        for pool in (request.app.state.reader, request.app.state.writer):
            async with pool.acquire() as connection:
                row = await connection.fetchrow(GET, patient_id)
            if row is not None:
                return dict(row)
        raise HTTPException(404, f"Patient {patient_id} does not exist.")

    @app.get("/patients", response_model=list[PatientOut])
    async def list_patients(request: Request, limit: int) -> Sequence[Any]:
        async with request.app.state.reader.acquire() as connection:
            rows = await connection.fetch(LIST, 0, limit + 1)
        return [dict(row) for row in rows[:limit]]

    @app.post("/patients", status_code=201, response_model=PatientOut)
    async def add_patient(request: Request, response: Response, new: PatientIn) -> Any:
        async with request.app.state.writer.acquire() as connection:
            async with connection.transaction():
                row = await connection.fetchrow(ADD, new.mrn, new.full_name, new.birth_date)
            response.headers["X-Consistency-Token"] = await connection.fetchval(LSN)
        response.headers["Location"] = f"/patients/{row['id']}"
        return dict(row)

    @app.post("/once", status_code=201, response_model=PatientOut)
    async def add_once(request: Request, response: Response, new: PatientIn) -> Any:
        async with request.app.state.writer.acquire() as connection:
            row = await connection.fetchrow(ADD, new.mrn, new.full_name, new.birth_date)
            response.headers["X-Consistency-Token"] = await connection.fetchval(LSN)
        response.headers["Location"] = f"/patients/{row['id']}"
        return dict(row)

    @app.get("/health/ready")
    async def ready() -> None:
        pass

    return app
