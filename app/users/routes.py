"""The routes of users."""

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response, status

from app.fields import Id
from app.paging import After, Limit, cut_page, decode_cursor
from app.security import needs
from app.users import queries
from app.users.schemas import UserChange, UserIn, UserOut
from pglifeguard.fastapi import IdempotentRoute, ReadDB, WriteDB, documented, public_path

router = APIRouter(
    prefix="/users",
    tags=["users"],
    dependencies=[needs(read="users:read", write="users:write")],
    route_class=IdempotentRoute,
    responses=documented(401, 403, 422, 503, 504),
)


@router.post("", status_code=status.HTTP_201_CREATED, response_model=UserOut, responses=documented(400, 408, 409, 413))
async def create_user(session: WriteDB, new: UserIn, request: Request, response: Response) -> queries.UserRow:
    """Store a user; the Location header names it."""
    user = await queries.add_user(session, vars(new))
    response.headers["Location"] = f"{public_path(request)}/{user.id}"
    return user


@router.get("", response_model=list[UserOut])
async def list_users(
    session: ReadDB, request: Request, response: Response, limit: Limit = 50, after: After = None
) -> Sequence[queries.UserRow]:
    """List users by id; the Link header names the next page."""
    (after_id,) = decode_cursor(after, int) or (0,)
    rows = await queries.list_users(session, limit=limit + 1, after_id=after_id)
    return cut_page(request, response, rows, limit, lambda row: (row.id,))


@router.get("/{user_id}", response_model=UserOut, responses=documented(404))
async def get_user(session: ReadDB, user_id: Id) -> queries.UserRow:
    """Return one user."""
    return await queries.get_user(session, user_id)


@router.patch("/{user_id}", response_model=UserOut, responses=documented(400, 404, 408, 409, 413))
async def change_user(session: WriteDB, user_id: Id, change: UserChange) -> queries.UserRow:
    """Change some fields of a user."""
    return await queries.change_user(session, user_id, change.changes())


@router.delete("/{user_id}", status_code=status.HTTP_204_NO_CONTENT, responses=documented(404, 409))
async def delete_user(session: WriteDB, user_id: Id) -> None:
    """Delete a user."""
    await queries.delete_user(session, user_id)
