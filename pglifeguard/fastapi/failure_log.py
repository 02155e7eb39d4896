"""Log lines about failed requests: pool, route and reason. Of many alike, the first is logged and the rest counted."""

import logging

from fastapi import Request, WebSocket
from sqlalchemy.exc import DBAPIError
from starlette.types import Scope

from pglifeguard.errors import Failure, database_of
from pglifeguard.fastapi.sessions import route_of
from pglifeguard.sampling import Sampler, origin

logger = logging.getLogger(__name__)


def report_failure(connection: Request | WebSocket, failure: Failure, error: BaseException) -> None:
    """Log that a request is answered with this failure, which the service or one of its servers is to blame for.

    An application mounted beneath the service has no databases of its own; its failures are not logged here.
    """
    databases = getattr(connection.app.state, "databases", None)
    if databases is None:
        return
    by = {
        "code": failure.code,
        "pool": database_of(error),
        "reason": getattr(error, "reason", None),
        "route": route_of(connection.scope),
    }
    shown = error.orig if isinstance(error, DBAPIError) else error
    databases.sampler.log(logger, logging.WARNING, "%s: %s", failure.code, shown, by=by)


def report_bug(sampler: Sampler, scope: Scope, error: Exception) -> None:
    """Log an exception that no handler took, with its traceback.

    The sampler is an argument because the scope may name a mounted application, which has none.
    """
    by = {"route": route_of(scope), "failure": origin(error)}
    sampler.log(logger, logging.ERROR, "unforeseen failure", by=by, failure=error)
