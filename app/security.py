"""Bearer tokens (JWT, HS256) with scopes, checked before a connection is acquired and without the database.

A route declares the scopes that it needs in its dependencies, its router's or those of an inclusion: `needs("ops")`, or
`OPEN` for everybody. Undeclared routes are closed: `read` allows GET and HEAD, `write` every other method and
WebSockets. Without AUTH_SECRET all routes are open, which `ENVIRONMENT=production` refuses.
"""

from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import jwt
from fastapi import APIRouter, FastAPI, params
from fastapi.routing import iter_route_contexts
from pydantic import SecretStr
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from pglifeguard import ServiceError
from pglifeguard.fastapi import client_key, selected_route

Scope = Literal["read", "write", "ops"]
ALGORITHM = "HS256"
_GRANTED = "app.granted"


class Unauthorized(ServiceError):
    """The bearer token is missing or not valid."""

    status = 401
    code = "unauthorized"


class Forbidden(ServiceError):
    """The token lacks the scope."""

    status = 403
    code = "forbidden"


class Needs:
    """A dependency that refuses requests whose token lacks one of these scopes.

    The guard finds it on the route, before a body is read. FastAPI solves it again, so it also works in an endpoint's
    signature and in another dependency.
    """

    def __init__(self, *scopes: Scope) -> None:
        self.scopes = frozenset(scopes)

    async def __call__(self, connection: HTTPConnection) -> None:
        """Refuse the request if its token lacks a scope. Without a guard every request is allowed."""
        granted = connection.scope.get(_GRANTED)
        if granted is not None:
            _check_scopes(self.scopes, granted)


def needs(*scopes: Scope) -> params.Depends:
    """Declare the scopes that a token must have: `APIRouter(dependencies=[needs("ops")])`.

    Those of app, inclusion, router and route add up.
    """
    return params.Depends(Needs(*scopes))


OPEN = needs()


def issue_token(secret: SecretStr, *, subject: str, scopes: list[Scope], lifetime: timedelta) -> str:
    """Sign a token for `subject` that expires after `lifetime`."""
    now = datetime.now(UTC)
    claims = {"sub": subject, "scope": " ".join(scopes), "iat": now, "exp": now + lifetime}
    return jwt.encode(claims, secret.get_secret_value(), ALGORITHM)


class BearerGuard:
    """Refuse a request whose token lacks a scope that its route needs, before anything else is done.

    The guard stands between the exception handlers and the router. So it sees the same path as the router, after all
    middleware, and its refusals are answered like every other error. An unknown path is refused like a known one.
    `request.state.caller` is the token's subject.
    """

    def __init__(self, app: ASGIApp, router: APIRouter, secret: SecretStr, open_paths: frozenset[str]) -> None:
        self._app = app
        self._router = router
        self._secret = secret.get_secret_value()
        self._open_paths = open_paths

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        if scope["type"] != "lifespan":
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: ASGIScope) -> None:
        needed = self.needed(selected_route(self._router, scope), scope.get("method"))
        scope[_GRANTED] = frozenset[str]()
        if not needed:
            return
        claims = self._claims(HTTPConnection(scope))
        scope.setdefault("state", {})["caller"] = claims["sub"]
        # Under overload the callers take turns.
        client_key.set(claims["sub"])
        scope[_GRANTED] = granted = frozenset(str(claims.get("scope", "")).split())
        _check_scopes(needed, granted)

    def needed(self, route: Any, method: str | None) -> frozenset[str]:
        """Return the scopes that a request of this method for this route needs; a WebSocket has no method."""
        if route is not None and not hasattr(route, "dependencies"):
            # Mounts, static files and FastAPI's own pages have no dependencies; their whole path template decides.
            declared = [frozenset[str]()] if getattr(route, "path", None) in self._open_paths else []
        else:
            dependencies = getattr(route, "dependencies", ())
            declared = [d.dependency.scopes for d in dependencies if isinstance(d.dependency, Needs)]
        if declared:
            return frozenset[str]().union(*declared)
        return frozenset({"read" if method in {"GET", "HEAD"} else "write"})

    def _claims(self, connection: HTTPConnection) -> dict[str, Any]:
        kind, _, token = connection.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            raise Unauthorized("This route needs a bearer token.")
        try:
            claims: dict[str, Any] = jwt.decode(
                token, self._secret, algorithms=[ALGORITHM], options={"require": ["exp", "sub"]}
            )
        except jwt.InvalidTokenError as error:
            raise Unauthorized(f"The bearer token is not valid: {error}.") from error
        return claims


def _check_scopes(needed: frozenset[str], granted: frozenset[str]) -> None:
    if missing := needed - granted:
        raise Forbidden(f"The bearer token lacks the scope {', '.join(map(repr, sorted(missing)))}.")


def install(app: FastAPI, secret: SecretStr, *, open_paths: Collection[str] = ()) -> None:
    """Guard the service, and declare the guard in its OpenAPI document.

    The document and its page are open. `open_paths` opens further routes that cannot have dependencies, each by its
    whole path template; a mount's is its mount path, "/static".
    """
    pages = {path for path in (app.openapi_url, app.docs_url, app.redoc_url) if path is not None}
    guard = BearerGuard(app.router.middleware_stack, app.router, secret, frozenset({*pages, *open_paths}))
    app.router.middleware_stack = guard
    describe = app.openapi

    def describe_guarded() -> dict[str, Any]:
        document = describe()
        scheme = {"type": "http", "scheme": "bearer", "description": "python -m app token --scope read --scope write"}
        document.setdefault("components", {})["securitySchemes"] = {"bearer": scheme}
        document["security"] = [{"bearer": []}]
        for route in iter_route_contexts(app.routes):
            operations = document["paths"].get(route.path, {})
            for method in route.methods or ():
                if method.lower() in operations and not guard.needed(route, method):
                    operations[method.lower()]["security"] = []
        return document

    app.openapi = describe_guarded  # type: ignore[method-assign]  # FastAPI's own way to extend the document.
