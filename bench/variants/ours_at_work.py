"""Ours, with a write of one query, queries that wait and that compute, and a way to resize the pools."""

from typing import Any

from fastapi import FastAPI, Request, Response
from sqlalchemy import literal_column, select

from app.main import create_app as create_service
from app.patients.queries import ADD
from app.patients.schemas import PatientIn, PatientOut
from bench.variants.patients import COMPUTE, WAIT
from pglifeguard import Databases, Query
from pglifeguard.fastapi import ReadDB, RequestDatabases

# As the service's own domains send theirs.
WAITING: Query[Any] = Query(select(literal_column(WAIT.removeprefix("SELECT "))))
COMPUTING: Query[Any] = Query(select(literal_column(COMPUTE.removeprefix("SELECT "))))


def create_app() -> FastAPI:
    """Make the application."""
    app = create_service()

    @app.post("/once", status_code=201, response_model=PatientOut)
    async def add_once(databases: RequestDatabases, new: PatientIn, response: Response) -> Any:
        (patient,) = await databases.write_once(ADD, **vars(new))
        response.headers["Location"] = f"/patients/{patient.id}"
        return patient

    @app.get("/wait")
    async def wait(session: ReadDB) -> None:
        await session.rows(WAITING)

    @app.get("/compute")
    async def compute(session: ReadDB) -> None:
        await session.rows(COMPUTING)

    @app.put("/pool/{size}")
    async def resize(size: int, request: Request) -> None:
        databases: Databases = request.app.state.databases
        pool = databases.replicas[0].pool
        pool.settings = pool.settings.model_copy(update={"pool_size": size, "pool_min_size": size})
        pool.abandon()
        await pool.warm_up()

    # In front, where the service has its own domains: FastAPI tries one route after the other.
    routes = app.router.routes
    routes[:] = [*routes[-4:], *routes[:-4]]
    return app
