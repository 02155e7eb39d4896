"""The base of all tables: names for constraints, times with a zone, text without a length."""

from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from sqlalchemy import BigInteger, MetaData, Text, event
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapper

# With these, reading the attribute sends a query. An async session cannot do that, and a reader does not see it.
HIDDEN_QUERIES = frozenset({"select", True, "dynamic"})


class Base(DeclarativeBase):
    """Declares tables. Each relationship says how it is loaded, `lazy="raise"` if in doubt.

    Raises: TypeError, when the service is built, for a relationship that sends a query when it is read.
    """

    # A migration drops a constraint by its name, and `constraint(error)` tells violations apart by it.
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )
    type_annotation_map: ClassVar = {str: Text, datetime: TIMESTAMP(timezone=True), int: BigInteger}


@event.listens_for(Base, "mapper_configured", propagate=True)
def _refuse_hidden_queries(mapper: Mapper[object], _model: type[object]) -> None:
    for found in mapper.relationships:
        if found.lazy in HIDDEN_QUERIES:
            raise TypeError(
                f"{found} loads with lazy={found.lazy!r}: reading it would send a query, which an async session cannot "
                f'do. Write relationship(..., lazy="raise") and load it where it is needed: '
                f".options(selectinload({found}))"
            )


def load_models() -> None:
    """Import the models of every domain, so that `Base.metadata` has all tables; migrations call this."""
    for found in sorted(Path(__file__).parent.glob("*/models.py")):
        import_module(f"app.{found.parent.name}.models")
