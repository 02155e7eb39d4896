"""What the textbook's variants share: the answer's schema, the ORM's model, sizes of pools, and the work besides."""

import os
from datetime import date, datetime

from pydantic import BaseModel, ConfigDict
from sqlalchemy import FetchedValue
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# As tutorials have it; a benchmark of many instances sets others.
POOL_SIZE = int(os.environ.get("BENCH_POOL_SIZE", "10"))
MAX_OVERFLOW = int(os.environ.get("BENCH_MAX_OVERFLOW", "5"))
POOL_TIMEOUT_SECONDS = 30
# By it the harness counts a way's connections; psycopg reads the variable itself.
SERVER_SETTINGS = {"application_name": os.environ.get("PGAPPNAME", "bench")}
BY_ID = "SELECT id, mrn, full_name, birth_date, created_at, updated_at FROM patients WHERE id = $1"
# A query that waits, as for a disk or a lock, and one that computes.
WAIT = "SELECT pg_sleep(0.02)"
COMPUTE = "SELECT sum(n) FROM generate_series(1, 20000) AS n"


class Base(DeclarativeBase):
    """The ORM's models."""


class Patient(Base):
    """A patient, as an entity."""

    __tablename__ = "patients"

    id: Mapped[int] = mapped_column(primary_key=True)
    mrn: Mapped[str]
    full_name: Mapped[str]
    birth_date: Mapped[date]
    created_at: Mapped[datetime] = mapped_column(server_default=FetchedValue())
    updated_at: Mapped[datetime] = mapped_column(server_default=FetchedValue())


class PatientIn(BaseModel):
    """A new patient."""

    mrn: str
    full_name: str
    birth_date: date


class PatientOut(BaseModel):
    """A patient, as answered."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    mrn: str
    full_name: str
    birth_date: date
    created_at: datetime
    updated_at: datetime


def reader_url(driver: str = "") -> str:
    """Return where reads go, for SQLAlchemy's dialect when a driver is named."""
    return _for_driver("DATABASE_REPLICA_URL", driver)


def writer_url(driver: str = "") -> str:
    """Return where writes go, for SQLAlchemy's dialect when a driver is named."""
    return _for_driver("DATABASE_URL", driver)


def _for_driver(variable: str, driver: str) -> str:
    return os.environ[variable].replace("postgresql://", f"postgresql{driver}://", 1)
