"""Every statement about users. Each function takes the session first; none commits.

Reads give rows and not entities: nothing is loaded by accident, and a row costs a third of an entity.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from app.db.sessions import ReadSession, WriteSession
from app.errors import Conflict, NotFound
from app.users.models import User

COLUMNS = (User.id, User.email, User.full_name, User.is_active, User.created_at)

UserRow: TypeAlias = Row[int, str, str, bool, datetime]


class UserNotFound(NotFound):
    """No user has this id."""

    def __init__(self, user_id: int) -> None:
        super().__init__(f"User {user_id} does not exist.")


class EmailTaken(Conflict):
    """Another user has this email, in whatever case."""

    code = "email_taken"

    def __init__(self) -> None:
        super().__init__("A user with this email exists already.")


async def get_user(session: ReadSession, user_id: int) -> UserRow:
    """Return one user.

    Raises: UserNotFound.
    """
    row = (await session.execute(select(*COLUMNS).where(User.id == user_id))).one_or_none()
    if row is None:
        raise UserNotFound(user_id)
    return row


async def list_users(session: ReadSession, *, limit: int, after_id: int = 0) -> Sequence[UserRow]:
    """Return at most `limit` users with a larger id than `after_id`, by id."""
    statement = select(*COLUMNS).where(User.id > after_id).order_by(User.id).limit(limit)
    return (await session.execute(statement)).all()


async def add_user(session: WriteSession, values: Mapping[str, Any]) -> UserRow:
    """Store a user and return it.

    Raises: EmailTaken.
    """
    try:
        return (await session.execute(insert(User).values(**values).returning(*COLUMNS))).one()
    except IntegrityError as error:
        raise EmailTaken from error


async def change_user(session: WriteSession, user_id: int, changes: Mapping[str, Any]) -> UserRow:
    """Change some columns of a user and return it.

    Raises: UserNotFound, EmailTaken.
    """
    statement = update(User).where(User.id == user_id).values(**changes).returning(*COLUMNS)
    try:
        row = (await session.execute(statement)).one_or_none()
    except IntegrityError as error:
        raise EmailTaken from error
    if row is None:
        raise UserNotFound(user_id)
    return row


async def delete_user(session: WriteSession, user_id: int) -> None:
    """Delete a user.

    Raises: UserNotFound.
    """
    if (await session.execute(delete(User).where(User.id == user_id).returning(User.id))).one_or_none() is None:
        raise UserNotFound(user_id)
