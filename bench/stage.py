"""Where everything runs: a real primary and replica, perhaps PgBouncer, and servers pinned to a core of their own."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import asyncpg
import httpx
import psutil  # type: ignore[import-untyped]  # See local/waiting.py.

from bench.load import BenchError
from local.cluster import DATABASE, Cluster
from local.postgres import free_port
from local.programs import explain
from local.seed import seed
from local.serve import environment
from local.setup import PROJECT
from local.waiting import eventually

READY_SECONDS = 30.0
STOP_SECONDS = 15.0
# Processes that start at a time; more keep each other from connecting in time.
STARTERS = 4
GROW_SECONDS = 120.0
# Ten thousand open clients are as many files, here and in the server, which inherits the limit.
FILES = 16_384
SAMPLE_SECONDS = 0.02
# Empty means no: compiled modules are kept, as in an installation.
COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}
# How a way tells the database its name: ours, and the others.
NAMES = ("DATABASE_APPLICATION_NAME", "PGAPPNAME")
USABLE = 'db_replica_usable{pool="replica"} 1.0'
PATIENTS = 1000
# Whoever is still logging in takes a place too, and has no name yet.
BACKENDS = (
    "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name IN ($1, '')"
)
# Whoever looks shares a core with the server and comes on when that is idle, so idle means for a while. Sentinels of
# ours ask this function, and go on asking.
BUSY = """
SELECT EXISTS (
    SELECT FROM pg_stat_activity
    WHERE application_name = $1 AND query NOT LIKE '%pg_is_in_recovery%'
          AND (state = 'active' OR state_change > clock_timestamp() - interval '50 ms')
)
"""
OPENED = "SELECT sessions FROM pg_stat_database WHERE datname = $1"


@dataclass
class Served:
    """One server: a process, perhaps with workers, that answers on a port."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    ready_seconds: float

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        """User and system time of all its processes by the kernel's account, ended threads included."""
        return float(sum(sum(process.cpu_times()[:2]) for process in self._processes()))

    def memory_bytes(self) -> int:
        """Resident memory of all its processes."""
        return int(sum(process.memory_info().rss for process in self._processes()))

    def pin(self, core: int) -> None:
        """Keep it on this core, with the threads that it starts from now on; starting may use all of them."""
        for process in self._processes():
            process.cpu_affinity([core])

    def _processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


class Stage:
    """A cluster with patients, and the cores: the last one for servers, the others for all the rest."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self._directory = directory
        self.version = ""
        self._looks: list[asyncpg.Pool[asyncpg.Record]] = []
        self._cores = cores = sorted(os.sched_getaffinity(0))
        self.server_core = cores[-1]
        self.pinned = len(cores) > 1
        if self.pinned:
            # What is started from here inherits it: PostgreSQL, PgBouncer, the generators.
            os.sched_setaffinity(0, set(cores[:-1]))
        self.database_cores = len(os.sched_getaffinity(0))

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead a server to the cluster."""
        # "test" and not "development": no thread that watches the loop, no secrets demanded.
        return (
            environment(self.cluster) | {"ENVIRONMENT": "test", "LOG_FORMAT": "json", "LOG_LEVEL": "ERROR"} | COMPILED
        )

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[Self]:
        """Connect to both servers, once and before any load: a full server lets nobody in who comes later."""
        async with AsyncExitStack() as stack:
            for server in ("primary", "replica"):
                url = self.cluster.url("postgres", server=server, database="postgres")
                # Two: the watch over connections goes on while something else is asked.
                pool = asyncpg.create_pool(url, min_size=2, max_size=2, server_settings={"application_name": "bench"})
                self._looks.append(await stack.enter_async_context(pool))
            self.version = str(await self._looks[0].fetchval("SHOW server_version"))
            yield self

    @asynccontextmanager
    async def serving(
        self, variant: str, variables: Mapping[str, str] | None = None, *, name: str | None = None, workers: int = 1
    ) -> AsyncIterator[Served]:
        """Run a variant; "ours" is `python -m app serve`, the others are in bench/variants.

        `name` is what the databases know it by: `watching_connections` counts by it.
        """
        name, port = variant if name is None else name, free_port()
        module = ["app", "serve"] if variant == "ours" else ["bench.serve", variant]
        with (self._directory / f"{name}-{port}.log").open("w+b") as log:
            started = time.perf_counter()
            process = subprocess.Popen(  # noqa: ASYNC220  # It returns at once.
                [sys.executable, "-m", *module, "--port", str(port), "--workers", str(workers)],
                cwd=PROJECT,
                env=os.environ | self.environment | dict.fromkeys(NAMES, name) | dict(variables or {}),
                # A way that runs out of connections says so thousands of times.
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the harness, which stops everything in order.
                preexec_fn=self._unpin,  # noqa: PLW1509  # No threads are about when it forks.
            )
            try:
                ready = await _until_ready(process, port, variant)
                if ready is None:
                    log.seek(0)
                    raise BenchError(explain(log.read().decode(errors="replace"), f"{name}, which did not get ready,"))
                served = Served(name, process, port, ready - started)
                if self.pinned:
                    served.pin(self.server_core)
                yield served
            finally:
                await _stop(process)

    async def serving_many(
        self, stack: AsyncExitStack, count: int, variant: str, variables: Mapping[str, str], *, name: str
    ) -> list[Served]:
        """Start several of a variant, which `stack` stops."""
        starters = asyncio.Semaphore(STARTERS)

        async def start() -> Served:
            async with starters:
                return await stack.enter_async_context(self.serving(variant, variables, name=name))

        starting = [asyncio.create_task(start()) for _ in range(count)]
        try:
            servers = await asyncio.gather(*starting)
        finally:
            # When one fails, no other may start behind the stack's back.
            for task in starting:
                task.cancel()
            await asyncio.wait(starting)

        def end() -> None:
            # Told together, they end together.
            for server in servers:
                server.process.terminate()

        stack.callback(end)
        return servers

    @asynccontextmanager
    async def watching_connections(self, name: str) -> AsyncIterator[list[int]]:
        """Yield a list of one: the most connections that `name` has had to one of the two servers, meanwhile."""
        peak, done = [0], asyncio.Event()

        async def watch() -> None:
            while not done.is_set():
                peak[0] = max(peak[0], *[await look.fetchval(BACKENDS, name) for look in self._looks])
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
            return not await self._looks[1].fetchval(BUSY, name)

        if not await eventually(has_ended, READY_SECONDS):
            raise BenchError(f"{name} still asks the database {READY_SECONDS:g} s after its clients have left.")

    async def sessions_opened(self) -> int:
        """Count the sessions that both servers opened so far: a way that reconnects shows here and nowhere else."""
        return sum([await look.fetchval(OPENED, DATABASE) or 0 for look in self._looks])

    async def grow(self, rows: int) -> None:
        """Add made-up patients until there are `rows`, on the replica too."""
        connection = await self.cluster.primary.connect(DATABASE)
        try:
            await connection.execute(
                "INSERT INTO patients (mrn, full_name, birth_date) SELECT 'GROWN-' || n, 'Ada Example ' || n, "
                "date '1980-05-17' FROM generate_series((SELECT count(*) FROM patients) + 1, $1::bigint) AS n",
                rows,
                timeout=GROW_SECONDS,
            )
            # Else the server tidies up during the measurement, on the core that answers queries.
            for tidying in ("VACUUM ANALYZE patients", "CHECKPOINT"):
                await connection.execute(tidying, timeout=GROW_SECONDS)
        finally:
            await connection.close()
        await self.cluster.wait_replayed(GROW_SECONDS)

    def _unpin(self) -> None:
        os.sched_setaffinity(0, self._cores)


@asynccontextmanager
async def set_up() -> AsyncIterator[Stage]:
    """Start the cluster, in memory where there is room, with a thousand patients that the replica has too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:
        most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    with _open_directory() as directory:
        cores = os.sched_getaffinity(0)
        cluster = Cluster(directory)
        stage = Stage(cluster, directory)
        try:
            async with cluster:
                await cluster.migrate()
                await seed(cluster.url("app_rw"), PATIENTS)
                await cluster.wait_replayed()
                async with stage.looking():
                    yield stage
        finally:
            cluster.remove()
            os.sched_setaffinity(0, cores)


@contextmanager
def _open_directory() -> Iterator[Path]:
    # PostgreSQL's account must get into it.
    memory = Path("/dev/shm")  # noqa: S108  # mkdtemp makes an unguessable name in it.
    with tempfile.TemporaryDirectory(prefix="lifeguard-bench-", dir=memory if memory.is_dir() else None) as directory:
        Path(directory).chmod(0o711)
        yield Path(directory)


async def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server, its workers too when it does not do so itself."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        await asyncio.to_thread(process.wait, STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await asyncio.to_thread(process.wait)


async def _until_ready(process: subprocess.Popen[bytes], port: int, variant: str) -> float | None:
    """Wait until it serves as it is to be measured; return when it first said that it was ready, None if never."""
    ready = 0.0
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=1, trust_env=False) as client:

        async def ready_or_ended() -> bool:
            nonlocal ready
            if process.poll() is not None:
                return True
            with suppress(httpx.TransportError):
                if not (await client.get("/health/ready")).is_success:
                    return False
                ready = ready or time.perf_counter()
                # Until its first looks at the replica, ours reads from the primary, and would be measured doing that.
                return not variant.startswith("ours") or USABLE in (await client.get("/metrics")).text
            return False

        in_time = await eventually(ready_or_ended, READY_SECONDS)
    return ready if in_time and process.poll() is None else None
