"""The page about transactions: every snippet of it runs, and does what the page says."""

import ast
import asyncio
import re
from datetime import date
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.conftest import Database, Execute
from tests.service import Service

PAGE = Path(__file__).parents[1] / "docs" / "transactions.md"
TEXT = PAGE.read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SQL = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)
MRNS = "SELECT coalesce(string_agg(mrn, ',' ORDER BY mrn), '') FROM patients"
NAMES = "SELECT coalesce(string_agg(full_name, ',' ORDER BY mrn), '') FROM patients"
BORN = date(1915, 12, 10)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Give the names that the page defines."""
    names: dict[str, Any] = {}
    for block in PYTHON:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102  # The page is ours.
    return names


async def add(execute: Execute, *mrns: str, name: str = "Ada") -> None:
    """Store patients beside the service."""
    for mrn in mrns:
        await execute("INSERT INTO patients (mrn, full_name, birth_date) VALUES ($1, $2, $3)", mrn, name, BORN)


def test_every_function_of_the_page_is_used() -> None:
    """A snippet that nobody runs would rot."""
    tree = ast.parse("\n".join(PYTHON))
    defined = {node.name for node in tree.body if isinstance(node, ast.AsyncFunctionDef)}
    used = set(re.findall(r'page\["(\w+)"\]', Path(__file__).read_text(encoding="utf-8")))

    assert defined == used
    assert len(SQL) == 1


async def test_row_that_is_read_is_locked(service: Service, execute: Execute, page: dict[str, Any]) -> None:
    """Both changes count."""
    await add(execute, "A-1", name="")
    number = await execute("SELECT id FROM patients")
    service.app.add_api_route("/rename/{patient_id}", page["rename"], methods=["POST"])

    answers = await asyncio.gather(
        *(service.client.post(f"/rename/{number}", params={"suffix": letter}) for letter in "abc")
    )

    assert {answer.status_code for answer in answers} == {200}
    assert sorted(await execute(NAMES)) == ["a", "b", "c"]
    assert (await service.client.post("/rename/0", params={"suffix": "a"})).status_code == 404


async def test_workers_take_different_rows(service: Service, execute: Execute, page: dict[str, Any]) -> None:
    """Each row once, and then nothing is left."""
    await add(execute, "A-1", "A-2", "A-3", name="waiting")

    taken = await asyncio.gather(*(page["take_one"](service.databases) for _ in range(5)))

    assert len({mrn for mrn in taken if mrn is not None}) == sum(mrn is not None for mrn in taken) >= 1
    while await page["take_one"](service.databases) is not None:
        pass
    assert await execute(NAMES) == "done,done,done"


async def test_overlap_is_refused(service: Service, database: Database, execute: Execute, page: dict[str, Any]) -> None:
    """Of two that overlap one is booked, and the other's request goes on."""
    owner = await asyncpg.connect(database.url("app_owner"))
    await owner.execute(SQL[0])
    await owner.close()
    service.app.add_api_route("/book/{room}", page["book"], methods=["POST"])

    async def book(room: int, first: str, last: str) -> str:
        answer = await service.client.post(f"/book/{room}", params={"first": first, "last": last})
        if answer.status_code == 503:
            # Two that are checked against each other at the same moment may deadlock, and one of them goes again.
            assert answer.json()["code"] == "deadlock"
            answer = await service.client.post(f"/book/{room}", params={"first": first, "last": last})
        return str(answer.json())

    both = await asyncio.gather(book(1, "2026-01-01", "2026-01-05"), book(1, "2026-01-05", "2026-01-09"))

    assert sorted(both) == ["booked", "taken"]
    assert await book(2, "2026-01-01", "2026-01-09") == "booked"
    assert await execute("SELECT count(*) FROM bookings") == 2


async def test_rebuilds_wait_for_each_other(service: Service, execute: Execute, page: dict[str, Any]) -> None:
    """And leave no lock."""
    assert await asyncio.gather(*(page["rebuild"](service.databases) for _ in range(3))) == [0, 0, 0]
    assert await execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


async def test_ward_is_not_overbooked(service: Service, execute: Execute, page: dict[str, Any]) -> None:
    """However many ask at once, by requests and by jobs, one gets in."""
    service.app.add_api_route("/admit/{mrn}", page["admit"], methods=["POST"])

    async def by_request(number: int) -> bool:
        return (await service.client.post(f"/admit/A-{number}")).status_code == 200

    async def by_job(number: int) -> bool:
        try:
            return bool(await page["admit_by_job"](service.databases, f"J-{number}") == "admitted")
        except Exception as error:  # noqa: BLE001  # Full, or the last attempt collided too.
            return "full" not in str(error) and "serialize" not in str(error)

    admitted = await asyncio.gather(*(by(number) for by in (by_request, by_job) for number in range(4)))

    assert admitted.count(True) == 1
    assert await execute("SELECT count(*) FROM patients") == 1


async def test_steps_are_stored(service: Service, execute: Execute, page: dict[str, Any]) -> None:
    """What came before the batch that fails."""
    with pytest.raises(Exception, match="uq_patients_mrn"):
        await page["load"](service.databases, [["A-1", "A-2"], ["A-3"], ["A-4", "A-1"]])

    assert await execute(MRNS) == "A-1,A-2,A-3"


async def test_rows_are_copied(service: Service, execute: Execute, page: dict[str, Any]) -> None:
    """In and out."""
    records = [(f"A-{number}", "Ada", BORN) for number in range(3)]
    written: list[bytes] = []

    async def write(data: bytes) -> None:
        written.append(data)

    async with service.databases.writing() as session:
        assert await page["import_patients"](records, session) == 3
        await page["export"](session, write)

    assert b"".join(written) == b"A-0,Ada\nA-1,Ada\nA-2,Ada\n"
    assert await execute(MRNS) == "A-0,A-1,A-2"


async def test_tenant_is_of_the_transaction(service: Service, page: dict[str, Any]) -> None:
    """The next statement of the request sees it, on the replica."""
    service.app.add_api_route("/tenants/{tenant}", page["tenant_of"], methods=["GET"])

    assert (await service.client.get("/tenants/a")).json() == "a"
    assert (await service.client.get("/tenants/b")).json() == "b"
    assert service.sample("db_connection_hold_seconds_count", pool="replica", route="/tenants/{tenant}") == 2
