"""What `… CONCURRENTLY` needs beside a migration's other statements: more patience, and no half of an earlier attempt.

Such a statement blocks nobody, so it may wait for longer than one for which everybody queues up. It waits for all older
transactions of the database. When it fails, its index stays, invalid: no query uses it, every write keeps it up, and
IF NOT EXISTS takes it for what it should be.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

import asyncpg
from alembic.util import CommandError
from sqlalchemy import Connection, event

logger = logging.getLogger("migrations")

# A migration that waits for a lock makes every statement behind it wait too: better to fail and be run again.
LOCK_TIMEOUT = "4s"
# The roles end a statement after 30 s and an idle transaction after 60 s; a dump or a report may take longer.
PATIENT_LOCK_TIMEOUT = "10min"

_CONCURRENTLY = re.compile(
    r"""\s*(?:
        CREATE\s+(?:UNIQUE\s+)?INDEX\s+CONCURRENTLY\b
        | DROP\s+INDEX\s+CONCURRENTLY\b
        | REINDEX\s*\([^)]*\bCONCURRENTLY\b
        | REINDEX\s*(?:\([^)]*\)\s*)?(?:INDEX|TABLE|SCHEMA|DATABASE)\s+CONCURRENTLY\b
        | ALTER\s+TABLE\s[^;]*\sDETACH\s+PARTITION\s[^;]*\sCONCURRENTLY\s*;?\s*$
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_NAME = r'(?:"(?:[^"]|"")+"|[^\s".(]+)'
_CREATE = re.compile(
    r"\s*CREATE\s+(?:UNIQUE\s+)?INDEX\s+CONCURRENTLY\s+(?:IF\s+NOT\s+EXISTS\s+)?"
    rf"(?P<index>{_NAME})\s+ON\s+(?:ONLY\s+)?(?P<table>{_NAME}(?:\.{_NAME})?)",
    re.IGNORECASE,
)
_SET = "SELECT set_config('lock_timeout', '{}', false) WHERE current_setting('lock_timeout') = '{}'"
# An index of a partitioned table (relkind I) is invalid until every partition has its own: that is no failure.
_INVALID = """
SELECT c.oid::regclass::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
WHERE NOT i.indisvalid AND c.relkind = 'i'
  AND NOT EXISTS (SELECT FROM pg_stat_progress_create_index p WHERE p.index_relid = i.indexrelid)
"""
_LEFT_OF_IT = f"{_INVALID} AND i.indrelid = to_regclass($1) AND c.relname = (parse_ident($2))[1]"


def watch(connection: Connection) -> None:
    """Prepare every statement of this connection that is sent CONCURRENTLY."""
    event.listen(connection, "before_cursor_execute", _prepare)


async def invalid_indexes(connection: "asyncpg.Connection[asyncpg.Record]") -> Sequence[str]:
    """Name the indexes that a failed CONCURRENTLY has left, and that nobody is building now."""
    return [row[0] for row in await connection.fetch(f"{_INVALID} ORDER BY 1")]


def _prepare(connection: Connection, cursor: Any, statement: str, *_rest: Any) -> None:
    if _CONCURRENTLY.match(statement) is None:
        if connection.info.pop("patient", False):
            cursor.execute(_SET.format(LOCK_TIMEOUT, PATIENT_LOCK_TIMEOUT))
        return
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        raise CommandError(
            "A statement CONCURRENTLY cannot run inside a transaction. Write it inside "
            "`with op.get_context().autocommit_block():`, best in a migration of its own."
        )
    # A migration that has set a lock_timeout of its own keeps it.
    cursor.execute(_SET.format(PATIENT_LOCK_TIMEOUT, LOCK_TIMEOUT))
    connection.info["patient"] = True
    if (created := _CREATE.match(statement)) is not None:
        cursor.execute(_LEFT_OF_IT, (created["table"], created["index"]))
        for (index,) in cursor.fetchall():
            logger.warning("index %s is the invalid rest of a build that failed: it is dropped and built anew", index)
            cursor.execute(f"DROP INDEX CONCURRENTLY {index}")
    logger.info(
        "waiting for older transactions, at most %s each: %s", PATIENT_LOCK_TIMEOUT, " ".join(statement.split())
    )
