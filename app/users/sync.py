"""The route that takes a user over from the user directory; loaded where `DIRECTORY_URL` is set."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from app.db.dependencies import consistency_of, databases_of, route_of
from app.db.engines import Databases
from app.errors import documented
from app.fields import Id
from app.users import queries
from app.users.directory import fetch_profile
from app.users.schemas import UserOut

router = APIRouter(
    prefix="/users",
    tags=["users"],
    responses=documented(401, 403, 422, 502, 503, 504),
)


@router.post("/{user_id}/sync", response_model=UserOut, responses=documented(404))
async def sync_user(
    request: Request, databases: Annotated[Databases, Depends(databases_of)], user_id: Id
) -> queries.UserRow:
    """Take over name and state from the user directory.

    The directory may take seconds, so no connection is held while it thinks: read, let go, ask, write.
    """
    label: dict[str, Any] = {"label": route_of(request.scope)}
    async with databases.reading(consistency_of(request.scope), **label) as session:
        user = await queries.get_user(session, user_id)
    timeout_seconds = databases.settings.directory_timeout_seconds
    profile = await fetch_profile(request.app.state.directory, user.email, timeout_seconds=timeout_seconds)
    async with databases.writing(consistency_of(request.scope), **label) as session:
        return await queries.change_user(session, user_id, profile.model_dump())
