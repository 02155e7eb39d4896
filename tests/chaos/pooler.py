"""The PgBouncer of this machine as a process of the test's own, in transaction mode, in front of one server."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType

from local.cluster import Cluster
from tests.poolers.programs import TRACKS_STATEMENTS, Mode, Program, Shape, installed, running

NOTHING: Mapping[str, object] = MappingProxyType({})


def program() -> Program | None:
    """Return PgBouncer, None where it is not installed."""
    return installed("PgBouncer")


def statement_cache_size() -> int:
    """Return what DATABASE_STATEMENT_CACHE_SIZE has to be for this PgBouncer."""
    found = program()
    return 0 if found is None or found.number < TRACKS_STATEMENTS else 500


@asynccontextmanager
async def pooling(  # noqa: PLR0913  # What PgBouncer is told.
    cluster: Cluster,
    directory: Path,
    *,
    size: int,
    keeps_statements: bool = True,
    mode: Mode = "transaction",
    more: Mapping[str, object] = NOTHING,
) -> AsyncIterator[int]:
    """Run PgBouncer in front of the primary; give its port. Before 1.21 it never keeps prepared statements.

    `more` are settings of its own. Its roles are app_rw, app_ro and app_owner; the last one may use its console too.
    """
    found = program()
    assert found is not None
    forgets: dict[str, object] = {"max_prepared_statements": 0}
    settings = NOTHING if keeps_statements or found.number < TRACKS_STATEMENTS else forgets
    async with running(found, Shape(mode, size, {**settings, **more}), cluster, directory) as pooler:
        yield pooler.port
