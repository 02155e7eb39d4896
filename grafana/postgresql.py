"""What the exporters say of the servers: PostgreSQL, its replication, and PgBouncer.

The names are those of prometheus-community's postgres_exporter and pgbouncer_exporter. The label `server`, which says
primary or replica, is given by prometheus/prometheus.yml. What prometheus/recording.yml records has CloudNativePG's
figures too, by pod.
"""

from grafana_foundation_sdk.models.dashboard import Dashboard
from grafana_foundation_sdk.models.units import (
    BytesIEC,
    BytesPerSecondIEC,
    OpsPerSecond,
    PercentUnit,
    Seconds,
    Short,
)

from grafana.parts import Row, assemble, graph, ratio, states, values_of

RATE = "[$__rate_interval]"
HERE = 'server=~"$server"'
IN = f'{HERE}, datname=~"$database"'
# Every alias of the pooler, and not its admin console.
POOLER = 'database!="pgbouncer"'
# Of these series the label `database` is the database behind an alias.
ALIAS = 'name!="pgbouncer"'


def rate(metric: str, labels: str, of: str = IN) -> str:
    """Return what is counted in a second."""
    return f"sum by ({labels}) (rate({metric}{{{of}}}{RATE}))"


FOUND = rate("pg_stat_database_blks_hit", "server")
READ = rate("pg_stat_database_blks_read", "server")
IDLE = f'server_session:pg_transaction_seconds:max1m{{{HERE}, state=~"idle in transaction.*"}}'


def dashboard() -> Dashboard:
    """Make it."""
    return assemble(
        "lifeguard-postgresql",
        "Lifeguard: PostgreSQL, replication, PgBouncer",
        "The servers as their exporters see them.",
        [
            values_of("server", "server", "pg_up"),
            values_of("database", "datname", 'pg_stat_database_numbackends{datname!~"template.*|"}'),
        ],
        [
            _sessions(),
            _work(),
            _space(),
            _replication(),
            _pgbouncer(),
            _backups(),
        ],
    )


def _sessions() -> Row:
    return "Sessions", [
        graph(
            11, "Connections taken",
            "The part of max_connections that is taken, by whomever. Bad: four fifths; then a deployment or a "
            "failover finds none. Runbook: ConnectionBudgetNearlySpent.",
            (
                ratio(
                    f"sum by (server) (pg_stat_database_numbackends{{{HERE}}})",
                    f"max by (server) (pg_settings_max_connections{{{HERE}}})",
                ),
                "{{server}}",
            ),
            unit=PercentUnit, limit=("above", 0.8),
        ),
        graph(
            12, "Sessions by state",
            "Bad: idle in transaction; somebody holds locks and does nothing. Runbook: ConnectionsHeldIdle.",
            (f"sum by (server, state) (pg_stat_activity_count{{{IN}}})", "{{server}} {{state}}"),
            unit=Short, stacked=True,
        ),
        graph(
            13, "Longest transaction",
            "That is at work. Bad: minutes; it keeps locks, and dead rows from being removed. "
            "Runbook: DatabasePoolNearlyExhausted, LongTransaction.",
            (f'max by (server) (server_session:pg_transaction_seconds:max1m{{{HERE}, state="active"}})', "{{server}}"),
            unit=Seconds, limit=("above", 300),
        ),
        graph(
            14, "Sessions that wait for a lock",
            "On average over a minute. Bad: more than one at any time; somebody holds a lock and does not let go, and "
            "soon every pool is full. Runbook: SessionsBlocked.",
            (f"max by (server) (server:pg_sessions_blocked:avg1m{{{HERE}}})", "{{server}}"),
            unit=Short, limit=("above", 1),
        ),
        graph(
            15, "Longest idle in transaction",
            "By role and program. Bad: a minute; whoever it is has gone away with locks in his hands. "
            "Runbook: IdleInTransaction.",
            (
                f"max by (server, usename, application_name) ({IDLE})",
                "{{server}} {{usename}} {{application_name}}",
            ),
            unit=Seconds, limit=("above", 60),
        ),
        graph(
            16, "Starts of the server",
            "In ten minutes. Bad: one that nobody ordered. Runbook: ServerRestarted.",
            (f"max by (server) (server:pg_start_time:changes10m{{{HERE}}})", "{{server}}"),
            unit=Short, limit=("above", 0),
        ),
    ]  # fmt: skip


def _work() -> Row:
    return "Work", [
        graph(
            21, "Transactions",
            "Committed and rolled back. Bad: many rolled back; constraints, collisions or timeouts.",
            (rate("pg_stat_database_xact_commit", "server"), "{{server}} committed"),
            (rate("pg_stat_database_xact_rollback", "server"), "{{server}} rolled back"),
            unit=OpsPerSecond,
        ),
        graph(
            22, "Deadlocks and conflicts",
            "Transactions that the server ended: for a deadlock, or on a standby because replay needed what "
            "they read. The service runs them again. Bad: a steady line.",
            (rate("pg_stat_database_deadlocks", "server"), "{{server}} deadlocks"),
            (rate("pg_stat_database_conflicts", "server"), "{{server}} conflicts"),
            unit=OpsPerSecond,
        ),
        graph(
            23, "Blocks found in memory",
            "Bad: it falls, while reads get slower: the data outgrew shared_buffers. Runbook: SlowQueries.",
            (
                ratio(FOUND, f"({FOUND} + {READ})"),
                "{{server}}",
            ),
            unit=PercentUnit,
        ),
        graph(
            24, "Rows written",
            "Inserted, updated and deleted on the primary, a second.",
            (rate("pg_stat_database_tup_inserted", "server"), "{{server}} inserted"),
            (rate("pg_stat_database_tup_updated", "server"), "{{server}} updated"),
            (rate("pg_stat_database_tup_deleted", "server"), "{{server}} deleted"),
            unit=OpsPerSecond,
        ),
        graph(
            25, "Locks",
            "By mode. Bad: accessexclusivelock for longer than a migration's moment: everybody else waits.",
            (f"sum by (server, mode) (pg_locks_count{{{IN}}})", "{{server}} {{mode}}"),
            unit=Short, stacked=True,
        ),
        graph(
            26, "Temporary files",
            "Sorts and hashes that did not fit into work_mem, in bytes a second.",
            (rate("pg_stat_database_temp_bytes", "server"), "{{server}}"),
            unit=BytesPerSecondIEC,
        ),
        graph(
            27, "Deadlocks in ten minutes",
            "Bad: three; two pieces of code lock the same rows in different orders. Runbook: DeadlocksRepeating.",
            (f"max by (server) (server:pg_deadlocks:increase10m{{{HERE}}})", "{{server}}"),
            unit=Short, limit=("above", 2),
        ),
    ]  # fmt: skip


def _space() -> Row:
    return "Space", [
        graph(
            31, "Dead rows",
            "The five tables with most of them. Bad: they grow without end; vacuum does not keep up, or a long "
            "transaction keeps it from removing them.",
            (
                f"topk(5, max by (server, relname) (pg_stat_user_tables_n_dead_tup{{{HERE}}}))",
                "{{server}} {{relname}}",
            ),
            unit=Short,
        ),
        graph(
            32, "Size of the databases",
            "Bad: a slope that reaches the disk's end before you do something.",
            (f"max by (server, datname) (pg_database_size_bytes{{{IN}}})", "{{server}} {{datname}}"),
            unit=BytesIEC,
        ),
        graph(
            33, "Transactions since the last freeze",
            "By database. Vacuum is forced at 200 million. Bad: 500 million; it does not get through, and the server "
            "takes no more writes at two thousand million. Runbook: TransactionIdsAging.",
            (f"max by (server, datname) (server_database:pg_xid_age:max5m{{{HERE}}})", "{{server}} {{datname}}"),
            unit=Short, limit=("above", 500000000),
        ),
    ]  # fmt: skip


def _replication() -> Row:
    return "Replication", [
        states(
            41, "Role",
            "Whether a server replays another one's log. Both primary, or both standby: a failover went wrong. "
            "Runbook: ServerRoleChanged.",
            (f"max by (server) (pg_replication_is_replica{{{HERE}}})", "{{server}}"),
            names=("primary", "standby"), colors=("blue", "green"),
        ),
        states(
            42, "Slots in use",
            "Whether a standby streams from its slot. Bad: nobody does, and the primary keeps the log for it. "
            "Runbook: ReplicationSlotInactive.",
            (
                f"min by (server, slot_name) (pg_replication_slot_slot_is_active{{{HERE}}})",
                "{{server}} {{slot_name}}",
            ),
            names=("inactive", "active"),
        ),
        graph(
            43, "Standby behind, in seconds",
            "As the standby sees it: 0 when it has replayed all that came. That is also so when nothing comes any "
            "more: then the bytes beside it tell. Runbook: ReplicaLagging.",
            (f"max by (server) (pg_replication_lag_seconds{{{HERE}}})", "{{server}}"),
            unit=Seconds,
        ),
        graph(
            44, "Standby behind, in bytes",
            "As the primary sees it: WAL that each standby has not replayed. Runbook: ReplicaLagging.",
            (
                f"max by (server, application_name) (pg_stat_replication_pg_wal_lsn_diff{{{HERE}}})",
                "{{server}} to {{application_name}}",
            ),
            unit=BytesIEC,
        ),
        graph(
            45, "WAL kept for slots",
            "For standbys that do not stream, and for the archive of the backups; the least within two minutes. Bad: "
            "half a gigabyte. Runbook: ReplicationSlotInactive, ReplicationSlotKeepsLog.",
            (
                f"max by (server, slot_name) (server_slot:pg_wal_kept_bytes:min2m{{{HERE}}})",
                "{{server}} {{slot_name}}",
            ),
            unit=BytesIEC, limit=("above", 536870912),
        ),
        graph(
            47, "WAL until a slot is lost",
            "How much more the server keeps before it gives a slot up (max_slot_wal_keep_size). Bad: a quarter of it. "
            "Runbook: ReplicationSlotNearlyLost.",
            (
                f"min by (server, slot_name) (pg_replication_slot_safe_wal_size_bytes{{{HERE}}})",
                "{{server}} {{slot_name}}",
            ),
            unit=BytesIEC, limit=("below", 268435456),
        ),
        graph(
            46, "WAL written",
            "On the primary, a second. A bulk load shows here first, and as lag after it.",
            (
                f"max by (server) (rate(pg_stat_replication_pg_current_wal_lsn_bytes{{{HERE}}}{RATE}))",
                "{{server}}",
            ),
            unit=BytesPerSecondIEC,
        ),
        graph(
            48, "Standby receives",
            "The part of two minutes in which a standby had a receiver that streams. Bad: less than half; its lag in "
            "seconds stays 0 meanwhile. Runbook: StandbyNotReceiving.",
            (f"max by (server) (server:pg_wal_receiver_streaming:avg2m{{{HERE}}})", "{{server}}"),
            unit=Short, limit=("below", 0.5),
        ),
    ]  # fmt: skip


def _pgbouncer() -> Row:
    return "PgBouncer", [
        graph(
            51, "Clients that wait",
            "Seconds waited each second are clients that wait, on average; beside it those that wait now. Bad: "
            "a half for a minute. Runbook: PgBouncerClientsWaiting.",
            (
                rate("pgbouncer_stats_totals_client_wait_seconds_total", "database", POOLER),
                "{{database}} on average",
            ),
            (
                f"sum by (database) (pgbouncer_pools_client_waiting_connections{{{POOLER}}})",
                "{{database}} now",
            ),
            unit=Short, limit=("above", 0.5),
        ),
        graph(
            52, "Longest wait now",
            "Of the client at the head of the queue. Bad: half of query_wait_timeout, after which it is sent away. "
            "Runbook: PgBouncerWaitTooLong.",
            (f"max by (database) (pgbouncer_pools_client_maxwait_seconds{{{POOLER}}})", "{{database}}"),
            unit=Seconds, limit=("above", 2.5),
        ),
        graph(
            53, "Server connections",
            "Open, and how many a database may have at most (max_db_connections). Bad: at the limit with "
            "clients that wait.",
            (
                f"sum by (name) (pgbouncer_databases_current_connections{{{ALIAS}}})",
                "{{name}} open",
            ),
            (
                f"sum by (name) (pgbouncer_databases_max_connections{{{ALIAS}}})",
                "{{name}} at most",
            ),
            unit=Short,
        ),
        graph(
            54, "Server connections by state",
            "Active ones are in a transaction. Bad: all active; login for long: the server is slow to let in.",
            *(
                (
                    f"sum by (database) (pgbouncer_pools_server_{state}_connections{{{POOLER}}})",
                    f"{{{{database}}}} {state}",
                )
                for state in ("active", "idle", "used", "testing", "login")
            ),
            unit=Short, stacked=True,
        ),
        graph(
            55, "Clients taken",
            "The part of max_client_conn that is taken. Bad: four fifths; the next clients are refused. "
            "Runbook: PgBouncerNearlyFull.",
            (
                ratio(
                    "max by (instance) (pgbouncer_used_clients)",
                    "max by (instance) (pgbouncer_config_max_client_connections)",
                ),
                "{{instance}}",
            ),
            unit=PercentUnit, limit=("above", 0.8),
        ),
        graph(
            56, "Clients by state",
            "Active ones have a server connection, or nothing to ask.",
            (f"sum by (database) (pgbouncer_pools_client_active_connections{{{POOLER}}})", "{{database}} active"),
            (
                f"sum by (database) (pgbouncer_pools_client_waiting_connections{{{POOLER}}})",
                "{{database}} waiting",
            ),
            unit=Short,
        ),
        graph(
            57, "Transactions",
            "Transactions a second through the pooler.",
            (rate("pgbouncer_stats_totals_sql_transactions_pooled_total", "database", POOLER), "{{database}}"),
            unit=OpsPerSecond,
        ),
        graph(
            58, "Time of a query, mean",
            "As the pooler sees it, without the wait. Slower than the server says: the network between.",
            (
                ratio(
                    rate("pgbouncer_stats_totals_queries_duration_seconds_total", "database", POOLER),
                    rate("pgbouncer_stats_totals_queries_pooled_total", "database", POOLER),
                ),
                "{{database}}",
            ),
            unit=Seconds,
        ),
        graph(
            59, "Traffic",
            "Bytes a second from clients and to them.",
            (rate("pgbouncer_stats_totals_received_bytes_total", "database", POOLER), "{{database}} received"),
            (rate("pgbouncer_stats_totals_sent_bytes_total", "database", POOLER), "{{database}} sent"),
            unit=BytesPerSecondIEC,
        ),
    ]  # fmt: skip


def _backups() -> Row:
    return "Backups, with the profile that makes them", [
        graph(
            61, "Age of the newest base backup",
            "A restore replays the log from there. Bad: more than a day and two hours. Runbook: BackupTooOld.",
            ("time() - max(backup_last_end_timestamp_seconds)", "newest"),
            unit=Seconds, limit=("above", 93600),
        ),
        graph(
            62, "Checks that fail",
            "Barman's, of what it needs to archive and to restore. Bad: any that lasts. Runbook: BackupChecksFailing.",
            ("max(backup_failed_checks)", "failed"),
            unit=Short, limit=("above", 0),
        ),
    ]  # fmt: skip
