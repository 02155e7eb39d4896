"""The route that the router will choose for a request, for a guard that runs before the router.

FastAPI keeps included routers nested and chooses while it dispatches. `selected_route` makes the same calls on the same
routes, and so finds the same route. `DebugRouter` keeps the routes for operators out of that for all other requests.
"""

from typing import Any

from fastapi import APIRouter
from fastapi.routing import _IncludedRouter
from starlette.routing import Match
from starlette.types import Scope


class DebugRouter(APIRouter):
    """A router whose paths all hold "/debug/": a request for another path is compared with none of its routes."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match as FastAPI does, unless the path says that no route will. Prefixes and mounts stand before /debug/."""
        return super().matches(scope) if "/debug/" in scope["path"] else (Match.NONE, {})


def selected_route(router: APIRouter, scope: Scope) -> Any:
    """Return the route that `router` will choose, with the path and the dependencies of its inclusions.

    Where a path exists without the method, it is the first route of the path, as in the router. None means no route.
    """
    partial = None
    for route in router.routes:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return _innermost(route, scope)
        if match is Match.PARTIAL and partial is None:
            partial = route
    if partial is not None:
        return _innermost(partial, scope)
    _, _, route_below, context = router._match_low_priority(scope)  # noqa: SLF001  # FastAPI has no other way to ask.
    return context or route_below


def _innermost(route: Any, scope: Scope) -> Any:
    while isinstance(route, _IncludedRouter):
        _, _, route, context = route._match(scope)  # noqa: SLF001  # As above.
        if context is not None:
            return context.starlette_route or context
    return route
