"""Row-level security: no clinic ever sees another's rows, whatever happens on the one connection that they share."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import asyncpg
import httpx
import jwt
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from examples.row_level_security.app import ADD, ALL, SET_CLINIC, create_app
from pglifeguard import Databases, DatabasesSettings
from pglifeguard.testing.counting import counting_round_trips
from pglifeguard.testing.network import Network
from pglifeguard.testing.serving import Running, running
from tests.chaos import pooler
from tests.conftest import Database, Execute
from tests.examples.conftest import TOKEN_KEY, make_tables
from tests.poolers.programs import Shape
from tests.poolers.programs import running as pooling

CLINICS = [f"clinic-{number}" for number in range(100)]
ROUNDS = 5


class Boom(Exception):
    """What a block of the application raises."""


@pytest.fixture(autouse=True)
async def _tables(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the table, as the owner, and set the key of the tokens."""
    await make_tables(database, "row_level_security")
    monkeypatch.setenv("TOKEN_KEY", TOKEN_KEY)


def settings_of(primary: str, replica: str, **pool: Any) -> DatabasesSettings:
    """Build settings whose pools have one connection each."""
    pool = {"pool_size": 1, "max_overflow": 0, "pool_min_size": 1, "pool_timeout": 30, "pool_max_waiting": 1000} | pool
    return DatabasesSettings(
        _env_file=None,
        primary={"url": primary, **pool},
        replicas=({"url": replica, **pool},),
        analytics={"url": replica, **pool},
        monitor_interval_seconds=0.5,
        retry_after_spread_seconds=0,
    )


@asynccontextmanager
async def behind_pgbouncer(database: Database, directory: Path) -> AsyncIterator[DatabasesSettings]:
    """Run PgBouncer in transaction mode with one server connection for each role, in front of both servers."""
    found = pooler.program()
    assert found is not None
    shape = Shape(size=1, on_replica=database.name)
    async with pooling(found, shape, database.cluster, directory) as pgbouncer:
        yield settings_of(
            pgbouncer.url(database.url()),
            pgbouncer.replica_url(database.replica_url()),
            pool_size=20,
            statement_cache_size=pooler.statement_cache_size(),
        )


@asynccontextmanager
async def serving_example(settings: DatabasesSettings) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
    """Run the example and give a client of it."""
    async with (
        running(create_app(settings)) as served,
        httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://test", timeout=60) as client,
    ):
        yield served, client


def of(clinic: Any) -> dict[str, str]:
    """Give the header of a token with this claim."""
    claims = {"sub": "grace", "clinic": clinic, "exp": datetime.now(UTC) + timedelta(hours=1)}
    return {"Authorization": f"Bearer {jwt.encode(claims, TOKEN_KEY, 'HS256')}"}


@dataclass
class Clinic:
    """All that a clinic does, in an order of its own; it counts the rows that it sees by what they are."""

    name: str
    client: httpx.AsyncClient
    databases: Databases
    seen: Counter[str]

    async def live(self) -> None:
        """Write, with everything else in between."""
        random = Random(self.name)  # noqa: S311  # An order of requests, and no secret.
        others = [self.conflict, self.fail, self.roll_back, self.read_without, self.read_with_none, self.read]
        if int(self.name.rpartition("-")[2]) % 10 == 0:
            others.append(self.cancel)  # Each costs a login, so a few are enough to have them between all others.
        for number in range(ROUNDS):
            await self.write(number)
            await random.choice(others)()
        for other in others:
            await other()

    def note(self, clinics: Iterable[str]) -> None:
        """Count rows, of which these are the clinics."""
        self.seen.update("own" if clinic == self.name else "foreign" for clinic in clinics)

    async def write(self, number: int) -> None:
        """Store a record."""
        body = {"number": f"{number}", "content": self.name}
        answer = await self.client.post("/records", json=body, headers=of(self.name))
        assert answer.status_code == 201, answer.text
        self.note([answer.json()["clinic"]])

    async def read(self) -> None:
        """List the records."""
        answer = await self.client.get("/records", headers=of(self.name))
        assert answer.status_code == 200, answer.text
        self.note(row["clinic"] for row in answer.json())

    async def conflict(self) -> None:
        """Store a number that is taken."""
        body = {"number": "0", "content": self.name}
        answer = await self.client.post("/records", json=body, headers=of(self.name))
        assert answer.status_code == 409, answer.text

    async def fail(self) -> None:
        """Send a statement that the server refuses."""
        async with self.databases.writing() as session:
            await session.rows(SET_CLINIC, clinic=self.name)
            with pytest.raises(DBAPIError):
                await session.execute(text("SELECT 1 / 0"))
            await session.rollback()
            self.seen["unscoped"] += len(await session.rows(ALL))

    async def roll_back(self) -> None:
        """Raise after a write."""
        with suppress(Boom):
            async with self.databases.writing() as session:
                await session.rows(SET_CLINIC, clinic=self.name)
                self.note(row.clinic for row in await session.rows(ADD, number="never", content=self.name))
                raise Boom

    async def cancel(self) -> None:
        """Leave in the middle of a statement."""
        begun = asyncio.Event()

        async def hold() -> None:
            async with self.databases.writing() as session:
                await session.rows(SET_CLINIC, clinic=self.name)
                begun.set()
                await session.execute(text("SELECT pg_sleep(30)"))

        task = asyncio.create_task(hold())
        await begun.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def read_without(self) -> None:
        """Read without a clinic: on the replica without a transaction, and on the primary in one."""
        async with self.databases.reading() as session:
            self.seen["unscoped"] += len(await session.rows(ALL))
        async with self.databases.writing() as session:
            self.seen["unscoped"] += len(await session.rows(ALL))

    async def read_with_none(self) -> None:
        """Read with an empty clinic."""
        async with self.databases.reading() as session:
            await session.rows(SET_CLINIC, clinic="")
            self.seen["unscoped"] += len(await session.rows(ALL))


@pytest.mark.parametrize("way", ["PgBouncer", "directly"])
async def test_hundred_clinics_on_one_connection(
    database: Database, execute: Execute, open_directory: Path, way: str
) -> None:
    """With errors, rollbacks, cancels and plain reads in between nobody sees another's row, or any without a clinic.

    Behind PgBouncer in transaction mode all share one server connection for each role; directly, a pool of one.
    """
    seen: Counter[str] = Counter()
    async with AsyncExitStack() as stack:
        settings = settings_of(database.url(), database.replica_url())
        if way == "PgBouncer":
            settings = await stack.enter_async_context(behind_pgbouncer(database, open_directory))
        served, client = await stack.enter_async_context(serving_example(settings))
        databases = served.app.state.databases

        await asyncio.gather(*(Clinic(name, client, databases, seen).live() for name in CLINICS))

    assert seen["own"] > len(CLINICS) * ROUNDS
    assert (seen["foreign"], seen["unscoped"]) == (0, 0)
    assert await execute("SELECT count(*) FROM records WHERE clinic <> content") == 0
    # What was rolled back is not there, and what was stored is.
    assert await execute("SELECT count(*) FROM records") == len(CLINICS) * ROUNDS


@pytest.mark.parametrize("role", ["app_owner", "app_rw", "app_ro"])
async def test_without_a_clinic_nobody_sees_a_row(database: Database, execute: Execute, role: str) -> None:
    """Neither the table's owner; nor with an empty setting, nor where an earlier transaction had a clinic."""
    await execute("INSERT INTO records (clinic, number, content) VALUES ('a', '1', ''), ('b', '1', '')")
    await database.cluster.wait_replayed()
    connection = await asyncpg.connect(database.replica_url() if role == "app_ro" else database.url(role))
    count, found = "SELECT count(*) FROM records", {}

    found["without"] = await connection.fetchval(count)
    async with connection.transaction():
        await connection.execute("SELECT set_config('app.clinic', 'a', true)")
        found["a"] = await connection.fetchval(count)
    found["after it"] = await connection.fetchval(count)
    for name in ("", "A", "a%", "a' OR true --"):
        await connection.execute("SELECT set_config('app.clinic', $1, false)", name)
        found[name] = await connection.fetchval(count)
    await connection.close()

    assert found == {"without": 0, "a": 1, "after it": 0, "": 0, "A": 0, "a%": 0, "a' OR true --": 0}


async def test_without_a_clinic_nothing_is_written(database: Database, execute: Execute) -> None:
    """Nor is a row given to another clinic, changed or deleted."""
    await execute("INSERT INTO records (clinic, number, content) VALUES ('b', '1', '')")
    writer = await asyncpg.connect(database.url())
    insert = "INSERT INTO records (clinic, number, content) VALUES ($1, '2', '')"

    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        await writer.execute("INSERT INTO records (number, content) VALUES ('2', '')")
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        await writer.execute(insert, "b")
    async with writer.transaction():
        await writer.execute("SELECT set_config('app.clinic', 'a', true)")
        changed = [
            await writer.execute("UPDATE records SET content = 'x'"),
            await writer.execute("DELETE FROM records"),
        ]
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
            async with writer.transaction():
                await writer.execute(insert, "b")
        # The number is taken by another clinic, of which nothing is told.
        await writer.execute("INSERT INTO records (number, content) VALUES ('1', '')")
    await writer.close()

    assert changed == ["UPDATE 0", "DELETE 0"]


@pytest.mark.parametrize("clinic", [None, "", " ", "A", "a%", ["a"], 7, "x" * 64])
async def test_token_without_a_clinic_is_refused(database: Database, clinic: Any) -> None:
    """403, and no connection is asked; so is a token that is not ours."""
    async with serving_example(settings_of(database.url(), database.replica_url())) as (_, client):
        answers = [
            await client.get("/records", headers=of(clinic)),
            await client.post("/records", json={"number": "1", "content": ""}, headers=of(clinic)),
            await client.get("/records", headers={"Authorization": "Bearer x.y.z"}),
        ]

    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(403, "no_clinic")] * 3


async def test_record_of_another_clinic_is_not_there(database: Database) -> None:
    """404 on the replica, and on the primary, where the read is tried again."""
    async with serving_example(settings_of(database.url(), database.replica_url())) as (_, client):
        made = await client.post("/records", json={"number": "1", "content": "x"}, headers=of("a"))
        path = f"/records/{made.json()['id']}"
        token = {"X-Consistency-Token": made.headers["X-Consistency-Token"]}
        answers = [await client.get(path, headers=of(clinic) | token) for clinic in ("a", "b")]

    assert [answer.status_code for answer in answers] == [200, 404]


async def test_what_it_costs(database: Database, network: Network) -> None:
    """A read is a transaction of four round trips, where it was one; a write has one more."""
    async with serving_example(settings_of(database.url(), database.replica_url())) as (served, client):
        counted = partial(counting_round_trips, network, served.app.state.databases)
        for number in range(2):  # The first time statements are prepared.
            costs = []
            with counted() as trips:
                await client.get("/records", headers=of("a"))
            costs.append((trips.primary, trips.replica))
            with counted() as trips:
                await client.post("/records", json={"number": f"{number}", "content": "x"}, headers=of("a"))
            costs.append((trips.primary, trips.replica))
            client.cookies.clear()

    assert costs == [(0, 4), (5, 0)]
