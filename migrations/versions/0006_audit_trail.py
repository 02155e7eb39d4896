"""Make the audit trail: a row for each change, to which the service can add and nothing else.

A version of the service from before this one goes on without it.

Revision: 0006, after 0005.
"""

import sqlalchemy as sa
from alembic import op

from migrations.audit import audit_changes_of, ignore_changes_of

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TABLES = ("patients", "users")
# With the rights of its owner, so that whoever may change a row may not leave it out of the trail.
FUNCTION = """
CREATE FUNCTION audit_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    changed jsonb := CASE TG_OP WHEN 'DELETE' THEN to_jsonb(OLD) ELSE to_jsonb(NEW) END;
BEGIN
    INSERT INTO audit_trail (at, subject, action, relation, row_id, request_id) VALUES (
        clock_timestamp(),
        coalesce(nullif(current_setting('app.audit_subject', true), ''), 'role ' || session_user),
        lower(TG_OP), TG_ARGV[0], changed ->> TG_ARGV[1],
        nullif(current_setting('app.audit_request', true), '')
    );
    RETURN NULL;
END $$
"""
# The default privileges of postgres/roles.sql give app_rw and app_ro every table.
PRIVILEGES = """
DO $$ BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'app_ro') THEN
        REVOKE ALL ON TABLE audit_trail FROM app_ro;
    END IF;
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'app_rw') THEN
        REVOKE ALL ON TABLE audit_trail FROM app_rw;
        GRANT INSERT ON TABLE audit_trail TO app_rw;
    END IF;
END $$
"""


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "audit_trail",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("at", sa.TIMESTAMP(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("row_id", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_audit_trail"),
    )
    # The table is new and empty: nobody waits for an index here.
    op.create_index("ix_audit_trail_relation_row_id", "audit_trail", ["relation", "row_id"])
    op.create_index("ix_audit_trail_at", "audit_trail", ["at"])
    op.execute(FUNCTION)
    for table in TABLES:
        for statement in audit_changes_of(table):
            op.execute(statement)
    op.execute(PRIVILEGES)


def downgrade() -> None:
    """Take back."""
    for table in TABLES:
        for statement in ignore_changes_of(table):
            op.execute(statement)
    op.execute("DROP FUNCTION audit_change()")
    op.drop_table("audit_trail")
