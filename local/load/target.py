"""The service to load: the one that `python -m local` started over a directory, or one named by its URL."""

import asyncio
import ipaddress
import socket
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from local.serve import Running, running_in
from local.setup import PROJECT
from pglifeguard.embedded.account import EmbeddedError

PATIENCE_SECONDS = 5.0
SCOPES = ("patients:read", "patients:write", "ops")


@dataclass(frozen=True)
class Target:
    """Where requests go, and the run behind it; `None` where it is somebody else's service."""

    url: str
    token: str | None
    directory: Path
    run: Running | None

    def client(self) -> httpx.AsyncClient:
        """Give a client for what the load itself asks; the caller closes it."""
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=PATIENCE_SECONDS, trust_env=False)

    def own(self, option: str) -> Running:
        """Return the run behind it, whose databases `option` needs. Raises: EmbeddedError where there is none."""
        if self.run is None:
            raise EmbeddedError(
                f"{option} needs the databases of `make run`, and {self.url} is not served by the one here."
            )
        return self.run


async def find_target(directory: Path, *, url: str | None, token: str | None, anywhere: bool) -> Target:
    """Find the service, and make sure that it answers.

    Raises: EmbeddedError when there is none, when it is on another machine and `anywhere` does not allow that, or when
    it wants a token that nobody has.
    """
    run = running_in(directory)
    if url is None:
        if run is None:
            raise EmbeddedError(
                f"No service of `make run` works over {directory}. Start one in another terminal, or name one "
                "with --url."
            )
        url = run.url
    url = url.rstrip("/")
    if not anywhere:
        await _refuse_others(url)
    target = Target(url, token, directory, run if run is not None and run.url == url else None)
    return await _with_token(target)


async def _refuse_others(url: str) -> None:
    """Raise EmbeddedError unless every address of the URL is this machine's."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or parts.hostname is None:
        raise EmbeddedError(f"{url} is no URL of a service, such as http://127.0.0.1:8000.")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise EmbeddedError(f"{parts.hostname} leads nowhere: {error.strerror}.") from None
    # Of IPv6's addresses ::1 is this machine.
    if not all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found):
        raise EmbeddedError(
            f"{parts.hostname} is not this machine. A load there may be somebody's outage: --anywhere allows it."
        )


async def _with_token(target: Target) -> Target:
    """Ask for something that takes a token, and make one where it is wanted and the run's secret is at hand."""
    async with target.client() as client:
        try:
            answer = await client.get("/patients", params={"limit": 1})
        except httpx.TransportError as error:
            raise EmbeddedError(f"{target.url} does not answer ({type(error).__name__}).") from None
    if answer.status_code == HTTPStatus.UNAUTHORIZED and target.run is not None and target.token is None:
        made = await asyncio.to_thread(make_token, target.run)
        return await _with_token(Target(target.url, made, target.directory, target.run))
    if answer.status_code in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        raise EmbeddedError(
            f"{target.url} wants a token with the scopes {', '.join(SCOPES)}: "
            f"LOAD_TOKEN=$(python -m app token {' '.join(f'--scope {scope}' for scope in SCOPES)})."
        )
    if not answer.is_success:
        raise EmbeddedError(f"{target.url} answers {answer.status_code} to GET /patients: {answer.text[:200]}")
    return target


def make_token(run: Running, scopes: Collection[str] = SCOPES) -> str:
    """Sign a token as the operator would, with the secret of the service."""
    words = [word for scope in scopes for word in ("--scope", scope)]
    made = subprocess.run(
        [sys.executable, "-m", "app", "token", *words, "--hours", "2"],
        cwd=PROJECT, env=run.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode != 0:
        raise EmbeddedError(
            f"No token could be made: {made.stderr.strip()} Give one with the scopes {', '.join(scopes)} by --token or "
            "LOAD_TOKEN."
        )
    return made.stdout.strip()
