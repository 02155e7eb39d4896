"""The user directory, an HTTP service of somebody else's that may be slow. Call it with no connection held."""

import asyncio
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from app.fields import Line
from app.settings import Settings
from pglifeguard import ServiceError


def open_directory(settings: Settings) -> httpx.AsyncClient:
    """Make the client of the directory, to be entered before use and left at the end."""
    return httpx.AsyncClient(
        base_url=settings.directory_url or "", timeout=settings.directory_timeout_seconds, trust_env=False
    )


class DirectoryFailed(ServiceError):
    """The user directory did not give a usable answer."""

    status = 502
    code = "directory_failed"


class Profile(BaseModel):
    """A user's profile in the directory."""

    full_name: Line
    is_active: bool


async def fetch_profile(client: httpx.AsyncClient, email: str, *, timeout_seconds: float) -> Profile:
    """Ask `GET {DIRECTORY_URL}/profiles/{email}`, and wait for the whole answer for `timeout_seconds`.

    Raises: DirectoryFailed when the answer is late, an error, or not a profile.
    """
    try:
        # httpx's timeouts apply to each read, so an answer that trickles in would never be late.
        async with asyncio.timeout(timeout_seconds):
            response = await client.get(f"/profiles/{quote(email, safe='@')}")
        response.raise_for_status()
        return Profile.model_validate_json(response.content)
    except (TimeoutError, httpx.TimeoutException) as error:
        raise DirectoryFailed("The user directory did not answer in time.") from error
    except httpx.HTTPStatusError as error:
        raise DirectoryFailed(f"The user directory answered {error.response.status_code}.") from error
    except httpx.HTTPError as error:
        raise DirectoryFailed("The user directory cannot be reached.") from error
    except ValidationError as error:
        raise DirectoryFailed("The user directory's answer is not a profile.") from error
