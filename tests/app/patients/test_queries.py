"""The list queries use their indexes, and read no more rows than they answer."""

import asyncpg
import pytest

from tests.conftest import Database
from tests.plans import noting_statements, plans
from tests.service import Service

ROWS = 5000
FILL = """
INSERT INTO patients (mrn, full_name, birth_date)
SELECT 'MRN-' || n, (ARRAY['Ada', 'adam', 'Bea', 'Cyd', 'Łukasz'])[1 + n % 5] || ' ' || n % 50, '1980-01-01'
FROM generate_series(1, $1) AS n
"""


async def fill(database: Database) -> None:
    """Store patients enough for the planner to care."""
    connection = await asyncpg.connect(database.url("app_owner"))
    await connection.execute(FILL, ROWS)
    await connection.execute("VACUUM ANALYZE patients")
    await connection.close()
    await database.cluster.wait_replayed()


@pytest.mark.parametrize(
    ("path", "index"),
    [
        ("/patients/77", "pk_patients"),
        ("/patients?limit=20", "pk_patients"),
        ("/patients?mrn=MRN-77", "uq_patients_mrn"),
        ("/patients?name=ada&limit=20", "ix_patients_name"),
        ("/patients?name=Ł&limit=20", "ix_patients_name"),
    ],
)
async def test_reads_use_their_index(database: Database, service: Service, path: str, index: str) -> None:
    """First page, next page, with and without sight of the parameters: an index gives the rows in their order."""
    await fill(database)
    async with noting_statements(service) as statements:
        answer = await service.client.get(path)
        if "next" in answer.links:
            await service.client.get(answer.links["next"]["url"])

    assert statements.sent
    for statement, parameters in statements.sent:
        for nodes in await plans(database, statement, parameters):
            scans = [node for node in nodes if "Scan" in node["Node Type"]]
            assert [scan.get("Index Name") for scan in scans] == [index], nodes
            # The one patient of a number is "sorted" by id, which costs nothing.
            sorts = {"Sort"} if index == "uq_patients_mrn" else set()
            assert {node["Node Type"] for node in nodes} <= {"Limit", "Index Scan"} | sorts, nodes
            assert sum(scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0) for scan in scans) <= 21, nodes
