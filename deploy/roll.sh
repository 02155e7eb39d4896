#!/usr/bin/env bash
# Replaces the instances of the service one by one, while they serve:
#
#     deploy/roll.sh
#
# It builds the image, brings the schema up to date, and then for each instance: starts a new one, waits until that is
# ready and the balancer has found it, and tells the old one to leave. So a new version, a changed setting and a changed
# password come in without a failed request. Two things are asked of a new version: its migrations suit the old code as
# well, and one instance more than usual fits in (the balancer has ten places).
#
# A new instance that is not ready within ROLL_PATIENCE_SECONDS (120) is removed again, and the old ones go on.
# Compose files and project are those of `docker compose`: name them in COMPOSE_FILE and COMPOSE_PROJECT_NAME.
set -euo pipefail
cd "$(dirname "$0")/.."
PATIENCE_SECONDS=${ROLL_PATIENCE_SECONDS:-120}

say() { printf 'roll: %s\n' "$*" >&2; }

instances() { docker compose ps --all --quiet app | sort; }

# Asks the balancer how many instances it sends requests to.
balanced() {
    docker compose exec -T balancer bash -c '
        exec 3<>/dev/tcp/127.0.0.1/8405
        printf "GET /metrics HTTP/1.0\r\n\r\n" >&3
        sed -n "s/^haproxy_backend_active_servers{proxy=\"instances\"} //p" <&3'
}

# Starts one instance beside those that there are, and waits for that one alone: an old one that is ill must not keep its
# replacement away, so this is not `up --wait`. `--no-recreate` leaves the old ones as they are.
add_instance() {
    local had=$1 before=$2 found new state second
    found=$(balanced)
    docker compose up --detach --no-deps --no-recreate --scale app=$((had + 1)) app || return 1
    new=$(comm -13 <(echo "$before") <(instances))
    for ((second = 0; second < PATIENCE_SECONDS; second++)); do
        state=$(docker inspect --format '{{.State.Health.Status}} {{.RestartCount}}' "$new")
        # It ended and was started again: its settings are wrong, and waiting mends nothing.
        if [[ $state != *' 0' ]]; then return 1; fi
        if [[ $state == 'healthy 0' ]] && (($(balanced) > found)); then return 0; fi
        sleep 1
    done
    return 1
}

docker compose build app
mapfile -t old < <(instances)
if ((${#old[@]} == 0)); then
    say "no instance is there: docker compose up --detach --wait starts everything"
    exit 1
fi
docker compose run --rm --no-deps migrate

for leaving in "${old[@]}"; do
    before=$(instances)
    if ! add_instance "${#old[@]}" "$before"; then
        for failed in $(comm -13 <(echo "$before") <(instances)); do
            docker logs --tail 20 "$failed" >&2 || true
            docker rm --force "$failed" >/dev/null
        done
        say "the new instance did not become ready: it is removed, and the old ones go on"
        exit 1
    fi
    # It says that it is closing, the balancer leaves it, it answers what it has, and ends.
    docker stop "$leaving" >/dev/null
    docker rm "$leaving" >/dev/null
    say "${leaving:0:12} is replaced"
done
