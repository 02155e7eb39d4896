"""What goes wrong with the databases of an application, for as long as a block lasts."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from pglifeguard.database import Database
from pglifeguard.databases import Databases
from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing.network import Network

NOTICE_SECONDS = 10.0


@asynccontextmanager
async def exhausted(database: Database) -> AsyncIterator[None]:
    """Hold every connection of a pool until the end of the block: requests wait for one, and are refused."""
    async with AsyncExitStack() as stack:
        for _ in range(database.settings.capacity):
            await stack.enter_async_context(database.engine.connect())
        yield


@asynccontextmanager
async def replica_away(network: Network, databases: Databases) -> AsyncIterator[None]:
    """Close the connections to the replica, and refuse new ones, until the end of the block.

    The block begins when the application has noticed, and what comes after it when the replica serves reads again. The
    replica itself runs on: it is the way to it that ends.

    Raises: RuntimeError when there is no replica; TimeoutError when the application notices nothing within ten seconds.
    """
    if network.replica is network.primary:
        raise RuntimeError("there is no replica: PGLIFEGUARD_TEST_REPLICA_URL names one beside PGLIFEGUARD_TEST_URL")
    network.replica.refuse()
    network.replica.cut()
    try:
        await _until(databases, usable=False)
        yield
    finally:
        await network.replica.accept()
    await _until(databases, usable=True)


async def _until(databases: Databases, *, usable: bool) -> None:
    """Probe until every replica is usable, or none is."""

    async def noticed() -> bool:
        for database in databases.all():
            await database.monitor.probe()
        return all((replica.state == "usable") is usable for replica in databases.router.replicas)

    if not await eventually(noticed, NOTICE_SECONDS):
        raise TimeoutError(f"the application does not notice that its replica is {'back' if usable else 'away'}")
