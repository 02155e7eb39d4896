"""The user directory: somebody else's HTTP service, slow on a bad day. Called with no connection held."""

import asyncio
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from app.fields import Line
from app.settings import Settings
from pglifeguard import ServiceError


def open_directory(settings: Settings) -> httpx.AsyncClient:
    """Make the client of the directory; entering it opens its pool of connections, leaving it closes them."""
    return httpx.AsyncClient(
        base_url=settings.directory_url or "", timeout=settings.directory_timeout_seconds, trust_env=False
    )


class DirectoryFailed(ServiceError):
    """The user directory did not give a usable answer."""

    status = 502
    code = "directory_failed"


class Profile(BaseModel):
    """What the directory knows of a user."""

    full_name: Line
    is_active: bool


async def fetch_profile(client: httpx.AsyncClient, email: str, *, timeout_seconds: float) -> Profile:
    """Ask `GET {DIRECTORY_URL}/profiles/{email}`, and wait for the whole answer for `timeout_seconds`.

    Raises: DirectoryFailed when the answer is late, an error, or not a profile.
    """
    try:
        # The client's own timeouts are for each read: an answer in drops would never be late.
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
