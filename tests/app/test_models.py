"""What every table shares."""

from datetime import datetime
from typing import cast

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Table, Text
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base


class Named(Base):
    """A table with one of each constraint, which no database has."""

    __tablename__ = "things_named"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    parent_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="RESTRICT"))
    made_at: Mapped[datetime] = mapped_column(index=True)

    __table_args__ = (CheckConstraint("id > 0", name="positive"),)


# The migrations are compared with what Base knows.
Base.metadata.remove(Base.metadata.tables["things_named"])


def test_constraints_have_names() -> None:
    """A migration can drop, and an error can name, every constraint that nobody named."""
    table = cast("Table", Named.__table__)

    assert {getattr(part, "name", None) for part in (*table.constraints, *table.indexes)} == {
        "pk_things_named",
        "uq_things_named_name",
        "fk_things_named_parent_id_users",
        "ck_things_named_positive",
        "ix_things_named_made_at",
    }


def test_types_are_the_ones_without_traps() -> None:
    """Text has no length, a time has a zone, a number has eight bytes."""
    columns = Named.__table__.columns

    assert isinstance(columns.name.type, Text)
    assert isinstance(columns.id.type, BigInteger)
    assert isinstance(columns.made_at.type, TIMESTAMP)
    assert columns.made_at.type.timezone is True
