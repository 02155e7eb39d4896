"""Tie answers that were kept before 0004 to their rows, and forget those whose rows are gone.

A transaction of its own, which locks no table: requests go on while it reads the kept answers.

Revision: 0005, after 0004.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# How the answer of a create or a change begins, by table.
BEGINNINGS = {"patients": '{"id":([0-9]+),"mrn":', "users": '{"id":([0-9]+),"email":'}
# MATERIALIZED, so that no other order of the conditions decodes a body that is no text.
TIE = """
    WITH answers AS MATERIALIZED (
        SELECT digest, body FROM idempotency_keys WHERE media_type = 'application/json' AND kept IS NULL
    ), tied AS (
        SELECT digest, substring(convert_from(body, 'UTF8') FROM '^\\{}') AS row_id FROM answers
    )
    INSERT INTO idempotency_rows (relation, row_id, digest)
    SELECT '{}', row_id, digest FROM tied WHERE row_id IS NOT NULL
    ON CONFLICT DO NOTHING
"""
FORGET = """
    WITH gone AS (
        DELETE FROM idempotency_rows r
        WHERE relation = '{0}' AND NOT EXISTS (SELECT FROM {0} WHERE id = CAST(r.row_id AS bigint))
        RETURNING digest
    )
    UPDATE idempotency_keys k
    SET fingerprint = '', status = 410, location = NULL, media_type = NULL, headers = NULL, body = NULL, kept = NULL
    FROM gone WHERE k.digest = gone.digest
"""


def upgrade() -> None:
    """Apply."""
    for table, beginning in BEGINNINGS.items():
        op.execute(TIE.format(beginning, table).replace(":", "\\:"))
        op.execute(FORGET.format(table))


def downgrade() -> None:
    """Take back: nothing, what is forgotten is gone."""
