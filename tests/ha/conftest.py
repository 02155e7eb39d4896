"""The cluster that all situations share, settled and empty before each."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from local.patroni import PatroniCluster, running
from pglifeguard.embedded.directories import open_directory
from tests.chaos.conftest import measured, pytest_addoption, pytest_terminal_summary

__all__ = ["measured", "pytest_addoption", "pytest_terminal_summary"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give an empty directory that the account reaches that the servers run as when we are root."""
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="session")
async def whole_cluster() -> AsyncIterator[PatroniCluster]:
    """Give three members, made once."""
    with open_directory() as directory:
        async with running(directory) as cluster:
            yield cluster


@pytest.fixture
async def cluster(whole_cluster: PatroniCluster) -> AsyncIterator[PatroniCluster]:
    """Give the cluster with one leader and two standbys, and no rows."""
    await whole_cluster.settle()
    connection = await (await whole_cluster.leader()).server.connect("lifeguard")
    await connection.execute("TRUNCATE users, patients, idempotency_keys RESTART IDENTITY")
    await connection.close()
    yield whole_cluster
    whole_cluster.thaw_etcd()
    for member in whole_cluster.members:
        member.thaw()
