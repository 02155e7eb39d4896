"""Once more, on the primary: what becomes of a read that its replica failed, or whose subject it did not find.

A replica cancels queries that stand in the way of replay, is lost, or has not replayed yet what a client looks for. One
answer to all of these: the first attempt is thrown away, and the request is run again from its dependencies on. Nobody
gets a 404 for a row that exists.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import lru_cache
from http import HTTPStatus
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from pglifeguard.checkout import holder
from pglifeguard.consistency import Consistency
from pglifeguard.errors import DatabaseUnavailable, NotFound, ReplicaUnavailable, classify
from pglifeguard.metrics import Metrics
from pglifeguard.replica import Router
from pglifeguard.settings import DatabasesSettings

T = TypeVar("T")

# What a replica answers when it is the replica that fails, and not the request.
REPLICA_FAILURES = frozenset(
    {
        "connection_lost",
        "database_timeout",
        "database_unreachable",
        "deadlock",
        "serialization_failure",
        "too_many_connections",
    }
)


class PrimaryRetry:
    """Says whether the primary is to be asked, and runs a read there.

    At most half of the primary's capacity does this at a time; others wait for their turn, as long as for a connection.
    Past that the answer is 503, for "not found" too, which may be a row on its way to the replica.
    """

    def __init__(self, settings: DatabasesSettings, router: Router, metrics: Metrics) -> None:
        self._allowed = settings.replica_fallback
        self._router = router
        self._count = lru_cache(lambda reason: metrics.reads_retried.labels(reason))
        self._room = asyncio.Semaphore(max(1, settings.primary.capacity // 2))
        self._patience_seconds = settings.primary.pool_timeout

    def reason(self, consistency: Consistency, failure: BaseException) -> str | None:
        """Say why the primary should be asked after this failure: "not_found" or its code; None when it should not.

        A failure that shows the replica to be away breaks it for the requests that follow.
        """
        database = consistency.read_from
        if not self._allowed or database is None or database.role != "replica":
            return None
        if isinstance(failure, NotFound) or getattr(failure, "status_code", None) == HTTPStatus.NOT_FOUND:
            return "not_found"
        known = classify(failure)
        if known is None or known.code not in REPLICA_FAILURES:
            return None
        if isinstance(failure, DatabaseUnavailable) and failure.database not in {None, database.name}:
            return None  # It is another database of the same request that failed.
        cause = failure.orig if isinstance(failure, DBAPIError) else failure
        database.watch.log("read failed on its replica", route=holder.get(), code=known.code, cause=str(cause))
        if known.code in {"database_unreachable", "database_timeout"}:
            self._router.trip(database.name)
        return known.code

    async def run(self, reason: str, consistency: Consistency, attempt: Callable[[], Awaitable[T]]) -> T:
        """Wait for a turn and run the attempt, whose read sessions are on the primary.

        Raises: ReplicaUnavailable when the turn does not come in time.
        """
        try:
            await self._take_turn()
        except TimeoutError:
            raise ReplicaUnavailable("The replica cannot tell, and the primary is busy.") from None
        self._count(reason).inc()
        consistency.primary_only = True
        try:
            return await attempt()
        finally:
            self._room.release()

    async def _take_turn(self) -> None:
        if not self._room.locked():
            await self._room.acquire()  # At once, without the price of a timer.
            return
        async with asyncio.timeout(self._patience_seconds):
            await self._room.acquire()
