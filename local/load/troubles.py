"""What is done to the service while the load runs, from outside it, and undone: slow writes, a lock, a dead replica."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import asyncpg

from local.cluster import Cluster
from local.load.rows import SLOW
from local.load.target import Target
from local.serve import running_in
from pglifeguard.embedded.account import EmbeddedError
from pglifeguard.embedded.leftovers import end_server, postmaster

# Long, so that three times what 15 connections serve are 112 requests a second, which leave the processor time.
SLOW_SECONDS = 0.4
# The roles of postgres/roles.sql end a statement that has waited for a lock for 30 s.
MOST_SECONDS = 25.0
CONNECT_SECONDS = 5.0
NAME = "make load"
# One at a time: two loads would take each other's trigger away. Any number that nothing else uses.
OVERLOADS = "SELECT pg_try_advisory_lock(76_239_411)"
FUNCTION = "lifeguard_load_is_slow"
DROP = f"DROP FUNCTION IF EXISTS {FUNCTION} CASCADE"
CREATE = f"""
    {DROP};
    CREATE FUNCTION {FUNCTION}() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN PERFORM pg_sleep({SLOW_SECONDS}); RETURN NEW; END';
    CREATE TRIGGER {FUNCTION} BEFORE UPDATE ON patients FOR EACH ROW
        WHEN (OLD.mrn LIKE 'LOAD-%{SLOW}%') EXECUTE FUNCTION {FUNCTION}();
"""
LOCK = "LOCK TABLE patients IN SHARE ROW EXCLUSIVE MODE"
Say = Callable[[str], None]


@asynccontextmanager
async def slow_writes(target: Target, say: Say) -> AsyncIterator[None]:
    """Let each change of a patient that was made for it take 0.4 s more in the database, where a trigger sleeps.

    The service is as it was. Raises: EmbeddedError when another load does so already.
    """
    owner = await asyncpg.connect(
        target.own("--overload").environment["MIGRATIONS_URL"],
        timeout=CONNECT_SECONDS,
        server_settings={"application_name": f"{NAME} --overload"},
    )
    try:
        if not await owner.fetchval(OVERLOADS):
            raise EmbeddedError("Another load with --overload is running.")
        await owner.execute(CREATE)
        try:
            yield
        finally:
            if owner.is_closed():
                say("The trigger that slows writes is left until the next --overload: the primary has gone.")
            else:
                await owner.execute(DROP)
    finally:
        await owner.close()


async def hold_lock(target: Target, say: Say, seconds: float) -> None:
    """Lock the table of patients against writes in a session that does nothing else, and release it."""
    session = await asyncpg.connect(
        target.own("--lock").environment["DATABASE_URL"],
        timeout=CONNECT_SECONDS,
        server_settings={"application_name": f"{NAME} --lock", "lock_timeout": "5s"},
    )
    pid = session.get_server_pid()
    try:
        await session.execute(f"BEGIN; {LOCK}")
        say(f"Session {pid} locks the table patients against writes for {seconds:.0f} s.")
        await asyncio.sleep(seconds)
        ended = session.is_closed()
        say(f"Somebody has ended session {pid}, and its lock." if ended else f"Session {pid} releases the table.")
    finally:
        # With the session ends its transaction, and with that the lock.
        session.terminate()


async def kill_replica(target: Target, say: Say, seconds: float) -> None:
    """Stop the replica of the run, and start it again."""
    target.own("--kill-replica")
    cluster = Cluster(target.directory)
    process = postmaster(cluster.replica.data)
    if process is None:
        raise EmbeddedError("The replica of `make run` does not run.")
    say(f"Stopping the replica, process {process.pid}, for {seconds:.0f} s.")
    try:
        await end_server(cluster.replica.data)
        await asyncio.sleep(seconds)
    finally:
        # Whoever has stopped `make run` meanwhile wants no server to be left.
        if running_in(target.directory) is not None:
            await cluster.replica.start_as_configured()
            say(f"The replica is started again, process {cluster.replica.pid}.")
