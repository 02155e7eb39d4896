"""What a server says of itself: which one it is, whether it is a standby, on which timeline and how far.

Positions (LSN) are bytes from the start of the write-ahead log. Two of them can be compared on one timeline of one
cluster only: a standby that is promoted begins another timeline, whose positions soon run ahead of the old one's. The
start time tells a server from the one that replaces it behind an address, and the system identifier tells a cluster
from another one.

Not every server that speaks PostgreSQL's protocol has these functions, and not every role may call them. A part that
the server does not report is None, "unknown"; `PositionQuery` finds out once which parts it reports.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from asyncpg import Record

from pglifeguard.errors import sqlstate

RECOVERY = "in_recovery"
# The timeline of a server that is not in recovery.
WRITTEN_TIMELINE = "('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int"
# The parts of a position, by name. `r.in_recovery` is whether the server is in recovery, false where it cannot tell.
PARTS = {
    "read_only": "current_setting('transaction_read_only')::boolean",
    "started": "extract(epoch FROM pg_postmaster_start_time())::float8",
    "system": "(SELECT system_identifier FROM pg_control_system())",
    "lsn": "(CASE WHEN r.in_recovery THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END"
    " - '0/0'::pg_lsn)::bigint",
    "replay_age": "CASE WHEN r.in_recovery"
    " THEN extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8 END",
    # A primary knows its timeline. A standby has three sources. The WAL receiver is the first to know a new timeline,
    # and shows it to roles in pg_read_all_stats; the control file may have it a checkpoint later. Timelines only rise.
    "written_timeline": f"CASE WHEN NOT r.in_recovery THEN {WRITTEN_TIMELINE} END",
    "checkpoint_timeline": "CASE WHEN r.in_recovery THEN (SELECT timeline_id FROM pg_control_checkpoint()) END",
    "recovery_timeline": "CASE WHEN r.in_recovery"
    " THEN (SELECT min_recovery_end_timeline FROM pg_control_recovery()) END",
    "received_timeline": "CASE WHEN r.in_recovery THEN (SELECT received_tli FROM pg_stat_wal_receiver) END",
    # A role sees its own sessions, or all of them when it is in pg_read_all_stats. These wait events are of commits
    # that wait for a synchronous standby, or for the disk of the WAL, while their clients wait for them.
    "stalled": "CASE WHEN NOT r.in_recovery THEN coalesce((SELECT extract(epoch FROM max(clock_timestamp() -"
    " query_start))::float8 FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid()"
    " AND (wait_event IN ('SyncRep', 'WALSync', 'WalSync', 'WALWrite', 'WalWrite') OR query ILIKE 'commit%')), 0.0)"
    " END",
    # What is left for ordinary roles. reserved_connections came with PostgreSQL 16.
    "granted": "current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int"
    " - coalesce(current_setting('reserved_connections', true)::int, 0)",
}
# The LSN as above, which a standby tells once it has replayed $1, or after $2 seconds. It looks at itself each
# millisecond: pg_sleep takes whole ones, and runs for each look because it depends on the look before. A replayed LSN
# only grows, so the largest is the last.
REPLAYED = "(pg_last_wal_replay_lsn() - '0/0'::pg_lsn)::bigint"
AWAITED_LSN = (
    f"CASE WHEN r.in_recovery THEN (WITH RECURSIVE look(lsn) AS (SELECT {REPLAYED} UNION ALL SELECT {REPLAYED}"  # noqa: S608  # Constants.
    " FROM look, LATERAL pg_sleep(0.001 + 0 * look.lsn::float8) WHERE look.lsn < $1::bigint"
    " AND clock_timestamp() < statement_timestamp() + $2::float8 * interval '1 second') SELECT max(lsn) FROM look)"
    " ELSE (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint END"
)
TIMELINES = ("written_timeline", "checkpoint_timeline", "recovery_timeline", "received_timeline")
RECOVERY_KNOWN = "pg_is_in_recovery() AS r(in_recovery)"
RECOVERY_UNKNOWN = "(SELECT false) AS r(in_recovery)"
LSN_BITS = 32
Ask = Callable[[str], Awaitable[Sequence[Record]]]


def is_missing_feature(error: BaseException | None) -> bool:
    """Return whether a healthy server lacks the feature that it was asked for; False when the server fails.

    0A000 is feature_not_supported, which Aurora's LSN functions raise. Class 42 is a missing function, view, column or
    right, or a syntax error. 42P05 is excluded: poolers cause it by losing prepared statements.
    """
    state = sqlstate(error) or ""
    return state == "0A000" or (state.startswith("42") and state != "42P05")


@dataclass(frozen=True, slots=True)
class Position:
    """The position that a server reported. Times are in seconds, `lsn` in bytes; None for a part that is not reported.

    `stalled` is the waiting time of the oldest commit; 0.0 when no commit waits. `granted` is how many connections the
    server has for ordinary roles.
    """

    in_recovery: bool | None = None
    read_only: bool | None = None
    system: int | None = None
    started: float | None = None
    timeline: int | None = None
    lsn: int | None = None
    replay_age: float | None = None
    stalled: float | None = None
    granted: int | None = None

    def is_same_server(self, other: "Position") -> bool:
        """Whether both are of one server, and of one run of it."""
        return self.started is not None and (self.system, self.started) == (other.system, other.started)

    def is_further(self, other: "Position") -> bool:
        """Whether it is later than another position of the same server; False where one of them is not known."""
        if self.lsn is None or self.timeline is None or other.lsn is None or other.timeline is None:
            return False
        return (self.timeline, self.lsn) > (other.timeline, other.lsn)

    def is_foreign(self, other: "Position") -> bool:
        """Whether the two are known to be of different clusters."""
        return None not in {self.system, other.system} and self.system != other.system

    def is_diverged(self, other: "Position") -> bool:
        """Whether the two are known to be on different timelines, so that their positions cannot be compared."""
        return None not in {self.timeline, other.timeline} and self.timeline != other.timeline

    def is_later(self, other: "Position") -> bool:
        """Whether this one is known to be on a later timeline of the same history, as after a failover."""
        return self.timeline is not None and other.timeline is not None and self.timeline > other.timeline


UNKNOWN = Position()


class PositionQuery:
    """Asks the servers behind one address for their positions, and remembers the parts that they do not report."""

    def __init__(self) -> None:
        self.missing: frozenset[str] = frozenset()

    @property
    def sql(self) -> str:
        """The query for all parts that the server is not known to lack; one round trip."""
        return self._select([name for name in (RECOVERY, *PARTS) if name not in self.missing])

    @property
    def waiting_sql(self) -> str:
        """The same query, which a standby answers once it has replayed the LSN $1, or after $2 seconds.

        Its answer has the transaction's isolation level too. Not for a server that lacks the LSN.
        """
        return self.sql.replace(PARTS["lsn"], f"current_setting('transaction_isolation') AS isolation, {AWAITED_LSN}")

    async def ask(self, ask: Ask) -> Position:
        """Ask for a position; raises what `ask` raises for any other reason than a missing feature."""
        try:
            (row,) = await ask(self.sql)
        except Exception as error:
            if not is_missing_feature(error):
                raise
        else:
            return read_position(row)
        return await self._ask_one_by_one(ask)

    async def _ask_one_by_one(self, ask: Ask) -> Position:
        told: dict[str, Any] = {}
        missing = set()
        for name in (RECOVERY, *PARTS):
            recovery_known = RECOVERY not in missing
            try:
                (row,) = await ask(self._select([name], recovery_known=recovery_known))
            except Exception as error:
                if not is_missing_feature(error):
                    raise
                missing.add(name)
            else:
                told |= dict(row.items())
        self.missing = frozenset(missing)
        return read_position(told)

    def _select(self, names: Sequence[str], *, recovery_known: bool | None = None) -> str:
        known = RECOVERY not in self.missing if recovery_known is None else recovery_known
        columns = ", ".join(f"r.in_recovery AS {RECOVERY}" if n == RECOVERY else f"{PARTS[n]} AS {n}" for n in names)
        return f"SELECT {columns} FROM {RECOVERY_KNOWN if known or names == [RECOVERY] else RECOVERY_UNKNOWN}"  # noqa: S608  # Constants.


def read_position(said: Any) -> Position:
    """Read the answer to `PositionQuery.sql`."""
    timelines = [said[name] for name in TIMELINES if said.get(name)]
    kept = {name: said.get(name) for name in Position.__slots__ if name != "timeline"}
    return Position(timeline=max(timelines, default=None), **kept)


@dataclass(frozen=True, slots=True)
class Token:
    """How far the write-ahead log reached after a commit: "5f3a91c0-2-0/307CD08", cluster, timeline and LSN.

    The cluster is the low half of its system identifier. Tokens of earlier versions are an LSN alone ("0/307CD08"). No
    replica can prove that it has replayed one, so reads with them go to the primary until they expire.
    """

    lsn: int
    timeline: int | None = None
    system: int | None = None

    @classmethod
    def parse(cls, text: bytes) -> "Token | None":
        """Read a client's token; None when it is none."""
        match = _TOKEN.fullmatch(text)
        if match is None:
            return None
        system, timeline, high, low = (None if part is None else int(part, 16) for part in match.groups())
        return cls(((high or 0) << LSN_BITS) + (low or 0), timeline, system or None)

    def is_newer(self, other: "Token | None") -> bool:
        """Whether it was written after the other one: a later timeline, or further on the same.

        One that cannot be compared is the newer one, since it leads to the primary.
        """
        if other is None or other.timeline is None or self.timeline is None or self.is_foreign_to(other.system):
            return other is None or other.timeline is not None
        return (self.timeline, self.lsn) > (other.timeline, other.lsn)

    def is_ahead_of(self, written: Position) -> bool:
        """Whether it is ahead of what the primary of its cluster has written; False where that is unknown."""
        if written.timeline is None or written.lsn is None or self.is_foreign_to(written.system):
            return False
        timeline = written.timeline if self.timeline is None else self.timeline
        return (timeline, self.lsn) > (written.timeline, written.lsn)

    def is_foreign_to(self, system: int | None) -> bool:
        """Whether it is known to come from another cluster than the one of this identifier."""
        return None not in {self.system, system} and self.system != _half(system)


def token_text(system: int | None, timeline: str, lsn: str) -> str:
    """Write a token as it is sent to a client; `timeline` is in hexadecimal."""
    return f"{_half(system):x}-{timeline.lstrip('0')}-{lsn}"


def _half(system: int | None) -> int:
    return (system or 0) & 0xFFFF_FFFF


_HEX = rb"([0-9A-Fa-f]{1,8})"
_TOKEN = re.compile(rb"(?:%b-%b-)?%b/%b" % (_HEX, _HEX, _HEX, _HEX))
# Asked after COMMIT; before it, the answer would be older than the commit itself.
WRITTEN = "SELECT left(pg_walfile_name(lsn), 8) AS timeline, lsn::text FROM pg_current_wal_insert_lsn() AS lsn"
