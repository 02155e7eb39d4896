"""Where everything runs: servers pinned to a core of their own, and the databases that `setup.py` started for them."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from bench.load import BenchError
from bench.looks import Looks
from bench.served import Served, stop, until_ready
from local.cluster import DATABASE, Cluster
from local.serve import environment
from local.setup import PROJECT
from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.programs import explain

# Processes that start at a time; more keep each other from connecting in time.
STARTERS = 4
GROW_SECONDS = 120.0
# Empty means no: compiled modules are kept, as in an installation.
COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}
# How a way tells the database its name: ours, and the others.
NAMES = ("DATABASE_APPLICATION_NAME", "PGAPPNAME")


class Stage:
    """A cluster with patients, and the cores: the last one for servers, the others for all the rest."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self._directory = directory
        self.looks = Looks(cluster)
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
    async def serving(
        self, variant: str, variables: Mapping[str, str] | None = None, *, name: str | None = None, workers: int = 1
    ) -> AsyncIterator[Served]:
        """Run a variant; "ours" is `python -m app serve`, the others are in bench/variants.

        `name` is what the databases know it by: `Looks.connections` counts by it.
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
                ready = await until_ready(process, port, variant)
                if ready is None:
                    log.seek(0)
                    raise BenchError(explain(log.read().decode(errors="replace"), f"{name}, which did not get ready,"))
                served = Served(name, process, port, ready - started)
                if self.pinned:
                    served.pin(self.server_core)
                yield served
            finally:
                await stop(process)

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
