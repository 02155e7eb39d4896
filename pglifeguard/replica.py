"""The state of a replica: whether it is near enough to the primary to serve reads, and whether it has a client's write.

Lag has two traps. On an idle primary the age of the last replayed transaction grows though the replica has everything.
With a dead WAL receiver, the received position equals the replayed one, so the replica seems to have everything. So a
replica is compared with the *primary's* LSN. It is usable when it is few bytes or few seconds behind; an unknown lag is
not usable.

A replica breaks when a probe fails, or when a request's connect or command gets no answer. The first good probe after
`BREAK_SECONDS` makes it usable again, so no request has to try it out. Where the address leads to several servers, one
of them breaks nothing: `SEVERAL_MISSES` probes have to fail in a row, and the first good one mends it. When one standby
of two was frozen, a synchronous one, all reads went to a primary whose connections waited for its commits.

A server that is no standby of this primary serves no reads, however healthy it is: one that was promoted, one of
another cluster, one that follows another timeline. Its positions run ahead of every token, and its rows may never have
been written by the primary.

A client that reads right after its write has a token that is newer than the last probe. So the replica is asked, on the
connection that will serve the read, and answers once it has replayed the write: see `replay_wait.py` for how long. Its
answer is then known to all reads, so the next ones ask nothing.

When the primary has not answered since the start, a standby serves reads without being compared (`alone`): no newer
answer can be had. Tokens are honoured there as elsewhere. The same holds of a server on a later timeline while the
primary is away: it is the successor, or follows it, and the primary's address does not lead there yet.

Of a replica that sleeps nothing is known (`asleep`). The primary serves the reads while the replica wakes up. Where the
primary sleeps too, the read waits for the replica, and its server is asked before it serves. A replica whose primary
sleeps is compared with what the primary had written when it was last seen: see docs/sleeping.md.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, cast

import asyncpg

from pglifeguard.consistency import Reason
from pglifeguard.database import Database
from pglifeguard.lease import Lease
from pglifeguard.metrics import Metrics
from pglifeguard.monitor import Monitor, Probe
from pglifeguard.replay_wait import ReplayWait
from pglifeguard.server_position import UNKNOWN, Position, Token, is_missing_feature, read_position
from pglifeguard.settings import DatabasesSettings

logger = logging.getLogger(__name__)

# The state of a replica. `alone`: a standby whose primary has not answered yet, so that nothing can be compared, or has
# gone and has a successor;
# `asleep`: nobody uses it, so it was not asked; `promoted`: no standby any more; `foreign`: of another cluster;
# `diverged`: on another timeline; `unmeasured`: its server reports no position.
State = Literal[
    "usable", "alone", "unknown", "asleep", "lagging", "broken", "promoted", "foreign", "diverged", "unmeasured"
]
# These states serve reads.
SERVING: frozenset[State] = frozenset({"usable", "alone"})
# The server is not this primary's standby, and the answers of reads that run there may be wrong.
NO_STANDBY: frozenset[State] = frozenset({"promoted", "foreign", "diverged"})
# The primary had not answered, or reported no position, when these states were found.
UNCOMPARED: frozenset[State] = frozenset({"unknown", "alone", "unmeasured"})
# What the log adds to them; the runbook has what to do.
REASONS: Mapping[State, str] = {
    "alone": ": its primary is away, so it serves reads without being compared",
    "unknown": ": its primary has not been looked at yet",
    "lagging": ": it is further behind than the settings allow",
    "broken": ": it does not answer, or refuses",
    "promoted": ": it takes writes, and is not this primary",
    "foreign": ": it belongs to another cluster",
    "diverged": ": it follows another timeline than the primary",
    "unmeasured": ": it tells no LSN",
}
BREAK_SECONDS = 1.0
SEVERAL_MISSES = 3
# Seconds for a server to answer how far it has replayed. After them its connection is cut, and the primary serves the
# read.
ASK_SECONDS = 0.25
# Seconds that one question waits for the replay. Its snapshot may hold up the replay of what it waits for, a removal of
# dead rows for one, so a longer wait is several questions.
STEP_SECONDS = 0.005
LARGEST_LSN = 2**63 - 1
# Isolation levels at which all statements of a transaction see what the first one saw.
ONE_SNAPSHOT = frozenset({"repeatable read", "serializable"})
SERVERS_KEPT = 100


class Replica:
    """One replica and its state.

    Its address may lead to several servers by turns. The monitor probes one of them, and `serves` judges each of the
    others by its answer on the connections that lead to it.
    """

    def __init__(self, database: Database, primary: Monitor, settings: DatabasesSettings, metrics: Metrics) -> None:
        self.database = database
        self.state: State = "asleep" if database.monitor.asleep else "unknown"
        self._primary = primary
        self._settings = settings
        self._metrics = metrics
        self._broken_at = float("-inf")
        # Of several replicas those of the least rank serve, each by its weight; a new one has a small share at first.
        self.rank = 0
        self.weight = 1.0
        self.share = 1.0
        # The turns that it had, by which the router goes round; see `Router`.
        self.turns = 0.0
        self.wait = ReplayWait(settings.replica_wait_milliseconds / 1000)
        self._count_read = lru_cache(metrics.consistent_reads.labels)
        # What the server that the monitor probes has answered to reads since.
        self._answer = UNKNOWN
        # The primary's LSN at its first probe on a timeline, by timeline.
        self._floors: dict[int, int] = {}
        # When the replica had last replayed all that the primary had written, and the positions of the two.
        self._level: tuple[float, Position, Position] | None = None
        # When a timeline that is later than the primary's was first seen.
        self._later_seen_at: dict[int | None, float] = {}
        # The servers behind the address that the monitor does not probe: the time and the answer of each.
        self.other_servers: OrderedDict[float, tuple[float, Position]] = OrderedDict()
        database.monitor.listeners.append(self._judge)
        primary.listeners.append(self._judge_again)

    def detach(self) -> None:
        """Hear the primary's probes no more, because this replica is gone."""
        self._primary.listeners.remove(self._judge_again)

    @property
    def position(self) -> Position:
        """The last reported position of its server; all parts are None before the first probe."""
        return self.database.monitor.position

    @property
    def known(self) -> Position:
        """The furthest position that its server is known to have: of the last probe, or of an answer to a read."""
        probed, answer = self.position, self._answer
        newer = answer.is_same_server(probed) and answer.is_further(probed)
        return answer if newer else probed

    @property
    def lag_bytes(self) -> int | None:
        """Bytes between what the primary wrote and what this replica replayed; None when either is unknown.

        None, too, where the two cannot be compared: on different timelines, or of different clusters, or while one of
        them is asleep.
        """
        return self.lag_of(self.position)

    @property
    def lag_seconds(self) -> float | None:
        """Seconds behind; 0.0 when nothing is left to replay, however long ago the last transaction was."""
        return None if self._old else self._bounded_lag()[1]

    def lag_of(self, position: Position) -> int | None:
        """Bytes behind of another server of the address; None as `lag_bytes`."""
        return None if self._old else self._lag(position)[0]

    @property
    def _old(self) -> bool:
        """Whether one of the two positions may be old, because its server is not asked."""
        return self._primary.asleep or self.database.monitor.asleep

    def trip(self) -> None:
        """Send reads elsewhere, because a request found that the replica refuses a login or does not answer.

        Nothing happens where that was one of several servers, and the monitor's one answers.
        """
        if self.database.connector.several and self.database.monitor.healthy:
            return
        self._broken_at = time.monotonic()
        self._become("broken")

    def covers(self, token: Token, position: Position | None = None) -> bool:
        """Whether a server at this position has replayed the token's write; False where that is unknown.

        On the token's own timeline the LSN decides. On a later timeline of the primary, a server has everything of the
        older one when it has replayed the LSN of the primary's first probe on the later one.
        """
        at = self.known if position is None else position
        needed = self._needed(token, at)
        return at.lsn is not None and needed is not None and at.lsn >= needed

    def awaits(self, token: Token) -> bool:
        """Whether a read may ask the replica for the token's write, and wait for it."""
        return self.wait.allowed and self._needed(token, self.known) is not None

    def _needed(self, token: Token, at: Position) -> int | None:
        """Return the LSN that covers the token on the timeline of this position; None where none is known to."""
        if at.timeline is None or token.timeline is None or token.is_foreign_to(at.system):
            return None
        if token.timeline == at.timeline:
            return token.lsn
        return self._floors.get(at.timeline) if token.timeline < at.timeline else None

    async def serves(self, lease: Lease, token: Token | None) -> Reason | None:
        """Return the reason why the server of this connection may not serve a read; None when it may.

        It asks the server, in the open transaction if there is one, in two cases: the monitor probes another server and
        this one was not asked for two probes, or this one is not known to have replayed the token's write. Behind a
        pooler each transaction may run on another server, so there the server is asked for every token.
        """
        connection = lease.connection
        known: Position | None
        if connection.pooled:
            if token is None:
                return None
            known = None
        elif connection.server is None:
            known = self.known if token is None else None
        elif connection.server == self.position.started:
            known = self.known
        else:
            at, known = self.other_servers.get(connection.server, (0.0, None))
            if time.monotonic() - at > 2 * self._settings.monitor_interval_seconds:
                known = None
        if known is not None and (token is None or self.covers(token, known)):
            if token is not None:
                self._count_read("known").inc()
            return self._unfit(known)
        known, covered = await self._ask(lease, token)
        if not connection.pooled and known.started is not None and known.started != self.position.started:
            self._keep(known.started, known)
        return self._unfit(known) or (None if covered else "behind_token")

    def skip(self) -> None:
        """Count a read with a token that goes to the primary without asking the replica."""
        self._count_read("skipped").inc()

    def state_of(self, position: Position) -> State:
        """Judge a server by its position."""
        written = self._primary.position
        if position.lsn is None:
            return "unmeasured"
        if position.is_foreign(written):
            return "foreign"
        if position.is_later(written) and self._is_gone(position):
            return "alone"
        if position.in_recovery is False:
            # A primary may be named as its own replica. Any other server that takes writes has its own history.
            return "usable" if position.is_same_server(written) else "promoted"
        if written == UNKNOWN:
            return "alone" if self._primary.last.status in {"error", "timeout", "asleep"} else "unknown"
        return "diverged" if position.is_diverged(written) else self._state_by_lag(position)

    def _is_gone(self, later: Position) -> bool:
        """Whether the primary has not answered since a server was first seen on this later timeline.

        Reads of all requests failed for a second after a switchover, until a pooler had found the new primary, and for
        half a second where the replica's address led to the standby that was just promoted.
        """
        seen_at = self._later_seen_at.setdefault(later.timeline, time.monotonic())
        return not self._primary.healthy or self._primary.last.at < seen_at

    def _unfit(self, position: Position) -> Reason | None:
        """Return why a server at this position serves no reads; None when it does."""
        state = self.state_of(position)
        return None if state in SERVING else cast("Reason", state)

    async def _ask(self, lease: Lease, token: Token | None) -> tuple[Position, bool]:
        """Ask the server of a connection; return its position, and whether it has replayed the token's write.

        Within the bound of `wait` the server answers when it has.
        """
        if token is None or self.database.monitor.lacks_lsn:
            said = await self._ask_once(lease, self.database.monitor.position_sql)
            return read_position(said), token is None
        needed = self._needed(token, self.known)
        # A client may send any 64 bits. No log gets as far as PostgreSQL's largest integer.
        target = min(needed or 0, LARGEST_LSN)
        begun = time.monotonic()
        seconds = 0.0 if needed is None else self.wait.begin()
        while True:
            left = begun + seconds - time.monotonic()
            step = min(max(0.0, left), STEP_SECONDS)
            said = await self._ask_once(lease, self.database.monitor.waiting_sql, target, step)
            position = read_position(said)
            if position.is_same_server(self.position):
                self._answer = position
            # A transaction that keeps its first snapshot will not see what was replayed during the question.
            covered = self.covers(token, position) and not (lease.begun and said.get("isolation") in ONE_SNAPSHOT)
            if covered or left <= STEP_SECONDS or self._unfit(position) is not None:
                break
        if covered:
            self.wait.end()
        elif seconds:
            self.wait.miss(token, since=begun)
        self._count_read("replayed" if covered else "missed" if seconds else "skipped").inc()
        return position, covered

    async def _ask_once(self, lease: Lease, sql: str, *arguments: float) -> Mapping[str, Any]:
        """Ask for `ASK_SECONDS` at most; empty when the server lacks the functions."""
        timer = asyncio.get_running_loop().call_later(ASK_SECONDS, lease.connection.cut)
        # The query leaves nothing in the server's session, so it must not cost a reset.
        left = lease.connection.left
        try:
            return cast("Mapping[str, Any]", await lease.ask(lease.connection.fetchrow(sql, *arguments), look=sql))
        except asyncpg.PostgresError as error:
            if not is_missing_feature(error):
                raise
            return {}
        finally:
            timer.cancel()
            lease.connection.left = left

    def _keep(self, server: float, position: Position) -> None:
        self.other_servers[server] = time.monotonic(), position
        self.other_servers.move_to_end(server)
        if len(self.other_servers) > SERVERS_KEPT:
            self.other_servers.popitem(last=False)

    def _judge(self, probe: Probe) -> None:
        if probe.status == "asleep":
            self._note_lag()
            self._become("asleep")
        elif probe.status != "healthy":
            if self.database.connector.several and self.database.monitor.misses < SEVERAL_MISSES:
                return
            self._broken_at = probe.at
            self._become("broken")
            if not self.database.monitor.healthy:
                # Reads that wait for its answer are cut, and run once more on the primary. One late probe or one failed
                # connect is not enough: on a machine short of processors they are not the replica's fault, and opening
                # all connections anew would make it worse.
                self.database.pool.abandon()
        elif self.database.connector.several or probe.at - self._broken_at >= BREAK_SECONDS:
            if self.wait.missed is not None and self.covers(self.wait.missed):
                self.wait.end()
            self._note_level()
            self._note_lag()
            self._become(self.state_of(self.position))

    def _judge_again(self, probe: Probe) -> None:
        """Judge the replica again after a probe of the primary, where that may change its state."""
        if probe.status == "asleep":
            self._note_lag()
        written = self._primary.position
        if probe.status == "healthy" and written.timeline is not None and written.lsn is not None:
            self._floors.setdefault(written.timeline, written.lsn)
            if self.wait.missed is not None and self.wait.missed.is_ahead_of(written):
                self.wait.end()  # The replica could not have what the primary has not written.
        unjudged = self.state in UNCOMPARED or written.is_diverged(self.position)
        if unjudged and self.database.monitor.last.status == "healthy":
            self._judge(self.database.monitor.last)

    def _lag(self, position: Position) -> tuple[int | None, float | None]:
        written = self._primary.position
        comparable = not position.is_foreign(written) and not position.is_diverged(written)
        if written.lsn is None or position.lsn is None or not comparable:
            return None, None
        behind = max(0, written.lsn - position.lsn)
        return behind, 0.0 if behind == 0 else position.replay_age

    def _bounded_lag(self) -> tuple[int | None, float | None]:
        """Bytes and seconds behind: no more seconds than have passed since it was level with the primary.

        An idle primary writes some log by itself. Until that is replayed, the age of the last transaction says an hour
        of what has been missing for a moment.
        """
        behind, seconds = self._lag(self.position)
        if seconds and self._level is not None:
            at, position, written = self._level
            if position.is_same_server(self.position) and written.is_same_server(self._primary.position):
                seconds = min(seconds, max(0.0, self.database.monitor.last.at - at))
        return behind, seconds

    def _note_level(self) -> None:
        # What is written after the primary's probe is not in its position, so the time is that of its probe.
        if self._primary.last.status == "healthy" and self._lag(self.position)[0] == 0:
            self._level = self._primary.last.at, self.position, self._primary.position

    def _note_lag(self) -> None:
        if self._old:
            self._metrics.forget(self._metrics.replica_lag_bytes, self.database.name)
            self._metrics.forget(self._metrics.replica_lag_seconds, self.database.name)
            return
        behind, seconds = self._bounded_lag()
        if behind is not None:
            self._metrics.replica_lag_bytes.labels(self.database.name).set(behind)
        if seconds is not None:
            self._metrics.replica_lag_seconds.labels(self.database.name).set(seconds)

    def _state_by_lag(self, position: Position) -> State:
        behind, seconds = self._lag(position)
        if behind is None:
            return "unmeasured"  # The primary reports no position.
        # A standby that has replayed no transaction since it was started cannot tell its seconds.
        near = seconds is not None and seconds <= self._settings.replica_max_lag_seconds
        return "usable" if near or behind <= self._settings.replica_max_lag_bytes else "lagging"

    def _become(self, state: State) -> None:
        if state == "asleep":
            self._metrics.forget(self._metrics.replica_usable, self.database.name)
        else:
            self._metrics.replica_usable.labels(self.database.name).set(state in SERVING)
        if state == self.state:
            return
        expected = state in {"usable", "asleep"} or (state == "alone" and self._primary.asleep)
        level = logging.INFO if expected else logging.WARNING
        extra = {"database": self.database.name, "lag_bytes": self.lag_bytes}
        logger.log(level, "%s is %s%s", self.database.name, state, REASONS.get(state, ""), extra=extra)
        self.state = state
        if state in NO_STANDBY:
            # The answers of reads that run there may be wrong, so they are cut, and run once more on the primary.
            self.database.pool.abandon()
