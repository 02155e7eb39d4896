"""Where everything runs: a real primary and replica, perhaps PgBouncer, and servers pinned to a core of their own."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import httpx
import psutil  # type: ignore[import-untyped]  # See local/waiting.py.

from bench.load import BenchError
from local.cluster import DATABASE, Cluster
from local.postgres import free_port
from local.seed import seed
from local.serve import environment
from local.setup import PROJECT
from local.waiting import eventually

READY_SECONDS = 30.0
SAMPLE_SECONDS = 0.02
# Empty means no: compiled modules are kept, as in an installation.
COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}
USABLE = 'db_replica_usable{pool="replica"} 1.0'
PATIENTS = 1000
BACKENDS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = $1"
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

    def _processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


class Stage:
    """A cluster with patients, and the cores: the last one for servers, the others for all the rest."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.version = ""
        cores = sorted(os.sched_getaffinity(0))
        self.server_core = cores[-1]
        self.pinned = len(cores) > 1
        if self.pinned:
            # What is started from here inherits it: PostgreSQL, PgBouncer, the generators.
            os.sched_setaffinity(0, set(cores[:-1]))

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead a server to the cluster."""
        # "test" and not "development": no thread that watches the loop, no secrets demanded.
        return (
            environment(self.cluster) | {"ENVIRONMENT": "test", "LOG_FORMAT": "json", "LOG_LEVEL": "ERROR"} | COMPILED
        )

    async def find_version(self) -> None:
        """Ask the primary what it is."""
        connection = await self.cluster.primary.connect()
        try:
            self.version = str(await connection.fetchval("SHOW server_version"))
        finally:
            await connection.close()

    @asynccontextmanager
    async def serving(
        self, name: str, variables: Mapping[str, str] | None = None, *, workers: int = 1
    ) -> AsyncIterator[Served]:
        """Run a variant; "ours" is `python -m app serve`, the others are in bench/variants."""
        port = free_port()
        module = ["app", "serve"] if name == "ours" else ["bench.serve", name]
        started = time.perf_counter()
        process = subprocess.Popen(  # noqa: ASYNC220  # It returns at once.
            [sys.executable, "-m", *module, "--port", str(port), "--workers", str(workers)],
            cwd=PROJECT,
            env=os.environ | self.environment | dict(variables or {}),
            preexec_fn=self._pin,  # noqa: PLW1509  # No threads are about when it forks.
        )
        try:
            ready = await _until_ready(process, port, name)
            yield Served(name, process, port, ready - started)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, 15)
            if process.poll() is None:
                process.kill()
                await asyncio.to_thread(process.wait)

    @asynccontextmanager
    async def watching_connections(self) -> AsyncIterator[list[int]]:
        """Yield a list of one: the most connections seen at the primary and the replica together, meanwhile."""
        servers = [await server.connect("postgres") for server in (self.cluster.primary, self.cluster.replica)]
        peak = [0]

        async def watch() -> None:
            while True:
                peak[0] = max(peak[0], sum([await server.fetchval(BACKENDS, DATABASE) for server in servers]))
                await asyncio.sleep(SAMPLE_SECONDS)

        task = asyncio.create_task(watch())
        try:
            yield peak
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            for server in servers:
                await server.close()

    async def sessions_opened(self) -> int:
        """Count the sessions that both servers opened so far: a way that reconnects shows here and nowhere else."""
        total = 0
        for server in (self.cluster.primary, self.cluster.replica):
            connection = await server.connect("postgres")
            try:
                total += int(await connection.fetchval(OPENED, DATABASE) or 0)
            finally:
                await connection.close()
        return total

    async def grow(self, rows: int) -> None:
        """Add made-up patients until there are `rows`, on the replica too."""
        connection = await asyncpg.connect(self.cluster.url("app_rw"))
        try:
            await connection.execute(
                "INSERT INTO patients (mrn, full_name, birth_date) SELECT 'GROWN-' || n, 'Ada Example ' || n, "
                "date '1980-05-17' FROM generate_series((SELECT count(*) FROM patients) + 1, $1::bigint) AS n",
                rows,
                timeout=120,
            )
        finally:
            await connection.close()
        await self.cluster.wait_replayed(120)

    def _pin(self) -> None:
        if self.pinned:
            os.sched_setaffinity(0, {self.server_core})


@asynccontextmanager
async def set_up() -> AsyncIterator[Stage]:
    """Start the cluster, in memory where there is room, with a thousand patients that the replica has too."""
    with _open_directory() as directory:
        cores = os.sched_getaffinity(0)
        cluster = Cluster(directory)
        stage = Stage(cluster)
        try:
            async with cluster:
                await cluster.migrate()
                await seed(cluster.url("app_rw"), PATIENTS)
                await cluster.wait_replayed()
                await stage.find_version()
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


async def _until_ready(process: subprocess.Popen[bytes], port: int, name: str) -> float:
    """Wait until it serves as it is to be measured; return when it first said that it was ready."""
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
                return not name.startswith("ours") or USABLE in (await client.get("/metrics")).text
            return False

        if not await eventually(ready_or_ended, READY_SECONDS) or process.poll() is not None:
            raise BenchError(f"{name} did not become ready; its own words are above.")
    return ready
