"""Bearer tokens with scopes, checked before a connection is acquired and without the database.

A route declares the scopes that it needs in its dependencies, its router's or those of an inclusion: `needs("ops")`,
`needs(read="patients:read", write="patients:write")`, or `OPEN` for everybody. A route that declares none is closed.
Without AUTH_SECRET and without an identity provider all routes are open, which `ENVIRONMENT=production` refuses.
`app/tokens.py` verifies the tokens.
"""

from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Protocol

from fastapi import APIRouter, FastAPI, params
from fastapi.routing import iter_route_contexts
from pydantic import SecretStr
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from pglifeguard import ServiceError
from pglifeguard.fastapi import client_key, selected_route

ALGORITHM = "HS256"
# OpenID Connect allows so many.
MAX_SUBJECT_CHARACTERS = 255
SUBJECT = f"1 to {MAX_SUBJECT_CHARACTERS} printable characters"
READING = frozenset({"GET", "HEAD"})
_GRANTED = "app.granted"
_NO_CLAIMS: Mapping[str, Any] = MappingProxyType({})


class Unauthorized(ServiceError):
    """The bearer token is missing or not valid."""

    status = 401
    code = "unauthorized"


class UnknownKey(Unauthorized):
    """The bearer token names a key that is not known, and perhaps not yet."""


class Forbidden(ServiceError):
    """The token lacks the scope."""

    status = 403
    code = "forbidden"


def invalid_token(reason: str) -> Unauthorized:
    """Make the refusal of a token that was sent."""
    return Unauthorized(f"The bearer token is not valid: {reason}.")


class Needs:
    """A dependency that refuses requests whose token lacks one of the scopes.

    The guard finds it on the route, before a body is read. FastAPI solves it again, so it also works in an endpoint's
    signature and in another dependency.
    """

    def __init__(self, *scopes: str, read: str | None = None, write: str | None = None) -> None:
        if (read is None) is not (write is None):
            raise ValueError("read and write belong together: without one of them those methods would need no scope.")
        self.reading = frozenset(scopes) if read is None else frozenset({*scopes, read})
        self.writing = frozenset(scopes) if write is None else frozenset({*scopes, write})

    def scopes(self, method: str | None) -> frozenset[str]:
        """Return what a request of this method needs; a WebSocket has no method, and needs what writes need."""
        return self.reading if method in READING else self.writing

    async def __call__(self, connection: HTTPConnection) -> None:
        """Refuse the request if its token lacks a scope. Without a guard every request is allowed."""
        granted = connection.scope.get(_GRANTED)
        if granted is not None:
            _check_scopes(self.scopes(connection.scope.get("method")), granted)


def needs(*scopes: str, read: str | None = None, write: str | None = None) -> params.Depends:
    """Declare the scopes that a token must have: `APIRouter(dependencies=[needs("ops")])`.

    `scopes` are needed by every request, `read` by GET and HEAD as well, `write` by every other method and WebSockets.
    Those of app, inclusion, router and route add up.
    """
    return params.Depends(Needs(*scopes, read=read, write=write))


OPEN = needs()


def is_subject(subject: str) -> bool:
    """Whether a token may be for it. What is not printable would break lines of logs, or not be stored."""
    return 0 < len(subject) <= MAX_SUBJECT_CHARACTERS and subject.isprintable()


def issue_token(  # noqa: PLR0913  # Each is a claim, but for the secret.
    secret: SecretStr,
    *,
    subject: str,
    scopes: Collection[str],
    lifetime: timedelta,
    issuer: str | None = None,
    audience: str | None = None,
    scope_claim: str = "scope",
) -> str:
    """Sign a token for `subject` that expires after `lifetime`."""
    import jwt  # noqa: PLC0415  # With its cryptography it takes a tenth of a second to load.

    now = datetime.now(UTC)
    claims = {"sub": subject, scope_claim: " ".join(scopes), "iat": now, "exp": now + lifetime}
    bound = {"iss": issuer, "aud": audience}
    claims |= {name: value for name, value in bound.items() if value is not None}
    return jwt.encode(claims, secret.get_secret_value(), ALGORITHM)


class Verifier(Protocol):
    """What the guard asks about a token; `app/tokens.py` has the one that the service uses."""

    def verify(self, token: str) -> Mapping[str, Any]:
        """Return the claims, `sub` among them. Raises: Unauthorized; UnknownKey if it may be known after `refresh`."""
        ...

    async def refresh(self) -> None:
        """Learn of new keys. Raises: ServiceError, of status 503, when that is not possible now."""
        ...


class BearerGuard:
    """Refuse a request whose token lacks a scope that its route needs, before anything else is done.

    The guard stands between the exception handlers and the router. So it sees the same path as the router, after all
    middleware, and its refusals are answered like every other error. A request without a valid token learns of no path
    whether it exists. `request.state.caller` is the token's subject, `request.state.claims` are all of its claims,
    read-only; an open route has no claims.
    """

    def __init__(
        self,
        app: ASGIApp,
        router: APIRouter,
        verifier: Verifier,
        *,
        needed_by_path: Mapping[str, Needs],
        scope_claim: str = "scope",
    ) -> None:
        self._app = app
        self._router = router
        self._verifier = verifier
        self._needed_by_path = needed_by_path
        self._scope_claim = scope_claim

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        scope[_GRANTED] = frozenset[str]()
        state = scope.setdefault("state", {})
        state["claims"] = _NO_CLAIMS
        route = selected_route(self._router, scope)
        needed = self.needed(route, scope.get("method"))
        if needed is None or needed:
            token = _bearer_token(scope)
            try:
                claims = self._verifier.verify(token)
            except UnknownKey:
                await self._verifier.refresh()
                claims = self._verifier.verify(token)
            state["claims"], state["caller"] = claims, claims["sub"]
            # Under overload the callers take turns.
            client_key.set(claims["sub"])
            scope[_GRANTED] = granted = _granted(claims.get(self._scope_claim))
            if needed is not None:
                _check_scopes(needed, granted)
            elif route is not None:
                raise Forbidden("This route is closed: it does not declare which scopes it needs.")
        await self._app(scope, receive, send)

    def needed(self, route: Any, method: str | None) -> frozenset[str] | None:
        """Return the scopes that a request of this method for this route needs; None if the route declares nothing."""
        if hasattr(route, "dependencies"):
            declared = [d.dependency for d in route.dependencies if isinstance(d.dependency, Needs)]
        else:
            # Mounts, static files and FastAPI's own pages have no dependencies; their whole path template decides.
            path = str(getattr(route, "path", None) or getattr(route, "host", None))
            declared = [self._needed_by_path[path]] if path in self._needed_by_path else []
        return frozenset[str]().union(*(one.scopes(method) for one in declared)) if declared else None

    def operations(self, app: FastAPI) -> Iterator[tuple[str, str, frozenset[str] | None]]:
        """List path template, method and needed scopes of each route; a WebSocket and a mount have the method ""."""
        for route in iter_route_contexts(app.routes):
            for method in sorted(getattr(route, "methods", None) or {""}):
                yield str(route.path), method, self.needed(route, method)


def _bearer_token(scope: ASGIScope) -> str:
    kind, _, token = HTTPConnection(scope).headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer":
        raise Unauthorized("This route needs a bearer token.")
    return token


def _granted(claim: object) -> frozenset[str]:
    """Read the claim of the scopes: words in a text (RFC 8693), or a list of texts, as some providers have it."""
    if isinstance(claim, str):
        return frozenset(claim.split())
    return frozenset(filter(lambda each: isinstance(each, str), claim)) if isinstance(claim, list) else frozenset()


def _check_scopes(needed: frozenset[str], granted: frozenset[str]) -> None:
    if missing := needed - granted:
        raise Forbidden(f"The bearer token lacks the scope {', '.join(map(repr, sorted(missing)))}.")


def install(
    app: FastAPI,
    verifier: Verifier,
    *,
    open_paths: Collection[str] = (),
    needed_by_path: Mapping[str, params.Depends] | None = None,
    scope_claim: str = "scope",
) -> BearerGuard:
    """Guard the service, and declare the guard in its OpenAPI document.

    The document and its page are open. `open_paths` opens further routes that cannot have dependencies, each by its
    whole path template; a mount's is its mount path, "/static". `needed_by_path` declares the scopes of others.
    """
    pages = {path for path in (app.openapi_url, app.docs_url, app.redoc_url) if path is not None}
    declared = {**dict.fromkeys({*pages, *open_paths}, OPEN), **(needed_by_path or {})}
    by_path = {path: depends.dependency for path, depends in declared.items() if isinstance(depends.dependency, Needs)}
    guard = BearerGuard(
        app.router.middleware_stack, app.router, verifier, needed_by_path=by_path, scope_claim=scope_claim
    )
    app.router.middleware_stack = guard
    describe = app.openapi

    def describe_guarded() -> dict[str, Any]:
        document = describe()
        scheme = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
        document.setdefault("components", {})["securitySchemes"] = {"bearer": scheme}
        document["security"] = [{"bearer": []}]
        for path, method, needed in guard.operations(app):
            operation = document["paths"].get(path, {}).get(method.lower())
            if operation is not None and needed is not None:
                # OpenAPI 3.1 allows the scopes of a scheme that is not OAuth's, too.
                operation["security"] = [{"bearer": sorted(needed)}] if needed else []
        return document

    app.openapi = describe_guarded  # type: ignore[method-assign]  # FastAPI's own way to extend the document.
    return guard


def leave_solved(app: FastAPI) -> None:
    """Have FastAPI not solve what the guard finds on a route: it would cost a tenth of a read's calls.

    To be called when the service starts. Routes that are added later work too, and pay for it. A mounted application
    solves its own, which the guard does not see.
    """
    for route in iter_route_contexts(app.routes):
        dependant = getattr(route, "dependant", None)
        if dependant is not None:
            # One of a signature has the name of its parameter.
            kept = [one for one in dependant.dependencies if one.name is not None or not isinstance(one.call, Needs)]
            dependant.dependencies[:] = kept


def scopes_of(app: FastAPI) -> list[str]:
    """Return every scope that a route of the application needs, guarded or not."""
    found = set[str]()
    for route in iter_route_contexts(app.routes):
        for depends in getattr(route, "dependencies", None) or ():
            if isinstance(depends.dependency, Needs):
                found |= depends.dependency.reading | depends.dependency.writing
    return sorted(found)
