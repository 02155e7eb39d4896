"""Five instances of twenty connections, and what the servers see of them: thirty. Instances replaced under load."""

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.compose.conftest import URL
from tests.compose.stack import SUPERUSER_PASSWORD, Stack, eventually
from tests.compose.traffic import Traffic

INSTANCES = 5
POOL = 20
SECONDS = 12
# Shorter than a client waits in PgBouncer (5 s), and long enough for twenty to come to it on a slow machine.
STALL_SECONDS = 3.0

BACKENDS = "SELECT count(*) FROM pg_stat_activity WHERE usename IN ('app_rw', 'app_ro', 'pgbouncer')"


@pytest.fixture
async def five(stack: Stack) -> AsyncIterator[None]:
    """Run five instances of twenty, and one of five again afterwards."""
    sizes = {"DATABASE_POOL_SIZE": str(POOL), "DATABASE_POOL_MIN_SIZE": str(POOL), "DATABASE_POOL_TIMEOUT": "5"}
    await stack.up("--scale", f"app={INSTANCES}", env=sizes)
    yield
    await stack.up("--scale", "app=1")


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("five")
async def test_hundred_connections_share_thirty(stack: Stack, prometheus: httpx.AsyncClient) -> None:
    """5 x 20 clients on each alias under load, three seconds of it with all writers behind one lock: at most 30 server
    connections at every sample, no error, statements prepared once and used by all; and Prometheus watches
    each instance.
    """
    samples = {server: asyncio.create_task(_sample(stack, server)) for server in ("primary", "replica")}
    async with httpx.AsyncClient(base_url=URL, timeout=30, limits=httpx.Limits(max_connections=200)) as client:
        first = (await client.post("/patients", json=_patient("FIVE-0"))).json()["id"]
        parses = await _stats(stack)
        stall = asyncio.create_task(_stall(stack, first))
        deadline = time.monotonic() + SECONDS
        counts = await asyncio.gather(
            *(_write(client, first, worker, deadline) for worker in range(INSTANCES * POOL)),
            *(_read(client, first, deadline) for _ in range(INSTANCES * POOL)),
        )
        await stall
    seen = {server: await task for server, task in samples.items()}
    clients = {
        alias: len([c for c in await stack.console("SHOW CLIENTS") if c["database"] == alias])
        for alias in ("lifeguard", "lifeguard_replica")
    }
    done = await _stats(stack)

    async def all_found() -> bool:
        answer = (await prometheus.get("/api/v1/query", params={"query": 'count(up{job="app"} == 1)'})).json()
        return bool(answer["data"]["result"] and answer["data"]["result"][0]["value"][1] == str(INSTANCES))

    await eventually(all_found, within=30)
    print(  # noqa: T201  # The figures of docs/topology.md.
        f"\n{sum(counts)} requests in {SECONDS} s; clients at the pooler {clients}; most server connections "
        f"{ {server: max(s) for server, s in seen.items()} } in {len(seen['primary'])} samples; "
        f"client parses {done['client_parse'] - parses['client_parse']}, "
        f"server parses {done['server_parse'] - parses['server_parse']}, binds {done['bind'] - parses['bind']}"
    )
    assert all(max(values) <= 30 for values in seen.values()), seen
    assert all(len(values) >= 20 for values in seen.values())
    assert max(seen["primary"]) >= 20, "the load was no load"
    assert all(count >= INSTANCES * POOL for count in clients.values()), clients
    # Prepared statements are in use: many binds to each parse, and no more parses at a server than at the pooler.
    binds = done["bind"] - parses["bind"]
    assert binds >= sum(counts)
    assert done["server_parse"] - parses["server_parse"] < binds / 10
    assert any(int(row["prepared_statements"]) > 0 for row in await stack.console("SHOW SERVERS"))


@pytest.mark.timeout(240)
async def test_instances_are_replaced_without_a_failed_request(stack: Stack) -> None:
    """`deploy/roll.sh` under load: a new version that does not start leaves the old instance in its place, one that
    does replaces it, and all the time every request is answered.
    """
    before = await _ids(stack)
    async with Traffic(URL, 50, prefix="ROLL") as traffic:
        refused, said = await stack.script("deploy/roll.sh", env={"DATABASE_POOL_SIZE": "0"})
        kept = await _ids(stack)
        rolled, log = await stack.script("deploy/roll.sh", env={"DATABASE_POOL_SIZE": "6"})
        replaced = await _ids(stack)
        sizes = [c["Config"]["Env"] for c in await stack.containers("app")]

    await stack.up()
    print(f"\nrolled twice: {traffic.summary()}")  # noqa: T201  # The figures of docs/topology.md.
    assert traffic.bad() == []
    assert refused == 1, said
    assert "DATABASE_POOL_SIZE: has to be greater than or equal to 1" in said
    assert kept == before
    assert rolled == 0, log
    assert len(replaced) == len(before)
    assert replaced.isdisjoint(before)
    assert all("DATABASE_POOL_SIZE=6" in variables for variables in sizes)


@pytest.mark.timeout(180)
async def test_scaling_down_fails_nobody(stack: Stack) -> None:
    """Two of three instances are taken away under load: each says that it is closing before its port closes."""
    await stack.up(env={"INSTANCES": "3"})
    async with Traffic(URL, 50, prefix="DOWN") as traffic:
        await stack.up()
        await asyncio.sleep(2)  # The claim is about these two seconds as well.

    assert len(await _ids(stack)) == 1
    assert traffic.bad() == []


async def _ids(stack: Stack) -> set[str]:
    return {container["Id"] for container in await stack.containers("app")}


async def _sample(stack: Stack, server: str) -> list[int]:
    """Count the service's backends on one server, about four times a second, from one session of its own."""
    watch = f"{BACKENDS} \\watch i=0.25 c={SECONDS * 4}"
    answer = await stack.compose(
        *("exec", "-T", "-e", f"PGPASSWORD={SUPERUSER_PASSWORD}", server),
        *("bash", "-c", f'psql -XqAt -U postgres lifeguard <<<"{watch}"'),
    )
    return [int(line) for line in answer.split()]


async def _stats(stack: Stack) -> dict[str, int]:
    """Add up PgBouncer's own counters of prepared statements over both aliases."""
    rows = [r for r in await stack.console("SHOW STATS") if r["database"].startswith("lifeguard")]
    return {
        name: sum(int(row[f"total_{name}_count"]) for row in rows) for name in ("client_parse", "server_parse", "bind")
    }


def _patient(mrn: str) -> dict[str, str]:
    return {"mrn": mrn, "full_name": "One Of Many", "birth_date": "1960-01-01"}


async def _stall(stack: Stack, patient: int) -> None:
    """Lock the row that all writers change, in the middle of the load, for less than a client waits in PgBouncer."""
    await asyncio.sleep(SECONDS / 3)
    await stack.lock_patient(patient, seconds=STALL_SECONDS)


async def _write(client: httpx.AsyncClient, shared: int, worker: int, deadline: float) -> int:
    """Create a patient of one's own, then change the one that everybody changes."""
    count = 0
    while time.monotonic() < deadline:
        count += 1
        made = await client.post("/patients", json=_patient(f"FIVE-{worker}-{count}"))
        assert made.status_code == 201, made.text
        changed = await client.patch(f"/patients/{shared}", json={"full_name": f"Worker {worker}"})
        assert changed.status_code == 200, changed.text
    return count * 2


async def _read(client: httpx.AsyncClient, patient: int, deadline: float) -> int:
    count = 0
    while time.monotonic() < deadline:
        count += 1
        response = await client.get(f"/patients/{patient}")
        assert response.status_code == 200, response.text
    return count
