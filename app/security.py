"""Bearer tokens (JWT, HS256) with scopes. Checked before any connection is taken; never touches the database.

`read` allows GET and HEAD, `write` every other method, `ops` what operators look at. Without AUTH_SECRET the routes
are open, which `ENVIRONMENT=production` refuses.
"""

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import jwt
from fastapi import FastAPI, Request
from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from app.errors import Failure, Forbidden, ServiceError, Unauthorized, problem

Scope = Literal["read", "write", "ops"]
ALGORITHM = "HS256"
# What balancers, Prometheus and people who read the documentation need before they have a token.
OPEN_PATHS = ("/health/", "/metrics", "/docs", "/openapi.json")


def issue_token(secret: SecretStr, *, subject: str, scopes: list[Scope], lifetime: timedelta) -> str:
    """Sign a token for `subject` that expires after `lifetime`."""
    now = datetime.now(UTC)
    claims = {"sub": subject, "scope": " ".join(scopes), "iat": now, "exp": now + lifetime}
    return jwt.encode(claims, secret.get_secret_value(), ALGORITHM)


class BearerGuard:
    """Let a request through with the scope that it needs; without it, answer 401 or 403 before anything else is done.

    A middleware, and not a dependency: it costs nothing when it is not there, and no route can forget it.
    """

    def __init__(self, app: ASGIApp, secret: SecretStr) -> None:
        self._app = app
        self._secret = secret

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and not scope["path"].startswith(OPEN_PATHS):
            request = Request(scope)
            try:
                self._check(request)
            except ServiceError as error:
                await problem(request, Failure(error.status, error.code, str(error)))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            raise Unauthorized("This route needs a bearer token.")
        try:
            claims = jwt.decode(
                token,
                self._secret.get_secret_value(),
                algorithms=[ALGORITHM],
                options={"require": ["exp", "sub"]},
            )
        except jwt.InvalidTokenError as error:
            raise Unauthorized(f"The bearer token is not valid: {error}.") from error
        needed = needed_scope(request)
        if needed not in str(claims.get("scope", "")).split():
            raise Forbidden(f"The bearer token lacks the scope {needed!r}.")


def needed_scope(request: Request) -> Scope:
    """Say which scope a request needs."""
    if request.url.path.startswith("/debug"):
        return "ops"
    return "read" if request.method in {"GET", "HEAD"} else "write"


def install(app: FastAPI, secret: SecretStr) -> None:
    """Guard the service, and tell its OpenAPI document so."""
    app.add_middleware(BearerGuard, secret=secret)
    describe = app.openapi

    def describe_guarded() -> dict[str, Any]:
        document = describe()
        scheme = {"type": "http", "scheme": "bearer", "description": "python -m app token --scope read --scope write"}
        document.setdefault("components", {})["securitySchemes"] = {"bearer": scheme}
        document["security"] = [{"bearer": []}]
        return document

    app.openapi = describe_guarded  # type: ignore[method-assign]  # FastAPI's own way to extend the document.
