"""More load than the database can serve: what can be served is, the rest hears so at once, and nothing is left over."""

import asyncio
import gc
import resource
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import asyncpg
import pytest
from pydantic import SecretStr

from app.security import issue_token
from pglifeguard.embedded.waiting import eventually
from pglifeguard.testing.faults import exhausted
from tests.app.test_cli import MODULE, NAME, Process, served
from tests.chaos import FULL, in_time
from tests.chaos.load import Answer, after, ask, offer, quantile, tell
from tests.chaos.wire import Client
from tests.conftest import Database
from tests.service import serving

SERVICE_SECONDS = 0.02
POOL_TIMEOUT_SECONDS = 0.5
POOL = 4
WAITING = 40
SECONDS = 10.0 if FULL else 2.0
SHED_SECONDS = 0.005
USEFUL_SHARE = 0.95
# Until then an overload is taken for a burst.
ONSET_SECONDS = 0.5
# Clients that ask twice a second each, beside one with so many requests in flight.
POLITE = 10
GREEDY = 200
SECRET = "a secret of the tests, of 32 bytes or more"
# Three times the capacity for so long is cleared within the patience.
BURST_SECONDS = 0.2
# A client that waits for longer has gone away.
USEFUL_WITHIN_SECONDS = 1.0
CONCURRENT = 10_000 if FULL else 500
# Half of a request, from a client that is slow or gone.
SLOW = 100
ADA = {"mrn": "O-1", "full_name": "Ada Example", "birth_date": "1980-05-17"}


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector of this process, which is the clock, from standing still for a tenth of a second."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def slow_down(database: Database, seconds: float = SERVICE_SECONDS) -> None:
    """Make each read of a patient take so much more on the server."""
    owner = await asyncpg.connect(database.url("app_owner"), timeout=5)
    try:
        await owner.execute("INSERT INTO patients (mrn, full_name, birth_date) VALUES ('O-1', 'Ada', '1980-05-17')")
        await owner.execute("ALTER TABLE patients RENAME TO patients_stored")
        await owner.execute(f"""
            CREATE VIEW patients AS
            SELECT stored.* FROM patients_stored AS stored, (SELECT pg_sleep({seconds}) OFFSET 0) AS slowly
        """)  # noqa: S608  # A number.
    finally:
        await owner.close()


@asynccontextmanager
async def overloadable(database: Database, directory: Path, **environment: str) -> AsyncIterator[Client]:
    """Serve with small pools, reads from the replica, as a process of its own."""
    await database.cluster.wait_replayed()
    variables = database.environment() | {
        "DATABASE_POOL_SIZE": str(POOL),
        "DATABASE_MAX_OVERFLOW": "0",
        "DATABASE_POOL_TIMEOUT": str(POOL_TIMEOUT_SECONDS),
        "DATABASE_POOL_MAX_WAITING": str(WAITING),
        "LOG_LEVEL": "ERROR",
    }
    async with served(directory, variables | environment, *MODULE) as server:
        client = Client(server.url)
        try:
            yield client
        finally:
            client.close()


async def capacity_of(client: Client) -> float:
    """Measure how many reads a second are served when each client waits for its answer."""
    done, until = after(SECONDS / 2), time.monotonic()
    counts: Counter[int] = Counter()

    async def read_on() -> None:
        while not done():
            counts[(await client.ask("GET", "/patients/1")).status] += 1

    await asyncio.gather(*(read_on() for _ in range(2 * POOL)))
    assert set(counts) == {200}
    return counts[200] / (time.monotonic() - until)


async def overload(client: Client, capacity: float, times: float = 3) -> list[Answer]:
    """Offer so many times as much, whatever becomes of it."""
    return await offer(lambda _: client.ask("GET", "/patients/1"), per_second=times * capacity, until=after(SECONDS))


@pytest.mark.parametrize("times", [2, 3, 5] if FULL else [3])
async def test_overload_sheds_and_serves(
    database: Database, tmp_path: Path, measured: Callable[[str], None], times: float
) -> None:
    """Beyond its capacity the service goes on at its capacity, answers whom it accepts as fast as usual, refuses the
    rest at once, and recovers.
    """
    await slow_down(database)
    async with overloadable(database, tmp_path) as client:
        capacity = await capacity_of(client)
        answers = await overload(client, capacity, times)
        ended = time.monotonic()
        calm = await offer(lambda _: client.ask("GET", "/patients/1"), per_second=capacity / 2, until=after(2))

    begun = answers[0].asked_at
    served_ones = [answer for answer in answers if answer.status == 200]
    useful = sum(answer.answered_at - begun <= SECONDS for answer in served_ones) / SECONDS
    accepted = quantile([answer.seconds for answer in served_ones], 0.99)
    # A burst is waited out, so those who come in the first moments are told after a wait.
    shed = quantile([a.seconds for a in answers if a.status == 503 and a.asked_at >= begun + ONSET_SECONDS], 0.99)
    back = [answer for answer in calm if answer.asked_at >= ended + 1]
    measured(
        f"{times:g} x: capacity {capacity:.0f}/s, offered {len(answers) / SECONDS:.0f}/s, useful {useful:.0f}/s "
        f"({useful / capacity:.0%}); p99 of accepted {accepted * 1000:.0f} ms, of shed {shed * 1000:.1f} ms; "
        f"a second later p99 {quantile([a.seconds for a in back], 0.99) * 1000:.0f} ms"
    )
    assert {answer.status for answer in answers} == {200, 503}
    assert {answer.code for answer in answers if answer.status == 503} == {"pool_exhausted"}
    assert all("retry-after" in answer.headers for answer in answers if answer.status == 503)
    in_time(useful >= USEFUL_SHARE * capacity, useful / capacity)
    in_time(accepted <= 5 * SERVICE_SECONDS, accepted)
    in_time(shed <= SHED_SECONDS, shed)
    assert {answer.status for answer in back} == {200}
    in_time(quantile([answer.seconds for answer in back], 0.99) <= 0.1)


async def test_what_can_be_served_is_not_shed(
    database: Database, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """At nine tenths of the capacity, and in a burst that the pool can clear within its patience, nobody is refused."""
    await slow_down(database)
    async with overloadable(database, tmp_path, DATABASE_POOL_MAX_WAITING="200") as client:
        capacity = await capacity_of(client)
        steady = await overload(client, capacity, 0.9)
        burst = await offer(
            lambda _: client.ask("GET", "/patients/1"), per_second=3 * capacity, until=after(BURST_SECONDS)
        )

    refused = [sum(answer.status == 503 for answer in answers) for answers in (steady, burst)]
    measured(
        f"0.9 x: {refused[0]} of {len(steady)} refused, p99 {quantile([a.seconds for a in steady], 0.99) * 1000:.0f} "
        f"ms; burst: {refused[1]} of {len(burst)} refused, slowest {max(a.seconds for a in burst) * 1000:.0f} ms"
    )
    in_time(refused == [0, 0], sum(refused))


async def test_one_client_starves_nobody(database: Database, tmp_path: Path, measured: Callable[[str], None]) -> None:
    """Beside one client with two hundred requests in flight ten others are served as if they were alone."""
    await slow_down(database)
    tokens = {
        name: issue_token(SecretStr(SECRET), subject=name, scopes=["patients:read"], lifetime=timedelta(hours=1))
        for name in ("greedy", *(f"polite-{number}" for number in range(POLITE)))
    }
    waiting = {"AUTH_SECRET": SECRET, "DATABASE_POOL_MAX_WAITING": str(GREEDY)}
    async with overloadable(database, tmp_path, **waiting) as anybody:
        clients = {name: Client(anybody.url, token=token) for name, token in tokens.items()}
        polite = [client for name, client in clients.items() if name != "greedy"]
        ended = asyncio.Event()

        async def ask_politely(number: int) -> Answer:
            return await polite[number % POLITE].ask("GET", "/patients/1")

        async def ask_on() -> int:
            count = 0
            while not ended.is_set():
                count += (await clients["greedy"].ask("GET", "/patients/1")).status == 200
            return count

        alone = await offer(ask_politely, per_second=2 * POLITE, until=after(SECONDS))
        flood = [asyncio.create_task(ask_on()) for _ in range(GREEDY)]
        beside = await offer(ask_politely, per_second=2 * POLITE, until=after(SECONDS))
        ended.set()
        served_greedily = sum(await asyncio.gather(*flood))
        for client in clients.values():
            client.close()

    served_ones = sum(answer.status == 200 for answer in beside)
    # All two hundred come at once. Whoever comes among them waits until the process has read them all.
    begun = beside[0].asked_at + ONSET_SECONDS
    onset = max(answer.seconds for answer in beside if answer.asked_at < begun)
    before = quantile([answer.seconds for answer in alone], 0.99)
    later = quantile([answer.seconds for answer in beside if answer.asked_at >= begun], 0.99)
    measured(
        f"{served_ones} of {len(beside)} served, p99 {later * 1000:.0f} ms, {before * 1000:.0f} ms without the other, "
        f"who was served {served_greedily} times; slowest when the 200 arrive {onset * 1000:.0f} ms"
    )
    assert {answer.status for answer in alone} == {200}
    in_time(served_ones >= 0.999 * len(beside), served_ones / len(beside))
    in_time(later <= 2 * before, later)


@pytest.mark.skipif(not FULL, reason="shows the usual way, which takes its time: make chaos")
async def test_a_long_queue_serves_nobody(database: Database, tmp_path: Path, measured: Callable[[str], None]) -> None:
    """With the usual 30 seconds of patience and a plain queue without a bound, hardly anyone is served in time."""
    await slow_down(database)
    patient = {
        "DATABASE_POOL_TIMEOUT": "30",
        "DATABASE_POOL_MAX_WAITING": "100000",
        "DATABASE_POOL_QUEUE_TARGET_SECONDS": "0",
    }
    async with overloadable(database, tmp_path, **patient) as client:
        capacity = await capacity_of(client)
        answers = await overload(client, capacity)

    useful = sum(a.status == 200 and a.seconds <= USEFUL_WITHIN_SECONDS for a in answers) / SECONDS
    measured(f"30 s of patience: useful {useful:.0f}/s of {capacity:.0f}/s ({useful / capacity:.0%})")
    assert useful < 0.5 * capacity


@pytest.mark.parametrize("patience", ["short", "long"] if FULL else ["long"])
async def test_ten_thousand_at_once(
    database: Database, tmp_path: Path, measured: Callable[[str], None], patience: str
) -> None:
    """Ten thousand requests at once are all answered over at most twenty connections: served, if they may wait."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * CONCURRENT:
        pytest.skip(f"a process may open {hard} files here, and {2 * CONCURRENT} are wanted")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    variables = {"DATABASE_POOL_SIZE": "8", "DATABASE_MAX_OVERFLOW": "0", "DATABASE_POOL_MIN_SIZE": "8"}
    variables |= {"DATABASE_ANALYTICS_POOL_SIZE": "1", "DATABASE_ANALYTICS_MAX_OVERFLOW": "0", "LOG_LEVEL": "ERROR"}
    if patience == "long":
        variables |= {"DATABASE_POOL_TIMEOUT": "60", "DATABASE_POOL_MAX_WAITING": str(CONCURRENT)}
    async with served(tmp_path, database.environment() | variables, *MODULE) as server:
        client = Client(server.url, keep=False)
        created = await client.ask("POST", "/patients", ADA)
        await database.cluster.wait_replayed()
        watching = asyncio.create_task(watch_connections(database))

        async def one(number: int) -> Answer:
            if number % 10:
                return await client.ask("GET", created.headers["location"])
            return await client.ask("POST", "/patients", ADA | {"mrn": f"O-{number + 2}"})

        async with asyncio.timeout(90):
            answers = await asyncio.gather(*(one(number) for number in range(CONCURRENT)))
        watching.cancel()
        most = await watching
        alive = await client.ask("GET", created.headers["location"])

    statuses = Counter(answer.status for answer in answers)
    slowest = max(answer.seconds for answer in answers)
    measured(
        f"{CONCURRENT} at once, {patience} patience: {tell(statuses)}, slowest {slowest:.1f} s, "
        f"at most {most} server connections"
    )
    assert set(statuses) == {200, 201} if patience == "long" else set(statuses) <= {200, 201, 503}
    assert most <= 20
    assert alive.status == 200


async def watch_connections(database: Database) -> int:
    """Count the service's connections to both servers, again and again until cancelled; return the most."""
    watchers = [await server.connect() for server in (database.cluster.primary, database.cluster.replica)]
    asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
    most = 0
    try:
        while True:
            most = max(most, sum([await watcher.fetchval(asked, NAME) for watcher in watchers]))
            await asyncio.sleep(0.05)
    except asyncio.CancelledError:
        return most
    finally:
        for watcher in watchers:
            watcher.terminate()


async def test_slow_clients_hold_no_connection(
    database: Database, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """A hundred clients that send half a request, and a hundred that never read, cost the others nothing."""
    async with served(tmp_path, database.environment(), *MODULE) as server:
        client = Client(server.url)
        await client.ask("POST", "/patients", ADA)
        half = client.request("POST", "/patients", ADA | {"mrn": "O-2"})[:-20]
        unread = client.request("GET", "/patients") * 50
        opened = [await client.connect() for _ in range(2 * SLOW)]
        for number, (_, writer) in enumerate(opened):
            writer.write(half if number % 2 else unread)
            await writer.drain()

        async def all_answered() -> bool:
            # Each answer was written to a client that does not read it.
            return await lists_answered(server) == SLOW * 50 and await held(server) == 0

        assert await eventually(all_answered, 60)
        answers = [await client.ask("GET", "/patients?limit=1") for _ in range(50)]
        at_once = await held(server)
        client.close()

    slowest = max(answer.seconds for answer in answers)
    measured(f"{at_once} connections held for {2 * SLOW} slow clients, others' slowest answer {slowest * 1000:.0f} ms")
    assert {answer.status for answer in answers} == {200}
    assert at_once == 0


async def lists_answered(server: Process) -> float:
    """Count the answers to `GET /patients`."""
    lines = (await server.client.get("/metrics")).text.splitlines()
    begin = 'http_requests_total{method="GET",route="/patients",'
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(begin))


async def held(server: Process) -> int:
    """Count the connections that the service holds for somebody."""
    figures = (await server.client.get("/debug/pool-stats")).json()
    return sum(pool["checked_out"] for pool in figures.values())


async def test_analytics_exhausted_leaves_users_and_patients_alone(
    database: Database, measured: Callable[[str], None]
) -> None:
    """Reports have a pool of their own: when it is full they are refused, and nobody else is."""
    async with serving(database.settings()) as service, exhausted(service.databases.analytics):
        report = asyncio.create_task(ask(service.app, "GET", "/reports/summary"))
        others = [await ask(service.app, "GET", path) for path in ("/users", "/patients") for _ in range(50)]
        refused = await report

    slowest = max(answer.seconds for answer in others)
    measured(f"reports {refused.status}, the others' slowest answer {slowest * 1000:.0f} ms")
    assert (refused.status, refused.code) == (503, "pool_exhausted")
    assert {answer.status for answer in others} == {200}
    in_time(slowest < 0.25, slowest)


async def test_waiting_is_first_come_first_served(database: Database, measured: Callable[[str], None]) -> None:
    """A hundred who wait for one connection get it in the order in which they came."""
    pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 10.0}
    order: list[int] = []
    async with serving(database.settings(replica=False, **pool)) as service:
        databases = service.databases

        async def wait_for_it(number: int) -> None:
            async with databases.reading() as session:
                await session.connection()
                order.append(number)

        async with exhausted(databases.primary):
            waiting = []
            for number in range(100):
                waiting.append(asyncio.create_task(wait_for_it(number)))

                async def queued(number: int = number) -> bool:
                    return databases.primary.pool.figures().waiting == number + 1

                assert await eventually(queued, 5)
        await asyncio.gather(*waiting)

    measured(f"{len(order)} served, {sum(later < earlier for earlier, later in pairwise(order))} out of order")
    assert order == list(range(100))
