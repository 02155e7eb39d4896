"""The table of patients."""

from datetime import date, datetime

from sqlalchemy import Identity, Index, UniqueConstraint, func
from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base


class Patient(Base):
    """A patient, known to the hospital by a medical record number."""

    __tablename__ = "patients"

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    mrn: Mapped[str]
    full_name: Mapped[str]
    birth_date: Mapped[date]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (UniqueConstraint("mrn"),)


# Serves the search by prefix, its order and its paging. In the C collation a prefix is a range of the index, whatever
# the collation of the database.
Index("ix_patients_name", func.lower(Patient.full_name).collate("C"), Patient.id)
