"""The short names of statements."""

import pytest

from pglifeguard.statement_summary import SUMMARY_CHARACTERS, summarize

NAMES = {
    "SELECT patients.id FROM patients WHERE patients.id = $1::INTEGER": ("SELECT patients", "SELECT", "patients"),
    "insert into patients (mrn) VALUES ($1) ON CONFLICT (mrn) DO UPDATE SET mrn = excluded.mrn": (
        "INSERT patients",
        "INSERT",
        "patients",
    ),
    "UPDATE ONLY clinic.patients SET full_name = $1": ("UPDATE clinic.patients", "UPDATE", "clinic.patients"),
    'DELETE FROM "users" WHERE id = $1': ("DELETE users", "DELETE", "users"),
    "COPY patients": ("COPY patients", "COPY", "patients"),
    # Several tables are named, and none is the one.
    "SELECT a.id FROM a JOIN b ON a.id = b.id FOR UPDATE": ("SELECT a b", "SELECT", None),
    "SELECT 1 FROM a AS one, b": ("SELECT a", "SELECT", None),
    "SELECT id FROM a WHERE id IN (SELECT a_id FROM b)": ("SELECT a", "SELECT", None),
    "SELECT count(*) FROM ( SELECT id FROM a) AS some": ("SELECT", "SELECT", None),
    "WITH old AS (DELETE FROM a RETURNING id), one(n) AS MATERIALIZED (SELECT 1) INSERT INTO b SELECT id FROM old": (
        "INSERT b",
        "INSERT",
        None,
    ),
    # FROM and UPDATE that name no table.
    "SELECT extract(epoch FROM at) FROM a WHERE x IS DISTINCT FROM y": ("SELECT a", "SELECT", "a"),
    "SELECT * FROM generate_series(1, 2) AS n": ("SELECT", "SELECT", None),
    "SELECT id FROM a FOR NO KEY UPDATE SKIP LOCKED": ("SELECT a", "SELECT", "a"),
    # No statement that we know.
    "SET LOCAL statement_timeout = 1": ("SET", "SET", None),
    "WITH": ("WITH", "WITH", None),
    "WITH nothing": ("statement", None, None),
    "": ("statement", None, None),
}


@pytest.mark.parametrize("statement", NAMES)
def test_name_verb_and_table(statement: str) -> None:
    """A statement is named by its verb and tables; a table is named alone where it is the only one for certain."""
    assert summarize(statement)[1:] == NAMES[statement]


def test_text_has_no_values() -> None:
    """What somebody has quoted in a statement is in neither."""
    made = summarize("SELECT id FROM patients WHERE full_name = 'Ada FROM Lovelace' AND id = 12")

    assert made.text == "SELECT id FROM patients WHERE full_name = ? AND id = ?"
    assert made.name == "SELECT patients"


def test_name_is_short() -> None:
    """A statement with many tables has a name of the length that the conventions allow."""
    tables = [f"table_with_a_long_name_{number}" for number in range(50)]

    assert len(summarize(" JOIN ".join(["SELECT 1 FROM first", *tables])).name) == SUMMARY_CHARACTERS
