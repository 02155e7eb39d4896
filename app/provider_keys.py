"""Where the identity provider's keys come from: fetched from its URL, or read from a file, again and again.

The keys last seen stay when the provider is away: tokens that they verify are let in. They are fetched every
AUTH_JWKS_REFRESH_SECONDS, and once more when a token names a key that is not there, which is how a new key is noticed.
Of these fetches there may be BURST at once, then one in PAUSE_SECONDS, and all tokens that wait share one: that is all
that a flood of tokens with invented names costs the provider, however many they are.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from jwt import PyJWK

from app.jwks import KeySet
from pglifeguard import ServiceError

logger = logging.getLogger(__name__)

# Fetches that tokens may have made at once: for keys that are changed again and again, as when one was stolen.
BURST = 5
# Seconds for a further one: short for those who come with a new key, and little work for the provider.
PAUSE_SECONDS = 10.0
MAX_BYTES = 1_048_576
Read = Callable[[], Awaitable[bytes]]


class KeysUnavailable(ServiceError):
    """The identity provider's keys cannot be had, so the token cannot be judged."""

    status = 503
    code = "keys_unavailable"


class ProviderKeys:
    """The provider's keys as they were last seen.

    `read` gives a key set's text, `parse` reads it, `count` is told how each fetch went: "ok" or "failed".
    """

    def __init__(
        self,
        read: Read,
        parse: Callable[[bytes], KeySet],
        *,
        refresh_seconds: float,
        count: Callable[[str], None],
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        self._read = read
        self._parse = parse
        self._refresh_seconds = refresh_seconds
        self._pause_seconds = pause_seconds
        self._count = count
        self._keys: KeySet | None = None
        self._failure: str | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._allowance = float(BURST)
        self._allowed_at = time.monotonic()

    def find(self, kid: str | None, algorithm: str) -> PyJWK | None:
        """Return the key of a token, if it is there."""
        return None if self._keys is None else self._keys.find(kid, algorithm)

    async def refresh(self) -> None:
        """Have the keys fetched, unless that was done too often of late; wait for a fetch that is under way.

        Raises: KeysUnavailable when the last fetch has failed.
        """
        if self._fetching is not None or self._may_fetch():
            await self._fetch_once()
        if self._failure is not None:
            raise KeysUnavailable("The identity provider's keys cannot be fetched, so no token of its can be judged.")

    @asynccontextmanager
    async def kept_fresh(self) -> AsyncIterator[None]:
        """Fetch the keys now and every `refresh_seconds`, without waiting for them, until the end of the block."""
        keeping = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            tasks = [task for task in (keeping, self._fetching) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _may_fetch(self) -> bool:
        now = time.monotonic()
        self._allowance = min(BURST, self._allowance + (now - self._allowed_at) / self._pause_seconds)
        self._allowed_at = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True

    async def _keep(self) -> None:
        while True:
            await self._fetch_once()
            await asyncio.sleep(self._refresh_seconds if self._failure is None else self._pause_seconds)

    async def _fetch_once(self) -> None:
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch())
        # The shield keeps the fetch for the others that wait for it when this one is cancelled.
        await asyncio.shield(self._fetching)

    async def _fetch(self) -> None:
        try:
            keys = self._parse(await self._read())
        except (OSError, ValueError) as error:  # UnusableKeys is one; so is a name that the resolver cannot take.
            self._note_failure(f"{type(error).__name__}: {error}")
        else:
            self._note(keys)
        finally:
            self._fetching = None

    def _note_failure(self, reason: str) -> None:
        self._count("failed")
        if self._failure is None:
            kept = "none yet" if self._keys is None else "those last seen stay"
            logger.warning("the identity provider's keys cannot be fetched; %s", kept, extra={"reason": reason})
        self._failure = reason

    def _note(self, keys: KeySet) -> None:
        self._count("ok")
        if self._failure is not None:
            logger.warning("the identity provider's keys can be fetched again")
        if self._keys is None or self._keys.names != keys.names:
            logger.info("the identity provider has new keys", extra={"kids": keys.names})
        self._failure, self._keys = None, keys


def from_file(path: Path) -> Read:
    """Read a file, which others replace when keys change."""

    async def read() -> bytes:
        # A file of a network may be slow.
        return await asyncio.to_thread(path.read_bytes)

    return read


def from_url(url: str, *, timeout_seconds: float) -> Read:
    """Fetch a URL: the whole answer within `timeout_seconds`, of at most MAX_BYTES, no redirects, no proxies.

    A certificate is checked by the authorities of the system, or those of SSL_CERT_FILE. What fails is an OSError.
    """
    import httpx  # noqa: PLC0415  # Only where there is a provider.

    # The system's authorities take some milliseconds to read, so they are read once.
    context = ssl.create_default_context() if urlsplit(url).scheme == "https" else False

    async def read() -> bytes:
        body = bytearray()
        try:
            # httpx's timeouts apply to each read, so an answer that trickles in would never be late.
            async with (
                asyncio.timeout(timeout_seconds),
                httpx.AsyncClient(verify=context, timeout=timeout_seconds, trust_env=False) as client,
                client.stream("GET", url, headers={"Accept": "application/json"}) as response,
            ):
                response.raise_for_status()
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > MAX_BYTES:
                        raise OSError(f"the answer has more than {MAX_BYTES} bytes")
        except httpx.HTTPStatusError as error:
            raise OSError(f"the provider answered {error.response.status_code}") from error
        except TimeoutError:
            raise OSError(f"no whole answer within {timeout_seconds:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
        return bytes(body)

    return read
