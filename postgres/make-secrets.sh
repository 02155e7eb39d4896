#!/usr/bin/env bash
# Makes a folder of random secrets for docker-compose.secrets.yml, once: what is there is kept, so that a second run
# after an update adds only what is new.
#
#     postgres/make-secrets.sh [FOLDER]                  (default: secrets)
#     postgres/make-secrets.sh --renew ROLE [FOLDER]     a new password for app_rw, app_ro, …, in every file that holds it
#
# The folder is closed to everybody else; the files in it can be read by any account, because the containers' accounts
# are not this machine's, and compose mounts them file by file.
set -euo pipefail
# Whose passwords roles.sql sets.
roles=(app_owner app_rw app_ro monitor replicator pgbouncer)
role=''
if [[ ${1:-} == --renew ]]; then
    role=${2:-}
    if [[ -z $role || " ${roles[*]} " != *" $role "* ]]; then echo "--renew takes one of: ${roles[*]}" >&2; exit 2; fi
    shift 2
fi
folder=${1:-secrets}
mkdir -p "$folder"
chmod 700 "$folder"

write() { # NAME CONTENT
    if [[ ! -e $folder/$1 ]]; then printf '%s\n' "$2" >"$folder/$1"; fi
    chmod 444 "$folder/$1"
}

random() { od -An -v -tx1 -N "$1" /dev/urandom | tr -d ' \n'; }

# Written into the file that is there: a running container holds on to that one, not to its name.
renew() { # ROLE
    local before after file content
    before=$(<"$folder/${1}_password")
    after=$(random 24)
    for file in "$folder"/*; do
        content=$(<"$file")
        if [[ $content == *"$before"* ]]; then
            chmod 644 "$file"
            printf '%s\n' "${content//"$before"/"$after"}" >"$file"
            chmod 444 "$file"
            echo "$file"
        fi
    done
}

if [[ -n $role ]]; then
    renew "$role"
    exit
fi

for name in postgres "${roles[@]}"; do write "${name}_password" "$(random 24)"; done
write auth_secret "$(random 32)"

# The same passwords in the form that the programs take them in.
password() { cat "$folder/${1}_password"; }
write database_url "postgresql://app_rw:$(password app_rw)@pgbouncer:6432/lifeguard"
write database_replica_url "postgresql://app_ro:$(password app_ro)@pgbouncer:6432/lifeguard_replica"
write migrations_url "postgresql://app_owner:$(password app_owner)@primary:5432/lifeguard"
write pgbouncer_admin_url "postgresql://pgbouncer:$(password pgbouncer)@pgbouncer:6432/pgbouncer"
# Read as one argument by the exporter (@FILE), which has no other way to take a password from a file.
write pgbouncer_exporter_flags \
    "--pgBouncer.connectionString=postgres://monitor:$(password monitor)@pgbouncer:6432/pgbouncer"
