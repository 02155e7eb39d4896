#!/bin/sh
# Writes the two logins that PgBouncer must know by itself, then becomes PgBouncer. All others are looked up in the
# database (auth_query). The file lies on a tmpfs: no image, volume or `docker inspect` of a mount ever holds it.
set -eu

secret() { # NAME or NAME_FILE
    eval "value=\${$1:-} file=\${$1_FILE:-}"
    if [ -n "$file" ]; then value=$(cat "$file"); fi
    if [ -z "$value" ]; then echo "pgbouncer: neither $1 nor $1_FILE is set" >&2; exit 1; fi
    printf '%s' "$value" | sed 's/"/""/g'
}

umask 077
pgbouncer=$(secret PGBOUNCER_PASSWORD)
monitor=$(secret MONITOR_PASSWORD)
printf '"pgbouncer" "%s"\n"monitor" "%s"\n' "$pgbouncer" "$monitor" >/run/pgbouncer/userlist.txt
unset PGBOUNCER_PASSWORD MONITOR_PASSWORD value pgbouncer monitor
exec "$@"
