"""What a run stands on: the limit of open files, a directory, and a primary and a replica with patients."""

import os
import resource
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from bench.stage import Stage
from local.cluster import Cluster
from local.seed import seed

# Ten thousand open clients are as many files, here and in the server, which inherits the limit.
FILES = 16_384
PATIENTS = 1000


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
                async with stage.looks:
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
