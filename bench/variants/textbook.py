"""The textbook's async engine: QueuePool with pre-ping and 30 seconds of patience, BEGIN … COMMIT, entities."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated

from fastapi import Depends, FastAPI
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from bench.variants import patients as shared


def create_app() -> FastAPI:
    """Make the application."""
    read_session, write_session = (
        _sessions_of(url) for url in (shared.reader_url("+asyncpg"), shared.writer_url("+asyncpg"))
    )
    app = FastAPI()

    @app.get("/patients/{patient_id}", response_model=shared.PatientOut)
    async def get_patient(patient_id: int, session: Annotated[AsyncSession, Depends(read_session)]) -> shared.Patient:
        found = await session.execute(select(shared.Patient).where(shared.Patient.id == patient_id))
        return found.scalar_one()

    @app.post("/patients", status_code=201, response_model=shared.PatientOut)
    async def add_patient(
        new: shared.PatientIn, session: Annotated[AsyncSession, Depends(write_session)]
    ) -> shared.Patient:
        patient = shared.Patient(**new.model_dump())
        session.add(patient)
        await session.commit()
        await session.refresh(patient)
        return patient

    @app.get("/wait")
    async def wait(session: Annotated[AsyncSession, Depends(read_session)]) -> None:
        await session.execute(text(shared.WAIT))

    @app.get("/health/db")
    async def look(session: Annotated[AsyncSession, Depends(write_session)]) -> None:
        await session.execute(text("SELECT 1"))

    @app.get("/health/ready")
    async def ready() -> None:
        pass

    return app


def _sessions_of(url: str) -> Callable[[], AsyncIterator[AsyncSession]]:
    engine = create_async_engine(
        url,
        pool_size=shared.POOL_SIZE,
        max_overflow=shared.MAX_OVERFLOW,
        pool_timeout=shared.POOL_TIMEOUT_SECONDS,
        pool_pre_ping=True,
        pool_recycle=1800,
        connect_args={"server_settings": shared.SERVER_SETTINGS},
    )
    make_session = async_sessionmaker(engine, expire_on_commit=False)

    async def session_of() -> AsyncIterator[AsyncSession]:
        async with make_session() as session:
            try:
                yield session
                await session.commit()
            except Exception:
                await session.rollback()
                raise

    return session_of
