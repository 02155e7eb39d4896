"""The arithmetic of connections."""

import pytest

from app.settings import Settings
from pglifeguard import budget
from pglifeguard.environment import SettingsError
from tests.pglifeguard.conftest import service_settings

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


def test_connections_multiply_by_workers_and_instances() -> None:
    """Each process has its own pools, and one connection more beside each pool."""
    service = settings()

    assert budget.connections_of(service, [service.primary, service.analytics]) == 2 * 3 * (16 + 5)


def test_no_limit_is_no_check() -> None:
    """Without CONNECTION_LIMIT nothing is known to be too much."""
    budget.check_budget(settings())


def test_what_fits_is_accepted_to_the_last_connection() -> None:
    """126 connections fit 129 of which 3 are reserved, and not 128."""
    budget.check_budget(settings(connection_limit=129))

    with pytest.raises(SettingsError) as refused:
        budget.check_budget(settings(connection_limit=128))

    sentence = str(refused.value)
    assert "db.example:5432 would get 2 workers x 3 instances x (10 + 5 + 1) + (2 + 2 + 1) = 126" in sentence
    assert "> 128 - 3 reserved" in sentence
    assert "hunter2" not in sentence


def test_each_server_has_its_own_budget() -> None:
    """A replica on another host does not count against the primary's limit."""
    elsewhere = {"url": URL.replace("db.example", "replica.example"), "pool_size": 10, "max_overflow": 5}

    budget.check_budget(settings(replicas=(elsewhere,), connection_limit=129))

    with pytest.raises(SettingsError, match=r"replica\.example:5432 would get"):
        budget.check_budget(settings(replicas=({**elsewhere, "pool_size": 50},), connection_limit=129))


def test_connection_that_listens_is_counted() -> None:
    """One for each process, on the server that LISTEN_URL names."""
    budget.check_budget(settings(listen_url=URL, connection_limit=135))

    with pytest.raises(SettingsError, match=r"\(2 \+ 2 \+ 1\) \+ 1 that listens = 132 connections > 134 - 3 reserved"):
        budget.check_budget(settings(listen_url=URL, connection_limit=134))

    past_the_pooler = URL.replace("db.example", "primary.example")
    budget.check_budget(settings(listen_url=past_the_pooler, connection_limit=129))
