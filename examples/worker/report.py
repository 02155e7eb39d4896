"""A scheduled script: prints what the queue has done, and ends."""

import asyncio

from pglifeguard import Databases, DatabasesSettings
from sqlalchemy import text

COUNT = text("""
    SELECT count(*) FILTER (WHERE done_at IS NULL) AS waiting, count(*) FILTER (WHERE error IS NOT NULL) AS failed,
           count(*) FILTER (WHERE done_at IS NOT NULL AND error IS NULL) AS sent, pg_is_in_recovery() AS replica
    FROM jobs
""")


async def main() -> None:
    """Read on the replica, if DATABASE_REPLICA_URL names one.

    `reporting()` goes there at once. `reading()` first has to know how far the replica is behind, and a script that
    has just started does not.
    """
    async with Databases(DatabasesSettings()) as databases, databases.reporting(label="report") as db:
        row = (await db.execute(COUNT)).one()
    where = "replica" if row.replica else "primary"
    print(f"{row.waiting} waiting, {row.sent} sent, {row.failed} failed ({where})")


if __name__ == "__main__":
    asyncio.run(main())
