"""A role's password is rotated under load: first on the server, later in the file that the service reads."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi import WriteDB
from tests.chaos import FULL, pooler
from tests.chaos.load import ask, offer, tell
from tests.conftest import Database
from tests.rotating import Rotating, rotating
from tests.service import serving

PER_SECOND = 200 if FULL else 60
# Seconds for which the server and the file disagree.
APART_SECONDS = 2.0 if FULL else 0.0
ANSWERS = 400 if FULL else 30
# So many slow requests more than the pool has open: it logs in while the password is refused.
TOO_MANY = 4
SOON = 20.0
SLOW = text("SELECT pg_sleep(0.05)")
PATIENT = {"full_name": "Ada Example", "birth_date": "1980-05-17"}
# PgBouncer asks the server for a client's password at each login, so a rotation needs nothing of it.
LOOK_UP = {
    "auth_type": "scram-sha-256",
    "auth_user": "app_rw",
    "auth_query": "SELECT name, password FROM look_up($1)",
}
LOOKED_UP = """
    CREATE FUNCTION look_up(INOUT name text, OUT password text) LANGUAGE sql SECURITY DEFINER
    SET search_path = pg_catalog AS 'SELECT usename, passwd FROM pg_shadow WHERE usename = name'
"""


@asynccontextmanager
async def way(by: str, database: Database, directory: Path) -> AsyncIterator[int]:
    """Give the port that leads to the primary."""
    if by == "direct":
        yield database.cluster.primary.port
        return
    if pooler.program() is None:
        pytest.skip("PgBouncer is not installed: apt-get install pgbouncer")
    superuser = await asyncpg.connect(database.url("postgres"))
    await superuser.execute(LOOKED_UP)
    await superuser.close()
    async with pooler.pooling(database.cluster, directory, size=5, more=LOOK_UP) as port:
        yield port


def settings_of(role: Rotating, port: int, *, pooled: bool) -> Any:
    """Return the settings of a service whose every connection is the role's."""
    own: dict[str, Any] = {"password_file": role.path, "pool_size": 40, "max_overflow": 0, "pool_min_size": 2}
    primary = own | {"url": role.url(port=port)}
    if pooled:
        primary["statement_cache_size"] = pooler.statement_cache_size()
    replica = own | {"url": role.url(replica=True)}
    return role.database.settings(primary=primary, replicas=(replica,), analytics=replica | {"pool_min_size": 0})


@pytest.mark.parametrize("by", ["direct", "pooler"])
async def test_rotated_password_costs_no_request(
    database: Database, open_directory: Path, tmp_path: Path, measured: Callable[[str], None], by: str
) -> None:
    """Old connections serve while new ones are refused; with the new password all of them are replaced."""
    async with (
        way(by, database, open_directory) as port,
        rotating(database, tmp_path) as role,
        serving(settings_of(role, port, pooled=by != "direct")) as service,
    ):

        @service.app.post("/slow")
        async def slow(db: WriteDB) -> None:
            await db.execute(SLOW)

        codes: Counter[str] = Counter()
        finished = False

        async def request(number: int) -> None:
            if number % 2:
                answer = await ask(service.app, "POST", "/patients", PATIENT | {"mrn": f"R-{number}"})
            else:
                answer = await ask(service.app, "GET", "/patients?limit=1")
            codes[answer.code or str(answer.status)] += 1

        async def answered_more() -> None:
            before = codes.total()

            async def enough() -> bool:
                return codes.total() >= before + ANSWERS

            assert await eventually(enough, SOON)

        async def refused_logins() -> bool:
            figures = service.databases.primary.pool.figures()
            burst = figures.checked_in + figures.checked_out + TOO_MANY
            answers = await asyncio.gather(*(ask(service.app, "POST", "/slow") for _ in range(burst)))
            codes.update(answer.code or str(answer.status) for answer in answers)
            return service.sample("db_connection_connect_failures_total", pool="primary") >= 2

        load = asyncio.create_task(offer(request, per_second=PER_SECOND, until=lambda: finished))
        try:
            await answered_more()
            before = await role.sessions()
            await role.rotate(publish=False)
            assert await eventually(refused_logins, SOON)
            await asyncio.sleep(APART_SECONDS)
            await answered_more()
            assert service.databases.primary.monitor.healthy
            role.publish()
            await service.databases.renew_connections()
            await answered_more()
        finally:
            finished = True
            await load
        refused = service.sample("db_connection_connect_failures_total", pool="primary")

        async def replaced() -> bool:
            return by != "direct" or not before & await role.sessions()

        assert await eventually(replaced, SOON)
    measured(f"{by}: {tell(codes)}, {refused:.0f} logins refused")
    assert set(codes) <= {"200", "201"}, codes
