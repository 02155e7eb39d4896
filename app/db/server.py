"""What a server says of itself: which one it is, whether it is a standby, on which timeline and how far.

Positions (LSN) are bytes from the start of the write-ahead log. They mean something on one timeline only: a standby
that is promoted begins another, whose positions soon run ahead of all that was written before. A server is told from
the one that takes its place behind an address by the time of its start, and from another cluster's by its system
identifier.

Not every server that speaks PostgreSQL's protocol has these functions, and not every role may call them. So there are
several questions, from the fullest down to one that every server answers; what was not told is None, "unknown".
"""

import re
from dataclasses import dataclass
from typing import Any

from asyncpg import Record

from app.errors import sqlstate

# feature_not_supported (Aurora's LSN functions), undefined_function, insufficient_privilege, undefined_table,
# undefined_object: the server is well, and lacks what it was asked for.
LACKS = frozenset({"0A000", "42883", "42501", "42P01", "42704"})

# The receiver knows a new timeline at once, and tells it to those in pg_read_all_stats; the control file may know it a
# checkpoint later. Sessions that wait for a synchronous standby are seen of one's own role, or of all in that role.
_FULL = """
SELECT in_recovery, current_setting('transaction_read_only')::boolean AS read_only,
       extract(epoch FROM pg_postmaster_start_time())::float8 AS started,
       (SELECT system_identifier FROM pg_control_system()) AS system,
       CASE WHEN in_recovery
            THEN greatest((SELECT timeline_id FROM pg_control_checkpoint()),
                          (SELECT min_recovery_end_timeline FROM pg_control_recovery()),
                          (SELECT received_tli FROM pg_stat_wal_receiver))
            ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int END AS timeline,
       CASE WHEN in_recovery THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END - '0/0'::pg_lsn AS lsn,
       CASE WHEN in_recovery
            THEN extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8 END AS replay_age,
       CASE WHEN NOT in_recovery
            THEN (SELECT extract(epoch FROM max(clock_timestamp() - state_change))::float8
                  FROM pg_stat_activity WHERE wait_event = 'SyncRep') END AS stalled
FROM pg_is_in_recovery() AS in_recovery
"""
_WITHOUT_CONTROL_FILE = """
SELECT in_recovery, current_setting('transaction_read_only')::boolean AS read_only,
       CASE WHEN in_recovery THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END - '0/0'::pg_lsn AS lsn,
       CASE WHEN in_recovery
            THEN extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8 END AS replay_age
FROM pg_is_in_recovery() AS in_recovery
"""
_WITHOUT_LSN = """
SELECT pg_is_in_recovery() AS in_recovery, current_setting('transaction_read_only')::boolean AS read_only
"""
QUESTIONS = (_FULL, _WITHOUT_CONTROL_FILE, _WITHOUT_LSN, "SELECT 1 AS answers")
# From here on they ask for no position.
WITHOUT_LSN = 2


def lacks(error: BaseException | None) -> bool:
    """Tell a server that is well and lacks a feature from one that fails."""
    return sqlstate(error) in LACKS


@dataclass(frozen=True, slots=True)
class Position:
    """What a server said. Times are in seconds, `lsn` in bytes; None where it did not say.

    `stalled` is for how long the oldest commit has been waiting for a synchronous standby.
    """

    in_recovery: bool | None = None
    read_only: bool | None = None
    system: int | None = None
    started: float | None = None
    timeline: int | None = None
    lsn: int | None = None
    replay_age: float | None = None
    stalled: float | None = None

    @classmethod
    def of(cls, row: Record) -> "Position":
        """Read the answer to one of `QUESTIONS`."""
        said: dict[str, Any] = {name: value for name, value in row.items() if name in cls.__slots__}
        if said.get("lsn") is not None:
            said["lsn"] = int(said["lsn"])
        return cls(**said)

    def is_same_server(self, other: "Position") -> bool:
        """Whether both were said by one server, between its start and its end."""
        return self.started is not None and (self.system, self.started) == (other.system, other.started)

    def has_replayed(self, token: "Token") -> bool:
        """Whether what the token stands for is to be seen here; not known is no."""
        if self.lsn is None or token.timeline is None or self.timeline != token.timeline:
            return False
        return self.lsn >= token.lsn


UNKNOWN = Position()


@dataclass(frozen=True, slots=True)
class Token:
    """How far the write-ahead log reached after a commit: "2-0/307CD08", timeline and LSN.

    Tokens of versions before 0.2 have no timeline; no replica can say that it has replayed them.
    """

    timeline: int | None
    lsn: int

    @classmethod
    def parse(cls, text: bytes) -> "Token | None":
        """Read a client's token; None when it is none."""
        match = _TOKEN.fullmatch(text)
        if match is None:
            return None
        timeline = None if match[1] is None else int(match[1], 16)
        return cls(timeline, (int(match[2], 16) << 32) + int(match[3], 16))

    def is_newer(self, other: "Token | None") -> bool:
        """Whether it was written after the other one: a later timeline, or further on the same."""
        return other is None or (self.timeline or 0, self.lsn) > (other.timeline or 0, other.lsn)


_TOKEN = re.compile(rb"(?:([0-9A-Fa-f]{1,8})-)?([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")
# Asked after COMMIT; before it, the answer would be older than the commit itself.
WRITTEN = "SELECT ltrim(left(pg_walfile_name(lsn), 8), '0') || '-' || lsn FROM pg_current_wal_insert_lsn() AS lsn"
