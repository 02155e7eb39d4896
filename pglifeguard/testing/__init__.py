"""Tests on a real primary and a real replica, as fixtures for pytest: `pytest_plugins = ["pglifeguard.testing"]`.

docs/testing.md shows each. No entry point announces the plugin: names such as `app`, `client` and `database` are for
those who ask for them, and not for every project that has the library installed. A conftest.py may import names from
here before pytest does: PYTEST_DONT_REWRITE, since nothing here is an `assert`.
"""

from pglifeguard.extras import not_installed

try:
    from pglifeguard.embedded.waiting import eventually
    from pglifeguard.testing.fixtures import (
        ExhaustedPool,
        MakeTables,
        ReplicaDown,
        RoundTrips,
        Statements,
        app,
        client,
        database,
        database_servers,
        databases,
        exhausted_pool,
        live_url,
        make_tables,
        maybe_network,
        network,
        pytest_configure,
        replica_down,
        round_trips,
        running_app,
        statements,
        template,
        token,
    )
    from pglifeguard.testing.network import Network
    from pglifeguard.testing.proxy import Proxy
    from pglifeguard.testing.servers import Database, DatabaseServers
except ModuleNotFoundError as error:
    raise not_installed(error, "testing", __name__) from None

__all__ = [
    "Database",
    "DatabaseServers",
    "ExhaustedPool",
    "MakeTables",
    "Network",
    "Proxy",
    "ReplicaDown",
    "RoundTrips",
    "Statements",
    "app",
    "client",
    "database",
    "database_servers",
    "databases",
    "eventually",
    "exhausted_pool",
    "live_url",
    "make_tables",
    "maybe_network",
    "network",
    "pytest_configure",
    "replica_down",
    "round_trips",
    "running_app",
    "statements",
    "template",
    "token",
]
