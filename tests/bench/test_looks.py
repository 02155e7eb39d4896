"""What the databases say of a server is of that server alone, and the most of it."""

import asyncpg

from bench.looks import Looks
from pglifeguard.embedded.waiting import eventually
from tests.conftest import Database

LEFT = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'way')"
ASKED = """
SELECT EXISTS (
    SELECT FROM pg_stat_activity WHERE application_name = 'bench' AND state = 'idle' AND query_start > $1
)
"""


async def test_most_connections_are_of_one_name(database: Database) -> None:
    """Three at a time remain three when they have left, and whoever has another name is not among them."""
    looks, name = Looks(database.cluster), {"application_name": "way"}
    async with looks, looks.connections("way") as peak:
        other = await asyncpg.connect(database.url("postgres"), server_settings={"application_name": "another way"})
        three = [await asyncpg.connect(database.url(), server_settings=name) for _ in range(3)]
        await looked(other)
        for connection in three:
            await connection.close()

        async def left() -> bool:
            return bool(await other.fetchval(LEFT))

        assert await eventually(left, 10)
        await looked(other)
        await other.close()

    assert peak == [3]


async def looked(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Wait until whoever counts has looked from now on.

    Twice: the first statement that is seen may be the pool's own, which follows a look from before.
    """
    for _ in range(2):
        since = await connection.fetchval("SELECT clock_timestamp()")

        async def asked(since: object = since) -> bool:
            return bool(await connection.fetchval(ASKED, since))

        assert await eventually(asked, 10)
