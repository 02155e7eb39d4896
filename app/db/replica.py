"""Which database serves a read: a replica that is near enough, else the primary; and why.

Lag has two traps. On an idle primary the age of the last replayed transaction grows though nothing is behind; with a
dead WAL receiver, received equals replayed and nothing seems behind. So a replica is measured against the *primary's*
LSN: it is near enough when few bytes behind, or few seconds; and unknown is not near.

A replica breaks on a look that fails, or on a request's connect or command that gets no answer, and is let in again by
the first good look after `BREAK_SECONDS`: the sentinel is the half-open probe, no request is.
"""

import logging
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from app.db.sentinel import Look, Sentinel
from app.errors import ReplicaUnavailable
from app.metrics import Metrics
from app.settings import Settings

if TYPE_CHECKING:
    from app.db.engines import Database

logger = logging.getLogger(__name__)

State = Literal["usable", "unknown", "lagging", "broken"]
Reason = Literal["replica", "absent", "unknown", "lagging", "broken", "behind_token", "primary_only"]
BREAK_SECONDS = 1.0


class Replica:
    """One replica and what is known of it."""

    def __init__(self, database: "Database", primary: Sentinel, settings: Settings, metrics: Metrics) -> None:
        self.database = database
        self.state: State = "unknown"
        self._primary = primary
        self._settings = settings
        self._metrics = metrics
        self._broken_at = float("-inf")
        database.sentinel.listeners.append(self._judge)
        primary.listeners.append(self._judge_again)

    @property
    def replayed_lsn(self) -> int:
        """Bytes of WAL that the replica is known to have replayed; 0 when unknown."""
        return self.database.sentinel.lsn or 0

    @property
    def lag_bytes(self) -> int | None:
        """Bytes between what the primary wrote and what this replica replayed; None when either is unknown."""
        written, replayed = self._primary.lsn, self.database.sentinel.lsn
        return None if written is None or replayed is None else max(0, written - replayed)

    @property
    def lag_seconds(self) -> float | None:
        """Seconds behind; 0.0 when nothing is left to replay, however long ago the last transaction was."""
        behind = self.lag_bytes
        return 0.0 if behind == 0 else None if behind is None else self.database.sentinel.last.replay_age_seconds

    def trip(self) -> None:
        """Send reads elsewhere: a request found that the replica does not let it in or does not answer."""
        self._broken_at = time.monotonic()
        self._become("broken")

    def _judge(self, look: Look) -> None:
        if look.status != "healthy":
            self._broken_at = look.at
            self._become("broken")
            if not self.database.sentinel.healthy:
                # Reads that wait for an answer on it would wait for long; cut, they are run once more on the primary.
                # Not for one late look or one failed connect: where the processor is short, those are not the
                # replica's fault, and opening every connection anew would make it shorter still.
                self.database.pool.abandon()
        elif look.at - self._broken_at >= BREAK_SECONDS:
            self._become(self._state_by_lag())

    def _judge_again(self, _look: Look) -> None:
        """Do not wait a whole interval for the next look if this replica's first one came before the primary's."""
        if self.state == "unknown" and self.database.sentinel.last.status == "healthy":
            self._judge(self.database.sentinel.last)

    def _state_by_lag(self) -> State:
        behind, seconds = self.lag_bytes, self.lag_seconds
        if behind is None:
            return "unknown"
        self._metrics.replica_lag_bytes.labels(self.database.name).set(behind)
        near = behind <= self._settings.replica_max_lag_bytes
        # A standby that has replayed no transaction since it was started cannot tell.
        if seconds is not None:
            self._metrics.replica_lag_seconds.labels(self.database.name).set(seconds)
            near = near or seconds <= self._settings.replica_max_lag_seconds
        return "usable" if near else "lagging"

    def _become(self, state: State) -> None:
        self._metrics.replica_usable.labels(self.database.name).set(state == "usable")
        if state == self.state:
            return
        level = logging.INFO if state == "usable" else logging.WARNING
        logger.log(level, "replica is %s", state, extra={"database": self.database.name, "lag_bytes": self.lag_bytes})
        self.state = state


class Router:
    """Chooses the database for each read."""

    def __init__(self, primary: "Database", replicas: list[Replica], metrics: Metrics, *, fallback: bool) -> None:
        self.replicas = replicas
        self._primary = primary
        self._count = lru_cache(lambda target, reason: metrics.reads_routed.labels(target, reason))
        self._fallback = fallback
        for reason in ("unknown", "lagging", "broken") if replicas else ():
            # A rate needs a zero to start from: without it the first reads that fall back would not show.
            self._count("primary", reason)

    def route(self, *, at_least: int | None = None, primary: bool = False) -> "tuple[Database, Reason]":
        """Choose the usable replica with the fewest requests that has replayed `at_least`, else the primary.

        Raises: ReplicaUnavailable when no replica is usable and falling back is switched off.
        """
        reason: Reason = "primary_only" if primary else "absent"
        best: Replica | None = None
        for replica in () if primary else self.replicas:
            if replica.state != "usable":
                # That one would do if it were nearer says more than that another one is away.
                reason = reason if reason == "behind_token" else replica.state
            elif at_least is not None and replica.replayed_lsn < at_least:
                reason = "behind_token"
            elif best is None or replica.database.pool.load < best.database.pool.load:
                best = replica
        if best is not None:
            self._count(best.database.name, "replica").inc()
            return best.database, "replica"
        if not self._fallback and reason in {"unknown", "lagging", "broken"}:
            raise ReplicaUnavailable(
                f"The replica is {reason} and falling back to the primary is switched off.", reason=reason
            )
        self._count("primary", reason).inc()
        return self._primary, reason

    def trip(self, name: str) -> None:
        """Break the replica of this name."""
        for replica in self.replicas:
            if replica.database.name == name:
                replica.trip()
