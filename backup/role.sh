#!/usr/bin/env bash
# Makes the role `backup` on the primary, or sets what it should be: it may look at the server's state and close a segment
# of the log, and sees no row. Its password is replicator's, whose holder reads everything anyway. Runs as the superuser.
set -euo pipefail

for name in POSTGRES_PASSWORD REPLICATOR_PASSWORD; do
    file=${name}_FILE
    if [[ -n ${!file:-} ]]; then export "$name=$(<"${!file}")"; fi
    : "${!name:?is not set, nor is ${file}}"
done

PGPASSWORD=$POSTGRES_PASSWORD psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --file=- \
    "host=${PRIMARY_HOST:-primary} port=${PRIMARY_PORT:-5432} user=postgres dbname=postgres" <<'END'
\getenv password REPLICATOR_PASSWORD
BEGIN;
-- "Already granted" is what idempotent means.
SET LOCAL client_min_messages = 'warning';
SET LOCAL log_statement = 'none';
SET LOCAL log_min_error_statement = 'panic';
SET LOCAL log_min_duration_statement = -1;
SET LOCAL password_encryption = 'scram-sha-256';
SELECT 'CREATE ROLE backup' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'backup')
\gexec
ALTER ROLE backup LOGIN PASSWORD :'password';
-- What Barman asks for; pg_switch_wal alone is used while backups are taken by streaming.
GRANT pg_read_all_settings, pg_read_all_stats, pg_checkpoint TO backup;
GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean), pg_switch_wal(),
    pg_create_restore_point(text) TO backup;
COMMIT;
END
