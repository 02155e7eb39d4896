"""What ties the answers that are kept for an `Idempotency-Key` to the rows that they tell of.

A migration that makes a table executes `forget_answers_with("table")`. From then on the database notes each row that a
request with a key writes, and deleting the row deletes the answer in the same transaction, whoever deletes it: a route,
a cascade, psql. Migration 0004 makes the functions; docs/retention.md says what they do.
"""

from collections.abc import Iterator


def forget_answers_with(table: str, *, key: str = "id") -> Iterator[str]:
    """Give the statements that tie kept answers to the rows of a table, whose primary key is the column `key`."""
    yield f"""
        CREATE TRIGGER idempotency_note AFTER INSERT OR UPDATE ON {table} FOR EACH ROW
        WHEN (current_setting('lifeguard.idempotency_key', true) <> '')
        EXECUTE FUNCTION idempotency_note_row('{table}', '{key}')
    """
    yield f"""
        CREATE TRIGGER idempotency_forget AFTER DELETE ON {table} REFERENCING OLD TABLE AS gone FOR EACH STATEMENT
        EXECUTE FUNCTION idempotency_forget_rows('{table}', '{key}')
    """
    yield f"""
        CREATE TRIGGER idempotency_forget_all AFTER TRUNCATE ON {table} FOR EACH STATEMENT
        EXECUTE FUNCTION idempotency_forget_rows('{table}', '{key}')
    """


def keep_answers_after(table: str) -> Iterator[str]:
    """Give the statements that take this back; a table that was dropped has nothing to take back."""
    for name in ("idempotency_note", "idempotency_forget", "idempotency_forget_all"):
        yield f"DROP TRIGGER IF EXISTS {name} ON {table}"
