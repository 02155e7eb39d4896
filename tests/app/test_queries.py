"""Every constant query of the service can be sent; a domain that is copied is found by itself."""

import pkgutil
from collections.abc import Iterator
from importlib import import_module

import pytest
from sqlalchemy import select

import app
from app.patients.models import Patient
from pglifeguard.query import Query


def constants() -> Iterator[tuple[str, Query[*tuple[object, ...]]]]:
    """List the queries that are constants of a module of the service, by their names."""
    for module in pkgutil.walk_packages(app.__path__, "app."):
        if not module.name.endswith("__main__"):
            found = vars(import_module(module.name)).items()
            yield from ((f"{module.name}.{name}", value) for name, value in found if isinstance(value, Query))


@pytest.mark.parametrize(("name", "query"), [pytest.param(*found, id=found[0]) for found in constants()])
def test_query_can_be_sent(name: str, query: Query[*tuple[object, ...]]) -> None:
    """A query compiles, and needs nothing that only SQLAlchemy's own execution does."""
    assert query.sql.split()[0] in {"SELECT", "INSERT", "UPDATE", "DELETE", "WITH"}, name


def test_all_queries_are_found() -> None:
    """One of a domain is among them, and a query that cannot be sent would be refused."""
    names = {name for name, _ in constants()}

    assert "app.patients.queries.BY_ID" in names
    with pytest.raises(TypeError, match="selects an entity"):
        Query(select(Patient))
