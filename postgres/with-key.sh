#!/bin/sh
# Copies the server's key to where PostgreSQL takes it, then becomes the given command. PostgreSQL refuses a key that is not
# its account's own, as one that was mounted may not be. To take a renewed certificate without a restart (docs/tls.md):
#
#     docker compose exec primary with-key.sh sh -c 'kill -HUP "$(head -n 1 "$PGDATA/postmaster.pid")"'
set -eu
umask 077
cp /certificates/server.key /var/run/postgresql/server.key.new
mv /var/run/postgresql/server.key.new /var/run/postgresql/server.key
umask 022
exec "$@"
