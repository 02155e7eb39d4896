"""Which database serves a read: a replica that is near enough, else the primary; and why.

Lag has two traps. On an idle primary the age of the last replayed transaction grows though nothing is behind; with a
dead WAL receiver, received equals replayed and nothing seems behind. So a replica is measured against the *primary's*
LSN: it is near enough when few bytes behind, or few seconds; and unknown is not near.

A replica breaks on a look that fails, or on a request's connect or command that gets no answer, and is let in again by
the first good look after `BREAK_SECONDS`: the sentinel is the half-open probe, no request is.

A server that is no standby of this primary serves nothing, however healthy it is: one that was promoted, one of another
cluster, one that follows another timeline. Its positions run ahead of every token, and its rows are nobody's truth.

Where the primary was never seen since the start, a standby serves reads without being compared (`alone`): there is no
newer answer to be had. Tokens are honoured there as elsewhere.
"""

import logging
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, cast

from app.db.sentinel import Look, Sentinel
from app.db.server import UNKNOWN, Position, Token
from app.errors import ReplicaUnavailable
from app.metrics import Metrics
from app.settings import Settings

if TYPE_CHECKING:
    from app.db.engines import Database

logger = logging.getLogger(__name__)

# What a replica is. `alone`: a standby whose primary was never seen, which nothing can be compared with; `promoted`: no
# standby; `foreign`: of another cluster; `diverged`: on another timeline; `unmeasured`: its server tells no position.
State = Literal["usable", "alone", "unknown", "lagging", "broken", "promoted", "foreign", "diverged", "unmeasured"]
Reason = Literal[
    "replica", "absent", "unknown", "lagging", "broken", "promoted", "foreign", "diverged", "unmeasured",
    "behind_token", "primary_only",
]  # fmt: skip
# These states serve reads.
SERVING: frozenset[State] = frozenset({"usable", "alone"})
# The server is not this primary's standby, and reads that are under way there may be wrong.
NO_STANDBY: frozenset[State] = frozenset({"promoted", "foreign", "diverged"})
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
    def position(self) -> Position:
        """What its server last said of itself; nothing at all before the first look."""
        return self.database.sentinel.position

    def may_have_replayed(self, token: Token) -> bool:
        """Whether a read with this token may go here. Behind a balancer's address the connection decides (`Demand`)."""
        return self.database.leads_to_several or self.position.has_replayed(token)

    @property
    def lag_bytes(self) -> int | None:
        """Bytes between what the primary wrote and what this replica replayed; None when either is unknown.

        None, too, where the two cannot be compared: on different timelines, or of different clusters.
        """
        written, replayed = self._primary.position, self.position
        if written.lsn is None or replayed.lsn is None or _diverged(written, replayed) or _foreign(written, replayed):
            return None
        return max(0, written.lsn - replayed.lsn)

    @property
    def lag_seconds(self) -> float | None:
        """Seconds behind; 0.0 when nothing is left to replay, however long ago the last transaction was."""
        behind = self.lag_bytes
        return 0.0 if behind == 0 else None if behind is None else self.position.replay_age

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
            self._become(self._state())

    def _judge_again(self, look: Look) -> None:
        """Judge anew, without waiting for the next look, what the look at the primary may have changed."""
        unjudged = self.state in {"unknown", "alone"} or look.position.timeline != self.position.timeline
        if unjudged and self.database.sentinel.last.status == "healthy":
            self._judge(self.database.sentinel.last)

    def _state(self) -> State:
        written, replayed = self._primary.position, self.position
        if replayed.lsn is None:
            return "unmeasured"
        if _foreign(written, replayed):
            return "foreign"
        if replayed.in_recovery is False:
            # A primary may be named as its own replica; any other server that takes writes goes its own way.
            return "usable" if replayed.is_same_server(written) else "promoted"
        if written == UNKNOWN:
            return "alone" if self._primary.last.status in {"error", "timeout"} else "unknown"
        return "diverged" if _diverged(written, replayed) else self._state_by_lag()

    def _state_by_lag(self) -> State:
        behind, seconds = self.lag_bytes, self.lag_seconds
        if behind is None:
            return "unmeasured"  # The primary is the one that tells no position.
        self._metrics.replica_lag_bytes.labels(self.database.name).set(behind)
        near = behind <= self._settings.replica_max_lag_bytes
        # A standby that has replayed no transaction since it was started cannot tell.
        if seconds is not None:
            self._metrics.replica_lag_seconds.labels(self.database.name).set(seconds)
            near = near or seconds <= self._settings.replica_max_lag_seconds
        return "usable" if near else "lagging"

    def _become(self, state: State) -> None:
        self._metrics.replica_usable.labels(self.database.name).set(state in SERVING)
        if state == self.state:
            return
        level = logging.INFO if state == "usable" else logging.WARNING
        if state in NO_STANDBY:
            self.database.pool.abandon()
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

    def route(self, *, at_least: Token | None = None, primary: bool = False) -> "tuple[Database, Reason]":
        """Choose the serving replica with the fewest requests that has replayed `at_least`, else the primary.

        Raises: ReplicaUnavailable when no replica is usable and falling back is switched off.
        """
        reason: Reason = "primary_only" if primary else "absent"
        best: Replica | None = None
        for replica in () if primary else self.replicas:
            if replica.state not in SERVING:
                # `behind_token` wins: it tells that a replica is well but has not replayed this client's write.
                reason = reason if reason == "behind_token" else cast("Reason", replica.state)
            elif at_least is not None and not replica.may_have_replayed(at_least):
                reason = "behind_token"
            elif best is None or replica.database.pool.load < best.database.pool.load:
                best = replica
        if best is not None:
            self._count(best.database.name, "replica").inc()
            return best.database, "replica"
        if not self._fallback and reason not in {"absent", "behind_token", "primary_only"}:
            raise ReplicaUnavailable(
                f"The replica is {reason} and falling back to the primary is switched off.", reason=reason
            )
        self._count("primary", reason).inc()
        return self._primary, reason

    def leave(self) -> "Database":
        """Return the primary, for a read whose connection leads to a server that has not replayed its token."""
        self._count("primary", "behind_token").inc()
        return self._primary

    def trip(self, name: str) -> None:
        """Break the replica of this name."""
        for replica in self.replicas:
            if replica.database.name == name:
                replica.trip()


def _foreign(written: Position, replayed: Position) -> bool:
    """Whether the two are known to be servers of different clusters."""
    return None not in {written.system, replayed.system} and written.system != replayed.system


def _diverged(written: Position, replayed: Position) -> bool:
    """Whether the two are known to be on different timelines, so that their positions cannot be compared."""
    return None not in {written.timeline, replayed.timeline} and written.timeline != replayed.timeline
