"""Running a read once more on the primary after its replica failed, or did not find its row.

A replica cancels queries that conflict with replay, it is lost, or it has not replayed the row yet. In each case the
first attempt is thrown away, and the request runs again from its dependencies on. So no client gets a 404 for a row
that exists. Where the primary is away too, a read that failed runs on another replica, if there is one.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import lru_cache
from http import HTTPStatus
from typing import TypeVar

from sqlalchemy.exc import DBAPIError, NoResultFound

from pglifeguard.checkout import holder
from pglifeguard.consistency import Consistency
from pglifeguard.errors import DatabaseUnavailable, NotFound, PoolExhausted, ReplicaUnavailable, classify
from pglifeguard.metrics import Metrics
from pglifeguard.router import Router
from pglifeguard.settings import DatabasesSettings
from pglifeguard.telemetry import Telemetry

T = TypeVar("T")

# Codes of failures that are the replica's and not the request's.
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
    """Decides whether a read runs again on the primary, and runs it there.

    At most half of the primary's capacity serves such reads at a time. Others wait for their turn, as long as for a
    connection, and are answered 503 after that. "Not found" is answered 503 then too: the row may be on its way to the
    replica.
    """

    def __init__(
        self, settings: DatabasesSettings, router: Router, metrics: Metrics, telemetry: Telemetry | None = None
    ) -> None:
        self._telemetry = telemetry
        self._allowed = settings.replica_fallback
        self._router = router
        self._count = lru_cache(lambda reason: metrics.reads_retried.labels(reason))
        self.resize(settings.primary.capacity)

    def resize(self, capacity: int) -> None:
        """Take half of another capacity from now on; whoever waits or runs goes on as before."""
        self._room = asyncio.Semaphore(max(1, capacity // 2))

    def reason(self, consistency: Consistency, failure: BaseException) -> str | None:
        """Return the reason to run the read on the primary, "not_found" or the failure's code; None for no reason.

        A failure that shows that the replica is away sends the following reads elsewhere.
        """
        database = consistency.read_from
        if not self._allowed or database is None or database.role != "replica":
            return None
        if (
            isinstance(failure, (NotFound, NoResultFound))
            or getattr(failure, "status_code", None) == HTTPStatus.NOT_FOUND
        ):
            return "not_found"
        known = classify(failure)
        # The pool of a replica that was drained is closed, and a session that goes on afterwards is refused.
        refused = database.stage == "draining" and isinstance(failure, PoolExhausted)
        if known is None or not (known.code in REPLICA_FAILURES or refused):
            return None
        if isinstance(failure, DatabaseUnavailable) and failure.database not in {None, database.name}:
            return None  # Another database of the same request failed.
        cause = failure.orig if isinstance(failure, DBAPIError) else failure
        database.watch.log("read failed on its replica", route=holder.get(), code=known.code, cause=str(cause))
        if known.code in {"database_unreachable", "database_timeout"}:
            self._router.trip(database)
        return known.code

    def leave_replica(self, reason: str, consistency: Consistency) -> bool:
        """Return whether the read runs on another replica, once: the primary is away as the one that failed is.

        What that one does not find is looked for on the primary as ever.
        """
        failed, tried = consistency.read_from, consistency.avoided is not None
        if failed is None or tried or reason == "not_found" or not self._router.has_other_than(failed):
            return False
        self._count(reason).inc()
        if self._telemetry is not None:
            self._telemetry.event("retry on another replica", reason=reason, failed=failed.name)
        consistency.avoided, consistency.read_from = failed, None
        return True

    async def run(self, reason: str, consistency: Consistency, attempt: Callable[[], Awaitable[T]]) -> T:
        """Wait for a turn and run the attempt, whose read sessions are on the primary.

        Raises: ReplicaUnavailable when the turn does not come in time.
        """
        room = self._room
        try:
            await self._take_turn(room)
        except TimeoutError:
            raise ReplicaUnavailable("The replica cannot tell, and the primary is busy.") from None
        self._count(reason).inc()
        consistency.primary_only = True
        try:
            if self._telemetry is None:
                return await attempt()
            with self._telemetry.retrying("retry on the primary", reason):
                return await attempt()
        finally:
            room.release()

    async def _take_turn(self, room: asyncio.Semaphore) -> None:
        if not room.locked():
            await room.acquire()  # It succeeds at once, and needs no timer.
            return
        async with asyncio.timeout(self._router.primary.pool.patience_seconds):
            await room.acquire()
