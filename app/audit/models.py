"""The table of changes. Triggers write it, and this service never reads it."""

from sqlalchemy import BigInteger, Column, Identity, Index, Table, Text, func
from sqlalchemy.dialects.postgresql import TIMESTAMP

from app.models import Base

AUDIT_TRAIL = Table(
    "audit_trail",
    Base.metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("at", TIMESTAMP(timezone=True), server_default=func.now(), nullable=False, index=True),
    Column("subject", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("relation", Text, nullable=False),
    Column("row_id", Text, nullable=False),
    Column("request_id", Text),
    Index(None, "relation", "row_id"),
)
