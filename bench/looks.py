"""What primary and replica themselves say while servers are measured: connections, sessions, work not done yet."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType

import asyncpg

from bench.load import BenchError
from local.cluster import DATABASE, Cluster
from pglifeguard.embedded.waiting import eventually

SAMPLE_SECONDS = 0.02
QUIET_SECONDS = 30.0
# Whoever is still logging in takes a place too, and has no name yet.
BACKENDS = (
    "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name IN ($1, '')"
)
# Whoever looks shares a core with the server and comes on when that is idle, so idle means for a while. Monitors of
# ours ask this function, and go on asking.
BUSY = """
SELECT EXISTS (
    SELECT FROM pg_stat_activity
    WHERE application_name = $1 AND query NOT LIKE '%pg_is_in_recovery%'
          AND (state = 'active' OR state_change > clock_timestamp() - interval '50 ms')
)
"""
OPENED = "SELECT sessions FROM pg_stat_database WHERE datname = $1"


class Looks:
    """Connections to both servers, opened once and before any load: a full server lets nobody in who comes later."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stack = AsyncExitStack()
        self._pools: list[asyncpg.Pool[asyncpg.Record]] = []
        self.version = ""

    async def __aenter__(self) -> None:
        """Connect, and ask for the server's version."""
        async with AsyncExitStack() as stack:
            for server in ("primary", "replica"):
                url = self._cluster.url("postgres", server=server, database="postgres")
                # Two: the watch over connections goes on while something else is asked.
                pool = asyncpg.create_pool(url, min_size=2, max_size=2, server_settings={"application_name": "bench"})
                self._pools.append(await stack.enter_async_context(pool))
            self.version = str(await self._pools[0].fetchval("SHOW server_version"))
            self._stack = stack.pop_all()

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self._stack.aclose()

    @asynccontextmanager
    async def connections(self, name: str) -> AsyncIterator[list[int]]:
        """Yield a list of one: the most connections that `name` has had to one of the two servers, meanwhile."""
        peak, done = [0], asyncio.Event()

        async def watch() -> None:
            while not done.is_set():
                peak[0] = max(peak[0], *[await look.fetchval(BACKENDS, name) for look in self._pools])
                await asyncio.sleep(SAMPLE_SECONDS)

        watching = asyncio.create_task(watch())
        try:
            yield peak
        finally:
            done.set()
            await watching

    async def quiet(self, name: str) -> None:
        """Wait until `name` asks the replica nothing more: a closed loop leaves its last requests behind."""

        async def has_ended() -> bool:
            return not await self._pools[1].fetchval(BUSY, name)

        if not await eventually(has_ended, QUIET_SECONDS):
            raise BenchError(f"{name} still asks the database {QUIET_SECONDS:g} s after its clients have left.")

    async def sessions_opened(self) -> int:
        """Count the sessions that both servers opened so far: a way that reconnects shows here and nowhere else."""
        return sum([await look.fetchval(OPENED, DATABASE) or 0 for look in self._pools])
