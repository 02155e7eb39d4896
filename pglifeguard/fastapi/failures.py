"""What the log says of requests that failed: pool, route and reason, and of a crowd of them the first and the count."""

import logging

from fastapi import Request, WebSocket
from sqlalchemy.exc import DBAPIError
from starlette.types import Scope

from pglifeguard.errors import Failure, database_of
from pglifeguard.fastapi.scope import route_of
from pglifeguard.sampling import Sampler, origin

logger = logging.getLogger(__name__)


def report_failure(request: Request | WebSocket, failure: Failure, error: BaseException) -> None:
    """Write down that a request is answered with this failure, for which the service or a server of its is to blame."""
    request.app.state.databases.sampler.log(
        logger,
        logging.WARNING,
        "%s: %s",
        failure.code,
        error.orig if isinstance(error, DBAPIError) else error,
        by={
            "code": failure.code,
            "pool": database_of(error),
            "reason": getattr(error, "reason", None),
            "route": route_of(request.scope),
        },
    )


def report_bug(sampler: Sampler, scope: Scope, error: Exception) -> None:
    """Write down a failure that nobody foresaw, with its traceback.

    The scope names the application that failed last: one that is mounted beneath ours has no sampler.
    """
    by = {"route": route_of(scope), "failure": origin(error)}
    sampler.log(logger, logging.ERROR, "unforeseen failure", by=by, failure=error)
