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
--   - closing large objects and messages in the log to everybody: functions of the system are a superuser's to close
--   - the sessions of other roles for monitor, unless it may grant pg_monitor (always in 15)
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
       rolsuper AND current_database() <> 'postgres'
           AND EXISTS (SELECT FROM pg_database WHERE datname = 'postgres' AND datallowconn) AS has_postgres,
       rolsuper OR version < 160000 OR pg_has_role('pg_read_all_stats', 'MEMBER WITH ADMIN OPTION') AS may_read_stats
FROM pg_roles, CAST(current_setting('server_version_num') AS int) AS version
WHERE rolname = current_user
\gset

DO $$
DECLARE
    me pg_roles := (SELECT r FROM pg_roles r WHERE rolname = current_user);
    foreign_roles text := (
        SELECT string_agg(rolname, ', ' ORDER BY rolname) FROM pg_roles
        WHERE (rolname IN ('app_owner', 'app_rw', 'app_ro', 'monitor')
            OR rolname = 'monitor_owner' AND pg_has_role('pg_monitor', 'MEMBER WITH ADMIN OPTION'))
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
-- A password that nobody has set, or an empty one, which would take away the one that is there, is told by its variable.
\if :{?owner_password} \else \set owner_password '' \endif
\if :{?rw_password} \else \set rw_password '' \endif
\if :{?ro_password} \else \set ro_password '' \endif
\if :{?monitor_password} \else \set monitor_password '' \endif
\if :{?replicator_password} \else \set replicator_password '' \endif
\if :{?pgbouncer_password} \else \set pgbouncer_password '' \endif
SELECT concat_ws(', ',
    CASE WHEN :'owner_password' = '' THEN 'APP_OWNER_PASSWORD' END,
    CASE WHEN :'rw_password' = '' THEN 'APP_RW_PASSWORD' END,
    CASE WHEN :'ro_password' = '' THEN 'APP_RO_PASSWORD' END,
    CASE WHEN :'monitor_password' = '' THEN 'MONITOR_PASSWORD' END,
    CASE WHEN :'replicator_password' = '' AND :'may_replicate' THEN 'REPLICATOR_PASSWORD' END,
    CASE WHEN :'pgbouncer_password' = '' AND :'superuser' THEN 'PGBOUNCER_PASSWORD' END
) AS missing
\gset
SELECT format('DO %L', format('BEGIN RAISE %L; END', 'export ' || :'missing'
    || ': each role gets its password from the environment; nothing was changed'))
WHERE :'missing' <> ''
\gexec
\if :quiet
\else
    \warn 'No superuser: a server that logs statements logs the passwords. Hashes (SCRAM-SHA-256$…) work too.'
\endif

SELECT format('CREATE ROLE %I', missing)
FROM unnest(ARRAY['app_owner', 'app_rw', 'app_ro', 'monitor', 'monitor_owner', 'replicator', 'pgbouncer']) AS missing
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = missing)
  AND (missing <> 'replicator' OR :'may_replicate') AND (missing <> 'pgbouncer' OR :'superuser')
  AND (missing <> 'monitor_owner' OR :'may_monitor')
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

-- A role may change its own settings, and PostgreSQL has no way to forbid that: what was changed since the last run is told.
DO $$
DECLARE
    changed record;
BEGIN
    FOR changed IN
        SELECT rolname, string_agg(setting, ', ' ORDER BY setting) AS settings
        FROM pg_roles
        JOIN pg_shdescription ON objoid = pg_roles.oid AND classoid = 'pg_authid'::regclass
        JOIN pg_db_role_setting ON setrole = pg_roles.oid AND setdatabase = 0,
        unnest(setconfig) AS setting
        WHERE rolname IN ('app_owner', 'app_rw', 'app_ro', 'monitor') AND description LIKE 'postgres/roles.sql: {%'
          AND setting <> ALL (substring(description FROM '{.*}')::text[])
        GROUP BY rolname
    LOOP
        RAISE WARNING 'Settings of % were changed since the last run: %. What this script sets is put back, the rest stays.',
            changed.rolname, changed.settings;
    END LOOP;
END $$;

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
        WHERE defaclrole = 'app_owner'::regrole AND defaclnamespace = 'public'::regnamespace AND defaclobjtype = 'r'
          AND grantee = 'app_rw'::regrole
    )
)
\gexec
ALTER DEFAULT PRIVILEGES FOR ROLE app_owner IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO app_rw;
ALTER DEFAULT PRIVILEGES FOR ROLE app_owner IN SCHEMA public GRANT SELECT ON TABLES TO app_ro;
ALTER DEFAULT PRIVILEGES FOR ROLE app_owner IN SCHEMA public GRANT USAGE, SELECT ON SEQUENCES TO app_rw;
-- The audit trail is for who audits: the service adds to it.
SELECT format('REVOKE ALL ON TABLE public.audit_trail FROM %s', role)
FROM unnest(ARRAY['app_ro', 'app_rw']) AS role WHERE to_regclass('public.audit_trail') IS NOT NULL
UNION ALL
SELECT 'GRANT INSERT ON TABLE public.audit_trail TO app_rw' WHERE to_regclass('public.audit_trail') IS NOT NULL
\gexec
-- Kept answers are health data that only who writes needs. Their migration says so too; this is for a later run.
SELECT format('REVOKE ALL ON TABLE public.%I FROM app_ro', tablename)
FROM pg_tables WHERE schemaname = 'public' AND tablename IN ('idempotency_keys', 'idempotency_rows')
\gexec

-- Tables that are closed to a role although the lines above open them. The migration that makes such a table revokes the
-- same; it stands here for a database that is older than that, or was restored without its privileges.
SELECT format('REVOKE %s ON public.%I FROM %I', privileges, name, role)
FROM (VALUES
    ('alembic_version', 'app_rw', 'INSERT, UPDATE, DELETE') -- Which migrations have run: migrations/version_table.py.
) AS closed(name, role, privileges)
WHERE to_regclass(format('public.%I', name)) IS NOT NULL
\gexec

-- A function of a migration runs in the name of who calls it, or, as SECURITY DEFINER, of the owner of every table. By
-- default everybody may call it; here app_rw, and who else a migration grants it to.
ALTER DEFAULT PRIVILEGES FOR ROLE app_owner REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;
ALTER DEFAULT PRIVILEGES FOR ROLE app_owner IN SCHEMA public GRANT EXECUTE ON FUNCTIONS TO app_rw;

-- Large objects, and messages in the write-ahead log, are written by functions that everybody may call, in PostgreSQL 15
-- in a read-only transaction, too. Reading a large object stays a matter of its own privileges.
SELECT format('REVOKE EXECUTE ON FUNCTION %1$s FROM PUBLIC; GRANT EXECUTE ON FUNCTION %1$s TO app_owner', oid::regprocedure)
FROM pg_proc
WHERE :'superuser' AND pronamespace = 'pg_catalog'::regnamespace
  AND proname IN ('lo_creat', 'lo_create', 'lo_from_bytea', 'lo_put', 'lowrite', 'lo_truncate', 'lo_truncate64',
                  'lo_unlink', 'pg_logical_emit_message')
\gexec
SELECT bool_or(has_function_privilege('app_ro', oid, 'EXECUTE')) AS everybody_writes
FROM pg_proc
WHERE pronamespace = 'pg_catalog'::regnamespace AND proname IN ('lo_from_bytea', 'pg_logical_emit_message')
\gset
\if :everybody_writes
    \warn 'Everybody may write large objects and messages in the log: to close their functions takes a superuser.'
\endif

-- Exporters need to know how many sessions are in which state, and no statement, whose text may hold what somebody typed.
-- PostgreSQL shows both or neither (pg_read_all_stats), and pg_monitor shows settings with passwords (primary_conninfo),
-- too. So monitor is a member of neither: the names that exporters ask for lead to views of monitor_owner, which has no login.
-- In plpgsql a function looks its names up at each call, so it also fits the next major version.
SELECT $statistics$
    CREATE SCHEMA IF NOT EXISTS monitor AUTHORIZATION monitor_owner;
    SET LOCAL ROLE monitor_owner;
    CREATE OR REPLACE FUNCTION monitor.sessions() RETURNS SETOF pg_catalog.pg_stat_activity
        LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
        AS 'BEGIN RETURN QUERY
            SELECT shown.* FROM pg_stat_activity AS a, jsonb_populate_record(a, ''{"query": null}'') AS shown; END';
    CREATE OR REPLACE FUNCTION monitor.standbys() RETURNS SETOF pg_catalog.pg_stat_replication
        LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
        AS 'BEGIN RETURN QUERY SELECT * FROM pg_stat_replication; END';
    CREATE OR REPLACE FUNCTION monitor.receiver() RETURNS SETOF pg_catalog.pg_stat_wal_receiver
        LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
        AS 'BEGIN RETURN QUERY SELECT * FROM pg_stat_wal_receiver; END';
    CREATE OR REPLACE VIEW monitor.pg_stat_activity AS SELECT * FROM monitor.sessions();
    CREATE OR REPLACE VIEW monitor.pg_stat_replication AS SELECT * FROM monitor.standbys();
    CREATE OR REPLACE VIEW monitor.pg_stat_wal_receiver AS SELECT * FROM monitor.receiver();
    CREATE OR REPLACE FUNCTION monitor.pg_ls_waldir(OUT name text, OUT size bigint, OUT modification timestamptz)
        RETURNS SETOF record
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
        AS 'BEGIN RETURN QUERY SELECT * FROM pg_ls_waldir(); END';
    CREATE OR REPLACE FUNCTION monitor.pg_database_size(name) RETURNS bigint
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
        AS 'BEGIN RETURN pg_database_size($1); END';
    CREATE OR REPLACE FUNCTION monitor.pg_stat_get_progress_info(
        cmdtype text, OUT pid int, OUT datid oid, OUT relid oid, OUT param1 bigint, OUT param2 bigint, OUT param3 bigint,
        OUT param4 bigint, OUT param5 bigint, OUT param6 bigint, OUT param7 bigint, OUT param8 bigint, OUT param9 bigint,
        OUT param10 bigint, OUT param11 bigint, OUT param12 bigint, OUT param13 bigint, OUT param14 bigint,
        OUT param15 bigint, OUT param16 bigint, OUT param17 bigint, OUT param18 bigint, OUT param19 bigint,
        OUT param20 bigint
    ) RETURNS SETOF record
        LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
        AS 'BEGIN RETURN QUERY SELECT * FROM pg_stat_get_progress_info($1); END';
    REVOKE ALL ON ALL FUNCTIONS IN SCHEMA monitor FROM PUBLIC;
    GRANT USAGE ON SCHEMA monitor TO monitor;
    GRANT SELECT ON ALL TABLES IN SCHEMA monitor TO monitor;
    GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA monitor TO monitor;
    RESET ROLE;
$statistics$ AS statistics
\gset
\if :may_monitor
    GRANT pg_monitor TO monitor_owner;
    \if :ordinary
        GRANT monitor_owner TO CURRENT_USER;
    \endif
    :statistics
    ALTER ROLE monitor SET search_path = monitor, pg_catalog;
\else
    \warn 'monitor sees no other role: to grant it that takes ADMIN OPTION on pg_monitor. Exporters see no sessions.'
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

-- What each role has now, in its comment, which it may not change itself: here and in doctor that tells what came later.
SELECT format('COMMENT ON ROLE %I IS %L', rolname, 'postgres/roles.sql: ' || array_agg(setting ORDER BY setting)::text)
FROM pg_roles JOIN pg_db_role_setting ON setrole = pg_roles.oid AND setdatabase = 0, unnest(setconfig) AS setting
WHERE rolname IN ('app_owner', 'app_rw', 'app_ro', 'monitor')
  AND coalesce(shobj_description(pg_roles.oid, 'pg_authid'), 'postgres/roles.sql: ') LIKE 'postgres/roles.sql: %'
GROUP BY rolname
\gexec
COMMIT;

-- The replica's own watch (postgres/replica.sh) logs in to the database postgres.
\if :has_postgres
    \connect postgres
    BEGIN;
    SET LOCAL client_min_messages = 'warning';
    :statistics
    COMMIT;
\endif

-- What earlier versions of this script have granted goes, now that there is something in its place. A session has the
-- search_path of its login, so those of monitor end, and its programs connect anew; on a standby somebody has to end them.
\if :may_monitor
    SELECT count(pg_terminate_backend(pid)) AS ended
    FROM pg_stat_activity
    WHERE :'superuser' AND usename = 'monitor' AND EXISTS (
        SELECT FROM pg_auth_members WHERE roleid = 'pg_monitor'::regrole AND member = 'monitor'::regrole
    )
    \gset
    SELECT format('REVOKE pg_monitor FROM monitor GRANTED BY %I', pg_get_userbyid(grantor))
    FROM pg_auth_members
    WHERE roleid = 'pg_monitor'::regrole AND member = 'monitor'::regrole
    \gexec
\endif
SELECT pg_has_role('monitor', 'pg_read_all_stats', 'MEMBER') AS sees_statements
\gset
\if :sees_statements
    \warn 'monitor sees statements of other roles: somebody else has granted it pg_monitor, or pg_read_all_stats, and may revoke it.'
\endif
