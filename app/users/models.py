"""The table of users."""

from datetime import datetime

from sqlalchemy import Identity, Index, func, true
from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base


class User(Base):
    """A person who may use the service. The email is unique, upper and lower case being the same."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    email: Mapped[str]
    full_name: Mapped[str]
    is_active: Mapped[bool] = mapped_column(server_default=true())
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


Index("uq_users_email_lower", func.lower(User.email), unique=True)
