#!/usr/bin/env bash
# Makes an authority and a certificate for each server of docker-compose.tls.yml. What is there is kept, unless it ends
# within 30 days: run it once a month.
#
#     deploy/make-certificates.sh [FOLDER]                       (default: certificates)
#     deploy/make-certificates.sh --renew [FOLDER]               all certificates anew, by the same authority
#     deploy/make-certificates.sh --renew-authority [FOLDER]     a new authority; the old one is believed beside it
#     NAMES="api.example.com 192.0.2.7" deploy/make-certificates.sh     names of the balancer beside localhost
#
# The folder is closed to everybody else. Each container sees the folder of its own service, and nobody mounts that of the
# authority. Root gives each key to the account of its container; anybody else leaves it readable within the closed folder,
# because the containers' accounts are not this machine's. docs/tls.md says how a running server takes a new one.
set -euo pipefail
AUTHORITY_DAYS=3650
CERTIFICATE_DAYS=397
SPARE_SECONDS=$((30 * 86400))
# Each service, and the account of its container.
declare -A account=([primary]=999 [replica]=999 [pgbouncer]=10002 [app]=10001 [balancer]=10003)

renew=''
if [[ ${1:-} == --renew || ${1:-} == --renew-authority ]]; then
    renew=$1
    shift
fi
folder=${1:-certificates}
mkdir -p "$folder"
chmod 700 "$folder"
cd "$folder"
umask 077
work=$(mktemp -d .work.XXXXXX)
trap 'rm -rf "$work"' EXIT

say() { printf 'certificates: %s\n' "$*"; }

new_key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null; }

# By a rename: a server that reads the file now gets the old one or the new one.
put() { # FILE MODE [ACCOUNT]
    chmod "$2" "$work/$(basename "$1")"
    if [[ -n ${3:-} && $EUID == 0 ]]; then chown "$3" "$work/$(basename "$1")"; fi
    mv "$work/$(basename "$1")" "$1"
}

make_authority() {
    mkdir -p authority
    new_key "$work/authority.key"
    openssl req -x509 -new -key "$work/authority.key" -days "$AUTHORITY_DAYS" -out "$work/own.crt" \
        -subj "/CN=Lifeguard's own authority, $(date -u +%F)" -addext 'keyUsage=critical,keyCertSign,cRLSign'
    put authority/authority.key 400
    # Servers and clients take the new certificates at their own time: until all have, the old authority is believed too.
    { cat "$work/own.crt"; if [[ -e authority/own.crt ]]; then cat authority/own.crt; fi; } >"$work/authority.crt"
    put authority/own.crt 444
    put authority/authority.crt 444
    say "a new authority"
}

names_of() { # SERVICE
    local name names="DNS:$1,DNS:localhost,IP:127.0.0.1"
    if [[ $1 == balancer ]]; then
        for name in ${NAMES:-}; do
            if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then names+=",IP:$name"; else names+=",DNS:$name"; fi
        done
    fi
    printf '%s' "$names"
}

make_certificate() { # SERVICE
    new_key "$work/server.key"
    openssl req -new -key "$work/server.key" -subj "/CN=$1" -out "$work/request"
    printf '%s\n' "subjectAltName=$(names_of "$1")" basicConstraints=critical,CA:FALSE \
        keyUsage=critical,digitalSignature extendedKeyUsage=serverAuth \
        subjectKeyIdentifier=hash authorityKeyIdentifier=keyid:always >"$work/extensions"
    openssl x509 -req -in "$work/request" -CA authority/own.crt -CAkey authority/authority.key -extfile "$work/extensions" \
        -set_serial "0x$(openssl rand -hex 16)" -days "$CERTIFICATE_DAYS" -out "$work/server.crt" 2>/dev/null
    local mode=444
    if [[ $EUID == 0 ]]; then mode=400; fi
    cat "$work/server.crt" "$work/server.key" >"$work/server.pem" # HAProxy takes both in one file.
    put "$1/server.key" "$mode" "${account[$1]}"
    put "$1/server.crt" 444
    if [[ $1 == balancer ]]; then put "$1/server.pem" "$mode" "${account[$1]}"; fi
    say "a new certificate for $1"
}

if [[ ! -e authority/authority.key || $renew == --renew-authority ]]; then
    make_authority
    renew=--renew
fi
for service in "${!account[@]}" client; do
    mkdir -p "$service"
    chmod 755 "$service"
    cp authority/authority.crt "$work/authority.crt"
    put "$service/authority.crt" 444
    if [[ $service == client ]]; then continue; fi
    if [[ $renew == --renew ]] || ! openssl x509 -checkend "$SPARE_SECONDS" -noout -in "$service/server.crt" >/dev/null 2>&1; then
        make_certificate "$service"
    fi
done
