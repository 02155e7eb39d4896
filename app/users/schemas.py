"""The JSON of users: what clients send and receive."""

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, EmailStr, Field, StrictBool

from app.fields import Change, Line

Email = Annotated[EmailStr, Field(max_length=254)]


class UserIn(BaseModel):
    """A new user."""

    model_config = ConfigDict(extra="forbid")

    email: Email
    full_name: Line
    is_active: StrictBool = True


class UserChange(Change):
    """The fields of a user to change."""

    email: Email | None = None
    full_name: Line | None = None
    is_active: StrictBool | None = None


class UserOut(BaseModel):
    """A user as stored."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    email: str
    full_name: str
    is_active: bool
    created_at: datetime
