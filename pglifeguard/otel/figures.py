"""The metrics `db.client.connection.*` of the semantic conventions, from the figures that the pools keep anyway."""

from collections.abc import Callable, Iterable, Mapping

from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, Observation
from opentelemetry.semconv._incubating.attributes import db_attributes
from opentelemetry.semconv._incubating.metrics import db_metrics

from pglifeguard.metrics import SECONDS_BUCKETS
from pglifeguard.telemetry import PoolState

POOL = db_attributes.DB_CLIENT_CONNECTION_POOL_NAME
STATE = db_attributes.DB_CLIENT_CONNECTION_STATE
USED = db_attributes.DbClientConnectionStateValues.USED.value
IDLE = db_attributes.DbClientConnectionStateValues.IDLE.value
CONNECTIONS, REQUESTS = "{connection}", "{request}"


class PoolInstruments:
    """The instruments of all pools; without metrics there are none, and nothing is recorded.

    `pools` is replaced once a second, on the event loop. A thread of the SDK reads it.
    """

    def __init__(self) -> None:
        self.pools: Mapping[str, PoolState] = {}
        self.wait_time: Histogram | None = None
        self.create_time: Histogram | None = None
        self.use_time: Histogram | None = None
        self.timeouts: Counter | None = None

    def make(self, meter: Meter) -> None:
        """Make the instruments."""

        def observed(name: str, unit: str, text: str, read: Callable[[PoolState], Mapping[str | None, int]]) -> None:
            def observe(_options: CallbackOptions) -> Iterable[Observation]:
                for pool, state in self.pools.items():
                    for which, value in read(state).items():
                        told = {} if which is None else {STATE: which}
                        yield Observation(value, {POOL: pool, **told})

            meter.create_observable_up_down_counter(name, [observe], unit, text)

        def histogram(name: str, text: str) -> Histogram:
            return meter.create_histogram(name, "s", text, explicit_bucket_boundaries_advisory=SECONDS_BUCKETS)

        observed(
            db_metrics.DB_CLIENT_CONNECTION_COUNT,
            CONNECTIONS,
            "Connections at work, and idle.",
            lambda state: {USED: state.used, IDLE: state.idle},
        )
        observed(
            db_metrics.DB_CLIENT_CONNECTION_MAX,
            CONNECTIONS,
            "Connections that may be open at once: size plus overflow.",
            lambda state: {None: state.capacity},
        )
        observed(
            db_metrics.DB_CLIENT_CONNECTION_IDLE_MAX,
            CONNECTIONS,
            "Connections that may stay idle: the size without overflow.",
            lambda state: {None: state.idle_max},
        )
        observed(
            db_metrics.DB_CLIENT_CONNECTION_IDLE_MIN,
            CONNECTIONS,
            "Connections that are kept open without a request.",
            lambda state: {None: state.idle_min},
        )
        observed(
            db_metrics.DB_CLIENT_CONNECTION_PENDING_REQUESTS,
            REQUESTS,
            "Requests that wait for a connection.",
            lambda state: {None: state.pending},
        )
        self.wait_time = histogram(
            db_metrics.DB_CLIENT_CONNECTION_WAIT_TIME,
            "Seconds to get a connection: waiting, connecting and checking together.",
        )
        self.create_time = histogram(
            db_metrics.DB_CLIENT_CONNECTION_CREATE_TIME, "Seconds to open a connection, authentication included."
        )
        self.use_time = histogram(db_metrics.DB_CLIENT_CONNECTION_USE_TIME, "Seconds a connection was held.")
        self.timeouts = meter.create_counter(
            db_metrics.DB_CLIENT_CONNECTION_TIMEOUTS, "{timeout}", "Requests refused because no connection became free."
        )

    def drop(self) -> None:
        """Record nothing from now on."""
        self.wait_time = self.create_time = self.use_time = self.timeouts = None
