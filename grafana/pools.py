"""What the library measures of its pools, over time and instances: filling, waiting, refusing, holding, routing."""

from grafana_foundation_sdk.models.dashboard import Dashboard
from grafana_foundation_sdk.models.units import (
    BytesIEC,
    OpsPerSecond,
    PercentUnit,
    ReadsPerSecond,
    Seconds,
    Short,
)

from grafana.parts import Query, Row, assemble, graph, ratio, states, values_of

RATE = "[$__rate_interval]"
JOB = 'job=~"$job"'
HERE = f'{JOB}, instance=~"$instance"'
OF = f'{HERE}, pool=~"$pool"'


def rate(metric: str, labels: str, more: str = "") -> str:
    """Return what is counted in a second."""
    return f"sum by ({labels}) (rate({metric}{{{OF}{more}}}{RATE}))"


def quantile(share: float, metric: str, labels: str = "pool", more: str = "") -> str:
    """Return the time that this share stays below."""
    return f"histogram_quantile({share}, {rate(metric + '_bucket', labels + ', le', more)})"


def p50_p95_p99(metric: str) -> list[Query]:
    """Return three lines for each pool."""
    return [(quantile(share, metric), f"{{{{pool}}}} p{share * 100:g}") for share in (0.5, 0.95, 0.99)]


# Those that mean that a replica does not serve as it should; the alert's, word for word.
FALLBACK = 'target="primary", reason=~"unknown|lagging|broken|promoted|foreign|diverged|unmeasured"'
FALLEN_BACK = f"sum(rate(db_reads_routed_total{{{HERE}, {FALLBACK}}}{RATE}))"
READS = f"sum(rate(db_reads_routed_total{{{HERE}}}{RATE}))"


def dashboard() -> Dashboard:
    """Make it."""
    return assemble(
        "lifeguard-pools",
        "Lifeguard: pools",
        "The connection pools of every instance, what they are used for, and where reads go.",
        [
            values_of("job", "job", "db_pool_connections_total", every=""),
            values_of("instance", "instance", f"db_pool_connections_total{{{JOB}}}"),
            values_of("pool", "pool", f"db_pool_connections_total{{{HERE}}}"),
        ],
        [
            _how_full(),
            _getting_a_connection(),
            _opening_and_replacing(),
            _holding_a_connection(),
            _statements(),
            _databases(),
            _where_reads_go(),
            _budget(),
        ],
    )


def _how_full() -> Row:
    return "How full", [
        graph(
            11, "Connections left",
            "The part of its connections that a pool could still hand out without a wait. Bad: below a fifth "
            "for minutes; the next burst queues. Runbook: DatabasePoolNearlyExhausted, "
            "DatabasePoolMostlyExhausted.",
            (
                ratio(f"db_pool_connections_available{{{OF}}}", f"db_pool_connections_total{{{OF}}}"),
                "{{pool}} {{instance}}",
            ),
            unit=PercentUnit, limit=("below", 0.2),
        ),
        graph(
            12, "Connections by state",
            "Of all instances. At the total everybody else waits. Connecting for long: logins are slow.",
            (f"sum by (pool) (db_pool_connections_checked_out{{{OF}}})", "{{pool}} at work"),
            (f"sum by (pool) (db_pool_connections_connecting{{{OF}}})", "{{pool}} connecting"),
            (f"sum by (pool) (db_pool_connections_open{{{OF}}})", "{{pool}} open"),
            (f"sum by (pool) (db_pool_connections_total{{{OF}}})", "{{pool}} in total"),
            unit=Short,
        ),
        graph(
            13, "Requests that wait",
            "The queue for a connection. A peak is a burst, which the queue is for. Bad: it does not empty. "
            "Runbook: DatabasePoolContention.",
            (f"sum by (pool, instance) (db_pool_connections_waiting{{{OF}}})", "{{pool}} {{instance}}"),
            unit=Short,
        ),
    ]  # fmt: skip


def _getting_a_connection() -> Row:
    return "Getting a connection", [
        graph(
            21, "Time to get a connection, p95",
            "Waiting, connecting and checking together, of those who got one. Bad: a tenth of a second, which "
            "each of these requests pays first. Runbook: SlowConnectionAcquisition.",
            (quantile(0.95, "db_connection_acquire_seconds", "pool, instance"), "{{pool}} {{instance}}"),
            unit=Seconds, limit=("above", 0.1),
        ),
        graph(
            22, "Requests that had to wait",
            "Requests a second that found no free connection. Bad: one in two seconds, for minutes. "
            "Runbook: DatabasePoolContention.",
            (rate("db_connection_wait_total", "pool, instance"), "{{pool}} {{instance}}"),
            unit=OpsPerSecond, limit=("above", 0.5),
        ),
        graph(
            23, "Time in the queue, p95",
            "By how the wait ended: granted, refused, or cancelled by the client.",
            (quantile(0.95, "db_connection_wait_seconds", "pool, outcome"), "{{pool}} {{outcome}}"),
            unit=Seconds,
        ),
        graph(
            24, "Requests refused",
            "Answered 503 because the queue was full (queue_full), stands (overload), or nothing came in time "
            "(timeout). An instance that ends (closing) is no load. Runbook: DatabaseSheddingLoad.",
            (rate("db_connection_rejected_total", "pool, reason"), "{{pool}} {{reason}}"),
            unit=OpsPerSecond, limit=("above", 0.1),
        ),
        graph(
            25, "Waits given up",
            "Clients that left while they waited, and tasks that were cancelled. Bad: clients whose patience is "
            "shorter than the queue.",
            (rate("db_connection_cancelled_total", "pool, reason"), "{{pool}} {{reason}}"),
            unit=OpsPerSecond,
        ),
    ]  # fmt: skip


def _opening_and_replacing() -> Row:
    return "Opening and replacing", [
        graph(
            31, "Time of a login, p95",
            "Authentication included. Bad: as long as a request may wait.",
            (quantile(0.95, "db_connection_connect_seconds"), "{{pool}}"),
            unit=Seconds,
        ),
        graph(
            32, "Logins",
            "Connections opened, and those that could not be. Bad: failures, or many logins under steady "
            "load: overflow comes and goes. Runbook: DatabaseDown.",
            (rate("db_connection_connect_seconds_count", "pool"), "{{pool}} opened"),
            (rate("db_connection_connect_failures_total", "pool"), "{{pool}} failed"),
            unit=OpsPerSecond,
        ),
        graph(
            33, "Connections replaced",
            "By reason; docs/metrics.md says what each means. Bad: error, closed, unresponsive.",
            (rate("db_connection_invalidations_total", "pool, reason"), "{{pool}} {{reason}}"),
            unit=OpsPerSecond,
        ),
        graph(
            34, "Time to wake a database, p95",
            "Of databases that sleep when nobody asks (DATABASE_PROFILE=sleeping). Bad: near WAKE_SECONDS, "
            "after which the request is refused.",
            (quantile(0.95, "db_connection_wake_seconds"), "{{pool}}"),
            unit=Seconds,
        ),
        states(
            35, "Databases asleep",
            "Nothing else is known of a database that sleeps.",
            (f"max by (pool) (db_asleep{{{OF}}})", "{{pool}}"),
            names=("awake", "asleep"), colors=("green", "blue"),
        ),
        graph(
            36, "Connections opened anew, in a second",
            "The part of a pool's connections, failed logins included. Bad: a twentieth; each of them lasts twenty "
            "seconds, and the server is busy with logins. Runbook: LoginStorm.",
            ('max by (pool) (pool:db_connection_logins:rate2m{pool=~"$pool"})', "{{pool}}"),
            unit=Short, limit=("above", 0.05),
        ),
    ]  # fmt: skip


def _holding_a_connection() -> Row:
    return "Holding a connection", [
        graph(
            41, "Held, by route",
            "Connections at work on average: seconds held, each second. The routes at the top are those that "
            "fill the pool. Runbook: DatabasePoolNearlyExhausted.",
            (rate("db_connection_hold_seconds_sum", "pool, route"), "{{pool}} {{route}}"),
            unit=Short, stacked=True,
        ),
        graph(
            42, "Held idle, by route",
            "The part of that in which no statement ran: slow work at the wrong place. Bad: half a connection "
            "around the clock. Runbook: ConnectionsHeldIdle.",
            (rate("db_connection_idle_hold_seconds_sum", "pool, route"), "{{pool}} {{route}}"),
            unit=Short, limit=("above", 0.5),
        ),
        graph(
            43, "Time held, p95, by route",
            "From checkout to return.",
            (quantile(0.95, "db_connection_hold_seconds", "pool, route"), "{{pool}} {{route}}"),
            unit=Seconds,
        ),
        graph(
            44, "Held for too long",
            "Checkouts past LEAK_AFTER_SECONDS in the last ten minutes: the log names the line that took the "
            "connection. Runbook: ConnectionHeldTooLong.",
            (
                f"sum by (pool, route) (increase(db_connection_long_held_total{{{OF}}}[10m]))",
                "{{pool}} {{route}}",
            ),
            unit=Short, limit=("above", 0),
        ),
    ]  # fmt: skip


def _statements() -> Row:
    return "Statements", [
        graph(
            51, "Time of a statement",
            "Seen from the service, the network included.",
            *p50_p95_p99("db_query_seconds"),
            unit=Seconds,
        ),
        graph(
            52, "Slow statements",
            "The part of the statements past SLOW_QUERY_SECONDS. Bad: one in twenty. Runbook: SlowQueries.",
            (
                ratio(rate("db_slow_queries_total", "pool"), rate("db_query_seconds_count", "pool")),
                "{{pool}}",
            ),
            unit=PercentUnit, limit=("above", 0.05),
        ),
        graph(
            53, "Statements",
            "Statements a second. Fewer at the same number of requests that wait: the server is slower.",
            (rate("db_query_seconds_count", "pool"), "{{pool}}"),
            unit=OpsPerSecond,
        ),
    ]  # fmt: skip


def _databases() -> Row:
    return "Databases", [
        states(
            61, "Databases answer",
            "Whether the last probe of an instance was answered. Bad: all instances alike is the database, one "
            "is its network. Runbook: DatabaseDown.",
            (f"min by (pool, instance) (db_up{{{OF}}})", "{{pool}} {{instance}}"),
            names=("down", "up"),
        ),
        states(
            62, "Replicas serve reads",
            "Whether an instance sends reads there. Bad: none does; the primary carries them. "
            "Runbook: ReplicaUnusable.",
            (f"min by (pool, instance) (db_replica_usable{{{OF}}})", "{{pool}} {{instance}}"),
            names=("not used", "used"),
        ),
        graph(
            63, "Replica behind, in seconds",
            "Bad: ten, and 8 MiB beside it: then it serves no reads. Runbook: ReplicaLagging.",
            (f"max by (pool) (db_replica_lag_seconds{{{OF}}})", "{{pool}}"),
            unit=Seconds, limit=("above", 10),
        ),
        graph(
            64, "Replica behind, in bytes",
            "WAL that the primary has written and the replica has not replayed. Runbook: ReplicaLagging.",
            (f"max by (pool) (db_replica_lag_bytes{{{OF}}})", "{{pool}}"),
            unit=BytesIEC, limit=("above", 8388608),
        ),
        graph(
            65, "Oldest commit that waits",
            "For a synchronous standby, or for the disk of the log. Bad: five seconds; every write hangs. "
            "Runbook: DatabaseWritesStalled.",
            (f"max by (pool) (db_write_stall_seconds{{{OF}}})", "{{pool}}"),
            unit=Seconds, limit=("above", 5),
        ),
        graph(
            66, "Replicas that DNS finds",
            "Of all instances the most: in the last answer, and by what a process does with them. Nothing without "
            "DATABASE_REPLICA_DISCOVERY. Bad: many listed, and none serving.",
            (f"max by (stage) (db_replicas{{{HERE}}})", "{{stage}}"),
            unit=Short,
        ),
        graph(
            67, "Lookups and changes of the replicas",
            "Bad: lookups that fail; the replicas stay as they are meanwhile. Changes without end: the name answers "
            "with a part of its addresses at a time.",
            (f"sum by (outcome) (rate(db_replica_lookups_total{{{HERE}}}{RATE}))", "lookup {{outcome}}"),
            (f"sum by (change) (rate(db_replica_changes_total{{{HERE}}}{RATE}))", "replica {{change}}"),
            unit=OpsPerSecond,
        ),
    ]  # fmt: skip


def _where_reads_go() -> Row:
    return "Where reads go", [
        graph(
            71, "Reads by target and reason",
            "Reads a second. On the primary, behind_token and primary_only are the design at work; the other "
            "reasons are a replica that does not serve. Runbook: ReadsFallingBack.",
            (
                f"sum by (target, reason) (rate(db_reads_routed_total{{{HERE}}}{RATE}))",
                "{{target}}: {{reason}}",
            ),
            unit=ReadsPerSecond, stacked=True,
        ),
        graph(
            72, "Reads that fall back",
            "The part of all reads that the primary serves because no replica can. Bad: one in twenty. "
            "Runbook: ReadsFallingBack.",
            (
                ratio(f"({FALLEN_BACK} or 0 * {READS})", READS),
                "on the primary",
            ),
            unit=PercentUnit, limit=("above", 0.05),
        ),
        graph(
            73, "Reads retried on the primary",
            "By what the replica failed with. not_found is a row that it had not replayed, or that does not "
            "exist. Bad: anything else.",
            (f"sum by (reason) (rate(db_reads_retried_total{{{HERE}}}{RATE}))", "{{reason}}"),
            unit=OpsPerSecond,
        ),
        graph(
            74, "Transactions run again",
            "They collided with another one. Bad: many compared with the writes.",
            (f"sum by (reason) (rate(db_transactions_retried_total{{{HERE}}}{RATE}))", "{{reason}}"),
            unit=OpsPerSecond,
        ),
        graph(
            75, "Consistency tokens",
            "Bad: malformed or ahead; no server of this cluster made these.",
            (f"sum by (outcome) (rate(db_consistency_tokens_total{{{HERE}}}{RATE}))", "{{outcome}}"),
            unit=OpsPerSecond,
        ),
        graph(
            76, "Reads with a token",
            "By what the replica has: known, replayed when asked, missed in time, skipped. Bad: many missed; "
            "the primary serves them.",
            (f"sum by (outcome) (rate(db_consistent_reads_total{{{HERE}}}{RATE}))", "{{outcome}}"),
            unit=ReadsPerSecond,
        ),
    ]  # fmt: skip


def _budget() -> Row:
    return "Budget", [
        graph(
            81, "Connections by server: wanted, possible, granted",
            "What the settings allow, what the instances that run may open together, and what the server has for "
            "the service. Bad: the last is the smallest. Runbook: ConnectionBudgetExceeded.",
            (f"max by (server) (db_connection_budget_wanted{{{HERE}}})", "{{server}}: settings allow"),
            (f"sum by (server) (db_connection_budget_instance{{{HERE}}})", "{{server}}: instances may open"),
            (f"min by (server) (db_connection_budget_granted{{{HERE}}})", "{{server}}: granted"),
            unit=Short,
        ),
    ]  # fmt: skip
