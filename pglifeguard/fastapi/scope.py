"""What the layers of a request find in its scope: route, databases, consistency, and what it failed with."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from starlette.requests import HTTPConnection

from pglifeguard.consistency import Consistency
from pglifeguard.databases import Databases

Scope = MutableMapping[str, Any]
SAFE_METHODS = frozenset({"GET", "HEAD"})
DATABASES = "lifeguard.databases"
# Where the request's session that writes is found.
WRITE = "lifeguard.write"
# Where the failure is kept that the answer was made of.
FAILURE = "lifeguard.failure"


def route_of(scope: Mapping[str, Any]) -> str:
    """Return the template of the route that serves a request, "/patients/{patient_id}"; "unmatched" without one."""
    route = scope.get("route")
    # FastAPI keeps the path with the prefixes of include_router apart from the route's own. An application around this
    # one may have left the context of its own route.
    context = scope.get("fastapi", {}).get("effective_route_context")
    if context is not None and context.original_route is route:
        route = context
    path = getattr(route, "path", None)
    return path if isinstance(path, str) else "unmatched"


def consistency_of(scope: Mapping[str, Any]) -> Consistency:
    """Return what the middleware left for the sessions of this request."""
    found = scope.get("state", {}).get("consistency")
    return found if isinstance(found, Consistency) else Consistency()


def databases_of(connection: HTTPConnection) -> Databases:
    """Return the databases of the service that serves this request or WebSocket, also in an application beneath it."""
    consistency_of(connection.scope).label = route_of(connection.scope)
    databases: Databases | None = connection.scope.get(DATABASES)
    return connection.scope["app"].state.databases if databases is None else databases


def note_failure(scope: Scope, error: BaseException) -> None:
    """Remember, for the layers around it, what a request failed with before it was made an answer."""
    scope.setdefault(FAILURE, error)
