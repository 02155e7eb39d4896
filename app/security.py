"""Bearer tokens (JWT, HS256) with scopes. Checked before any connection is taken; never touches the database.

`read` allows GET and HEAD, `write` every other method, `ops` what operators look at. Without AUTH_SECRET the routes
are open, which `ENVIRONMENT=production` refuses.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

import jwt
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr

from app.errors import Forbidden, Unauthorized

Scope = Literal["read", "write", "ops"]
ALGORITHM = "HS256"

_bearer = HTTPBearer(auto_error=False, description="python -m app token --scope read --scope write")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def issue_token(secret: SecretStr, *, subject: str, scopes: list[Scope], lifetime: timedelta) -> str:
    """Sign a token for `subject` that expires after `lifetime`."""
    now = datetime.now(UTC)
    claims = {"sub": subject, "scope": " ".join(scopes), "iat": now, "exp": now + lifetime}
    return jwt.encode(claims, secret.get_secret_value(), ALGORITHM)


def required(secret: SecretStr, scope: Scope | None = None) -> Callable[..., Awaitable[None]]:
    """Make a dependency that asks for `scope`, or for `read` or `write` by the request's method.

    Raises, when called: Unauthorized without a valid token, Forbidden without the scope.
    """

    async def authorize(request: Request, credentials: Credentials) -> None:
        if credentials is None:
            raise Unauthorized("This route needs a bearer token.")
        try:
            claims = jwt.decode(
                credentials.credentials,
                secret.get_secret_value(),
                algorithms=[ALGORITHM],
                options={"require": ["exp", "sub"]},
            )
        except jwt.InvalidTokenError as error:
            raise Unauthorized(f"The bearer token is not valid: {error}.") from error
        needed = scope or ("read" if request.method in {"GET", "HEAD"} else "write")
        if needed not in str(claims.get("scope", "")).split():
            raise Forbidden(f"The bearer token lacks the scope {needed!r}.")

    return authorize
