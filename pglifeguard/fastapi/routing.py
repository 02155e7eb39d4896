"""Which route a request is handed to, and by which path its client reached it.

FastAPI keeps included routers nested and decides while it dispatches, so the route is known only inside. Whoever must
decide before that (the guard) asks here, by the same calls on the same routes, and comes to the same route.
"""

from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.routing import _IncludedRouter
from starlette._utils import get_route_path
from starlette.routing import Match
from starlette.types import Scope


def selected_route(router: APIRouter, scope: Scope) -> Any:
    """Return the route that `router` will choose: its own, or what stands for it where a router was included.

    What stands for it has the path and the dependencies of the inclusion. A path that is there without the method is
    the first route of that path, as in the router; None leads nowhere.
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


def public_path(request: Request) -> str:
    """Return the path by which the client reached this request, as it stands in a URL.

    `root_path` is part of it, whether the proxy in front has left it in the path or taken it off; and so is the path at
    which the application is mounted.
    """
    root_path: str = request.scope.get("root_path", "")
    return quote(root_path.rstrip("/") + get_route_path(request.scope), safe="/:@!$&'()*+,;=~-._")
