"""What writes a line of `audit_trail` for each changed row, in the transaction of the change.

A migration that makes a table executes `audit_changes_of("table")`. Migration 0006 makes the function; docs/audit.md
says who reads it and for how long it is kept.
"""

from collections.abc import Iterator


def audit_changes_of(table: str, *, key: str = "id") -> Iterator[str]:
    """Give the statements that audit the changes of a table, whose primary key is the column `key`."""
    yield f"""
        CREATE TRIGGER audit_change AFTER INSERT OR UPDATE OR DELETE ON {table} FOR EACH ROW
        WHEN (current_setting('app.audit', true) = 'on')
        EXECUTE FUNCTION audit_change('{table}', '{key}')
    """


def ignore_changes_of(table: str) -> Iterator[str]:
    """Give the statements that take this back; a table that was dropped has nothing to take back."""
    yield f"DROP TRIGGER IF EXISTS audit_change ON {table}"
