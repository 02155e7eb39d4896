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
