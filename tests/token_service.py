"""The token services of three clouds and of Vault, on this machine: what they issue is the password of a real role."""

import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import psycopg.sql

# What each service demands to be sent, by path.
DEMANDED = {
    "/v1/credentials": ("Authorization", "of-this-pod"),
    "/msi/token": ("X-Identity-Header", "of-this-app"),
    "/metadata/identity/oauth2/token": ("Metadata", "true"),
    "/computeMetadata/v1/instance/service-accounts/default/token": ("Metadata-Flavor", "Google"),
    "/v1/database/static-creds": ("X-Vault-Token", "of-the-service"),
}
RESOURCE = "https://ossrdbms-aad.database.windows.net"


class TokenService:
    """Issues one token until it is told that it has expired; then the role has another one."""

    def __init__(self, role: str, admin: str) -> None:
        self.role = role
        self.seconds = 3600
        self.port = 0
        # How often a token was asked for.
        self.asked = 0
        self._admin = admin
        self._token = ""
        self._turn = threading.Lock()

    def expire(self) -> None:
        """Let the role in by a new token only, which the next question gets."""
        self.accept(secrets.token_urlsafe(900))

    def accept(self, token: str) -> None:
        """Make this the token by which the role logs in."""
        with psycopg.connect(self._admin, autocommit=True) as connection:
            change = psycopg.sql.SQL("ALTER ROLE {} PASSWORD {}")
            connection.execute(change.format(psycopg.sql.Identifier(self.role), psycopg.sql.Literal(token)))
        self._token = token

    def answer(self, path: str, headers: Any) -> dict[str, Any] | None:
        """Answer a question; None when it is not what the service takes."""
        parts = urlsplit(path)
        place = parts.path.removesuffix(f"/{self.role}")
        name, value = DEMANDED.get(place, ("", ""))
        if headers.get(name) != value:
            return None
        with self._turn:
            self.asked += 1
        if place == "/v1/credentials":
            return {"AccessKeyId": "AKIDEXAMPLE", "SecretAccessKey": "wJalrXUtnFEMI/K7MDENG", "Token": "a/b+c=" * 100}
        if "resource" in parse_qs(parts.query):
            (resource,) = parse_qs(parts.query)["resource"]
            known = resource == RESOURCE
            expires = str(int(time.time() + self.seconds))
            return {"access_token": self._token, "expires_on": expires} if known else None
        if place == "/v1/database/static-creds":
            return {"data": {"username": self.role, "password": self._token, "ttl": self.seconds}}
        return {"access_token": self._token, "expires_in": self.seconds, "token_type": "Bearer"}


@contextmanager
def issuing(role: str, admin: str) -> Iterator[TokenService]:
    """Run the service for a role of the server that `admin` is the way to."""
    service = TokenService(role, admin)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = service.answer(self.path, self.headers)
            self.send_response(403 if found is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        service.expire()
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
