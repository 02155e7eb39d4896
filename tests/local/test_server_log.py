"""What a server writes into its log: who waits for whom, and nothing of the rows."""

import asyncio
from contextlib import suppress

import asyncpg
import pytest

from pglifeguard.embedded.waiting import eventually
from tests.conftest import Database

PATIENT = "INSERT INTO patients (mrn, full_name, birth_date) VALUES ($1, $2, '1980-05-17')"
# As much as nothing else in the log resembles.
SECRET = "Ada Confidential"


async def read_log(database: Database) -> str:
    """Read what the primary has logged so far."""
    return await asyncio.to_thread(database.cluster.primary.log.read_text, "utf-8", "replace")


async def test_log_names_who_holds_the_lock(database: Database) -> None:
    """A statement that waits for longer than deadlock_timeout is logged with the process that it waits for."""
    holder, waiter = [await asyncpg.connect(database.url("app_rw")) for _ in range(2)]
    holding, waiting = holder.get_server_pid(), waiter.get_server_pid()
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute("LOCK TABLE patients")

    wait = asyncio.create_task(waiter.fetch("SELECT FROM patients"))

    async def is_told() -> bool:
        said = await read_log(database)
        waits = f"process {waiting} still waiting for AccessShareLock on relation"
        return waits in said and f"Process holding the lock: {holding}." in said

    told = await eventually(is_told, 10)
    await transaction.rollback()
    await wait
    for connection in (holder, waiter):
        await connection.close()
    assert told


@pytest.mark.parametrize("role", ["app_rw", "app_owner"])
@pytest.mark.parametrize(
    ("statement", "arguments"),
    [
        pytest.param(PATIENT, ("S-1", SECRET), id="unique violation"),
        pytest.param("UPDATE patients SET mrn = NULL, full_name = $1", (SECRET,), id="failing row"),
        pytest.param("SELECT CAST($1::text AS date)", (SECRET,), id="invalid input"),
        pytest.param("DO $$ BEGIN RAISE WARNING 'row %', (SELECT p FROM patients p LIMIT 1); END $$", (), id="warning"),
    ],
)
async def test_log_quotes_no_row(database: Database, role: str, statement: str, arguments: tuple[str, ...]) -> None:
    """An error is about a row, and its text or detail quotes it: none of it is in the server's log."""
    connection = await asyncpg.connect(database.url(role))
    await connection.execute(PATIENT.replace("$2", f"'{SECRET}'").replace("$1", f"'{SECRET}'"))
    if statement == PATIENT:
        arguments = (SECRET, SECRET)

    with suppress(asyncpg.PostgresError):
        await connection.execute(statement, *arguments)
    await connection.close()

    said = await read_log(database)
    assert SECRET not in said


async def test_log_keeps_the_errors_of_others(database: Database) -> None:
    """What the server or an operator does wrong is logged: only the roles that handle rows are quiet."""
    connection = await asyncpg.connect(database.url("postgres"))

    with pytest.raises(asyncpg.UndefinedTableError):
        await connection.execute("SELECT FROM nowhere_to_be_found")
    await connection.close()

    assert 'relation "nowhere_to_be_found" does not exist' in await read_log(database)
