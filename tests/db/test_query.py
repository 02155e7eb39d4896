"""A query sent past SQLAlchemy gives the same rows as one that goes through it."""

from datetime import date
from decimal import Decimal

import pytest
from sqlalchemy import Date, Double, Enum, Integer, Numeric, Text, bindparam, literal, select
from sqlalchemy.types import TypeDecorator

from app.db.query import Query
from app.db.sessions import ReadSession
from tests.conftest import Database
from tests.db.conftest import pooled


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
VALUES = {"word": "loud", "day": date(2001, 2, 3), "number": 41}


async def test_both_ways_give_the_same_row(database: Database) -> None:
    """Constants, parameters and their types arrive alike, by position and by name."""
    async with pooled(database.replica_url(), role="replica") as p:
        (past,) = await p.database.fetch(ECHO, VALUES)
        async with ReadSession(p.database, p.database.reads, label="test") as session:
            (through,) = (await session.execute(ECHO.statement, VALUES)).all()

    assert tuple(past) == tuple(through)
    assert (past.word, past.day, past.number) == ("LOUD", date(2001, 2, 3), 42)
    assert ECHO.sql.count("$") == 4


async def test_column_that_is_not_there(database: Database) -> None:
    """A row has the attributes of its columns and no others."""
    async with pooled(database.replica_url(), role="replica") as p:
        (row,) = await p.database.fetch(ECHO, VALUES)

    with pytest.raises(AttributeError, match="weight"):
        row.weight  # noqa: B018  # That it is not there is the point.


def test_missing_parameter_is_a_mistake() -> None:
    """Nothing is sent with a hole in it."""
    with pytest.raises(KeyError, match="number"):
        ECHO.arguments({"word": "loud", "day": date(2001, 2, 3)})


async def test_numbers_keep_their_types(database: Database) -> None:
    """Money stays a Decimal and a measure a float, as through SQLAlchemy."""
    both = Query(select(literal(Decimal("0.10"), Numeric).label("price"), literal(0.5, Double).label("measure")))
    async with pooled(database.replica_url(), role="replica") as p:
        (past,) = await p.database.fetch(both, {})
        async with ReadSession(p.database, p.database.reads, label="test") as session:
            (through,) = (await session.execute(both.statement)).all()

    assert [repr(value) for value in past] == [repr(value) for value in through] == ["Decimal('0.10')", "0.5"]


@pytest.mark.parametrize("kind", [Whispered(), Enum("a", "b", name="letter")])
def test_types_that_sqlalchemy_must_read_are_refused(kind: TypeDecorator[str]) -> None:
    """A column that would arrive raw is refused before anything is sent."""
    with pytest.raises(TypeError, match=r"use session\.execute"):
        _ = Query(select(bindparam("word", type_=kind).label("word"))).sql
