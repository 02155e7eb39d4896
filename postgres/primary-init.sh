#!/usr/bin/env bash
# First start of the primary, once its empty database is there: make the roles. The image's entrypoint runs this
# from /docker-entrypoint-initdb.d against a server that listens on its socket alone. Run it by hand, with PGHOST, to
# change a password (docs/servers.md).
set -euo pipefail

for name in POSTGRES_PASSWORD APP_OWNER_PASSWORD APP_RW_PASSWORD APP_RO_PASSWORD MONITOR_PASSWORD REPLICATOR_PASSWORD PGBOUNCER_PASSWORD; do
    file=${name}_FILE
    if [[ -n ${!file:-} ]]; then export "$name=$(<"${!file}")"; fi
    : "${!name:?is not set, nor is ${file}}"
done

export PGPASSWORD=$POSTGRES_PASSWORD
psql --no-psqlrc --quiet --username "${POSTGRES_USER:-postgres}" --dbname "$POSTGRES_DB" --file /etc/postgresql/roles.sql

# By hand, while everything runs: PgBouncer logs in at a server with what a client has proved to it last, and would be refused
# with the old password from its next connection on. So one client shows it the new one.
show_pooler() { # ROLE PASSWORD DATABASE
    local attempt
    for attempt in {1..20}; do
        if PGPASSWORD=$2 psql --no-psqlrc --quiet --output=/dev/null --command='SELECT 1' \
            "host=${POOLER_HOST:-pgbouncer} port=6432 user=$1 dbname=$3"; then return 0; fi
        sleep 0.5 # The replica has it when it has replayed it.
    done
    echo "$1 cannot log in through PgBouncer after $attempt attempts" >&2
    return 1
}

if [[ -n ${PGHOST:-} ]]; then
    show_pooler app_rw "$APP_RW_PASSWORD" "$POSTGRES_DB"
    show_pooler app_ro "$APP_RO_PASSWORD" "${POSTGRES_DB}_replica"
fi
