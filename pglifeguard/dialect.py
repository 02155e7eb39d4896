"""SQLAlchemy's dialect for asyncpg, changed to begin a transaction at once and not at its first statement.

So statements that go to the driver past SQLAlchemy, a COPY for example, are in the transaction too.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic_core import to_jsonable_python
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.util.concurrency import await_

# The URL that stands for this dialect.
URL = "postgresql+lifeguard://"
registry.register("postgresql.lifeguard", __name__, "Dialect")


def write_json(value: Any) -> str:
    """Write a value of json or jsonb: as SQLAlchemy does, and what it refuses as FastAPI writes it in an answer.

    So a column takes Pydantic's models, dataclasses, dates, decimals and UUIDs, alone or in lists and dicts. Raises:
    PydanticSerializationError for what an answer could not have either.
    """
    return json.dumps(value, default=to_jsonable_python)


class Dialect(PGDialect_asyncpg):
    """PostgreSQL by asyncpg; BEGIN, COMMIT and ROLLBACK count as time at work, and not as idle time."""

    supports_statement_cache = True

    def do_begin(self, dbapi_connection: Any) -> None:
        """Begin, unless the transaction of a lease is going on."""
        adapter = dbapi_connection.dbapi_connection
        if adapter._transaction is None:  # noqa: SLF001  # The adapter has no public word for it.
            with _queried(dbapi_connection):
                await_(adapter._start_transaction())  # noqa: SLF001

    def do_commit(self, dbapi_connection: Any) -> None:
        """Commit."""
        with _queried(dbapi_connection):
            super().do_commit(dbapi_connection)  # type: ignore[no-untyped-call]  # SQLAlchemy leaves its dialects bare.

    def do_rollback(self, dbapi_connection: Any) -> None:
        """Roll back."""
        with _queried(dbapi_connection):
            super().do_rollback(dbapi_connection)  # type: ignore[no-untyped-call]  # As above.

    def on_connect(self) -> Callable[[Any], None]:
        """Set a new connection up, and mark it clean: a reset must keep the codecs that this sets."""
        set_up = super().on_connect()  # type: ignore[no-untyped-call]  # As above.

        def connect(adapter: Any) -> None:
            set_up(adapter)
            adapter.driver_connection.mark_clean()

        return connect


@contextmanager
def _queried(dbapi_connection: Any) -> Iterator[None]:
    try:
        checkout = dbapi_connection.info["checkout"]
    except (NotImplementedError, KeyError):
        # The connection is being opened: it has no checkout yet, and SQLAlchemy asks for the server's version.
        yield
        return
    checkout.begin_query()
    try:
        yield
    finally:
        checkout.end_query()
