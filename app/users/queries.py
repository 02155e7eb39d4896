"""Every statement about users. Each function takes the session first; none commits.

Reads return rows and not entities: a row loads nothing by accident and costs a third of an entity.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

from sqlalchemy import Row, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from app.users.models import User
from pglifeguard import Conflict, NotFound, Query, ReadSession, WriteSession, constraint

COLUMNS = (User.id, User.email, User.full_name, User.is_active, User.created_at)

UNIQUE = "uq_users_email_lower"
UserRow: TypeAlias = Row[int, str, str, bool, datetime]
# Built and compiled once, because compiling costs as much as the round trip.
BY_ID = Query(select(*COLUMNS).where(User.id == bindparam("user_id")))
PAGE = Query(select(*COLUMNS).where(User.id > bindparam("after_id")).order_by(User.id).limit(bindparam("limit")))
ADD = Query(
    insert(User).values({name: bindparam(name) for name in ("email", "full_name", "is_active")}).returning(*COLUMNS)
)


class UserNotFound(NotFound):
    """No user has this id."""

    def __init__(self, user_id: int) -> None:
        super().__init__(f"User {user_id} does not exist.")


class EmailTaken(Conflict):
    """Another user has this email, in upper or lower case."""

    code = "email_taken"

    def __init__(self) -> None:
        super().__init__("A user with this email exists already.")


async def get_user(session: ReadSession, user_id: int) -> UserRow:
    """Return one user.

    Raises: UserNotFound.
    """
    rows = await session.rows(BY_ID, user_id=user_id)
    if not rows:
        raise UserNotFound(user_id)
    return rows[0]


async def list_users(session: ReadSession, *, limit: int, after_id: int = 0) -> Sequence[UserRow]:
    """Return at most `limit` users with a larger id than `after_id`, by id."""
    return await session.rows(PAGE, after_id=after_id, limit=limit)


async def add_user(session: WriteSession, values: Mapping[str, Any]) -> UserRow:
    """Store a user and return it.

    Raises: EmailTaken.
    """
    try:
        return (await session.rows(ADD, **values))[0]
    except IntegrityError as error:
        if constraint(error) != UNIQUE:
            raise
        raise EmailTaken from error


async def change_user(session: WriteSession, user_id: int, changes: Mapping[str, Any]) -> UserRow:
    """Change some columns of a user and return it.

    Raises: UserNotFound, EmailTaken.
    """
    statement = update(User).where(User.id == user_id).values(**changes).returning(*COLUMNS)
    try:
        row = (await session.execute(statement)).one_or_none()
    except IntegrityError as error:
        if constraint(error) != UNIQUE:
            raise
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
