-- Who may do what in this database, and for how long. Idempotent: run it again to change a password or a timeout.
--
-- Run it with psql, PostgreSQL 15 or newer, connected to the service's own database, before the first migration:
--
--     psql -d lifeguard -f postgres/roles.sql
--
-- The passwords come from the environment, where no process list shows them: APP_OWNER_PASSWORD, APP_RW_PASSWORD,
-- APP_RO_PASSWORD, MONITOR_PASSWORD, REPLICATOR_PASSWORD, PGBOUNCER_PASSWORD. `psql -v owner_password=…` works too.
--
-- A superuser gets everything. A managed server gives none: there the owner of the database runs it, with CREATEROLE.
-- Such an owner does without, and is told so at each run:
--   - hiding the passwords from the server's log, if that logs statements: hand over SCRAM-SHA-256$… hashes instead
--   - replicator, unless it has REPLICATION itself (16 or newer): the provider's replicas do not need it
--   - pgbouncer and its auth_query, which reads the hashes: a PgBouncer of one's own takes an auth_file
--   - keeping the rows that an error is about out of the server's log: see log_min_messages below
--   - pg_monitor for monitor, unless it may grant that (always in 15): monitor then sees no other role's statements
-- and becomes a member of app_owner, because only a member may hand the schema over to it.
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
SELECT format('SET LOCAL %s = %s', name, value)
FROM (VALUES ('log_statement', 'none'), ('log_min_error_statement', 'panic'), ('log_min_duration_statement', '-1'))
    AS quiet(name, value)
WHERE has_parameter_privilege(name, 'SET')
\gexec

-- Who runs this, and what that allows. From 16 on a role manages only those that it has made, or has ADMIN OPTION on.
SELECT rolsuper AS superuser, NOT rolsuper AS ordinary, has_parameter_privilege('log_statement', 'SET') AS quiet,
       has_parameter_privilege('log_min_messages', 'SET') AS discreet,
       rolsuper OR (rolreplication AND version >= 160000) AS may_replicate,
       rolsuper OR version < 160000 OR pg_has_role('pg_monitor', 'MEMBER WITH ADMIN OPTION') AS may_monitor,
       rolsuper OR version < 160000 OR pg_has_role('pg_read_all_stats', 'MEMBER WITH ADMIN OPTION') AS may_read_stats
FROM pg_roles, CAST(current_setting('server_version_num') AS int) AS version
WHERE rolname = current_user
\gset

DO $$
DECLARE
    me pg_roles := (SELECT r FROM pg_roles r WHERE rolname = current_user);
    foreign_roles text := (
        SELECT string_agg(rolname, ', ' ORDER BY rolname) FROM pg_roles
        WHERE rolname IN ('app_owner', 'app_rw', 'app_ro', 'monitor')
          AND CAST(current_setting('server_version_num') AS int) >= 160000
          AND NOT pg_has_role(rolname, 'MEMBER WITH ADMIN OPTION')
    );
BEGIN
    IF me.rolsuper THEN
        RETURN;
    ELSIF NOT me.rolcreaterole THEN
        RAISE 'role % has no CREATEROLE: a superuser gives it that', current_user;
    ELSIF NOT (SELECT pg_has_role(datdba, 'USAGE') FROM pg_database WHERE datname = current_database()) THEN
        RAISE 'role % does not own database %, and only an owner decides who may connect', current_user,
            current_database();
    ELSIF NOT (SELECT pg_has_role(nspowner, 'USAGE') FROM pg_namespace WHERE nspname = 'public') THEN
        RAISE 'role % does not own schema public: who does has to ALTER SCHEMA public OWNER TO pg_database_owner',
            current_user;
    ELSIF foreign_roles IS NOT NULL THEN
        RAISE 'role % did not make %: it needs ADMIN OPTION on them, from the role that did', current_user,
            foreign_roles;
    END IF;
END $$;
\if :quiet
\else
    \warn 'No superuser: a server that logs statements logs the passwords. Hashes (SCRAM-SHA-256$…) work too.'
\endif

SELECT format('CREATE ROLE %I', missing)
FROM unnest(ARRAY['app_owner', 'app_rw', 'app_ro', 'monitor', 'replicator', 'pgbouncer']) AS missing
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = missing)
  AND (missing <> 'replicator' OR :'may_replicate') AND (missing <> 'pgbouncer' OR :'superuser')
\gexec

ALTER ROLE app_owner LOGIN PASSWORD :'owner_password';
ALTER ROLE app_rw LOGIN PASSWORD :'rw_password';
ALTER ROLE app_ro LOGIN PASSWORD :'ro_password';
ALTER ROLE monitor LOGIN PASSWORD :'monitor_password';
\if :may_replicate
    ALTER ROLE replicator LOGIN REPLICATION PASSWORD :'replicator_password';
\else
    \warn 'No replicator: to make it takes a superuser, or REPLICATION in PostgreSQL 16 or newer.'
\endif
\if :superuser
    ALTER ROLE pgbouncer LOGIN PASSWORD :'pgbouncer_password';
\else
    \warn 'No pgbouncer: auth_query reads hashes, which takes a superuser. Give PgBouncer an auth_file.'
\endif
\if :ordinary
    -- Only a member may hand a schema over, and set privileges in the name of its owner.
    GRANT app_owner TO CURRENT_USER;
\endif

-- What each role may do --------------------------------------------------------------------------------------------

-- Nobody else gets in, and only migrations make tables, schemas and (trusted) extensions.
REVOKE ALL ON DATABASE :"DBNAME" FROM PUBLIC;
GRANT CONNECT, CREATE, TEMPORARY ON DATABASE :"DBNAME" TO app_owner;
GRANT CONNECT ON DATABASE :"DBNAME" TO app_rw, app_ro, monitor;
ALTER SCHEMA public OWNER TO app_owner;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO app_rw, app_ro;

-- The first run in a database catches up on tables made earlier. A later one grants only on those that nobody was ever
-- granted anything on, because default privileges follow each migration by themselves: what one revokes stays revoked.
SELECT CASE relkind WHEN 'S' THEN format('GRANT USAGE, SELECT ON SEQUENCE %s TO app_rw', oid::regclass)
       ELSE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %1$s TO app_rw; GRANT SELECT ON %1$s TO app_ro', oid::regclass)
       END
FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND (
    relacl IS NULL OR NOT EXISTS (
        SELECT FROM pg_default_acl, aclexplode(defaclacl)
        WHERE defaclrole = 'app_owner'::regrole AND defaclnamespace = 'public'::regnamespace
          AND grantee = 'app_rw'::regrole
    )
)
\gexec
ALTER DEFAULT PRIVILEGES FOR ROLE app_owner IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO app_rw;
ALTER DEFAULT PRIVILEGES FOR ROLE app_owner IN SCHEMA public GRANT SELECT ON TABLES TO app_ro;
ALTER DEFAULT PRIVILEGES FOR ROLE app_owner IN SCHEMA public GRANT USAGE, SELECT ON SEQUENCES TO app_rw;

-- Tables that are closed to a role although the lines above open them. The migration that makes such a table revokes the
-- same; it stands here for a database that is older than that, or was restored without its privileges.
SELECT format('REVOKE %s ON public.%I FROM %I', privileges, name, role)
FROM (VALUES
    ('alembic_version', 'app_rw', 'INSERT, UPDATE, DELETE') -- Which migrations have run: migrations/version_table.py.
) AS closed(name, role, privileges)
WHERE to_regclass(format('public.%I', name)) IS NOT NULL
\gexec

-- All statistics, every statement in pg_stat_activity, no rows of tables.
\if :may_monitor
    GRANT pg_monitor TO monitor;
\else
    \warn 'monitor is not in pg_monitor: this role may not grant that. Exporters see no statements of other roles.'
\endif

-- State and age of other roles' sessions, for /debug/connections: without it a blocker has a process id and a name there
-- and nothing else. Not pg_monitor, which reads settings that hold passwords (primary_conninfo).
\if :may_read_stats
    GRANT pg_read_all_stats TO app_rw, app_ro;
\else
    \warn 'app_rw and app_ro are not in pg_read_all_stats: this role may not grant that. A blocker is shown without its state.'
\endif

-- PgBouncer's auth_query: SELECT username, password FROM pgbouncer.get_auth($1). Reading the hashes takes a
-- superuser's rights, hence SECURITY DEFINER with a pinned search_path, for the roles that may come through a pooler.
\if :superuser
GRANT CONNECT ON DATABASE :"DBNAME" TO pgbouncer;
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
\endif

-- What the server's log may tell -----------------------------------------------------------------------------------

-- An error quotes the row that it is about ("Key (mrn)=(…) already exists", "Failing row contains (…)"), and rows are
-- health data. 'log' drops these roles' errors and warnings, which the service and the migrations log themselves, without
-- rows. It keeps what the server reports about them: slow statements, and who waits for whom, which
-- log_error_verbosity = terse for the whole server would cut down to "somebody waits".
\if :discreet
    ALTER ROLE app_owner SET log_min_messages = 'log';
    ALTER ROLE app_rw SET log_min_messages = 'log';
    ALTER ROLE app_ro SET log_min_messages = 'log';
\else
    \warn 'Errors may quote rows in the server log: to set log_min_messages takes a superuser, or GRANT SET ON PARAMETER.'
\endif

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
\if :superuser
    ALTER ROLE pgbouncer SET statement_timeout = '5s';
    ALTER ROLE pgbouncer SET jit = off;
\endif
COMMIT;
