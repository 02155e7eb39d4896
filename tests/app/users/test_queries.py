"""The queries use their indexes, and read no more rows than they answer."""

import asyncpg
import pytest

from tests.conftest import Database
from tests.plans import noting_statements, plans
from tests.service import Service

FILL = """
INSERT INTO users (email, full_name) SELECT 'user-' || n || '@example.com', 'User ' || n FROM generate_series(1, 5000) n
"""


@pytest.mark.parametrize("path", ["/users/77", "/users?limit=20"])
async def test_reads_use_the_primary_key(database: Database, service: Service, path: str) -> None:
    """One user, the first page and the next one."""
    connection = await asyncpg.connect(database.url("app_owner"))
    await connection.execute(FILL)
    await connection.execute("VACUUM ANALYZE users")
    await connection.close()
    await database.cluster.wait_replayed()
    async with noting_statements(service) as statements:
        answer = await service.client.get(path)
        if "next" in answer.links:
            await service.client.get(answer.links["next"]["url"])

    assert statements.sent
    for statement, parameters in statements.sent:
        for nodes in await plans(database, statement, parameters):
            assert nodes[-1]["Index Name"] == "pk_users", nodes
            assert all(node["Node Type"] in {"Limit", "Index Scan"} for node in nodes), nodes
            assert nodes[-1]["Actual Rows"] <= 21, nodes
