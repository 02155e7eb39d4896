"""Every Prometheus object: name, help, labels, buckets. No logic.

Wait, connect, query and hold are four different times. A request first gets a connection (`acquire`, of which `wait` is
the time in the queue, and `connect` that of a login), then runs statements (`query`), and holds the connection
meanwhile (`hold`). The time that it holds the connection without a statement is `idle hold`: slow work that is done at
the wrong place.

`Metrics` is made once per application, with a registry of its own, so that two applications in one process do not
share figures. In multi-process mode (PROMETHEUS_MULTIPROC_DIR) gauges are the sum over the living workers, or the
worst of them.
"""

import math

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from pglifeguard.registry import Registry

ACQUIRE_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
# What a gauge is set to while nobody knows its value. It loses against the value of any other worker, by the way in
# which the gauges of several workers are put together.
UNKNOWN = {"livemin": math.inf, "livemax": -math.inf}
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The figures of one application."""

    def __init__(self) -> None:  # noqa: PLR0915  # A list, with no logic in it.
        # Without this each counter and histogram has a second series with the time at which it was made.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus-client annotates only parts.
        self.registry = registry = Registry()
        self._modes: dict[Gauge, str] = {}

        def gauge(name: str, text: str, *labels: str, mode: str = "livesum") -> Gauge:
            made = Gauge(name, text, labels, registry=registry, multiprocess_mode=mode)  # type: ignore[arg-type]
            self._modes[made] = mode
            return made

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS_BUCKETS) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=buckets)

        # The pools, refreshed at each scrape.
        self.pool_total = gauge(
            "db_pool_connections_total", "Connections that may be at work at once: size plus overflow.", "pool"
        )
        self.pool_available = gauge(
            "db_pool_connections_available", "Connections that a request could still take without waiting.", "pool"
        )
        self.pool_checked_out = gauge("db_pool_connections_checked_out", "Connections at work.", "pool")
        self.pool_open = gauge("db_pool_connections_open", "Connections open, at work or idle.", "pool")
        self.pool_connecting = gauge(
            "db_pool_connections_connecting", "Connections being opened, checked or handed over.", "pool"
        )
        self.pool_waiting = gauge("db_pool_connections_waiting", "Requests in the queue for a connection.", "pool")
        self.up = gauge(
            "db_up",
            "Whether the database answered the last probe: 1 or 0; absent while asleep.",
            "pool",
            mode="livemin",
        )
        self.asleep = gauge(
            "db_asleep",
            "Whether the database may sleep, because nobody asks: 1 or 0. Nothing else is known of it then.",
            "pool",
            mode="livemin",
        )

        # Getting a connection.
        self.acquire_seconds = histogram(
            "db_connection_acquire_seconds",
            "Seconds to get a connection: waiting, connecting and checking together.",
            "pool",
            buckets=ACQUIRE_BUCKETS,
        )
        self.wait = counter("db_connection_wait_total", "Acquisitions that had to wait in the queue.", "pool")
        self.wait_seconds = histogram(
            "db_connection_wait_seconds",
            "Seconds in the queue of those that db_connection_wait_total counts, by how it ended: granted, refused or "
            "cancelled.",
            "pool",
            "outcome",
        )
        self.cancelled = counter(
            "db_connection_cancelled_total",
            "Acquisitions given up while they waited: client_left, or cancelled with their task.",
            "pool",
            "reason",
        )
        self.rejected = counter(
            "db_connection_rejected_total",
            "Acquisitions refused: queue_full, overload (the queue stands), timeout (the deadline passed) or closing.",
            "pool",
            "reason",
        )
        self.wake_seconds = histogram(
            "db_connection_wake_seconds",
            "Seconds to get a connection while a sleeping database woke up; not in db_connection_acquire_seconds.",
            "pool",
        )
        self.connect_seconds = histogram(
            "db_connection_connect_seconds", "Seconds to open a connection, authentication included.", "pool"
        )
        self.connect_failures = counter(
            "db_connection_connect_failures_total", "Connections that could not be opened.", "pool"
        )
        self.invalidations = counter(
            "db_connection_invalidations_total",
            "Connections replaced: age, uses, idle, surplus, closed, unresponsive, error, disposed, superseded "
            "(another server has taken over meanwhile) or session_state.",
            "pool",
            "reason",
        )

        # What all instances together may open, by server.
        self.budget_wanted = gauge(
            "db_connection_budget_wanted",
            "Connections that the settings allow: all instances with the surge of a rollout, migrations and jobs.",
            "server",
            mode="livemax",
        )
        self.budget_instance = gauge(
            "db_connection_budget_instance",
            "Connections that this instance may open; the sum over those that run is for db_connection_budget_granted.",
            "server",
            mode="livemax",
        )
        self.budget_granted = gauge(
            "db_connection_budget_granted",
            "Connections that the server has for this service; absent behind a pooler without CONNECTION_LIMIT.",
            "server",
            mode="livemin",
        )

        # Having one.
        self.hold_seconds = histogram(
            "db_connection_hold_seconds", "Seconds a connection was held, by the route that held it.", "pool", "route"
        )
        self.idle_hold_seconds = histogram(
            "db_connection_idle_hold_seconds", "Seconds a connection was held without a query.", "pool", "route"
        )
        self.long_held = counter(
            "db_connection_long_held_total", "Checkouts held for longer than LEAK_AFTER_SECONDS.", "pool", "route"
        )
        self.query_seconds = histogram("db_query_seconds", "Seconds of one statement, seen from here.", "pool")
        self.slow_queries = counter("db_slow_queries_total", "Statements over SLOW_QUERY_SECONDS.", "pool")

        # The replica.
        self.reads_routed = counter(
            "db_reads_routed_total", "Read sessions by where they went and why.", "target", "reason"
        )
        self.reads_retried = counter(
            "db_reads_retried_total", "GETs retried on the primary, by what the replica failed with.", "reason"
        )
        self.transactions_retried = counter(
            "db_transactions_retried_total", "Transactions run again because they collided with another one.", "reason"
        )
        self.replica_lag_seconds = gauge(
            "db_replica_lag_seconds",
            "Seconds the replica is behind; 0 with nothing left to replay. Absent while it or the primary is asleep.",
            "pool",
            mode="livemax",
        )
        self.replica_lag_bytes = gauge(
            "db_replica_lag_bytes",
            "Bytes of WAL between the primary and what the replica replayed; absent as the seconds are.",
            "pool",
            mode="livemax",
        )
        self.write_stall_seconds = gauge(
            "db_write_stall_seconds",
            "Seconds for which the oldest commit has been waiting, once it is more than one; else 0. "
            "Absent while asleep.",
            "pool",
            mode="livemax",
        )
        self.replica_usable = gauge(
            "db_replica_usable",
            "Whether reads go to this replica: 1 or 0; absent while asleep.",
            "pool",
            mode="livemin",
        )
        self.replicas = gauge(
            "db_replicas",
            "Replicas that DNS finds: listed in its last answer; of these, warming, serving or draining in a process. "
            "Of several workers the most.",
            "stage",
            mode="livemax",
        )
        self.replica_changes = counter(
            "db_replica_changes_total",
            "Replicas found by DNS that a process took in or let go: joined or left.",
            "change",
        )
        self.replica_lookups = counter(
            "db_replica_lookups_total",
            "Lookups of the replicas' name: found or failed. After a failed one the replicas stay as they are.",
            "outcome",
        )
        self.tokens = counter(
            "db_consistency_tokens_total",
            "Consistency tokens received: accepted, malformed or ahead (of all that the primary wrote).",
            "outcome",
        )

        self.consistent_reads = counter(
            "db_consistent_reads_total",
            "Reads with a consistency token, by what the replica has: known (nothing was asked), replayed (it said so "
            "when asked), missed (not in time) or skipped (it missed one shortly before, or is not comparable).",
            "outcome",
        )

        # HTTP.
        self.http_requests = counter(
            "http_requests_total",
            "Requests by route template and status; 499 is a client that left.",
            "method",
            "route",
            "status",
        )
        self.http_seconds = histogram(
            "http_request_seconds",
            "Seconds from the first byte of a request to the last of its answer.",
            "method",
            "route",
        )
        self.connections_refused = counter(
            "http_connections_refused_total",
            "Connections ended without a request: malformed_request, url_too_long, head_too_large, head_too_slow, "
            "idle, too_many; or stalled, by a client that does not read its answer.",
            "reason",
        )
        self.requests_refused = counter(
            "http_requests_refused_total",
            "Requests refused before their route was asked: host_not_allowed or rate_limited.",
            "reason",
        )
        self.http_in_progress = gauge("http_requests_in_progress", "Requests being worked on.")
        self.event_loop_lag_seconds = histogram(
            "event_loop_lag_seconds", "Seconds by which the event loop was late for a timer."
        )

    def forget_pool(self, pool: str) -> None:
        """Leave out what is known of a pool that is gone, and say that it has no connections; its counters stay."""
        for count in (
            self.pool_total, self.pool_available, self.pool_checked_out, self.pool_open, self.pool_connecting,
            self.pool_waiting,
        ):  # fmt: skip
            count.labels(pool).set(0)
        for known in (self.up, self.asleep, self.replica_lag_seconds, self.replica_lag_bytes, self.replica_usable):
            self.forget(known, pool)

    def forget(self, gauge: Gauge, *labels: str) -> None:
        """Leave a series out of the exposition, because nobody knows its value now; setting it brings it back."""
        # Gauge.remove would not do: prometheus-client cannot remove a series from the files of several workers (0.26).
        gauge.labels(*labels).set(UNKNOWN[self._modes[gauge]])
