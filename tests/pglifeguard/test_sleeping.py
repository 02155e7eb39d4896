"""A database that sleeps is left alone while nobody asks, and woken by one request for all."""

import asyncio
from typing import Any, get_args

import asyncpg
import pytest

from app.settings import Settings
from local.cluster import Cluster
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.embedded.waiting import eventually
from pglifeguard.fastapi.idempotency import purge_expired_keys
from pglifeguard.testing.proxy import Proxy, Sleep
from tests.conftest import Database
from tests.interpreter import python
from tests.pglifeguard.conftest import pooled, sessions_end
from tests.service import ADA, Service, serving

# The sessions that the server has served, since it counts: monitors and probes would be among them.
SERVED = "SELECT sessions FROM pg_stat_database WHERE datname = $1"
CROWD = 100
# What asks for the state of the service, and must not wake the database.
WATCHING = (
    "/health/live", "/health/ready", "/health/db", "/metrics", "/debug/pool-stats", "/debug/connections",
    "/debug/pools", "/debug/pools/figures", "/debug/pools/sessions",
)  # fmt: skip


def sleeping(
    database: Database,
    through: Proxy | None = None,
    replica: Proxy | None = None,
    *,
    url: str | None = None,
    **changes: Any,
) -> Settings:
    """Return settings of a service whose databases sleep: the primary, and the replica when there is a proxy to it."""
    url = url or (database.url() if through is None else through.url(database.url()))
    sleeps = {"profile": "sleeping", "pool_idle_seconds": 0.1, "wake_seconds": 30, "pool_min_size": None}
    pool = sleeps | {name: changes.pop(name) for name in set(changes) & {"pool_idle_seconds", "wake_seconds"}}
    replicas = () if replica is None else ({**pool, "url": replica.url(database.replica_url())},)
    fields: dict[str, Any] = {"primary": {**pool, "url": url}, "analytics": {**pool, "url": url}, "replicas": replicas}
    return database.settings(replica=False, **(fields | changes))


async def asleep(service: Service) -> None:
    """Return when all databases sleep and all connections are closed."""

    async def all_asleep() -> bool:
        return all(database.monitor.asleep and not database.pool.asked for database in service.databases.all())

    assert await eventually(all_asleep, 10), [database.monitor.last for database in service.databases.all()]


async def no_login(service: Service) -> bool:
    """Return whether no login is under way, and nobody waits for one."""
    searches = [database.connector._search for database in service.databases.all()]
    return not any(search._attempts or search._callers for search in searches)


async def crowd(service: Service, path: str = "/users", count: int = CROWD) -> list["asyncio.Task[Any]"]:
    """Send as many requests at once; return when all of them wait for the database."""
    requests = [asyncio.create_task(service.client.get(path)) for _ in range(count)]

    async def all_wait() -> bool:
        return sum(database.pool.load for database in service.databases.all()) == count

    assert await eventually(all_wait, 10)
    return requests


async def test_sleeping_database_is_asked_nothing(database: Database) -> None:
    """From the start on, and again after the idle time, the server sees no session, whoever looks at the service."""
    watcher = await asyncpg.connect(database.cluster.url("postgres"))

    async def no_session() -> bool:
        return not await watcher.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'",
            database.name,
        )

    async def look_at_everything() -> None:
        before = await watcher.fetchval(SERVED, database.name)
        for path in WATCHING:
            assert (await service.client.get(path)).status_code == 200
        # That nothing happens can only be watched for a while: ten intervals of the monitor.
        await asyncio.sleep(0.5)
        assert await no_session()
        assert await watcher.fetchval(SERVED, database.name) == before

    assert await eventually(no_session, 5)
    async with serving(sleeping(database), settled=False) as service:
        await asleep(service)
        await look_at_everything()

        assert (await service.client.get("/users")).status_code == 200
        await asleep(service)
        assert await eventually(no_session, 5)
        await look_at_everything()
    await watcher.close()


@pytest.mark.parametrize("how", get_args(Sleep))
async def test_one_request_wakes_it_for_all(database: Database, proxy: Proxy, how: Sleep) -> None:
    """A hundred requests come while it sleeps: one login wakes it, the others wait for that, and none fails."""
    # A login that the server forgot is tried again after a sixth of the time.
    settings = sleeping(database, proxy, wake_seconds=3 if how == "forgets" else 30)

    # A server that answers is asked again.
    knocks = {"refuses": 0, "says_starting": 3}.get(how, 1)

    async def knocked() -> bool:
        return proxy.connections >= knocks

    async with serving(settings, settled=False) as service:
        proxy.fall_asleep(how)

        requests = await crowd(service)
        health = (await service.client.get("/health/db")).json()
        assert (health["status"], health["databases"]["primary"]["waiting_for_it"]) == ("asleep", CROWD)
        assert await eventually(knocked, 5)
        if how in {"holds", "forgets"}:
            assert proxy.connections == knocks
        await proxy.wake_up(how)
        answers = await asyncio.gather(*requests)

        assert {answer.status_code for answer in answers} == {200}
        assert service.sample("db_connection_wake_seconds_count", pool="primary") == CROWD
        # The usual patience, and the usual alert of slow acquisitions, begin when it is awake.
        slow = service.sample("db_connection_acquire_seconds_count", pool="primary") - service.sample(
            "db_connection_acquire_seconds_bucket", pool="primary", le="0.1"
        )
        assert slow == 0


async def test_database_that_does_not_wake_up(database: Database, proxy: Proxy) -> None:
    """All who wait are told at once; it counts as down while somebody asks; the next request tries again."""
    # The last request has so long for the first login of all, on a busy machine too.
    settings = sleeping(database, proxy, wake_seconds=1.0, pool_idle_seconds=30)
    async with serving(settings, settled=False) as service:
        proxy.fall_asleep("says_starting")

        answers = await asyncio.gather(*await crowd(service, count=20))

        assert {answer.status_code for answer in answers} == {503}
        assert all(answer.headers["Retry-After"] for answer in answers)
        assert proxy.connections < 20, "the logins are paced, however many requests wait"

        async def known_as_down() -> bool:
            return service.databases.primary.monitor.last.status == "error"

        assert await eventually(known_as_down, 5)
        service.databases.publish()
        assert service.databases.metrics.registry.get_sample_value("db_up", {"pool": "primary"}) == 0
        assert (await service.client.get("/health/ready")).status_code == 503
        (request,) = await crowd(service, count=1)
        await proxy.wake_up("says_starting")
        assert (await request).status_code == 200


async def test_database_that_is_down_sleeps_when_nobody_asks(database: Database, proxy: Proxy) -> None:
    """After the idle time it is not known to be down: it is asked nothing, and traffic may come."""
    async with serving(sleeping(database, proxy, wake_seconds=0.1), settled=False) as service:
        proxy.fall_asleep("says_starting")
        assert (await service.client.get("/users")).status_code == 503

        await asleep(service)
        # A probe that had begun by then waits for its turn to knock, and may still do so.
        assert await eventually(lambda: no_login(service), 10)
        assert (await service.client.get("/health/live")).status_code == 200

        knocks = proxy.connections
        assert (await service.client.get("/health/ready")).json() == {"status": "ready", "primary": "asleep"}
        assert (await service.client.get("/health/db")).json()["status"] == "asleep"
        exposed = (await service.client.get("/metrics")).text
        assert 'db_asleep{pool="primary"} 1.0' in exposed
        assert not [line for line in exposed.splitlines() if line.startswith(("db_up{", "db_write_stall_seconds{"))]
        assert proxy.connections == knocks


async def test_refusal_by_a_server_that_is_awake_is_told_at_once(database: Database) -> None:
    """Nobody waits for a database that is not there: that is no sleep."""
    settings = sleeping(database, wake_seconds=300, url=f"{database.url()}_not_there")
    async with serving(settings, settled=False) as service, asyncio.timeout(30):
        answer = await service.client.get("/users")

        assert (answer.status_code, "does not exist" in answer.json()["detail"]) == (503, True)


@pytest.mark.parametrize("silently", [False, True])
async def test_server_that_goes_to_sleep_by_itself_is_let_alone(
    database: Database, proxy: Proxy, *, silently: bool
) -> None:
    """Connections that it closes, or forgets, are no reason to knock; and they fail no request later."""
    async with serving(sleeping(database, proxy, pool_idle_seconds=300), settled=False) as service:
        assert {(await service.client.get("/users")).status_code for _ in range(3)} == {200}
        primary = service.databases.primary

        async def watched() -> bool:
            return primary.monitor.healthy

        assert await eventually(watched, 5)
        knocks = proxy.connections
        if silently:
            proxy.hang()
        else:
            proxy.fall_asleep("holds")
        await asleep(service)

        assert proxy.connections == knocks
        requests = await crowd(service, count=20)

        async def knocked() -> bool:
            return proxy.connections > knocks

        assert await eventually(knocked, 5)
        assert proxy.connections == knocks + 1
        await proxy.wake_up("holds")
        assert {answer.status_code for answer in await asyncio.gather(*requests)} == {200}


async def test_login_that_it_fell_asleep_under_refuses_nobody(database: Database, proxy: Proxy) -> None:
    """When the last connection goes while another one is being opened, the next login has the time to wake it."""
    async with pooled(proxy.url(database.url()), profile="sleeping", pool_timeout=10, connect_timeout_seconds=5) as p:
        slot = await p.pool.acquire()
        proxy.hang()
        waiting = asyncio.create_task(p.pool.acquire())

        async def knocked(times: int) -> bool:
            return proxy.connections >= times

        assert await eventually(lambda: knocked(2), 5)
        slot.info["checkout"].connection.terminate()
        p.pool.release(slot)
        proxy.fall_asleep("says_starting")
        assert await eventually(lambda: knocked(5), 5)

        await proxy.wake_up("says_starting")
        p.pool.release(await waiting)


async def test_it_has_the_time_to_wake_up_after_a_pause(
    database: Database, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waited for the end of a planned switchover waits for the wake-up that follows it too."""
    monkeypatch.setattr("pglifeguard.pool.RESUMED_SECONDS", 0.01)
    async with pooled(proxy.url(database.url()), profile="sleeping") as p:
        proxy.fall_asleep("says_starting")
        p.pool.pause(60)
        waiting = asyncio.create_task(p.pool.acquire())
        await asyncio.sleep(0)  # It is in the queue now.

        p.pool.resume()

        async def knocked() -> bool:
            return proxy.connections >= 4

        assert await eventually(knocked, 5)
        await proxy.wake_up("says_starting")
        p.pool.release(await waiting)


async def test_shutdown_while_it_wakes_up(database: Database, proxy: Proxy) -> None:
    """The requests that wait are told, and no session is left at the server that wakes up just then."""
    async with serving(sleeping(database, proxy), settled=False) as service:
        proxy.fall_asleep("holds")
        requests = await crowd(service, count=5)
        waking = asyncio.create_task(proxy.wake_up("holds"))  # It runs at the first await of the shutdown.

    await waking
    assert {(await request).json()["code"] for request in requests} == {"pool_exhausted"}
    assert await sessions_end(database)


@pytest.mark.parametrize("command", [["-m", "alembic", "current"], ["-m", "app", "connections"]], ids=" ".join)
async def test_jobs_and_operators_wake_it(database: Database, proxy: Proxy, command: list[str]) -> None:
    """What an operator starts may wake the database, and waits for it as the service does."""
    url = proxy.url(database.url("app_owner"))
    proxy.fall_asleep("says_starting")
    running = asyncio.create_task(
        python(*command, environment={"DATABASE_URL": url, "MIGRATIONS_URL": url, "DATABASE_PROFILE": "sleeping"})
    )

    async def knocked_again() -> bool:
        return proxy.connections > 1 or running.done()

    assert await eventually(knocked_again, 30)
    await proxy.wake_up("says_starting")
    status, said = await running
    assert status == 0, said


async def test_doctor_wakes_it_and_says_that_it_sleeps(database: Database, proxy: Proxy) -> None:
    """The diagnosis is that of a database which is awake; the budget says that nothing is open otherwise."""
    proxy.fall_asleep("says_starting")
    environment = {"DATABASE_URL": proxy.url(database.url()), "DATABASE_PROFILE": "sleeping"}
    running = asyncio.create_task(python("-m", "pglifeguard", "doctor", environment=environment))

    async def knocked_again() -> bool:
        return proxy.connections > 2 or running.done()

    assert await eventually(knocked_again, 30)
    await proxy.wake_up("says_starting")
    _status, said = await running
    assert "does not answer" not in said
    assert "or 0 asleep" in said


async def test_reads_go_to_the_primary_while_the_replica_wakes_up(database: Database, replica_proxy: Proxy) -> None:
    """A read that finds the replica asleep does not wait: it wakes the replica, once, for the reads that follow."""
    settings = sleeping(database, replica=replica_proxy, primary={"url": database.url()}, pool_idle_seconds=1)
    async with serving(settings, settled=False) as service:
        (replica,) = service.databases.router.replicas

        async def settled() -> bool:
            return service.databases.primary.monitor.healthy and replica.state == "asleep"

        async def usable() -> bool:
            return replica.state == "usable"

        assert await eventually(settled, 5)
        replica_proxy.fall_asleep("holds")
        for _ in range(5):
            assert (await service.client.get("/users")).status_code == 200

        assert service.sample("db_reads_routed_total", target="primary", reason="asleep") == 5
        assert replica_proxy.connections == 1
        await replica_proxy.wake_up("holds")
        assert await eventually(usable, 5)
        assert service.sample("db_replica_usable", pool="replica") == 1
        assert await eventually(settled, 5)
        figures = service.databases.metrics.registry.get_sample_value
        assert figures("db_replica_usable", {"pool": "replica"}) is None
        assert figures("db_replica_lag_bytes", {"pool": "replica"}) is None
        assert (replica.lag_bytes, replica.lag_seconds) == (None, None)


async def test_sleeping_replica_is_woken_beside_a_broken_one(database: Database, replica_proxy: Proxy) -> None:
    """Of two replicas one refuses: the reads wake the other."""
    settings = sleeping(database, replica=replica_proxy, primary={"url": database.url()}, pool_idle_seconds=30)
    (replica,) = settings.replicas
    broken = {"url": f"{database.replica_url()}_not_there", "pool_min_size": 0}
    settings = settings.model_copy(update={"replicas": (replica, DatabaseSettings(**broken))})
    async with serving(settings, settled=False) as service:
        first, second = service.databases.router.replicas

        async def settled() -> bool:
            return service.databases.primary.monitor.healthy and (first.state, second.state) == ("asleep", "broken")

        async def usable() -> bool:
            return first.state == "usable"

        assert await eventually(settled, 5)
        assert (await service.client.get("/users")).status_code == 200
        assert await eventually(usable, 5)


async def test_reads_wait_for_the_replica_where_the_primary_may_not_serve_them(
    database: Database, replica_proxy: Proxy
) -> None:
    """Without falling back a read waits for the replica, and the primary, which is awake, has none of it."""
    settings = sleeping(database, replica=replica_proxy, primary={"url": database.url()}, replica_fallback=False)
    async with serving(settings, settled=False) as service:
        primary = service.databases.primary.monitor

        async def awake() -> bool:
            return primary.healthy

        # A replica cannot be compared with a primary that has not been looked at yet.
        assert await eventually(awake, 5)
        replica_proxy.fall_asleep("holds")
        requests = await crowd(service, count=5)
        await replica_proxy.wake_up("holds")

        assert {answer.status_code for answer in await asyncio.gather(*requests)} == {200}
        assert service.sample("db_reads_routed_total", target="replica", reason="replica") == 5


async def test_reads_leave_a_sleeping_primary_alone(database: Database, proxy: Proxy, replica_proxy: Proxy) -> None:
    """Where both sleep, a read wakes the replica alone; where that has not replayed the client's write, the primary."""
    settings = sleeping(database, proxy, replica_proxy)
    async with serving(settings, settled=False) as service:
        await asleep(service)
        created = await service.client.post("/patients", json=ADA)
        location = created.headers["Location"]
        await database.cluster.wait_replayed()
        await asleep(service)
        of_primary, of_replica = proxy.connections, replica_proxy.connections

        assert (await service.client.get(location)).status_code == 200

        assert (proxy.connections, replica_proxy.connections > of_replica) == (of_primary, True)
        health = (await service.client.get("/health/db")).json()
        assert health["databases"]["replica"]["lag_bytes"] is None
        await asleep(service)
        token = service.client.cookies["consistency_token"]
        head, _, low = token.rpartition("/")
        ahead = f"{head}/{int(low, 16) + 2**24:X}"
        service.client.cookies.clear()
        assert (await service.client.get(location, headers={"X-Consistency-Token": ahead})).status_code == 200
        assert proxy.connections > of_primary
        assert service.sample("db_reads_routed_total", target="primary", reason="behind_token") == 1


async def test_replica_that_does_not_wake_up(database: Database, proxy: Proxy, replica_proxy: Proxy) -> None:
    """A read that waited for it in vain runs on the primary, where the following ones go at once."""
    settings = sleeping(database, proxy, replica_proxy, pool_idle_seconds=30)
    settings = settings.model_copy(
        update={"replicas": tuple(each.model_copy(update={"wake_seconds": 0.2}) for each in settings.replicas)}
    )
    async with serving(settings, settled=False) as service:
        replica_proxy.fall_asleep("refuses")

        assert (await service.client.get("/users")).status_code == 200

        assert service.databases.router.replicas[0].state == "broken"
        assert service.sample("db_reads_retried_total", reason="database_unreachable") == 1
        assert (await service.client.get("/users")).status_code == 200
        assert service.sample("db_reads_routed_total", target="primary", reason="broken") == 1


async def test_rotated_password_wakes_nobody(database: Database, proxy: Proxy) -> None:
    """A sleeping database has no connection that would have to be renewed."""
    async with serving(sleeping(database, proxy), settled=False) as service:
        await service.databases.renew_connections()

        assert proxy.connections == 0


async def test_expired_keys_are_purged_while_it_is_awake(database: Database, proxy: Proxy) -> None:
    """The purge does not wake the database, and does not forget that it is due."""
    async with serving(sleeping(database, proxy, pool_idle_seconds=2), settled=False) as service:
        purge = asyncio.create_task(purge_expired_keys(service.databases, hours=24, interval_seconds=0.01))
        await asyncio.sleep(0.1)  # Ten times as long as the purge would wait.
        assert proxy.connections == 0

        assert (await service.client.get("/users")).status_code == 200

        async def purged() -> bool:
            return any("DELETE FROM idempotency_keys" in statement for statement in proxy.statements)

        assert await eventually(purged, 5)
        purge.cancel()


async def test_replica_that_wakes_up_is_asked_how_far_it_is(
    breakable_cluster: Cluster, database: Database, proxy: Proxy, replica_proxy: Proxy
) -> None:
    """What a lagging replica would tell is not told, with the client's token and without one."""
    settings = sleeping(
        database, proxy, replica_proxy, replica_max_lag_bytes=0, replica_max_lag_seconds=0.001, pool_idle_seconds=1
    )
    async with serving(settings, settled=False) as service:
        await breakable_cluster.pause_replay()
        created = await service.client.post("/patients", json=ADA)
        for client_has_token in (True, False):
            await asleep(service)
            if not client_has_token:
                service.client.cookies.clear()

            listed = await service.client.get("/patients")

            assert [patient["mrn"] for patient in listed.json()] == [created.json()["mrn"]]
        await breakable_cluster.resume_replay()
    assert service.sample("db_reads_routed_total", target="primary", reason="lagging") == 2
