"""The textbook's sync engine: psycopg under SQLAlchemy, in the threads that FastAPI keeps for `def` routes."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, FastAPI
from sqlalchemy import create_engine, select, text
from sqlalchemy.orm import Session, sessionmaker

from bench.variants import patients as shared


def create_app() -> FastAPI:
    """Make the application."""
    engine = create_engine(
        shared.reader_url("+psycopg"),
        pool_size=shared.POOL_SIZE,
        max_overflow=shared.MAX_OVERFLOW,
        pool_timeout=shared.POOL_TIMEOUT_SECONDS,
        pool_pre_ping=True,
        pool_recycle=1800,
    )
    make_session = sessionmaker(engine, expire_on_commit=False)
    app = FastAPI()

    def session_of() -> Iterator[Session]:
        with make_session.begin() as session:
            yield session

    @app.get("/patients/{patient_id}", response_model=shared.PatientOut)
    def get_patient(patient_id: int, session: Annotated[Session, Depends(session_of)]) -> shared.Patient:
        return session.execute(select(shared.Patient).where(shared.Patient.id == patient_id)).scalar_one()

    @app.get("/wait")
    def wait(session: Annotated[Session, Depends(session_of)]) -> None:
        session.execute(text(shared.WAIT))

    @app.get("/health/ready")
    async def ready() -> None:
        pass

    return app
