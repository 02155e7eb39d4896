#!/usr/bin/env bash
# Puts the primary's data directory, $PGDATA, back to how it was at a moment, from the repository of backups:
#
#     restore.sh '2026-11-28 12:00:00+00' [TIMELINE]      or: restore.sh latest
#
# The primary must not run. The log is replayed here, beside the old directory, which is moved aside only once the server
# of that moment stands, and is left for you to remove. Without TIMELINE it is the one that was live at the moment.
set -euo pipefail

say() { printf 'restore: %s\n' "$*" >&2; }
refuse() { say "$*"; exit 2; }

: "${PGDATA:?is not set}" "${BACKUP_HOME:?is not set}" "${POSTGRES_CONFIG:=/etc/postgresql/postgresql.conf}"
half=$PGDATA.restoring
target=${1:-}
[[ -n $target ]] || refuse "say to which moment, as '2026-11-28 12:00:00+00', or latest"
if [[ $target == latest ]]; then
    seconds=9999999999
else
    [[ $target =~ (Z|[+-][0-9]{2}(:?[0-9]{2})?)$ && $target == *:* ]] ||
        refuse "'$target' has no time zone: say it as '2026-11-28 12:00:00+00', in UTC"
    seconds=$(date --date="$target" +%s) || refuse "'$target' is no moment"
    ((seconds <= $(date +%s))) || refuse "'$target' is in the future"
fi
# A name that is gone with its container may take the resolver ten seconds.
if timeout 3 pg_isready --quiet --timeout=3 --host="${PRIMARY_HOST:-primary}" --port="${PRIMARY_PORT:-5432}"; then
    refuse "the primary runs. Stop it first: what it writes from now on would not be in what is restored"
fi

# Each timeline begins with a file of history: its number in hexadecimal, its size, and when it was written.
timeline_at() { # SECONDS
    {
        echo 00000001.history 0 0
        cat "$log_index"
        find "$received" -name '*.history' -printf '%f %s %T@\n'
    } | awk -v at="$1" '$1 ~ /\.history$/ && $3 <= at { print $1 }' | sort | tail -n 1
}

# Where the timeline comes from: a line for each one before it, with the position at which that was left.
ancestors() {
    local name
    name=$(printf '%08X.history' "$timeline")
    { cat "$received/$name" 2>/dev/null || barman get-wal lifeguard "$name" 2>/dev/null || true; } | awk '$1 ~ /^[0-9]+$/ { print $1, $2 }'
}

bytes() { # LSN
    echo $((16#${1%/*} * 4294967296 + 16#${1#*/}))
}

# Whether the timeline goes through the end of a base backup: it may have been taken on a branch that was given up.
leads_to() { # TIMELINE LSN
    local ancestor left
    (($1 == timeline)) && return
    while read -r ancestor left; do
        if (($1 == ancestor && $(bytes "$2") <= $(bytes "$left"))); then return; fi
    done <<<"$branches"
    return 1
}

# The newest base backup that ended before the moment and from which the timeline can be reached.
backup_for() {
    local id shown
    while read -r id; do
        shown=$(barman show-backup lifeguard "$id")
        if [[ $(field Status) =~ ^(DONE|WAITING_FOR_WALS)$ ]] && (($(date --date="$(field 'End time')" +%s) <= seconds)) &&
            leads_to "$(field Timeline)" "$(field 'End LSN')"; then
            echo "$id"
            return
        fi
    done < <(barman list-backups --minimal lifeguard)
}
field() { sed -n "/^ *$1 *: /{s///p;q}" <<<"$shown"; }

# What was received and is not in the archive yet. Nothing more comes: the primary is away.
for _ in {1..60}; do
    if barman archive-wal lifeguard >/dev/null 2>&1; then break; fi
    sleep 1 # The other container does the same at this moment.
done
received=$BACKUP_HOME/lifeguard/streaming

log_index=$(find "$BACKUP_HOME/lifeguard" -name '*xlog.db' | head -n 1)
[[ -n $log_index ]] || refuse "there is no archive of the log in $BACKUP_HOME"
history=$(timeline_at "$seconds")
timeline=${2:-$((16#${history%.history}))}
branches=$(ancestors)
backup=$(backup_for)
[[ -n $backup ]] || refuse "no backup ended before '$target' on timeline $timeline; \`barman list-backups lifeguard\` lists them"

say "from backup $backup, on timeline $timeline, to $target"
rm -rf "$half"
options=(--target-tli "$timeline")
if [[ $target != latest ]]; then options+=(--target-time "$target" --target-action promote); fi
barman --quiet restore --no-get-wal --partial-wal "${options[@]}" lifeguard "$backup" "$half" >&2
# The segment that was being received last. Barman leaves it out while no other one of its timeline is in the archive.
for segment in "$received/$(printf '%08X' "$timeline")"0*; do
    if [[ -s $segment ]]; then cp --no-clobber "$segment" "$half/barman_wal/$(basename "$segment" .partial)"; fi
done

socket=$(mktemp -d)
echo 'local all all trust' >"$socket/hba.conf"
log=$socket/log
ask() { psql --no-psqlrc --no-align --tuples-only --quiet --set=ON_ERROR_STOP=1 --host="$socket" --port=5432 --username=postgres --dbname=postgres "$@"; }
postgres -D "$half" -c config_file="$POSTGRES_CONFIG" -c hba_file="$socket/hba.conf" -c listen_addresses= -c port=5432 \
    -c unix_socket_directories="$socket" >"$log" 2>&1 &
postmaster=$!
trap 'kill -INT "$postmaster" 2>/dev/null && wait "$postmaster"; rm -rf "$socket"' EXIT
until [[ $(ask --command='SELECT pg_is_in_recovery()' 2>/dev/null) == f ]]; do
    if ! kill -0 "$postmaster" 2>/dev/null; then
        grep -E 'FATAL|PANIC|last completed transaction' "$log" >&2 || tail -n 20 "$log" >&2
        if grep -q 'ended before configured recovery target' "$log"; then
            say "the archive has no transaction after that moment on timeline $timeline; \`restore.sh latest\` takes all that it has"
        fi
        say "the server of that moment did not come up; $PGDATA is as it was"
        exit 1
    fi
    sleep 0.2
done
grep -E 'last completed transaction|recovery stopping|new timeline' "$log" >&2 || true

# Of no use any more, and a replica that is cloned from here would stop at the moment too.
for name in restore_command recovery_end_command recovery_target_time recovery_target_timeline recovery_target_action; do
    ask --command="ALTER SYSTEM RESET $name"
done
# The log goes on being archived where the new timeline begins: no gap, and what was received of the old one is kept.
segment=$(ask --command="SELECT pg_walfile_name(pg_current_wal_lsn()) FROM pg_create_physical_replication_slot('backup', true)")
touch "$received/$segment.partial" "$BACKUP_HOME/wanted"
kill -INT "$postmaster"
wait "$postmaster"
trap 'rm -rf "$socket"' EXIT

if [[ -e $PGDATA ]]; then
    aside=$PGDATA.before-$(date --utc +%Y%m%dT%H%M%SZ)
    mv "$PGDATA" "$aside"
    say "what was there is in $aside"
fi
mv "$half" "$PGDATA"
say "done: start the primary"
