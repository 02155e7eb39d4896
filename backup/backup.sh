#!/usr/bin/env bash
# Receives the primary's log as it is written, takes a base backup a day, and removes what is older than BACKUP_KEEP_DAYS.
# Whatever it looked at last is on port 9188, /metrics.txt, for Prometheus. Runs until it is told to end.
set -euo pipefail

: "${BACKUP_HOME:?is not set}" "${BACKUP_AT:=02:00}" "${BACKUP_METRICS_PORT:=9188}" "${BACKUP_LOOK_SECONDS:=60}"
: "${BACKUP_RETRY_SECONDS:=600}" # A base backup that failed is a load on the primary: not each minute.
public=$HOME/public

say() { printf 'backup: %s\n' "$*" >&2; }

[[ $BACKUP_AT =~ ^([01][0-9]|2[0-3]):[0-5][0-9]$ ]] || { say "BACKUP_AT is a time of day in UTC, as 02:00, and not '$BACKUP_AT'"; exit 2; }

ask() { PGPASSFILE=$HOME/pgpass psql --no-psqlrc --no-align --tuples-only "host=$PRIMARY_HOST port=$PRIMARY_PORT user=backup dbname=postgres connect_timeout=5" --command="$1"; }

primary_answers() { pg_isready --quiet --timeout=3 --host="$PRIMARY_HOST" --port="$PRIMARY_PORT"; }

# The primary keeps the log for the slot up to max_slot_wal_keep_size. Past it the slot is lost: a gap, and a new beginning.
renew_lost_slot() {
    [[ $(ask "SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'backup'" 2>/dev/null) == lost ]] || return 0
    say "the primary dropped log that was not received: there is a gap in the archive, and a new base backup is taken"
    barman receive-wal --drop-slot lifeguard
    barman receive-wal --create-slot lifeguard
    barman receive-wal --reset lifeguard
    touch "$BACKUP_HOME/wanted"
}

receive() {
    local before=''
    while true; do
        renew_lost_slot || true
        # The same failure once a second would be all that the log holds.
        said=$(barman receive-wal lifeguard 2>&1 >/dev/null) || true
        if [[ ${said##*ERROR: } != "$before" ]]; then say "${said##*ERROR: }"; fi
        before=${said##*ERROR: }
        sleep 1
    done
}

# A line for each base backup, the newest first: name, status, whether it is to be kept, and when it ended.
catalogue() {
    barman --format json list-backups lifeguard | python3 -c '
import json, sys
for backup in json.load(sys.stdin)["lifeguard"]:
    print(backup["backup_id"], backup["status"], backup.get("retention_status"), backup.get("end_time_timestamp"))'
}

newest() { catalogue | awk '$2 ~ /^(DONE|WAITING_FOR_WALS)$/ && !found++ { print $1, $4 }'; }

# The name of a backup is when it began.
due() {
    local at
    [[ ! -e $BACKUP_HOME/wanted ]] || return 0
    at=$(date --utc --date="today $BACKUP_AT" +%Y%m%dT%H%M%S)
    if [[ $at > $(date --utc +%Y%m%dT%H%M%S) ]]; then at=$(date --utc --date="yesterday $BACKUP_AT" +%Y%m%dT%H%M%S); fi
    [[ $(newest) < $at ]]
}

# To Barman an archive works once a segment is in it, and a segment is closed when 16 MB are written, or by asking for it.
begin_archive() {
    local attempt
    for attempt in {1..60}; do
        barman archive-wal lifeguard >/dev/null
        if grep -qs . "$BACKUP_HOME"/lifeguard/wals/*xlog.db; then return; fi
        barman switch-wal --force lifeguard >/dev/null
        sleep 1
    done
    say "no log has arrived after $attempt attempts"
    return 1
}

take_backup() {
    if [[ -z $(newest) ]]; then begin_archive; fi
    barman backup --wait --wait-timeout 600 lifeguard >/dev/null && rm -f "$BACKUP_HOME/wanted"
}

# What is too old, and what failed. Not by `barman cron`: that starts a second receiver, in a session of its own, whenever ours is between two attempts.
remove_old() {
    local id
    catalogue | awk '$2 == "FAILED" || $3 == "OBSOLETE" { print $1 }' | while read -r id; do
        say "removing $id"
        barman delete lifeguard "$id" >/dev/null
    done
}

publish() {
    local ended failed
    ended=$(newest | awk '{ print $2 }')
    failed=$(barman check lifeguard 2>/dev/null | grep -c FAILED) || true
    cat >"$public/metrics.new" <<END
# HELP backup_last_end_timestamp_seconds When the newest base backup ended, 0 while there is none.
# TYPE backup_last_end_timestamp_seconds gauge
backup_last_end_timestamp_seconds ${ended:-0}
# HELP backup_failed_checks How many of Barman's checks failed.
# TYPE backup_failed_checks gauge
backup_failed_checks $failed
END
    mv "$public/metrics.new" "$public/metrics.txt"
}

look() {
    while true; do
        barman archive-wal lifeguard >/dev/null || true
        publish || true
        sleep "$BACKUP_LOOK_SECONDS"
    done
}

mkdir -p "$public"
# Every child ends with this script, whatever it is about to do.
trap 'trap - TERM INT; kill 0' TERM INT
receive &
look &
python3 -m http.server --directory "$public" "$BACKUP_METRICS_PORT" >/dev/null 2>&1 &

# A large base backup takes hours, in which the three go on.
while true; do
    pause=$BACKUP_LOOK_SECONDS
    if due && primary_answers; then
        say "taking a base backup"
        if take_backup; then
            say "took it"
            remove_old
        else
            say "the base backup failed"
            pause=$BACKUP_RETRY_SECONDS
        fi
    fi
    sleep "$pause" &
    wait $!
done
