"""Routes that a request passes by quickly on its way to its own."""

from collections.abc import Callable
from typing import Any

from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Scope


class Route(APIRoute):
    """A route that looks at the fixed beginning of its path before it matches all of it.

    A request is offered to one route after the other, and a path that leads nowhere to each of them. Three of the four
    calls that each takes are saved, two fifths of all that such a path takes (docs/performance.md).
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self._beginning = path.partition("{")[0]

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match method and path. Behind a `root_path` or an `include_router` the beginning is somewhere else."""
        if not scope["path"].startswith(self._beginning) and not (scope.get("root_path") or scope.get("fastapi")):
            return Match.NONE, {}
        return super().matches(scope)
