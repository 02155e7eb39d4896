"""What a run stands on: the limit of open files, a directory, and a primary and a replica with patients."""

import os
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bench.stage import Stage
from local.cluster import Cluster
from local.seed import seed
from pglifeguard.embedded.directories import open_directory

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
    with open_directory() as directory:
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
