"""A query sent past SQLAlchemy gives the same rows as one that goes through it."""

import enum
from datetime import date, timedelta
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

import asyncpg
import pytest
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError
from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Column,
    Date,
    Double,
    Enum,
    Float,
    Identity,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    Table,
    Text,
    Uuid,
    any_,
    bindparam,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy import cast as cast_
from sqlalchemy.dialects.postgresql import BIT, INT8MULTIRANGE, INT8RANGE, JSONB, BitString, Range
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import Bundle, aliased, load_only
from sqlalchemy.types import TypeDecorator

from app.patients.models import Patient
from pglifeguard.database import Role
from pglifeguard.lease import fetch_once
from pglifeguard.query import Query
from pglifeguard.sessions import ReadSession
from tests.conftest import Database
from tests.pglifeguard.conftest import pooled


class Shouted(TypeDecorator[str]):
    """A type that changes what it is given, as encrypted columns do."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: object) -> str | None:
        """Change a value on its way to the database."""
        del dialect
        return None if value is None else value.upper()


class Whispered(TypeDecorator[str]):
    """A type that only SQLAlchemy can read."""

    impl = Text
    cache_ok = True

    def process_result_value(self, value: str | None, dialect: object) -> str | None:
        """Change a value on its way from the database."""
        del dialect
        return None if value is None else value.lower()


ECHO = Query(
    select(
        bindparam("word", type_=Shouted).label("word"),
        bindparam("day", type_=Date).label("day"),
        (bindparam("number", type_=Integer) + literal(1)).label("number"),
    )
)
TODAY = date(2001, 2, 3)
VALUES = {"word": "loud", "day": TODAY, "number": 41}


async def test_both_ways_give_the_same_row(database: Database) -> None:
    """Constants, parameters and their types arrive alike, by position and by name."""
    async with pooled(database.replica_url(), role="replica") as p:
        (past,) = await fetch_once(p.database, ECHO, VALUES)
        async with ReadSession(p.database, p.database.reads, label="test") as session:
            (through,) = (await session.execute(ECHO.statement, VALUES)).all()

    assert tuple(past) == tuple(through)
    assert (past.word, past.day, past.number) == ("LOUD", date(2001, 2, 3), 42)
    assert ECHO.sql.count("$") == 4


async def test_column_that_is_not_there(database: Database) -> None:
    """A row has the attributes of its columns and no others."""
    async with pooled(database.replica_url(), role="replica") as p:
        (row,) = await fetch_once(p.database, ECHO, VALUES)

    with pytest.raises(AttributeError, match="weight"):
        row.weight  # noqa: B018  # That it is not there is the point.


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"word": "loud", "day": TODAY}, "lacks number: the Query takes day, number, word"),
        (VALUES | {"numbr": 1}, "does not know numbr"),
        ({"word": "loud", "day": TODAY, "numbr": 1}, "lacks number and does not know numbr"),
        ({}, "lacks day, number, word"),
    ],
)
def test_wrong_parameters_are_refused(parameters: dict[str, Any], sentence: str) -> None:
    """Nothing is sent with a hole in it, and nothing that was meant is left out."""
    with pytest.raises(TypeError, match=sentence):
        ECHO.arguments(parameters)


async def test_numbers_keep_their_types(database: Database) -> None:
    """Money stays a Decimal and a measure a float, as through SQLAlchemy."""
    both = Query(select(literal(Decimal("0.10"), Numeric).label("price"), literal(0.5, Double).label("measure")))
    async with pooled(database.replica_url(), role="replica") as p:
        (past,) = await fetch_once(p.database, both, {})
        async with ReadSession(p.database, p.database.reads, label="test") as session:
            (through,) = (await session.execute(both.statement)).all()

    assert [repr(value) for value in past] == [repr(value) for value in through] == ["Decimal('0.10')", "0.5"]


THINGS = Table(
    "things_queried",
    MetaData(),
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("name", Text),
    Column("rank", Integer, default=lambda: 1),
    Column("weight", Integer, default=7, onupdate=8),
)
ID = select(Patient.id)
LISTED = insert(THINGS).values(name=bindparam("name"))


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        (select(Patient), "selects an entity"),
        (select(aliased(Patient)), "selects an entity"),
        (select(Bundle("both", Patient.id, Patient.mrn)), "selects an entity"),
        (insert(Patient).returning(Patient), "selects an entity"),
        (select(Patient.id, text("mrn")).select_from(Patient), "selects the text 'mrn'"),
        (text("SELECT 1"), "its columns are not known"),
        ("SELECT 1", "returns no rows"),
        (delete(THINGS), "returns no rows"),
        (ID.options(load_only(Patient.id)), "its loader options"),
        (ID.execution_options(yield_per=10), "its execution options"),
    ],
)
def test_what_needs_sqlalchemy_is_refused_when_the_query_is_made(statement: Any, sentence: str) -> None:
    """What could only fail, or answer something else, when it is sent is refused where it is written."""
    with pytest.raises(TypeError, match=sentence):
        Query(statement)


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        (ID.where(Patient.id.in_(bindparam("ids"))), r"the list ids has another length .* any_\(bindparam\('ids'"),
        (LISTED.returning(THINGS.c.id), "the default of rank, weight is made in Python"),
        (insert(THINGS).values([{"name": "a"}, {"name": "b"}]).returning(THINGS.c.id), "the default of rank, "),
        (update(THINGS).values(name="b").returning(THINGS.c.id), "the default of weight"),
        (ID.where(Patient.id == bindparam("now", callable_=lambda: 1)), "the value of now is a function's"),
    ],
)
def test_what_needs_sqlalchemy_is_refused_when_it_is_compiled(statement: Any, sentence: str) -> None:
    """What only the compiled statement shows is refused before anything is sent."""
    query = Query(statement)

    with pytest.raises(TypeError, match=sentence):
        _ = query.sql


@pytest.mark.parametrize("statement", [ID, text("SELECT 1"), "SELECT 1"])
@pytest.mark.parametrize("role", ["primary", "replica"])
async def test_rows_takes_a_query_only(database: Database, statement: Any, role: Role) -> None:
    """A statement in place of a Query is refused with the way that takes it, before a connection is taken."""
    url = database.url() if role == "primary" else database.replica_url()
    async with pooled(url, role=role) as p, ReadSession(p.database, p.database.reads, label="test") as session:
        with pytest.raises(TypeError, match=r"rows\(\) takes a Query.*session\.execute"):
            await session.rows(statement)
        assert p.sample("db_connection_connect_seconds_count") == 0


SIXES = select(func.generate_series(1, 6).label("number")).subquery()
PAIRS = select(literal(1).label("number")).subquery()


@pytest.mark.parametrize(
    ("statement", "parameters", "expected"),
    [
        (select(SIXES.c.number).where(SIXES.c.number.in_([2, 5])), {}, [(2,), (5,)]),
        (select(SIXES.c.number).where(SIXES.c.number.in_([])), {}, []),
        (select(SIXES.c.number).where(SIXES.c.number.not_in([1, 2, 3, 4])), {}, [(5,), (6,)]),
        (
            select(SIXES.c.number).where(SIXES.c.number == any_(bindparam("numbers", type_=ARRAY(Integer)))),
            {"numbers": [2, 5]},
            [(2,), (5,)],
        ),
        (select(literal(1).label("one"), bindparam("two", 2).label("two")), {}, [(1, 2)]),
        (select(literal(1).label("one"), bindparam("two", 2).label("two")), {"two": 3}, [(1, 3)]),
        (select(bindparam("none", None, type_=Integer).label("none")), {}, [(None,)]),
        (select(SIXES.c.number, PAIRS.c.number).join(PAIRS, literal(True)).limit(1), {}, [(1, 1)]),
        (select(literal({"a": [1]}, JSONB).label("document")), {}, [({"a": [1]},)]),
        (text("SELECT 2 AS b, 1 AS a").columns(a=Integer, b=Integer), {}, [(2, 1)]),
        (text("SELECT CAST(:n AS int) AS n").columns(literal_column("n", Integer)), {"n": 4}, [(4,)]),
        (select(literal(1).label("count"), literal(2).label("keys")), {}, [(1, 2)]),
    ],
)
async def test_what_is_accepted_gives_what_sqlalchemy_gives(
    database: Database, statement: Any, parameters: dict[str, Any], expected: list[tuple[Any, ...]]
) -> None:
    """Lists that the statement holds, defaults of parameters, repeated columns and texts work as in a session."""
    query = cast("Query[Any]", Query(statement))
    async with pooled(database.replica_url(), role="replica") as p:
        past = await fetch_once(p.database, query, parameters)
        async with ReadSession(p.database, p.database.reads, label="test") as session:
            through = (await session.execute(statement, parameters)).all()

    assert [tuple(row) for row in past] == [tuple(row) for row in through] == expected
    for one, other in zip(past, through, strict=True):
        for name in other._fields:
            assert getattr(one, name) == getattr(other, name) or callable(getattr(other, name))


class Letter(enum.Enum):
    """What PostgreSQL knows as an enum."""

    A = "alpha"
    B = "beta"


LETTERS = Enum(Letter, name="letter")
SPAN = Range(1, 5)


TYPED: list[tuple[Any, Any]] = [
    (ARRAY(Text), ["a", None, "b"]),
    (ARRAY(Integer, dimensions=2), [[1, 2], [3, 4]]),
    (ARRAY(Text, as_tuple=True), ("a", "b")),
    (ARRAY(Numeric), [Decimal("0.10")]),
    (ARRAY(Numeric(asdecimal=False)), [0.5]),
    (ARRAY(Double), [0.5]),
    (ARRAY(Shouted), ["LOUD"]),
    (ARRAY(Whispered), ["quiet", None]),
    (LETTERS, Letter.B),
    (LETTERS, None),
    (ARRAY(LETTERS), [Letter.A, Letter.B]),
    (Enum("A", "B", name="letter"), "A"),
    (Enum(Letter, name="letter_text", native_enum=False), Letter.A),
    (Whispered(), "quiet"),
    (INT8RANGE(), SPAN),
    (INT8MULTIRANGE(), [SPAN, Range(7, 9)]),
    (Numeric(asdecimal=False), 0.5),
    (Float(asdecimal=True), Decimal("0.5")),
    (Uuid(as_uuid=False), "9f1f6d4e-4bb2-4f6e-9c3a-1f6d4e4bb24f"),
    (Interval(), timedelta(days=1, seconds=2)),
    (JSONB(), {"a": [1, None]}),
    (ARRAY(JSONB), [{"a": 1}]),
    (LargeBinary(), b"\x00\xff"),
    (BIT(3), BitString("101")),
]


async def test_every_type_is_read_and_bound_as_by_sqlalchemy(database: Database) -> None:
    """What a session gives for a column, and takes for a parameter, a Query gives and takes too."""
    owner = await asyncpg.connect(database.url("app_owner"))
    await owner.execute("CREATE TYPE letter AS ENUM ('A', 'B'); GRANT USAGE ON TYPE letter TO app_rw")
    await owner.close()
    # Names that rows have as methods too.
    names = ["count", "index", *(f"column_{number}" for number in range(len(TYPED) - 2))]
    columns = [
        cast_(bindparam(name, type_=kind), kind).label(name) for name, (kind, _) in zip(names, TYPED, strict=True)
    ]
    values = {name: value for name, (_, value) in zip(names, TYPED, strict=True)}
    statement = select(*columns)
    async with pooled(database.url()) as p:
        (past,) = await fetch_once(p.database, Query(statement), values)
        assert await fetch_once(p.database, Query(statement.where(text("false"))), values) == []
        async with ReadSession(p.database, p.database.reads, label="test") as session:
            (through,) = (await session.execute(statement, values)).all()

    assert past._asdict() == through._asdict() == dict(past._mapping) == values
    assert list(map(type, past)) == list(map(type, through))
    assert (past.count, past.index, past._fields) == (values["count"], values["index"], through._fields)


class Item(BaseModel):
    """A part of a document, as a request may have it."""

    name: str
    price: Decimal
    due: date


@pytest.mark.parametrize("kind", [JSON, JSONB])
async def test_json_takes_what_an_answer_may_hold(database: Database, kind: Any) -> None:
    """A request's models can be stored as they came, in the driver's lane as in SQLAlchemy's."""
    item = Item(name="é", price=Decimal("1.50"), due=date(2026, 1, 31))
    query = Query(select(cast_(bindparam("document", type_=kind), kind).label("document")))
    given = {"document": {"items": [item], "id": UUID(int=7), "plain": [1, None, True]}}
    async with pooled(database.url()) as p:
        (past,) = await fetch_once(p.database, query, given)
        async with ReadSession(p.database, p.database.reads, label="test") as session:
            (through,) = (await session.execute(query.statement, given)).all()
            with pytest.raises(StatementError, match="Unable to serialize unknown type"):
                await session.execute(query.statement, {"document": [object()]})
        with pytest.raises(PydanticSerializationError, match="Unable to serialize unknown type"):
            await fetch_once(p.database, query, {"document": [object()]})

    stored = {"name": "é", "price": "1.50", "due": "2026-01-31"}
    expected = {"items": [stored], "id": str(UUID(int=7)), "plain": [1, None, True]}
    assert past.document == through.document == expected


@pytest.mark.parametrize("kind", [Text, Whispered])
async def test_columns_of_a_text_are_found_by_name(database: Database, kind: Any) -> None:
    """A text may send its columns in another order than they are named in, also those that SQLAlchemy reads."""
    statement: Any = text("SELECT 'TWO' AS b, 1 AS a").columns(a=Integer, b=kind)
    async with pooled(database.replica_url(), role="replica") as p:
        (past,) = await fetch_once(p.database, Query(statement), {})
        async with ReadSession(p.database, p.database.reads, label="test") as session:
            (through,) = (await session.execute(statement)).all()

    assert tuple(past) == tuple(through)
    assert (past.a, past.b) == (through.a, through.b)
    assert past._asdict() == {"b": through.b, "a": 1}
    assert past._fields == ("b", "a")


async def test_value_that_cannot_be_read_is_the_types_own_error(database: Database) -> None:
    """A value that is none of the enum's is a LookupError, as in a session, and the connection works on."""
    odd = Query(select(literal_column("'C'", LETTERS).label("letter")))
    async with pooled(database.replica_url(), role="replica", pool_size=1, max_overflow=0) as p:
        with pytest.raises(LookupError, match="'C' is not among the defined enum values"):
            await fetch_once(p.database, odd, {})

        assert (await fetch_once(p.database, ECHO, VALUES))[0].number == 42
        assert p.pool.figures().checked_in == 1


async def test_row_has_what_rows_have(database: Database) -> None:
    """What SQLAlchemy's rows offer beside their columns is there, too."""
    async with pooled(database.replica_url(), role="replica") as p:
        (past,) = await fetch_once(p.database, ECHO, VALUES)
        async with ReadSession(p.database, p.database.reads, label="test") as session:
            (through,) = (await session.execute(ECHO.statement, VALUES)).all()

    assert past._fields == through._fields
    assert past._asdict() == through._asdict()
    assert dict(past._mapping) == dict(through._mapping)
