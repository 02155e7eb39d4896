#!/usr/bin/env bash
# A streaming replica that needs no hand: it clones the primary when it has nothing to start from, follows it through
# restarts of either side, and clones it anew when it can no longer follow: the primary was rebuilt or restored, its
# timeline forked away, or it dropped the log that this copy still needed (max_slot_wal_keep_size).
#
# What it never does is throw away a server that somebody promoted, or a copy before the next one is complete.
# Arguments go to postgres. Runs as the user postgres.
set -euo pipefail

PRIMARY_HOST=${PRIMARY_HOST:-primary}
SLOT=${REPLICATION_SLOT:-replica}
PATIENCE_SECONDS=${REPLICA_PATIENCE_SECONDS:-30} # Without progress for so long while the primary answers: clone anew.
CLONE=$PGDATA.clone
PASSFILE=/tmp/pgpass

say() { printf 'replica: %s\n' "$*" >&2; }

secret() { # NAME or NAME_FILE
    local file=${1}_FILE
    if [[ -n ${!file:-} ]]; then cat "${!file}"; else printf '%s\n' "${!1:?is not set, nor is ${file}}"; fi
}

escaped() { sed 's/[\\:]/\\&/g'; } # The two characters that a password file gives a meaning of its own.

write_passfile() {
    local replicator monitor
    replicator=$(secret REPLICATOR_PASSWORD | escaped)
    monitor=$(secret MONITOR_PASSWORD | escaped)
    (umask 077 && printf '*:*:*:replicator:%s\n*:*:*:monitor:%s\n' "$replicator" "$monitor" >"$PASSFILE")
    export PGPASSFILE=$PASSFILE
}

primary_answers() { pg_isready --quiet --timeout=3 --host="$PRIMARY_HOST"; }

# Whoever is not let in, as with a password that was changed, could not clone either: a server would be stopped for nothing.
primary_lets_in() {
    psql --no-psqlrc --quiet --output=/dev/null "host=$PRIMARY_HOST user=replicator replication=true connect_timeout=3" \
        --command=IDENTIFY_SYSTEM 2>/dev/null
}

clone_primary() {
    say "cloning $PRIMARY_HOST"
    until primary_answers; do sleep 1; done
    rm -rf "$CLONE"
    # The slot of an earlier copy points at log that nobody will ask for again.
    psql --no-psqlrc --quiet --output=/dev/null "host=$PRIMARY_HOST user=replicator replication=true" \
        --command="DROP_REPLICATION_SLOT $SLOT" 2>/dev/null || true
    pg_basebackup --host="$PRIMARY_HOST" --username=replicator --no-password --pgdata="$CLONE" \
        --wal-method=stream --create-slot --slot="$SLOT" --checkpoint=fast
    touch "$CLONE/standby.signal"
    rm -rf "$PGDATA"
    mv "$CLONE" "$PGDATA"
    say "cloned"
}

ask() { psql --no-psqlrc --no-align --tuples-only --username=monitor --dbname=postgres --command="$1" 2>/dev/null; }

# Follows, or replays what it fetched earlier, or is on its way up: anything but standing still.
makes_progress() {
    local answer
    if ! answer=$(ask "SELECT coalesce((SELECT status FROM pg_stat_wal_receiver), 'none'), pg_last_wal_replay_lsn()"); then
        # It serves, and only this question was turned away.
        if pg_isready --quiet; then served=yes; fi
        return 0
    fi
    served=yes
    [[ $answer == streaming* || $answer != "$last_answer" ]] || return 1
    last_answer=$answer
}

# Each look takes three processes: often while something is the matter, seldom while it streams.
seconds_to_next_look() { if [[ $last_answer == streaming* ]]; then echo 5; else echo 1; fi; }

stop_server() {
    kill -INT "$server" 2>/dev/null || true
    wait "$server" || true
}

# Returns 0 when the server was told to stop, 1 when it ended by itself, 2 when it could not follow.
follow() {
    local last_answer='' progress_at=$SECONDS
    postgres -c primary_slot_name="$SLOT" \
        -c primary_conninfo="host=$PRIMARY_HOST user=replicator passfile=$PASSFILE application_name=$SLOT" "$@" &
    server=$!
    trap 'stopping=yes; kill -INT "$server" 2>/dev/null' INT TERM
    while kill -0 "$server" 2>/dev/null; do
        if [[ -n $stopping ]] || makes_progress || ! primary_answers || promoted; then
            progress_at=$SECONDS
        elif ((SECONDS - progress_at >= PATIENCE_SECONDS)); then
            if primary_lets_in; then
                say "no progress for $PATIENCE_SECONDS seconds although $PRIMARY_HOST answers"
                stop_server
                return 2
            fi
            say "$PRIMARY_HOST refuses the login of replicator, so it cannot be cloned; what is here is served"
            progress_at=$SECONDS
        fi
        sleep "$(seconds_to_next_look)" &
        wait -n $! "$server" || true
    done
    wait "$server" || true
    [[ -n $stopping ]]
}

promoted() { [[ ! -e $PGDATA/standby.signal ]]; }

stopping=''
server=''
unfit=0
write_passfile
[[ -s $PGDATA/PG_VERSION ]] || clone_primary
while true; do
    if promoted; then
        say "this server was promoted: it runs as it is and is never cloned over; remove its volume to start again"
        exec postgres "$@"
    fi
    served=''
    status=0
    follow "$@" || status=$?
    if ((status == 0)); then exit 0; fi
    if ((status == 1)); then
        # One that served was killed, and starts again with its container.
        if [[ -n $served ]]; then exit 1; fi
        # One that ends before it serves, twice, does not fit the primary any more.
        if ((++unfit < 2)); then
            sleep 1 # Until the last process of a killed server has let go of its memory.
            continue
        fi
    fi
    clone_primary
    unfit=0
done
