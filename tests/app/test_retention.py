"""Deleting a row deletes what `idempotency_keys` remembers of it, and the table is closed to who only reads."""

import asyncio
import json
from datetime import date
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import APIRouter

from app.audit.models import AUDIT_TRAIL
from app.models import Base, load_models
from app.patients import queries
from local.setup import create_roles
from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi import IDEMPOTENCY_TABLE, IdempotentRoute, WriteDB
from pglifeguard.fastapi.idempotency import HEADER, purge_expired
from tests.conftest import Database, Execute
from tests.interpreter import python
from tests.service import Service

load_models()
ADA = {"mrn": "K-1", "full_name": "Ada Example", "birth_date": "1980-05-17"}
EVE = {"mrn": "K-2", "full_name": "Eve Example", "birth_date": "1981-05-17"}
# All that is kept, as text, in which a test looks for a patient's data.
KEPT = "SELECT string_agg(k::text || coalesce(encode(body, 'escape'), ''), ' ') FROM idempotency_keys k"
ROWS = "SELECT count(*) FROM idempotency_rows"
SHARED = pytest.mark.shares_service


async def create(service: Service, body: dict[str, str] = ADA, key: str = "one") -> httpx.Response:
    """Create a patient with a key."""
    return await service.client.post("/patients", json=body, headers={HEADER: key})


async def change(service: Service, path: str, key: str) -> httpx.Response:
    """Change a patient with a key."""
    return await service.client.patch(path, json={"full_name": "Ada Other"}, headers={HEADER: key})


@SHARED
async def test_deleting_a_patient_deletes_its_answers(service: Service, execute: Execute) -> None:
    """Those of the create and of the changes; another patient's answer stays, and is given again."""
    path = (await create(service)).headers["location"]
    await change(service, path, "two")
    other = await create(service, EVE, "three")
    before = await execute(KEPT)

    await service.client.delete(path)

    after = await execute(KEPT)
    assert ["Ada" in kept for kept in (before, after)] == [True, False]
    assert (await create(service, EVE, "three")).content == other.content


@SHARED
@pytest.mark.parametrize("body", [ADA, EVE], ids=["same body", "another body"])
async def test_repetition_after_the_deletion_is_told_and_does_nothing(
    service: Service, execute: Execute, body: dict[str, str]
) -> None:
    """The key gets 410 with a sentence and no data, and there is no second patient; another key makes one."""
    path = (await create(service)).headers["location"]
    await service.client.delete(path)

    again = await create(service, body)

    assert (again.status_code, again.json()["code"]) == (410, "idempotency_forgotten")
    assert "send another key" in again.json()["detail"]
    assert not [value for value in ADA.values() if value in again.text]
    assert await execute("SELECT count(*) FROM patients") == 0
    assert (await create(service, body, "other")).status_code == 201


@SHARED
async def test_change_of_a_deleted_patient_is_told_too(service: Service) -> None:
    """A PATCH that is repeated gets 410, and not the patient."""
    path = (await create(service)).headers["location"]
    await change(service, path, "two")
    await service.client.delete(path)

    again = await change(service, path, "two")

    assert (again.status_code, again.json()["code"]) == (410, "idempotency_forgotten")


@SHARED
@pytest.mark.parametrize("role", ["app_rw", "app_owner", "postgres"])
@pytest.mark.parametrize("statement", ["DELETE FROM patients WHERE mrn = 'K-1'", "DELETE FROM patients"])
async def test_deletion_beside_the_service_counts(
    service: Service, database: Database, execute: Execute, role: str, statement: str
) -> None:
    """psql, a job and a bulk delete forget as the route does, whoever runs them."""
    await create(service)
    connection = await asyncpg.connect(database.url(role))

    await connection.execute(statement)

    await connection.close()
    assert "Ada" not in await execute(KEPT)
    assert await execute(ROWS) == 0


@SHARED
async def test_role_that_may_only_delete_forgets_too(service: Service, database: Database, execute: Execute) -> None:
    """A role without a right on the keys deletes a patient with its answers: the trigger has its owner's rights."""
    await create(service)
    connection = await asyncpg.connect(database.url("postgres"))
    await connection.execute("CREATE ROLE eraser; GRANT USAGE ON SCHEMA public TO eraser")
    try:
        await connection.execute("GRANT SELECT, DELETE ON patients TO eraser; SET ROLE eraser")
        await connection.execute("DELETE FROM patients")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("SELECT FROM idempotency_keys")
    finally:
        await connection.execute("RESET ROLE; DROP OWNED BY eraser; DROP ROLE eraser")
        await connection.close()

    assert "Ada" not in await execute(KEPT)


async def test_cascade_and_truncate_count(service: Service, execute: Execute) -> None:
    """Rows that go by a cascade or by TRUNCATE take their answers along, and no one else's."""
    await execute("CREATE TABLE wards (id bigint PRIMARY KEY)")
    await execute("ALTER TABLE patients ADD ward bigint REFERENCES wards ON DELETE CASCADE")
    await execute("INSERT INTO wards VALUES (1)")
    await create(service)
    await create(service, EVE, "two")
    await execute("UPDATE patients SET ward = 1 WHERE mrn = 'K-1'")

    await execute("DELETE FROM wards")
    cascaded = await execute(KEPT)
    await execute("TRUNCATE patients CASCADE")
    truncated = await execute(KEPT)

    assert ["Ada" in cascaded, "Eve" in cascaded, "Eve" in truncated] == [False, True, False]


@SHARED
async def test_deletion_that_is_rolled_back_forgets_nothing(
    service: Service, database: Database, execute: Execute
) -> None:
    """Both happen in one transaction, or neither."""
    first = await create(service)
    connection = await asyncpg.connect(database.url())
    async with connection.transaction():
        await connection.execute("SAVEPOINT before; DELETE FROM patients; ROLLBACK TO before")
    await connection.close()

    again = await create(service)

    assert (again.status_code, again.content) == (201, first.content)
    assert await execute(ROWS) == 1


@pytest.mark.parametrize("ending", ["changes", "creates"])
async def test_deletion_races_with_a_request_with_a_key(service: Service, execute: Execute, ending: str) -> None:
    """A deletion that waits for a change in flight finds its answer; one that comes before a create finds no row."""
    reached, go_on = asyncio.Event(), asyncio.Event()
    router = APIRouter(route_class=IdempotentRoute)

    @router.post("/slow")
    async def slow(session: WriteDB) -> dict[str, Any]:
        if ending == "creates":
            row = await queries.add_patient(session, ADA | {"birth_date": date(1980, 5, 17)})
        else:
            row = await queries.change_patient(session, 1, {"full_name": "Ada Other"})
        reached.set()
        await go_on.wait()
        return {"full_name": row.full_name}

    service.app.include_router(router)
    if ending == "changes":
        await create(service)
    slowly = asyncio.create_task(service.client.post("/slow", headers={HEADER: "slow"}))
    await reached.wait()
    deleting = asyncio.create_task(service.client.delete("/patients/1"))
    if ending == "changes":

        async def waits() -> bool:
            return bool(await execute("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        assert await eventually(waits, 10)
    else:
        await deleting
    go_on.set()

    answers = [await slowly, await deleting]

    if ending == "creates":
        assert [answer.status_code for answer in answers] == [200, 404]
        await service.client.delete("/patients/1")
    else:
        assert [answer.status_code for answer in answers] == [200, 204]
    assert "Ada" not in await execute(KEPT)
    assert (await service.client.post("/slow", headers={HEADER: "slow"})).status_code == 410


async def test_repetition_waits_for_a_deletion_in_flight(service: Service, database: Database) -> None:
    """A key that is sent again before the deletion commits gets its 410 afterwards, and not the old answer."""
    await create(service)
    connection = await asyncpg.connect(database.url("app_rw"))
    async with connection.transaction():
        await connection.execute("DELETE FROM patients")
        again = asyncio.create_task(create(service))

        async def waits() -> bool:
            return bool(await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        assert await eventually(waits, 10)
    await connection.close()

    assert (await again).status_code == 410


async def test_request_that_deletes_keeps_its_own_answer(service: Service, execute: Execute) -> None:
    """A POST that deletes is answered alike when it is repeated; what others kept of the row is gone."""
    await create(service)
    router = APIRouter(route_class=IdempotentRoute)

    @router.post("/merge")
    async def merge(session: WriteDB) -> str:
        await queries.change_patient(session, 1, {"mrn": "K-9"})
        await queries.delete_patient(session, 1)
        return "merged"

    service.app.include_router(router)

    answers = [await service.client.post("/merge", headers={HEADER: "two"}) for _ in range(2)]

    assert [(answer.status_code, answer.json()) for answer in answers] == [(200, "merged")] * 2
    assert "Ada" not in await execute(KEPT)


@SHARED
async def test_key_after_its_time_begins_anew(service: Service, execute: Execute) -> None:
    """An expired key that is used again is not forgotten with the row that it was about before."""
    first = await create(service)
    await execute("UPDATE idempotency_keys SET created_at = now() - interval '25 hours'")
    second = await create(service, EVE)
    await service.client.delete(first.headers["location"])

    again = await create(service, EVE)

    assert (again.status_code, again.content) == (201, second.content)
    assert await execute(ROWS) == 1


@SHARED
async def test_purge_takes_the_notes_along(service: Service, execute: Execute) -> None:
    """No note outlives its key, purged or emptied."""
    await create(service)
    await create(service, EVE, "two")
    await execute("UPDATE idempotency_keys SET created_at = now() - interval '25 hours' WHERE body LIKE '%Ada%'::bytea")

    await purge_expired(service.databases, hours=24)
    purged = await execute(ROWS)
    await execute("TRUNCATE idempotency_keys")

    assert (purged, await execute(ROWS)) == (1, 0)


@SHARED
async def test_request_without_a_key_notes_nothing(service: Service, execute: Execute) -> None:
    """Nor does one that follows on the connection of a request that had one."""
    await create(service)
    await service.client.post("/patients", json=EVE)

    assert await execute(ROWS) == 1


@SHARED
async def test_version_before_this_one_forgets_too(database: Database) -> None:
    """While instances are replaced, what an old one keeps is tied to its row; what is left is no answer to it."""
    connection = await asyncpg.connect(database.url("app_rw"))
    async with connection.transaction():
        await connection.execute("INSERT INTO idempotency_keys (digest, fingerprint) VALUES ('d', 'f')")
        await connection.execute(
            "INSERT INTO patients (mrn, full_name, birth_date) VALUES ('K-1', 'Ada', '1980-01-01')"
        )
        await connection.execute(
            "UPDATE idempotency_keys SET status = 201, headers = '', body = 'Ada' WHERE digest = 'd'"
        )

    await connection.execute("DELETE FROM patients")

    row = await connection.fetchrow("SELECT fingerprint, status, body FROM idempotency_keys")
    await connection.close()
    assert row is not None
    assert tuple(row) == (b"", 410, None)


# Who may read it


@SHARED
@pytest.mark.parametrize("table", list(IDEMPOTENCY_TABLE.metadata.tables))
@pytest.mark.parametrize("where", ["primary", "replica"])
async def test_reader_sees_no_kept_answer(database: Database, table: str, where: str) -> None:
    """app_ro is shut out on both servers; what it may read else, it may read."""
    connection = await asyncpg.connect(database.url("app_ro") if where == "primary" else database.replica_url())

    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute(f"SELECT FROM {table}")  # A name of ours.

    assert await connection.fetchval("SELECT count(*) FROM patients") == 0
    await connection.close()


async def test_roles_run_again_leave_it_closed(database: Database) -> None:
    """postgres/roles.sql grants app_ro every table that it finds, and these no more."""
    cluster = database.cluster
    await create_roles(cluster.primary, database.name, cluster.passwords)
    connection = await asyncpg.connect(database.url("app_ro"))

    for table in IDEMPOTENCY_TABLE.metadata.tables:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(f"SELECT FROM {table}")  # A name of ours.
    await connection.close()


async def test_upgrade_of_a_database_in_use(database: Database, execute: Execute) -> None:
    """Answers from before are tied to their rows, those of deleted rows are forgotten, and the table is closed."""
    url = {"MIGRATIONS_URL": database.url("app_owner")}
    down = await python("-m", "alembic", "downgrade", "0003", environment=url)
    reader = await asyncpg.connect(database.url("app_ro"))
    await reader.fetch("SELECT body FROM idempotency_keys")
    await execute("INSERT INTO patients (mrn, full_name, birth_date) VALUES ('K-1', 'Ada', '1980-01-01')")
    connection = await asyncpg.connect(database.url("app_rw"))
    kept = [
        (b"a", json.dumps({"id": 1, "mrn": "K-1", "full_name": "Ada"}, separators=(",", ":")), "application/json"),
        (b"b", json.dumps({"id": 2, "mrn": "K-2", "full_name": "Eve"}, separators=(",", ":")), "application/json"),
        (b"c", json.dumps({"other": 1}), "application/json"),
        (b"d", None, None),
    ]
    await connection.executemany(
        "INSERT INTO idempotency_keys (digest, fingerprint, status, body, media_type) VALUES ($1, $1, 201, $2, $3)",
        [(digest, body and body.encode(), media_type) for digest, body, media_type in kept],
    )
    await connection.execute("INSERT INTO idempotency_keys (digest, fingerprint, body) VALUES ('e', 'e', '\\xff00')")

    up = await python("-m", "alembic", "upgrade", "head", environment=url)

    assert (down[0], up[0]) == (0, 0), (down, up)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await reader.fetch("SELECT body FROM idempotency_keys")
    assert ["Ada" in await execute(KEPT), "Eve" in await execute(KEPT)] == [True, False]
    await connection.execute("DELETE FROM patients")
    assert "Ada" not in await execute(KEPT)
    assert await execute("SELECT count(*) FROM idempotency_keys WHERE fingerprint <> ''") == 3
    await connection.close()
    await reader.close()


TRIGGERS = """
SELECT count(DISTINCT proname) FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
WHERE tgrelid = to_regclass($1) AND tgenabled = 'O'
  AND proname IN ('idempotency_note_row', 'idempotency_forget_rows', 'audit_change')
"""


async def test_every_table_of_a_domain_is_tied(execute: Execute) -> None:
    """A migration that makes a table without `forget_answers_with` or `audit_changes_of` is noticed."""
    tables = sorted(set(Base.metadata.tables) - {AUDIT_TRAIL.name})

    tied = {table: await execute(TRIGGERS, table) for table in tables}

    assert tied == dict.fromkeys(tables, 3)
