"""Tests that break their servers on purpose and fail, between others that must not notice.

pytest does not collect this file by itself: test_servers.py runs it in a process of its own and reads the outcome.
"""

from collections.abc import AsyncIterator

import pytest

from local.cluster import Cluster
from pglifeguard.testing.serving import listening
from tests.conftest import Database, Execute
from tests.servers import Servers
from tests.service import Service

LATE = "on purpose"


async def works(database: Database, execute: Execute) -> None:
    """Use primary and replica as any test does."""
    assert await execute("SELECT count(*) FROM patients") == 0
    await database.cluster.wait_replayed()


async def test_before_on_the_shared_servers(database: Database, execute: Execute) -> None:
    """Works."""
    await works(database, execute)


async def test_promotes(database: Database, breakable_cluster: Cluster, execute: Execute) -> None:
    """Leaves two servers that both were the primary, as a failover that came late."""
    await works(database, execute)
    await breakable_cluster.replica.promote()
    await breakable_cluster.primary.kill()
    raise AssertionError(LATE)


async def test_freezes(database: Database, breakable_cluster: Cluster, execute: Execute) -> None:
    """Leaves a primary that does not answer."""
    await works(database, execute)
    breakable_cluster.primary.freeze()
    raise AssertionError(LATE)


async def test_configures(database: Database, breakable_cluster: Cluster, execute: Execute) -> None:
    """Leaves a primary that takes no writes, and that would wait for a standby that does not exist."""
    await works(database, execute)
    await execute("ALTER SYSTEM SET default_transaction_read_only = on")
    breakable_cluster.primary.settings["synchronous_standby_names"] = "nobody"
    await breakable_cluster.primary.restart()
    raise AssertionError(LATE)


async def test_pauses(database: Database, breakable_cluster: Cluster, execute: Execute) -> None:
    """Leaves a replica that shows nothing new."""
    await works(database, execute)
    await breakable_cluster.pause_replay()
    raise AssertionError(LATE)


async def test_loses_the_data(database: Database, breakable_cluster: Cluster, execute: Execute) -> None:
    """Leaves a primary that cannot be started again."""
    await works(database, execute)
    await breakable_cluster.stop()
    (breakable_cluster.primary.data / "global" / "pg_control").unlink()
    raise AssertionError(LATE)


async def test_breaks_what_is_shared(database: Database) -> None:
    """Breaks servers without having said so."""
    await database.cluster.replica.promote()
    raise AssertionError(LATE)


async def test_after_on_the_shared_servers(database: Database, execute: Execute) -> None:
    """Works."""
    await works(database, execute)


async def test_after_on_the_breakable_servers(database: Database, breakable_cluster: Cluster, execute: Execute) -> None:
    """Works."""
    await works(database, execute)
    assert breakable_cluster is database.cluster


async def test_serves_what_does_not_start(service: Service) -> None:
    """Ends like an application whose lifespan fails."""
    databases = service.databases
    async with listening(service.app):  # Its lifespan is open already, and cannot be opened again.
        assert databases


@pytest.fixture
async def killer(shared_servers: Servers) -> AsyncIterator[None]:
    """Kill a server when the test is over, and its inspection too."""
    yield
    await (await shared_servers.take()).replica.kill()


@pytest.mark.usefixtures("killer")
async def test_before_a_server_is_killed(database: Database, execute: Execute) -> None:
    """Works."""
    await works(database, execute)


async def test_after_a_server_was_killed(service: Service, execute: Execute) -> None:
    """Works."""
    assert await execute("SELECT 1") == 1
    assert (await service.client.get("/patients")).status_code == 200
