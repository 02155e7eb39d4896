"""The choice of the database for a read: a replica that may serve it, else the primary, with the reason.

`Router` chooses by what is known of the replicas; where only the server behind the connection can tell, `ServerCheck`
asks it, and sends the read to the primary when it may not serve.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from pglifeguard.consistency import Consistency, Reason
from pglifeguard.database import Database
from pglifeguard.errors import ReplicaUnavailable
from pglifeguard.forged_tokens import ForgedTokens
from pglifeguard.lease import Lease
from pglifeguard.metrics import Metrics
from pglifeguard.replica import SERVING, Replica
from pglifeguard.server_position import Token

# Reads go to the primary for these reasons, and for "behind_token" and "asleep", which are no fault of the replica.
FALLING_BACK: tuple[Reason, ...] = ("unknown", "lagging", "broken", "promoted", "foreign", "diverged", "unmeasured")


class Router:
    """Chooses the database for each read."""

    def __init__(
        self,
        primary: Database,
        replicas: list[Replica],
        metrics: Metrics,
        *,
        fallback: bool,
        finds_replicas: bool = False,
    ) -> None:
        # Of replicas that DNS finds, those that take reads now, and all of them: see members.py.
        self.replicas = replicas
        self.judges = list(replicas)
        self.primary = primary
        # The turn of the replica that was chosen last.
        self._turn = 0.0
        self._without: Reason = "unknown" if finds_replicas else "absent"
        self._count = lru_cache(lambda target, reason: metrics.reads_routed.labels(target, reason))
        self._fallback = fallback
        self.forged = ForgedTokens(primary.monitor, metrics.tokens.labels("ahead").inc)
        for reason in FALLING_BACK if replicas or finds_replicas else ():
            # A rate needs a zero to start from: without it the first reads that fall back would not show.
            self._count("primary", reason)

    def route(  # noqa: C901  # The whole choice is told in one place.
        self, *, at_least: Token | None = None, primary: bool = False, avoided: Database | None = None
    ) -> tuple[Database, Reason]:
        """Choose the serving replica with the fewest requests that has replayed `at_least`, else the primary.

        Of those that have equally few each has its turn, by its weight.

        A replica that is not known to have replayed it is chosen when the read may ask it: see `ServerCheck`.

        Raises: ReplicaUnavailable when no replica is usable and falling back is switched off.
        """
        reason: Reason = "primary_only" if primary else self._without
        wanted = None if at_least is None else self.forged.believed(at_least)
        best: Replica | None = None
        asked: Replica | None = None
        for replica in () if primary else self.replicas:
            if replica.database is avoided and not avoided.connector.several:
                continue
            if replica.state not in SERVING:
                # `behind_token` wins over other reasons: it tells the operator that a replica is healthy but has not
                # replayed this client's write.
                reason = reason if reason == "behind_token" else cast("Reason", replica.state)
            elif wanted is None or replica.database.connector.several or replica.covers(wanted):
                # Where the address leads to several servers, the connection decides: see `serves`.
                if best is None or self._order(replica) < self._order(best):
                    best = replica
            elif not (replica.awaits(wanted) or self.forged.is_ahead(wanted)):
                reason = "behind_token"
                replica.skip()
            elif asked is None or self._order(replica) < self._order(asked):
                asked = replica
        best = best or asked
        if best is None and not primary and reason != "behind_token":
            best = self._woken()
        if best is not None:
            if len(self.replicas) > 1:
                self._turn = max(self._turn, best.turns)
                best.turns = self._turn + 1 / (best.weight * best.share)
            self._count(best.database.name, "replica").inc()
            return best.database, "replica"
        return self._fall_back(reason), reason

    def _order(self, replica: Replica) -> tuple[bool, int, float, float]:
        """Return what a replica is chosen by, the least first.

        A new one waits for its turn, which comes as seldom as its share is small: it has the fewest requests, so by
        these alone it would get all of them, into an empty cache. Who was away for some turns has not saved them up.
        """
        waits = replica.share < 1 and replica.turns > self._turn
        return waits, replica.rank, replica.database.pool.load / replica.weight, max(replica.turns, self._turn)

    def _woken(self) -> Replica | None:
        """Wake a replica, if one sleeps; return it for the read that waits for it, None where the primary can serve."""
        sleeping = next((replica for replica in self.replicas if replica.state == "asleep"), None)
        if sleeping is None or not self._fallback or not self.primary.monitor.healthy:
            return sleeping
        sleeping.database.pool.wake()
        return None

    def judge_of(self, database: Database) -> Replica | None:
        """Return the replica of a database, whether it takes reads or not; None for the primary and analytics."""
        return next((one for one in self.judges if one.database is database), None)

    @property
    def serves_reads(self) -> bool:
        """Whether a replica takes reads now."""
        return any(replica.state in SERVING for replica in self.replicas)

    def has_other_than(self, failed: Database) -> bool:
        """Whether a read that this replica has failed belongs to another one: the primary is away, or busy, as well.

        It may be the same server, where all members of a cluster are named as replicas, the leader among them. It is
        busy when a frozen standby is a synchronous one: all of its connections wait for their commits. An address that
        leads to several servers may lead to another one.
        """
        primary, spare = self.primary.monitor, self.primary.settings.capacity > self.primary.pool.load
        if spare and primary.healthy and not primary.position.is_same_server(failed.monitor.position):
            return False
        return any(
            replica.state in SERVING and (replica.database is not failed or failed.connector.several)
            for replica in self.replicas
        )

    def leave(self, reason: Reason) -> Database:
        """Return the primary, for a read that the server behind its connection may not serve.

        Raises: ReplicaUnavailable as `route` does.
        """
        return self._fall_back(reason)

    def trip(self, database: Database) -> None:
        """Break the replica of this database."""
        for replica in self.replicas:
            if replica.database is database:
                replica.trip()

    def _fall_back(self, reason: Reason) -> Database:
        if not self._fallback and reason in FALLING_BACK:
            raise ReplicaUnavailable(
                f"The replica is {reason} and falling back to the primary is switched off.", reason=reason
            )
        self._count("primary", reason).inc()
        return self.primary


@dataclass(frozen=True, slots=True)
class ServerCheck:
    """Sends a read to the primary when the server behind a replica's connection may not serve it."""

    router: Router
    replica: Replica
    consistency: Consistency

    async def leave_early(self) -> Database | None:
        """Return the primary for a read that need not acquire a connection of the replica; None for any other.

        It does so for a replica that is drained: the session was opened before, and its pool may be closed by now. A
        token that the primary did not write is forgotten here.
        """
        consistency, forged = self.consistency, self.router.forged
        token = consistency.wanted
        if self._is_drained():
            return self._leave("drained", token)
        if token is not None:
            token = consistency.wanted = forged.believed(token)
        if token is None or not forged.is_ahead(token) or self.replica.covers(token):
            return None
        if forged.alert and not await forged.confirms(token):
            token = consistency.wanted = None
        if self._is_drained():  # It has left during the question.
            return self._leave("drained", token)
        if token is None or self.replica.database.connector.several or self.replica.awaits(token):
            return None
        self.replica.skip()
        return self._leave("behind_token", token)

    async def redirect(self, lease: Lease) -> Database | None:
        """Return the primary when the server that this connection leads to may not serve the read; None when it may."""
        token = self.consistency.wanted
        reason = await self.replica.serves(lease, token)
        if reason is None:
            return None
        # Other connections of the pool may lead to a server that may serve it; they are handed out first.
        lease.checkout.behind = True
        return self._leave(reason, token)

    def _is_drained(self) -> bool:
        return self.replica.database.stage == "draining"

    def _leave(self, reason: Reason, token: Token | None) -> Database:
        if reason == "behind_token" and token is not None:
            self.router.forged.suspect(token)
        self.consistency.read_from, self.consistency.reason = self.router.leave(reason), reason
        return self.consistency.read_from
