"""A statement that is built and compiled once, and sent past SQLAlchemy's execution where nothing else needs that.

SQLAlchemy writes the SQL and says how values are bound; asyncpg runs it on a connection of our pool. That saves what
costs most of a short read: building the statement, the engine's connection, its cursor and its result, and two switches
of greenlet. `docs/performance.md` has the figures; `Lease` runs it, and decision 0003 says when SQLAlchemy does.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any, Generic, TypeVarTuple, cast

import asyncpg
from sqlalchemy import Float, Row
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.selectable import TypedReturnsRows

Ts = TypeVarTuple("Ts")

# PostgreSQL's numbers for two of its types.
FLOAT8, NUMERIC = 701, 1700

_DIALECT: Dialect = dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves its dialects bare.


class Query(Generic[*Ts]):
    """One statement with `bindparam`s for what changes: `BY_ID = Query(select(...).where(... == bindparam("id")))`.

    Make it a constant of the module: its worth is that it is compiled once.
    """

    def __init__(self, statement: TypedReturnsRows[*Ts]) -> None:
        self.statement = statement

    @cached_property
    def sql(self) -> str:
        """The statement in asyncpg's notation, with $1 for the first parameter."""
        return str(self._compiled)

    def arguments(self, parameters: Mapping[str, Any]) -> list[Any]:
        """Return the values in the order of the statement, bound as their types say."""
        values = {**self._constants, **parameters} if self._constants else parameters
        return [values[name] if bind is None else bind(values[name]) for name, bind in self._binds]

    def fetch(self, connection: asyncpg.Connection, parameters: Mapping[str, Any]) -> Awaitable[Sequence[Row[*Ts]]]:
        """Run it by the driver: one round trip once the connection knows the statement."""
        rows = connection.fetch(self.sql, *self.arguments(parameters), record_class=self._row_class)
        return cast("Awaitable[Sequence[Row[*Ts]]]", rows)

    @cached_property
    def _row_class(self) -> type[asyncpg.Record]:
        """A record whose columns are attributes too, as those of SQLAlchemy's rows are."""
        names = enumerate(self.statement.exported_columns.keys())
        columns = {name: property(itemgetter(number)) for number, name in names}
        return type("Row", (asyncpg.Record,), {"__slots__": (), **columns})

    @cached_property
    def _compiled(self) -> Any:
        compiled = self.statement.compile(dialect=_DIALECT)
        for column in self.statement.exported_columns:
            # Numbers are asked what the server will send: a double for floats, else a numeric.
            sent = FLOAT8 if isinstance(column.type, Float) else NUMERIC
            if column.type.dialect_impl(_DIALECT).result_processor(_DIALECT, sent) is not None:
                raise TypeError(f"{column} needs SQLAlchemy to read it: use session.execute for this statement")
        return compiled

    @cached_property
    def _constants(self) -> dict[str, Any]:
        return {name: value for name, value in self._compiled.params.items() if value is not None}

    @cached_property
    def _binds(self) -> list[tuple[str, Callable[[Any], Any] | None]]:
        binds = self._compiled.binds
        return [
            (name, binds[name].type.dialect_impl(_DIALECT).bind_processor(_DIALECT))
            for name in self._compiled.positiontup
        ]
