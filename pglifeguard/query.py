"""A statement that is built and compiled once, and run by the driver past SQLAlchemy's execution.

SQLAlchemy writes the SQL and binds the values; asyncpg runs it on a connection of the pool. That saves most of the cost
of a short read: building the statement, the engine's connection, its cursor and its result, and two switches of
greenlets. `docs/performance.md` has the figures; `Lease` runs the query, and decision 0003 says when SQLAlchemy does.

A statement that needs SQLAlchemy's execution is refused with a sentence: when the `Query` is made where that can be
seen, else when it is compiled. `tests/app/test_queries.py` compiles every constant of the service.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from operator import itemgetter
from typing import Any, Generic, TypeVarTuple, cast

import asyncpg
from sqlalchemy import ARRAY, Float, Row, TextClause
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.sql.compiler import ExpandedState, SQLCompiler
from sqlalchemy.sql.selectable import TextualSelect, TypedReturnsRows
from sqlalchemy.types import TypeEngine

from pglifeguard.dialect import write_json

Ts = TypeVarTuple("Ts")

# PostgreSQL's numbers for two of its types.
FLOAT8, NUMERIC = 701, 1700

# The types of ranges and bit strings need the driver's module to say how their values are read.
_DIALECT: Dialect = dialect(dbapi=dialect.import_dbapi(), json_serializer=write_json)  # type: ignore[no-untyped-call]  # SQLAlchemy leaves its dialects bare.


class Query(Generic[*Ts]):
    """One statement with `bindparam`s for what changes: `BY_ID = Query(select(...).where(... == bindparam("id")))`.

    Make it a constant of the module: its worth is that it is compiled once. Its rows have the columns of the statement,
    by position and by name, as SQLAlchemy's rows have them.

    Raises: TypeError when the statement needs SQLAlchemy's own execution: entities, loader options, execution options,
    Python-side defaults, lists of changing length. Some of these are found at the first use only, when the statement is
    compiled.
    """

    def __init__(self, statement: TypedReturnsRows[*Ts]) -> None:
        self.statement = statement
        for reason in _reasons_against(statement):
            raise TypeError(f"a Query cannot send this statement: {reason}\n{_shortened(statement)}")

    @cached_property
    def sql(self) -> str:
        """The statement in asyncpg's notation, with $1 for the first parameter."""
        return self._expanded.statement

    def arguments(self, parameters: Mapping[str, Any]) -> list[Any]:
        """Return the values in the order of the statement, bound as their types say.

        Raises: TypeError when a parameter is missing, or is none of the statement's.
        """
        values = {**self._constants, **parameters} if self._constants else parameters
        if len(values) != self._count or not self._names.issuperset(values):
            raise TypeError(self._mismatch(parameters))
        return [values[name] if bind is None else bind(values[name]) for name, bind in self._binds]

    def fetch(self, connection: asyncpg.Connection, parameters: Mapping[str, Any]) -> Awaitable[Sequence[Row[*Ts]]]:
        """Run it by the driver: one round trip once the connection knows the statement."""
        rows = connection.fetch(self.sql, *self.arguments(parameters), record_class=self._row_class)
        return cast("Awaitable[Sequence[Row[*Ts]]]", self._read(rows) if self._readers else rows)

    @cached_property
    def _row_class(self) -> type[asyncpg.Record]:
        """A record whose columns are attributes too, as those of SQLAlchemy's rows are."""
        names = self._columns
        columns = {name: property(itemgetter(name if self._by_name else n)) for n, name in enumerate(names)}
        fields = property(lambda row: tuple(row.keys())) if self._by_name else names
        return type("Row", (QueryRow,), {"__slots__": (), "_fields": fields, **columns})

    @cached_property
    def _columns(self) -> tuple[str, ...]:
        return tuple(self.statement.exported_columns.keys())

    @cached_property
    def _by_name(self) -> bool:
        """Whether a text names its columns in any order: they are found by their names in the answer."""
        return isinstance(self.statement, TextualSelect) and not self.statement.positional

    @cached_property
    def _readers(self) -> dict[str, Callable[[Any], Any]]:
        """What SQLAlchemy makes of the values of some columns, those of enums for example."""
        readers = {name: _reader(column.type) for name, column in self.statement.exported_columns.items()}
        return {name: reader for name, reader in readers.items() if reader is not None}

    async def _read(self, answer: Awaitable[Sequence[asyncpg.Record]]) -> Sequence[Any]:
        """Make rows that hold what SQLAlchemy reads: a record of the driver cannot be changed."""
        records = await answer
        if not records:
            return records
        names = tuple(records[0].keys()) if self._by_name else self._columns
        readers = [self._readers.get(name) for name in names]
        row = _read_row(names)
        return [row(v if read is None else read(v) for read, v in zip(readers, each, strict=True)) for each in records]

    @cached_property
    def _compiled(self) -> SQLCompiler:
        compiled = self.statement.compile(dialect=_DIALECT)
        for reason in _reasons_when_compiled(compiled):
            raise TypeError(f"a Query cannot send this statement: {reason}\n{_shortened(compiled)}")
        return compiled

    @cached_property
    def _expanded(self) -> ExpandedState:
        """The statement with the lists that it holds, as of `in_([1, 2])`, written out."""
        required = [name for name, bind in self._compiled.binds.items() if bind.required]
        return self._compiled.construct_expanded_state(dict.fromkeys(required))

    @cached_property
    def _constants(self) -> dict[str, Any]:
        """The values in the statement, with those of `bindparam("name", value)`, which a call may replace."""
        binds, values = self._compiled.binds, self._expanded.parameters
        return {n: values[n] for n in self._expanded.positiontup or () if n not in binds or not binds[n].required}

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self._expanded.positiontup or ())

    @cached_property
    def _count(self) -> int:
        return len(self._names)

    @cached_property
    def _binds(self) -> list[tuple[str, Callable[[Any], Any] | None]]:
        binds, processors = self._compiled.binds, self._expanded.processors
        return [
            (name, _processor(binds[name]) if name in binds else cast("Any", processors.get(name)))
            for name in self._expanded.positiontup or ()
        ]

    def _mismatch(self, parameters: Mapping[str, Any]) -> str:
        required = self._names - set(self._constants)
        missing, unknown = sorted(required - set(parameters)), sorted(set(parameters) - self._names)
        parts = [
            f"{word} {', '.join(names)}" for word, names in (("lacks", missing), ("does not know", unknown)) if names
        ]
        return f"the call {' and '.join(parts)}: the Query takes {', '.join(sorted(required)) or 'no parameters'}"


class _Fields:
    """The attributes of SQLAlchemy's `Row` beside its columns."""

    __slots__ = ()
    _fields: tuple[str, ...] = ()

    @property
    def _mapping(self) -> Mapping[str, Any]:
        return self._asdict()

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, cast("Iterable[Any]", self), strict=True))


class QueryRow(_Fields, asyncpg.Record):
    """A row of a Query, as the driver made it."""

    __slots__ = ()


@cache
def _read_row(names: tuple[str, ...]) -> type[tuple[Any, ...]]:
    """Make the class of rows with these columns, of values that SQLAlchemy has read."""
    columns = {name: property(itemgetter(number)) for number, name in enumerate(names)}
    return type("Row", (_Fields, tuple), {"__slots__": (), "_fields": names, **columns})


def _reasons_against(statement: Any) -> Iterator[str]:
    """List the reasons against a Query that are seen without compiling it: models may not be complete yet."""
    if isinstance(statement, TextClause):
        yield "its columns are not known; say text(…).columns(…), or use session.execute."
    elif not getattr(statement, "exported_columns", ()):
        yield "it returns no rows; add .returning(…), or use session.execute."
    else:
        yield from _reasons_of_parts(statement)


def _reasons_of_parts(statement: Any) -> Iterator[str]:
    if statement.get_execution_options():
        yield "its execution options would be ignored; use session.execute."
    if getattr(statement, "_with_options", ()):
        yield "its loader options would be ignored; use session.execute."
    for selected in getattr(statement, "_raw_columns", ()) or getattr(statement, "_returning", ()):
        if isinstance(selected, TextClause):
            yield f"it selects the text {str(selected)!r}, whose columns are not known; use literal_column(…)."
        elif _is_entity(selected):
            yield "it selects an entity, which only a session can make; name its columns, or use session.scalars."


def _reader(kind: TypeEngine[Any]) -> Callable[[Any], Any] | None:
    """Return what SQLAlchemy does to the driver's value of a type; None where it takes it as it is."""
    item = kind.item_type if isinstance(kind, ARRAY) else kind
    # Numbers are asked what the server will send: a double for floats, else a numeric.
    sent = FLOAT8 if isinstance(item, Float) else NUMERIC
    if isinstance(kind, ARRAY) and not kind.as_tuple and _reader(item) is None:
        return None  # SQLAlchemy would copy the driver's list.
    reader: Callable[[Any], Any] | None = kind.dialect_impl(_DIALECT).result_processor(_DIALECT, sent)
    return reader


def _is_entity(selected: Any) -> bool:
    """Tell an entity, plain, aliased or a bundle, from a column or a table, by what the ORM notes on it."""
    noted = getattr(selected, "_annotations", {})
    return ("parententity" in noted and "proxy_key" not in noted) or "bundle" in noted


def _reasons_when_compiled(compiled: SQLCompiler) -> Iterator[str]:
    """List the reasons against a Query that only the compiled statement shows."""
    if compiled.prefetch:
        names = ", ".join(sorted({str(column.key) for column in compiled.prefetch}))
        yield f"the default of {names} is made in Python; use server_default, bind the value, or use session.execute."
    for name, bind in compiled.binds.items():
        if bind.callable is not None:
            yield f"the value of {name} is a function's, which would be called once for all; bind it."
        elif bind in compiled.post_compile_params and bind.required:
            yield (
                f"the list {name} has another length at each call; write == any_(bindparam({name!r}, "
                "type_=ARRAY(…))), or use session.execute."
            )


def _processor(bind: Any) -> Callable[[Any], Any] | None:
    processor: Callable[[Any], Any] | None = bind.type.dialect_impl(_DIALECT).bind_processor(_DIALECT)
    return processor


def _shortened(statement: object) -> str:
    try:
        return " ".join(str(statement).split())[:200]
    except SQLAlchemyError as error:  # Loader options that do not fit are noticed when the SQL is written.
        return f"{type(statement).__name__}: {error}"
