#!/usr/bin/env bash
# Writes Barman's configuration, in $HOME/.barman.conf, and runs what it is told to. docs/backups.md names the variables.
set -euo pipefail

: "${BACKUP_HOME:?is not set}" "${PRIMARY_HOST:=primary}" "${PRIMARY_PORT:=5432}"
: "${BACKUP_KEEP_DAYS:=7}"
export PRIMARY_HOST PRIMARY_PORT

refuse() { echo "backup: $*" >&2; exit 2; }

[[ $BACKUP_KEEP_DAYS =~ ^[1-9][0-9]*$ ]] || refuse "BACKUP_KEEP_DAYS is a whole number of days, 1 or more, and not '$BACKUP_KEEP_DAYS'"

password_file=${REPLICATOR_PASSWORD_FILE:-}
if [[ -n $password_file ]]; then password=$(<"$password_file"); else password=${REPLICATOR_PASSWORD:?is not set, nor is REPLICATOR_PASSWORD_FILE}; fi
escaped=$(sed 's/[\\:]/\\&/g' <<<"$password") # The two characters that a password file gives a meaning of its own.
(umask 077 && printf '*:*:*:replicator:%s\n*:*:*:backup:%s\n' "$escaped" "$escaped" >"$HOME/pgpass.$$" && mv "$HOME/pgpass.$$" "$HOME/pgpass")

server="host=$PRIMARY_HOST port=$PRIMARY_PORT passfile=$HOME/pgpass connect_timeout=5"
# Moved into place: a Barman that runs already never reads half of it.
cat >"$HOME/.barman.conf.$$" <<END
[barman]
barman_home = $BACKUP_HOME
barman_user = $(id -un)
# Two containers work on one repository: the locks are in it.
barman_lock_directory = $BACKUP_HOME
log_level = ERROR

[lifeguard]
description = the primary
conninfo = $server user=backup dbname=postgres
streaming_conninfo = $server user=replicator
# Both by streaming: nothing of the primary's own configuration has to be changed.
backup_method = postgres
streaming_archiver = on
slot_name = backup
create_slot = auto
immediate_checkpoint = true
compression = gzip
retention_policy = RECOVERY WINDOW OF $BACKUP_KEEP_DAYS DAYS
minimum_redundancy = 1
END
mv "$HOME/.barman.conf.$$" "$HOME/.barman.conf"

exec "$@"
