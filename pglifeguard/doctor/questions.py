"""The questions that `doctor` asks a server, each by itself: what one role may not see, it does without.

All are read from views that are open to every role, unless the server hides a part. `to_jsonb(view) ->> 'column'` is
NULL where an older server has no such column.
"""

from pglifeguard.activity import CLIENTS

ROUND_TRIP = "SELECT clock_timestamp() AS at"
IDENTITY = """
SELECT pg_is_in_recovery() AS in_recovery, current_setting('transaction_read_only')::boolean AS read_only,
       current_database()::text AS database, current_user::text AS role,
       pg_encoding_to_char(encoding)::text AS encoding,
       d.datconnlimit AS database_limit, to_jsonb(d) ->> 'datcollversion' AS collation_version,
       r.rolconnlimit AS role_limit, r.rolsuper AS superuser, r.rolvaliduntil AS password_ends,
       pg_has_role(current_user, 'pg_monitor', 'MEMBER') OR r.rolsuper AS sees_all
FROM pg_database d, pg_roles r WHERE d.datname = current_database() AND r.rolname = current_user
"""
# $1: names of settings. Times are in milliseconds, sizes in the unit of the setting.
SETTINGS = """
SELECT name::text, setting::text, unit::text, pending_restart FROM pg_settings WHERE name = ANY($1::text[])
"""
SETTING_NAMES = (
    "autovacuum", "autovacuum_freeze_max_age", "data_checksums", "effective_cache_size", "fsync", "full_page_writes",
    "idle_in_transaction_session_timeout", "lock_timeout", "max_connections", "server_version", "server_version_num",
    "statement_timeout", "synchronous_standby_names", "transaction_timeout", "work_mem",
)  # fmt: skip
PENDING = "SELECT array_agg(name::text ORDER BY name) AS names FROM pg_settings WHERE pending_restart"
COLLATION = """
SELECT pg_database_collation_actual_version(oid) AS actual FROM pg_database WHERE datname = current_database()
"""
# $1: seconds after which a transaction is long; $2: after which an idle one was forgotten.
ACTIVITY = f"""
SELECT count(*) AS connections, count(*) FILTER (WHERE state IS NULL) AS hidden,
       count(*) FILTER (WHERE state LIKE 'idle in transaction%' AND state_age > $2) AS forgotten,
       max(state_age) FILTER (WHERE state LIKE 'idle in transaction%') AS forgotten_seconds,
       count(*) FILTER (WHERE state = 'active' AND age > $1) AS long,
       max(age) FILTER (WHERE state = 'active') AS long_seconds,
       count(*) FILTER (WHERE usename = current_user) AS of_role
FROM (SELECT state, usename, extract(epoch FROM clock_timestamp() - xact_start)::float8 AS age,
             extract(epoch FROM clock_timestamp() - state_change)::float8 AS state_age
      FROM pg_stat_activity WHERE {CLIENTS} AND pid <> pg_backend_pid()) AS others
"""  # noqa: S608  # Made of constants.
SLOTS = """
SELECT slot_name::text AS name, slot_type::text AS type, active, to_jsonb(s) ->> 'wal_status' AS wal_status,
       CASE WHEN NOT pg_is_in_recovery() THEN (pg_current_wal_lsn() - restart_lsn)::bigint END AS retained_bytes
FROM pg_replication_slots s WHERE NOT temporary ORDER BY slot_name
"""
# A role outside of pg_read_all_stats sees that a standby is there, and not how it does.
STANDBYS = """
SELECT application_name::text AS name, state::text, sync_state::text,
       (pg_current_wal_lsn() - replay_lsn)::bigint AS behind_bytes
FROM pg_stat_replication ORDER BY 1
"""
# $1: seconds.
PREPARED = """
SELECT count(*) AS transactions, max(extract(epoch FROM clock_timestamp() - prepared))::float8 AS seconds
FROM pg_prepared_xacts WHERE prepared < clock_timestamp() - make_interval(secs => $1)
"""
WRAPAROUND = (
    "SELECT datname::text AS database, age(datfrozenxid)::bigint AS age FROM pg_database ORDER BY 2 DESC LIMIT 1"
)
INVALID_INDEXES = """
SELECT array_agg(indexrelid::regclass::text ORDER BY 1) AS names FROM pg_index i
WHERE NOT indisvalid AND NOT EXISTS (SELECT FROM pg_stat_progress_create_index p WHERE p.index_relid = i.indexrelid)
"""
ARCHIVER = """
SELECT last_failed_wal::text AS failed FROM pg_stat_archiver
WHERE last_failed_time > coalesce(last_archived_time, '-infinity')
"""
MAY_CREATE = "SELECT has_schema_privilege(current_schema(), 'CREATE') AS may_create"
