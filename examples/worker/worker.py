"""A job queue: works through the table `jobs` until SIGTERM. Start as many as there are cores.

It is not named queue.py: Python would take that for its own module `queue`, and not start.
"""

import asyncio
import logging
import signal
from contextlib import suppress

from pglifeguard import Databases, DatabasesSettings, DatabaseUnavailable, WriteSession
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

IDLE_SECONDS = 1.0
# A row that another worker has locked is skipped, so workers never wait for each other.
TAKE = text("SELECT id, recipient FROM jobs WHERE done_at IS NULL ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED")
DONE = text("UPDATE jobs SET done_at = now(), error = :error WHERE id = :id")
WRITE_LETTER = text("INSERT INTO letters (recipient) VALUES (:recipient)")

logger = logging.getLogger("worker")


async def work_until_stopped(databases: Databases, stopping: asyncio.Event) -> None:
    """Do the jobs one by one; a stop takes effect between two of them."""
    while not stopping.is_set():
        try:
            if await work_once(databases):
                continue
        except (DatabaseUnavailable, DBAPIError) as error:
            # A restart of the server must not end the worker. What it cuts off within a statement is SQLAlchemy's
            # DBAPIError. The job is still there: it was rolled back.
            logger.warning("the database is away, trying again: %s", error)
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), IDLE_SECONDS)


async def work_once(databases: Databases) -> bool:
    """Do the oldest job that nobody else does; tell whether there was one.

    The lock, what the job writes and `done_at` are one transaction: a worker that dies gives the job back.
    """
    async with databases.writing(label="worker") as db:
        job = (await db.execute(TAKE)).one_or_none()
        if job is None:
            return False
        await db.execute(DONE, {"id": job.id, "error": await do(db, job.recipient)})
        return True


async def do(db: WriteSession, recipient: str) -> str | None:
    """Write the letter; return what was wrong with the job, None if nothing was.

    Without the savepoint a job that cannot be done would be taken back, be the oldest again, and stop the queue.
    """
    try:
        async with db.begin_nested():
            await db.execute(WRITE_LETTER, {"recipient": recipient})
    except DBAPIError as error:
        if error.connection_invalidated:
            raise  # The job is not to blame.
        logger.exception("a job failed")
        return type(error).__name__
    return None


async def main() -> None:
    """Open the databases, and close them when the job at work is done."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with Databases(DatabasesSettings()) as databases:
        logger.info("working")
        await work_until_stopped(databases, stopping)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main())
