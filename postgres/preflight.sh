#!/usr/bin/env bash
# Runs before anything else. In production it lists every secret that is missing, short or a development default, and
# nothing starts; a database once made with a default password would keep it.
set -euo pipefail

refused=()
for name in POSTGRES_PASSWORD APP_OWNER_PASSWORD APP_RW_PASSWORD APP_RO_PASSWORD MONITOR_PASSWORD REPLICATOR_PASSWORD \
    PGBOUNCER_PASSWORD AUTH_SECRET; do
    file=${name}_FILE
    value=${!name:-}
    if [[ -n ${!file:-} ]]; then value=$(<"${!file}"); fi
    minimum=16
    if [[ $name == AUTH_SECRET ]]; then minimum=32; fi
    # An identity provider signs tokens in place of the secret.
    if [[ $name == AUTH_SECRET && -z $value && -n ${AUTH_JWKS_URL:-} ]]; then continue; fi
    if [[ -z $value ]]; then
        refused+=("$name is not set")
    elif [[ $value == development-* ]]; then
        refused+=("$name is the development default")
    elif ((${#value} < minimum)); then
        refused+=("$name is shorter than $minimum characters")
    elif [[ $name != AUTH_SECRET && $value == *[^A-Za-z0-9._~-]* ]]; then
        refused+=("$name holds a character that would have to be escaped in a URL; take letters, digits and . _ ~ -")
    fi
done

if [[ ${ENVIRONMENT:-development} == production ]] && ((${#refused[@]})); then
    {
        echo "ENVIRONMENT=production refuses to start:"
        printf '  %s\n' "${refused[@]}"
        echo "Set each in .env or as a file (docker-compose.secrets.yml); \`openssl rand -hex 24\` makes a good one."
    } >&2
    exit 1
fi
echo "preflight: ${ENVIRONMENT:-development}, ${#refused[@]} secrets that production would refuse"
