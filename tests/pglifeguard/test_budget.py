"""The arithmetic of connections."""

from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from app.settings import Settings
from pglifeguard import budget
from pglifeguard.environment import SettingsError
from tests.chaos.pooler import pooling, program, statement_cache_size
from tests.conftest import Database
from tests.pglifeguard.conftest import service_settings
from tests.service import Service, serving

needs_pgbouncer = pytest.mark.skipif(program() is None, reason="PgBouncer is not installed: apt-get install pgbouncer")

URL = "postgresql://a:hunter2@db.example:5432/lifeguard"


def settings(**changes: object) -> Settings:
    """Return a service of two workers and three instances on one server."""
    chosen: dict[str, object] = {
        "workers": 2,
        "instances": 3,
        "primary": {"url": URL, "pool_size": 10, "max_overflow": 5},
        "replicas": (),
        "analytics": {"url": URL, "pool_size": 2, "max_overflow": 2},
    }
    return service_settings(URL, **(chosen | changes))


def test_sizes_by_formula() -> None:
    """The published examples come out."""
    assert budget.by_cores(8) == 17
    assert budget.by_spindles(8, 4) == 20
    assert budget.for_production(8) == 20
    assert budget.by_load(500, 0.010) == 6
    assert budget.by_load(2000, 0.005) == 12
    assert budget.by_load(1, 0.001) == 5


def test_presets_are_the_published_ones() -> None:
    """Each kind of service has the size that the guides name."""
    sizes = {preset.name: (preset.pool_size, preset.max_overflow) for preset in budget.PRESETS}

    assert sizes == {
        "development": (5, 5),
        "small": (10, 10),
        "medium": (20, 10),
        "high traffic": (20, 30),
        "very high traffic": (50, 20),
        "background worker": (5, 5),
    }


def test_budget_says_which_database_sleeps() -> None:
    """The sum is what may be open at once; that nothing is open while nobody asks stands beside it."""
    primary = {"url": URL, "profile": "sleeping"}
    (demand,) = budget.demands(settings(primary=primary, workers=1, instances=1, migration_connections=0))

    assert demand.arithmetic.endswith("((10 + 5 + 1, or 0 asleep) + (2 + 2 + 1))")
    assert demand.wanted == 21


def test_connections_multiply_by_workers_and_instances() -> None:
    """Each process has its own pools, and one connection more beside each pool."""
    (demand,) = budget.demands(settings(migration_connections=0))

    assert (demand.per_instance, demand.wanted) == (2 * (16 + 5), 2 * 3 * (16 + 5))


def test_no_limit_is_no_check() -> None:
    """Without CONNECTION_LIMIT nothing is known to be too much."""
    budget.check_budget(settings())


def test_what_fits_is_accepted_to_the_last_connection() -> None:
    """127 connections fit 130 of which 3 are reserved, and not 129."""
    budget.check_budget(settings(connection_limit=130))

    with pytest.raises(SettingsError) as refused:
        budget.check_budget(settings(connection_limit=129))

    sentence = str(refused.value)
    sum_of_all = "2 workers x 3 instances x ((10 + 5 + 1) + (2 + 2 + 1)) + 1 for migrations = 127 connections"
    assert f"db.example:5432 would get {sum_of_all} > 129 - 3 reserved" in sentence
    assert "hunter2" not in sentence


def test_surge_and_jobs_are_part_of_the_sum() -> None:
    """A rollout runs old and new instances together; jobs and migrations run beside both."""
    rollout = {"surge_instances": 2, "job_connections": 7, "migration_connections": 2}
    (demand,) = budget.demands(settings(**rollout))

    assert demand.arithmetic == (
        "2 workers x (3 + 2 surge) instances x ((10 + 5 + 1) + (2 + 2 + 1)) + 2 for migrations + 7 for jobs"
    )
    assert demand.wanted == 2 * (3 + 2) * 21 + 2 + 7
    with pytest.raises(SettingsError, match="= 219 connections > 221 - 3 reserved"):
        budget.check_budget(settings(**rollout, connection_limit=221))
    budget.check_budget(settings(**rollout, connection_limit=222))


def test_each_place_of_a_replica_counts() -> None:
    """Two addresses that DNS finds may be one server, so the limit is compared with all places; a server gets one."""
    replica = {"url": URL.replace("db.example", "replicas.example"), "pool_size": 10, "max_overflow": 5}
    found = settings(
        replicas=(replica,), database_replica_discovery="dns", database_replica_max_pools=4, workers=1, instances=2
    )
    _, demand = budget.demands(found)
    _, on_one = budget.demands(found, budget.on_one_server(found, found.pools, 1))

    assert (demand.arithmetic, demand.wanted) == ("1 workers x 2 instances x 4 pools x (10 + 5 + 1)", 128)
    assert (on_one.arithmetic, on_one.wanted) == ("1 workers x 2 instances x (10 + 5 + 1)", 32)
    with pytest.raises(SettingsError, match=r"replicas\.example:5432 would get .* = 128 connections > 130 - 3"):
        budget.check_budget(found.model_copy(update={"connection_limit": 130}))
    budget.check_budget(found.model_copy(update={"connection_limit": 131}))


def test_jobs_count_on_the_primarys_server_alone() -> None:
    """A replica elsewhere is asked for the pools only."""
    elsewhere = {"url": URL.replace("db.example", "replica.example"), "pool_size": 10, "max_overflow": 5}

    first, second = budget.demands(settings(replicas=(elsewhere,), job_connections=7))

    assert (first.server, first.wanted) == ("db.example:5432", 6 * 21 + 1 + 7)
    assert (second.server, second.wanted) == ("replica.example:5432", 6 * 16)


def test_least_of_limit_and_server_is_granted() -> None:
    """CONNECTION_LIMIT less its reserve, or what the server has; a pooler's clients are told by the first alone."""
    assert budget.granted(settings(), None) is None
    assert budget.granted(settings(), 97) == 97
    assert budget.granted(settings(connection_limit=200), 97) == 97
    assert budget.granted(settings(connection_limit=200), None) == 197


def test_each_server_has_its_own_budget() -> None:
    """A replica on another host does not count against the primary's limit."""
    elsewhere = {"url": URL.replace("db.example", "replica.example"), "pool_size": 10, "max_overflow": 5}

    budget.check_budget(settings(replicas=(elsewhere,), connection_limit=130))

    with pytest.raises(SettingsError, match=r"replica\.example:5432 would get"):
        budget.check_budget(settings(replicas=({**elsewhere, "pool_size": 50},), connection_limit=130))


def test_connection_that_listens_is_counted() -> None:
    """One for each process, on the server that LISTEN_URL names."""
    budget.check_budget(settings(listen_url=URL, connection_limit=136))

    with pytest.raises(SettingsError, match=r"\+ 1 that listens\) \+ 1 for migrations = 133 connections > 135 - 3"):
        budget.check_budget(settings(listen_url=URL, connection_limit=135))

    past_the_pooler = URL.replace("db.example", "primary.example")
    budget.check_budget(settings(listen_url=past_the_pooler, connection_limit=130))


async def test_budget_is_published_by_server(service: Service) -> None:
    """Each server has what the settings want of it, and what it has for ordinary roles: 100 less 3."""
    service.databases.publish()

    for server, wanted in ((service.databases.primary, 17), (service.databases.replicas[0], 16 + 3)):
        at = server.settings.server
        assert service.sample("db_connection_budget_wanted", server=at) == wanted
        assert service.sample("db_connection_budget_instance", server=at) in {wanted, wanted - 1}
        assert service.sample("db_connection_budget_granted", server=at) == 97


@needs_pgbouncer
@pytest.mark.parametrize(("limit", "granted"), [(None, None), (1000, 997)])
async def test_poolers_limit_is_not_the_servers(
    database: Database, open_directory: Path, limit: int | None, granted: int | None
) -> None:
    """What the server behind a pooler has is no limit for the pooler's clients."""
    async with pooling(database.cluster, open_directory, size=2) as port:
        url = make_url(database.url()).set(port=port).render_as_string(hide_password=False)
        one = {"url": url, "statement_cache_size": statement_cache_size()}
        settings = database.settings(replica=False, primary=one, analytics=one, connection_limit=limit)
        async with serving(settings) as service:
            service.databases.publish()
            registry, at = service.databases.metrics.registry, {"server": settings.primary.server}

            assert registry.get_sample_value("db_connection_budget_wanted", at) == 33
            assert registry.get_sample_value("db_connection_budget_granted", at) == granted
