-- Who may do what in this database, and for how long. Idempotent: run it again to change a password or a timeout.
--
-- A superuser runs it with psql (14 or newer), connected to the service's own database, before the first migration:
--
--     psql -d lifeguard -f postgres/roles.sql
--
-- The passwords come from the environment, where no process list shows them: APP_OWNER_PASSWORD, APP_RW_PASSWORD,
-- APP_RO_PASSWORD, MONITOR_PASSWORD, REPLICATOR_PASSWORD, PGBOUNCER_PASSWORD. `psql -v owner_password=…` works too.
--
-- The timeouts live on the roles because a pooler refuses them as connection options, while a role's settings hold
-- on every connection that is made in its name, directly or through PgBouncer, and cost no round trip.
\set ON_ERROR_STOP on
\getenv owner_password APP_OWNER_PASSWORD
\getenv rw_password APP_RW_PASSWORD
\getenv ro_password APP_RO_PASSWORD
\getenv monitor_password MONITOR_PASSWORD
\getenv replicator_password REPLICATOR_PASSWORD
\getenv pgbouncer_password PGBOUNCER_PASSWORD

BEGIN;
-- Two runs at once would both find a role missing; the second waits here instead.
DO $$ BEGIN PERFORM pg_advisory_xact_lock(hashtext('roles.sql')); END $$;
-- "Already exists, skipping" is what idempotent means.
SET LOCAL client_min_messages = 'warning';
-- Stored hashed whatever the server's default is; a server log never gets to see them.
SET LOCAL password_encryption = 'scram-sha-256';
SET LOCAL log_statement = 'none';
SET LOCAL log_min_error_statement = 'panic';
SET LOCAL log_min_duration_statement = -1;

SELECT format('CREATE ROLE %I', missing)
FROM unnest(ARRAY['app_owner', 'app_rw', 'app_ro', 'monitor', 'replicator', 'pgbouncer']) AS missing
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = missing)
\gexec

ALTER ROLE app_owner LOGIN PASSWORD :'owner_password';
ALTER ROLE app_rw LOGIN PASSWORD :'rw_password';
ALTER ROLE app_ro LOGIN PASSWORD :'ro_password';
ALTER ROLE monitor LOGIN PASSWORD :'monitor_password';
ALTER ROLE replicator LOGIN REPLICATION PASSWORD :'replicator_password';
ALTER ROLE pgbouncer LOGIN PASSWORD :'pgbouncer_password';

-- What each role may do --------------------------------------------------------------------------------------------

-- Nobody else gets in, and only migrations make tables, schemas and (trusted) extensions.
REVOKE ALL ON DATABASE :"DBNAME" FROM PUBLIC;
GRANT CONNECT, CREATE, TEMPORARY ON DATABASE :"DBNAME" TO app_owner;
GRANT CONNECT ON DATABASE :"DBNAME" TO app_rw, app_ro, monitor, pgbouncer;
ALTER SCHEMA public OWNER TO app_owner;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO app_rw, app_ro;

-- Default privileges follow each migration by themselves; the first two lines catch up on tables made earlier.
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO app_rw;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO app_ro;
GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO app_rw;
ALTER DEFAULT PRIVILEGES FOR ROLE app_owner IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO app_rw;
ALTER DEFAULT PRIVILEGES FOR ROLE app_owner IN SCHEMA public GRANT SELECT ON TABLES TO app_ro;
ALTER DEFAULT PRIVILEGES FOR ROLE app_owner IN SCHEMA public GRANT USAGE, SELECT ON SEQUENCES TO app_rw;

-- All statistics, every statement in pg_stat_activity, no rows of tables.
GRANT pg_monitor TO monitor;

-- PgBouncer's auth_query: SELECT username, password FROM pgbouncer.get_auth($1). Reading the hashes takes a
-- superuser's rights, hence SECURITY DEFINER with a pinned search_path, for the roles that may come through a pooler.
CREATE SCHEMA IF NOT EXISTS pgbouncer;
REVOKE ALL ON SCHEMA pgbouncer FROM PUBLIC;
GRANT USAGE ON SCHEMA pgbouncer TO pgbouncer;
CREATE OR REPLACE FUNCTION pgbouncer.get_auth(login text) RETURNS TABLE (username text, password text)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$
        SELECT rolname::text, rolpassword
        FROM pg_authid
        WHERE rolname = login AND rolname IN ('app_rw', 'app_ro', 'monitor')
          AND rolcanlogin AND (rolvaliduntil IS NULL OR rolvaliduntil > now())
    $$;
REVOKE ALL ON FUNCTION pgbouncer.get_auth(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pgbouncer.get_auth(text) TO pgbouncer;

-- For how long ----------------------------------------------------------------------------------------------------

-- The service. The server ends a statement, so the connection survives it: STATEMENT_TIMEOUT_SECONDS says the same.
-- Waiting for a lock counts as running, so these two need no lock_timeout of their own.
ALTER ROLE app_rw SET statement_timeout = '30s';
ALTER ROLE app_ro SET statement_timeout = '30s';
-- A transaction left open holds locks and keeps vacuum from cleaning. No request idles inside one, so twice the
-- longest statement is reached by a leak alone.
ALTER ROLE app_rw SET idle_in_transaction_session_timeout = '60s';
ALTER ROLE app_ro SET idle_in_transaction_session_timeout = '60s';
-- When a process of the service dies, PostgreSQL would run its statements to their end. Now it looks every five
-- seconds whether the client is still there: one poll(2), nothing at all for statements shorter than that.
ALTER ROLE app_rw SET client_connection_check_interval = '5s';
ALTER ROLE app_ro SET client_connection_check_interval = '5s';
-- Compiling costs tens of milliseconds and pays for statements of seconds; a wrong row estimate is enough to start it.
ALTER ROLE app_rw SET jit = off;
ALTER ROLE app_ro SET jit = off;
-- The service thinks in UTC wherever the server stands; days in reports depend on it.
ALTER ROLE app_rw SET timezone = 'UTC';
ALTER ROLE app_ro SET timezone = 'UTC';
-- Says no before the privileges do, and on a promoted standby too.
ALTER ROLE app_ro SET default_transaction_read_only = on;

-- Migrations. An index takes as long as the table is large, but whoever waits for ACCESS EXCLUSIVE makes everyone
-- else wait behind it: give up after four seconds and try again at a better time.
ALTER ROLE app_owner SET statement_timeout = 0;
ALTER ROLE app_owner SET lock_timeout = '4s';
ALTER ROLE app_owner SET idle_in_transaction_session_timeout = '60s';
ALTER ROLE app_owner SET client_connection_check_interval = '5s';
ALTER ROLE app_owner SET jit = off;
ALTER ROLE app_owner SET timezone = 'UTC';

-- Looking on. A look at statistics that takes longer than this adds to the trouble that it looks for.
ALTER ROLE monitor SET statement_timeout = '10s';
ALTER ROLE monitor SET lock_timeout = '1s';
ALTER ROLE monitor SET idle_in_transaction_session_timeout = '10s';
ALTER ROLE monitor SET client_connection_check_interval = '5s';
ALTER ROLE monitor SET default_transaction_read_only = on;
ALTER ROLE monitor SET jit = off;
ALTER ROLE monitor SET timezone = 'UTC';

-- A login waits for this one: an answer later than PgBouncer's patience is no answer. replicator runs no statements.
ALTER ROLE pgbouncer SET statement_timeout = '5s';
ALTER ROLE pgbouncer SET jit = off;
COMMIT;
