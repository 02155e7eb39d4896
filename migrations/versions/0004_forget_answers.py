"""Forget the answers of idempotency keys with the rows that they tell of, and close their table to readers.

The database does all of it, so a version of the service from before this one keeps to it too. What was kept before this
migration is tied to its rows by the next one.

Revision: 0004, after 0003.
"""

import sqlalchemy as sa
from alembic import op

from migrations.retention import forget_answers_with, keep_answers_after

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLES = ("patients", "users")
STATEMENTS = (
    # Names the key of this transaction, for the triggers of the other tables. A key that is used again after its time
    # begins anew.
    """
    CREATE FUNCTION idempotency_claim() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
        IF TG_OP = 'UPDATE' THEN
            DELETE FROM idempotency_rows WHERE digest = NEW.digest;
        END IF;
        PERFORM set_config('lifeguard.idempotency_key', encode(NEW.digest, 'hex'), true);
        RETURN NULL;
    END $$
    """,
    # Notes that this transaction has written the row.
    """
    CREATE FUNCTION idempotency_note_row() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
        INSERT INTO idempotency_rows (relation, row_id, digest)
        VALUES (TG_ARGV[0], to_jsonb(NEW) ->> TG_ARGV[1],
                decode(current_setting('lifeguard.idempotency_key'), 'hex'))
        ON CONFLICT DO NOTHING;
        RETURN NULL;
    END $$
    """,
    # Leaves of the answers that tell of a deleted row nothing but that there was one: status 410, and no fingerprint,
    # which is a hash of the request. The request that deletes the row keeps its own answer.
    """
    CREATE FUNCTION idempotency_forget_rows() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    DECLARE
        own bytea := decode(coalesce(current_setting('lifeguard.idempotency_key', true), ''), 'hex');
        digests bytea[];
    BEGIN
        IF TG_OP = 'TRUNCATE' THEN
            WITH linked AS (DELETE FROM idempotency_rows WHERE relation = TG_ARGV[0] RETURNING digest)
            SELECT array_agg(digest) INTO digests FROM linked;
        ELSE
            WITH linked AS (
                DELETE FROM idempotency_rows r USING gone g
                WHERE r.relation = TG_ARGV[0] AND r.row_id = to_jsonb(g) ->> TG_ARGV[1]
                RETURNING r.digest
            )
            SELECT array_agg(digest) INTO digests FROM linked;
        END IF;
        UPDATE idempotency_keys
        SET fingerprint = '', status = 410, location = NULL, media_type = NULL, headers = NULL, body = NULL, kept = NULL
        WHERE digest = ANY (digests) AND digest <> own;
        RETURN NULL;
    END $$
    """,
    # A key that is purged takes its notes along.
    """
    CREATE FUNCTION idempotency_purge_rows() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
        IF TG_OP = 'TRUNCATE' THEN
            DELETE FROM idempotency_rows;
        ELSE
            DELETE FROM idempotency_rows r USING purged p WHERE r.digest = p.digest;
        END IF;
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER idempotency_claim AFTER INSERT OR UPDATE OF fingerprint ON idempotency_keys FOR EACH ROW
    WHEN (NEW.fingerprint <> '') EXECUTE FUNCTION idempotency_claim()
    """,
    """
    CREATE TRIGGER idempotency_purge AFTER DELETE ON idempotency_keys REFERENCING OLD TABLE AS purged FOR EACH STATEMENT
    EXECUTE FUNCTION idempotency_purge_rows()
    """,
    """
    CREATE TRIGGER idempotency_purge_all AFTER TRUNCATE ON idempotency_keys FOR EACH STATEMENT
    EXECUTE FUNCTION idempotency_purge_rows()
    """,
)
# The default privileges of postgres/roles.sql give app_ro every table. Servers without these roles have their own.
PRIVILEGE = """
DO $$ BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'app_ro') THEN
        {} app_ro;
    END IF;
END $$
"""


def upgrade() -> None:
    """Apply."""
    # In the order in which a request with a key locks them.
    op.add_column("idempotency_keys", sa.Column("kept", sa.Text(), nullable=True))
    op.create_table(
        "idempotency_rows",
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("row_id", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("relation", "row_id", "digest", name="pk_idempotency_rows"),
    )
    op.create_index("ix_idempotency_rows_digest", "idempotency_rows", ["digest"])
    for statement in STATEMENTS:
        op.execute(statement)
    for table in TABLES:
        for statement in forget_answers_with(table):
            op.execute(statement)
    op.execute(PRIVILEGE.format("REVOKE ALL ON TABLE idempotency_keys, idempotency_rows FROM"))


def downgrade() -> None:
    """Take back."""
    op.execute(PRIVILEGE.format("GRANT SELECT ON TABLE idempotency_keys TO"))
    for table in TABLES:
        for statement in keep_answers_after(table):
            op.execute(statement)
    for name in ("idempotency_claim", "idempotency_purge", "idempotency_purge_all"):
        op.execute(f"DROP TRIGGER {name} ON idempotency_keys")
    for name in ("claim", "note_row", "forget_rows", "purge_rows"):
        op.execute(f"DROP FUNCTION idempotency_{name}()")
    op.drop_table("idempotency_rows")
    op.drop_column("idempotency_keys", "kept")
