"""The route that takes a user's profile from the user directory; mounted only if `DIRECTORY_URL` is set."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request

from app import audit
from app.fields import Id
from app.security import needs
from app.settings import Settings
from app.users import queries
from app.users.directory import fetch_profile, open_directory
from app.users.schemas import UserOut
from pglifeguard.fastapi import RequestDatabases, documented


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep the directory's client open while the service runs."""
    async with open_directory(app.state.settings) as app.state.directory:
        yield


responses = documented(401, 403, 422, 502, 503, 504)
router = APIRouter(
    prefix="/users",
    tags=["users"],
    dependencies=[needs("users:write")],
    responses=responses,
    lifespan=lifespan,
)


@router.post("/{user_id}/sync", response_model=UserOut, responses=documented(404))
async def sync_user(request: Request, databases: RequestDatabases, user_id: Id) -> queries.UserRow:
    """Take over name and state from the user directory.

    The directory may take seconds to answer, so the connection is released after the read and acquired again for the
    write.
    """
    settings: Settings = request.app.state.settings
    async with databases.reading() as session:
        user = await queries.get_user(session, user_id)
    profile = await fetch_profile(
        request.app.state.directory, user.email, timeout_seconds=settings.directory_timeout_seconds
    )
    async with databases.writing() as session:
        await audit.mark(session, request)
        return await queries.change_user(session, user_id, profile.model_dump())
