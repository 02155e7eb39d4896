"""What every table shares: names for constraints, times with a zone, text without a length."""

from datetime import datetime
from typing import ClassVar

from sqlalchemy import BigInteger, MetaData, Text
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.orm import DeclarativeBase


class Base(DeclarativeBase):
    """Declares tables. Relationships, where there are any, are `lazy="raise"`: no query hides in an attribute."""

    # Without names of our own a constraint could not be dropped by a migration, nor told apart in an error.
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
