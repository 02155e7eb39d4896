"""The route that takes a user over from the user directory; loaded where `DIRECTORY_URL` is set."""

from fastapi import APIRouter, Request

from app.fields import Id
from app.settings import Settings
from app.users import queries
from app.users.directory import fetch_profile
from app.users.schemas import UserOut
from pglifeguard.fastapi import RequestDatabases, documented

router = APIRouter(
    prefix="/users",
    tags=["users"],
    responses=documented(401, 403, 422, 502, 503, 504),
)


@router.post("/{user_id}/sync", response_model=UserOut, responses=documented(404))
async def sync_user(request: Request, databases: RequestDatabases, user_id: Id) -> queries.UserRow:
    """Take over name and state from the user directory.

    The directory may take seconds, so no connection is held while it thinks: read, let go, ask, write.
    """
    settings: Settings = request.app.state.settings
    async with databases.reading() as session:
        user = await queries.get_user(session, user_id)
    profile = await fetch_profile(
        request.app.state.directory, user.email, timeout_seconds=settings.directory_timeout_seconds
    )
    async with databases.writing() as session:
        return await queries.change_user(session, user_id, profile.model_dump())
