"""A read that follows its client's own write is served by the replica, which is asked for milliseconds."""

import asyncio
import time
from typing import Any

import pytest
from sqlalchemy import select

from app.patients.models import Patient
from local.cluster import Cluster
from pglifeguard import replay_wait
from pglifeguard.consistency import Consistency
from pglifeguard.embedded.waiting import eventually
from pglifeguard.errors import DatabaseUnavailable
from pglifeguard.forged_tokens import ROUND_SECONDS
from pglifeguard.lease import Lease
from pglifeguard.replay_wait import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, ReplayWait
from pglifeguard.server_position import Token
from pglifeguard.testing.proxy import Proxy
from tests.conftest import Database, Execute
from tests.service import Service, quiet, write
from tests.standbys import cascading_standby

WRITTEN = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"


async def change(service: Service, path: str, name: str) -> dict[str, str]:
    """Change a patient's name; return the header with the token of that."""
    changed = await service.client.patch(path, json={"full_name": name})
    service.client.cookies.clear()
    return {"X-Consistency-Token": changed.headers["x-consistency-token"]}


async def name_of(service: Service, path: str, token: dict[str, str]) -> Any:
    """Read a patient's name."""
    answer = await service.client.get(path, headers=token)
    assert answer.status_code == 200, answer.text
    return answer.json()["full_name"]


def outcomes(service: Service) -> dict[str, float]:
    """Count the reads with a token by what the replica had; leave out what there was none of."""
    names = ("known", "replayed", "missed", "skipped")
    counts = {name: service.sample("db_consistent_reads_total", outcome=name) for name in names}
    return {name: count for name, count in counts.items() if count}


def on_primary(service: Service) -> float:
    """Count the reads that went to the primary for a token."""
    return service.sample("db_reads_routed_total", target="primary", reason="behind_token")


# The replica is asked.


async def test_one_question_and_its_answer_is_known_to_all(
    database: Database, proxy: Proxy, replica_proxy: Proxy
) -> None:
    """The first read after a write takes one round trip more, on the replica; those after it take none."""
    settings = database.settings(
        primary={"url": proxy.url(database.url())}, replicas=({"url": replica_proxy.url(database.replica_url())},)
    )
    async with quiet(settings) as service:
        path = (await write(service)).headers["location"]
        for number in range(2):  # The first turn prepares the statements.
            token = await change(service, path, f"Name {number}")
            await database.cluster.wait_replayed()
            trips = []
            for _ in range(3):
                proxy.round_trips = replica_proxy.round_trips = 0
                assert await name_of(service, path, token) == f"Name {number}"
                trips.append((proxy.round_trips, replica_proxy.round_trips))

        assert trips == [(0, 2), (0, 1), (0, 1)]
        assert outcomes(service) == {"replayed": 2, "known": 4}


@pytest.mark.parametrize("lane", ["driver", "sqlalchemy", "pooled"])
async def test_replica_answers_once_it_has_replayed_the_write(
    database: Database, breakable_cluster: Cluster, lane: str
) -> None:
    """A read that comes before the replay waits for it, and sees the write; the primary is not asked."""
    async with quiet(database.settings(replica_wait_milliseconds=1000)) as service:
        path = (await write(service)).headers["location"]
        (replica,) = service.databases.replicas
        await breakable_cluster.wait_replayed()
        await breakable_cluster.pause_replay()
        token = await change(service, path, "Changed")
        if lane == "pooled":
            for entry in replica.pool._idle:
                entry.info["checkout"].connection.pooled = True

        async def read() -> Any:
            if lane == "driver":
                return await name_of(service, path, token)
            wanted = Token.parse(token["X-Consistency-Token"].encode())
            async with service.databases.reading(Consistency(wanted)) as session:
                return await session.scalar(select(Patient.full_name))

        async def asked() -> bool:
            return replica.pool.figures().checked_out == 1

        reading = asyncio.create_task(read())
        assert await eventually(asked, 5)
        await breakable_cluster.resume_replay()

        assert await reading == "Changed"
        assert (outcomes(service), on_primary(service)) == ({"replayed": 1}, 0)


async def test_behind_a_pooler_a_read_without_a_token_asks_nothing(database: Database) -> None:
    """The next transaction may run on another server, so an answer would say nothing."""
    async with quiet(database.settings()) as service:
        (replica,) = service.databases.router.replicas
        lease = Lease(replica.database, await replica.database.pool.acquire(), readonly=True)
        lease.connection.pooled = True

        assert await replica.serves(lease, None) is None
        lease.give_back()


async def test_cascading_standby_is_asked_as_any_other(database: Database, breakable_cluster: Cluster) -> None:
    """A standby that follows a standby serves what it has replayed itself."""
    async with cascading_standby(breakable_cluster) as standby:
        url = database.url("app_ro").replace(str(breakable_cluster.primary.port), str(standby.port))
        settings = database.settings(replicas=({"url": url},), replica_wait_milliseconds=1000)
        async with quiet(settings) as service:
            path = (await write(service)).headers["location"]
            for number in range(20):
                token = await change(service, path, f"Name {number}")
                assert await name_of(service, path, token) == f"Name {number}"

            assert service.databases.router.replicas[0].state == "usable"
            assert outcomes(service).get("replayed", 0) + outcomes(service).get("known", 0) == 20


async def test_transaction_with_an_older_snapshot_does_not_serve(database: Database, execute: Execute) -> None:
    """Under REPEATABLE READ the question takes the snapshot, so what is replayed during it would not be seen."""
    await execute(f"ALTER DATABASE {database.name} SET default_transaction_isolation = 'repeatable read'")
    await database.cluster.wait_replayed()
    async with quiet(database.settings()) as service:
        path = (await write(service)).headers["location"]
        token = await change(service, path, "Changed")
        await database.cluster.wait_replayed()
        wanted = Token.parse(token["X-Consistency-Token"].encode())
        async with service.databases.reading(Consistency(wanted)) as session:
            found = await session.scalar(select(Patient.full_name))

        assert (found, on_primary(service)) == ("Changed", 1)


# Replay has stopped.


async def test_replica_that_missed_is_not_asked_for_a_while(
    database: Database, breakable_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With replay stopped one read waits; the next ones go to the primary at once, until a probe finds the write."""
    monkeypatch.setattr(replay_wait, "FIRST_PAUSE_SECONDS", 3600)
    monkeypatch.setattr(replay_wait, "LONGEST_PAUSE_SECONDS", 3600)
    async with quiet(database.settings()) as service:
        (replica,) = service.databases.router.replicas
        path = (await write(service)).headers["location"]
        await breakable_cluster.pause_replay()
        try:
            token = await change(service, path, "Changed")
            for _ in range(5):
                assert await name_of(service, path, token) == "Changed"
            stopped = outcomes(service)
            await service.databases.primary.monitor.probe()
            # Known to be written, so the primary is chosen without a session on the replica.
            assert await name_of(service, path, token) == "Changed"
        finally:
            await breakable_cluster.resume_replay()
        await breakable_cluster.wait_replayed()
        await replica.database.monitor.probe()
        assert await name_of(service, path, token) == "Changed"

        assert stopped == {"missed": 1, "skipped": 4}
        assert outcomes(service) == {"missed": 1, "skipped": 5, "known": 1}
        assert (on_primary(service), replica.wait.missed) == (6, None)


async def test_switched_off_no_replica_is_asked(database: Database) -> None:
    """With a bound of 0 a read with a newer token goes to the primary at once."""
    async with quiet(database.settings(replica_wait_milliseconds=0)) as service:
        path = (await write(service)).headers["location"]
        token = await change(service, path, "Changed")
        await database.cluster.wait_replayed()

        assert await name_of(service, path, token) == "Changed"
        assert (outcomes(service), on_primary(service)) == ({"skipped": 1}, 1)


def test_pause_doubles_with_each_miss() -> None:
    """Reads that waited together are one miss; after a pause one read tries while the others do not wait."""
    wait, token, now = ReplayWait(0.01), Token(1, 1), time.monotonic()
    assert (wait.begin(), wait.begin()) == (0.01, 0.01)

    wait.miss(token, since=now)
    wait.miss(token, since=now)

    assert (wait.allowed, wait.begin(), wait._pause) == (False, 0.0, FIRST_PAUSE_SECONDS)
    for times in (2, 4, 8):
        wait._pauses_until = 0.0
        assert (wait.begin(), wait.begin()) == (0.01, 0.0)
        wait.miss(token, since=time.monotonic())
        assert wait._pause == FIRST_PAUSE_SECONDS * times
    for _ in range(10):
        wait.miss(token, since=time.monotonic())
    assert wait._pause == LONGEST_PAUSE_SECONDS
    wait.end()
    assert wait.begin() == 0.01


# Tokens that the primary did not write.


def forged(service: Service, number: int) -> Token:
    """Make a token of this cluster, ahead of all that the primary has written, and of PostgreSQL's integers."""
    return Token(2**64 - 1 - number, 1, (service.databases.primary.monitor.position.system or 0) & 0xFFFF_FFFF)


async def read(service: Service, token: Token) -> None:
    """Read with a token."""
    async with service.databases.reading(Consistency(token)) as session:
        await session.scalar(select(Patient.id))


async def test_token_ahead_of_the_primary_is_not_believed_for_long(database: Database) -> None:
    """A forged token, or one of writes that a restore has lost, costs one read on the primary; its question tells."""
    async with quiet(database.settings()) as service:
        (replica,) = service.databases.router.replicas
        token = forged(service, 0)

        await read(service, token)

        async def found() -> bool:
            return service.databases.router.forged.believed(token) is None

        assert await eventually(found, 5)
        before = service.sample("db_consistency_tokens_total", outcome="ahead")
        for _ in range(3):
            await read(service, token)
        assert service.sample("db_consistency_tokens_total", outcome="ahead") >= before + 3
        assert on_primary(service) == 1
        # It was not the replica's fault.
        assert replica.wait.missed is None


async def test_flood_of_forged_tokens_does_not_reach_the_primary(database: Database) -> None:
    """Each token is another one: after the first the primary is asked for all of them together, and serves no read."""
    replica = {"url": database.replica_url(), "pool_timeout": 10}
    async with quiet(database.settings(replicas=(replica,))) as service:
        await read(service, forged(service, 0))
        checked = service.databases.router.forged

        async def found() -> bool:
            return checked.alert

        assert await eventually(found, 5)
        questions = 0

        def count(_probe: object) -> None:
            nonlocal questions
            questions += 1

        service.databases.primary.monitor.listeners.append(count)
        begun = time.monotonic()
        tokens = [forged(service, number) for number in range(1, 51)]
        await asyncio.gather(*(read(service, token) for token in tokens))
        seconds = time.monotonic() - begun

        assert on_primary(service) == 1
        assert service.sample("db_consistency_tokens_total", outcome="ahead") >= 50
        assert questions <= 2 * (seconds / ROUND_SECONDS + 2)


async def test_among_forged_tokens_a_real_one_is_honoured(
    database: Database, breakable_cluster: Cluster, execute: Execute
) -> None:
    """The write of another instance is ahead of what this one knows; the question confirms it, and nothing is stale."""
    async with quiet(database.settings()) as service:
        await write(service)
        await breakable_cluster.wait_replayed()
        await breakable_cluster.pause_replay()
        try:
            assert not await service.databases.router.forged.confirms(forged(service, 0))
            await execute("UPDATE patients SET full_name = 'Changed'")
            wanted = Token(int(await execute(WRITTEN)), 1)
            async with service.databases.reading(Consistency(wanted)) as session:
                found = await session.scalar(select(Patient.full_name))
        finally:
            await breakable_cluster.resume_replay()

        assert found == "Changed"
        assert outcomes(service) == {"missed": 1}


async def test_without_an_answer_a_token_is_believed(database: Database, proxy: Proxy) -> None:
    """Nothing is called forged that the primary could not be asked about, nor while the databases are closing."""
    async with quiet(database.settings(primary={"url": proxy.url(database.url())})) as service:
        token, checked = forged(service, 0), service.databases.router.forged
        proxy.refuse()
        proxy.cut()

        assert await checked.confirms(token)
        with pytest.raises(DatabaseUnavailable):
            await read(service, token)
        await checked.close()
        checked.suspect(token)
        assert await checked.confirms(token)
        assert service.sample("db_consistency_tokens_total", outcome="ahead") == 0


async def test_question_that_had_begun_before_does_not_count(database: Database, proxy: Proxy) -> None:
    """A probe under way may have read the position before a token was written, so the primary is asked after it."""
    async with quiet(database.settings(primary={"url": proxy.url(database.url())})) as service:
        monitor, checked = service.databases.primary.monitor, service.databases.router.forged
        probes: list[float] = []
        monitor.listeners.append(lambda probe: probes.append(probe.at - (probe.latency_seconds or 0.0)))
        under_way = asyncio.create_task(monitor.probe())
        for _ in range(2):  # Its task makes another one, which asks.
            await asyncio.sleep(0)

        begun = time.monotonic()
        await checked.confirms(forged(service, 0))

        await under_way
        assert probes[0] < begun < probes[1]
