"""A statement is shown as it was meant, and nothing that somebody put into it is."""

import asyncpg
import pytest

from pglifeguard.statement_text import without_values
from tests.conftest import Database

CASES = {
    "parameters stay": ("SELECT a FROM t WHERE b = $1 LIMIT $2", "SELECT a FROM t WHERE b = $1 LIMIT $2"),
    "strings": ("UPDATE t SET a = 'Ada', b = '' WHERE c IN ('x', 'y')", "UPDATE t SET a = ?, b = ? WHERE c IN (?, ?)"),
    "a quote in a string": ("SELECT 'O''Hara' || a", "SELECT ? || a"),
    "an escaped quote": (r"SELECT E'it\'s Ada', b", "SELECT ?, b"),
    "kinds of strings": (r"SELECT U&'d\0061t' , B'101', X'1F', N'Ada'", "SELECT U&? , B?, X?, N?"),
    "dollar quotes": ("DO $$ BEGIN PERFORM 'Ada'; END $$", "DO ?"),
    "tagged dollar quotes": ("SELECT $a$it's $$ Ada$a$, $b$x$b$", "SELECT ?, ?"),
    "numbers": ("SELECT 1, -2.5, .5, 1e-3, 0xFF, 1_000 + a1", "SELECT ?, -?, ?, ?-?, ?, ? + a1"),
    "names with digits": ("SELECT t_1.a2, anon_1 FROM t1", "SELECT t_1.a2, anon_1 FROM t1"),
    "comments": ("SELECT a -- of Ada\nFROM t /* 1980\n-05-17 */ WHERE b", "SELECT a FROM t WHERE b"),
    "plain quoted names": ('SELECT "order" FROM "my_table"', 'SELECT "order" FROM "my_table"'),
    "a value in double quotes": ('SELECT a FROM t WHERE b = "Ada Example"', "SELECT a FROM t WHERE b = ?"),
    "casts": ("SELECT '1980-05-17'::date, $1::VARCHAR", "SELECT ?::date, $1::VARCHAR"),
    "passwords": ("ALTER ROLE app_rw PASSWORD 'secret'", "ALTER ROLE app_rw PASSWORD ?"),
    "lines": ("SELECT\n   a,\tb", "SELECT a, b"),
    "nothing": ("", ""),
}
CUT_OFF = ["SELECT 'Ada", "SELECT E'Ada\\", "SELECT $$Ada", "SELECT $x$Ada$$", 'SELECT "Ada', "SELECT /* Ada"]


@pytest.mark.parametrize(("statement", "shown"), CASES.values(), ids=CASES)
def test_values_are_left_out(statement: str, shown: str) -> None:
    """What is no value stays, so that the statement can be found."""
    assert without_values(statement) == shown


@pytest.mark.parametrize("statement", CUT_OFF)
def test_value_that_was_cut_off_is_left_out(statement: str) -> None:
    """The server keeps the beginning of a long statement, which may end within a value."""
    assert without_values(statement) in {"SELECT", "SELECT ?"}


@pytest.mark.parametrize("doubtful", [r"'a\' , Ada, 'b'", "/* a /* b */ Ada */"])
def test_text_ends_where_a_value_may_go_on(doubtful: str) -> None:
    r"""With standard_conforming_strings off, \' is a quote in a string; comments may be nested."""
    assert without_values(f"SELECT {doubtful}") in {"SELECT", "SELECT ?"}


def test_text_is_cut() -> None:
    """After the values were taken out, so that no cut reveals one."""
    assert without_values("SELECT a, 'Ada', b", characters=12) == "SELECT a, ?,"


async def test_server_reads_it_in_the_same_way(database: Database) -> None:
    """What PostgreSQL takes for the values of a statement are the parts that are left out."""
    connection = await asyncpg.connect(database.url())
    statement = r"SELECT 'O''Hara', E'it\'s', $x$ $$ 'Ada' $x$, U&'d\0061t', 1.5, .5"

    row = await connection.fetchrow(statement)
    await connection.close()

    assert row is not None
    assert [str(value) for value in row] == ["O'Hara", "it's", " $$ 'Ada' ", "dat", "1.5", "0.5"]
    assert without_values(statement) == "SELECT ?, ?, ?, U&?, ?, ?"
