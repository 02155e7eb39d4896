"""Traces and metrics by OpenTelemetry, exported by OTLP over HTTP: loaded where the environment names an endpoint.

The SDK reads its own variables (OTEL_…). Spans wait in a queue of bounded length, and threads of the SDK send them: an
endpoint that is slow or away costs spans, and no request waits for it. docs/opentelemetry.md shows what is emitted.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from opentelemetry import metrics as metrics_api
from opentelemetry import trace as trace_api
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.semconv.attributes.service_attributes import SERVICE_INSTANCE_ID, SERVICE_NAME

from pglifeguard.otel.figures import PoolInstruments
from pglifeguard.otel.spans import PoolSpans, Spans
from pglifeguard.telemetry import PoolState

logger = logging.getLogger(__name__)

SCOPE = "pglifeguard"
# What is not exported so long after the databases were closed is given up.
STOP_SECONDS = 2.0


class OpenTelemetry(Spans):
    """Listens to the databases of one service, and exports what it hears between `start` and `stop`.

    A tracer provider or meter provider that the application has made OpenTelemetry's global one is used as it is, and
    stays its own. Otherwise this has its own, which is nobody else's: two services of one process do not share it.
    """

    def __init__(self, signals: Collection[str], *, workers: int) -> None:
        super().__init__()
        self._signals = signals
        self._workers = workers
        self._instruments = PoolInstruments()
        self._stops: list[Callable[[], object]] = []
        self._cuts: list[Callable[[], object]] = []

    def of_pool(self, name: str, database: str) -> PoolSpans:
        """Return what listens to one pool, which leads to the database of this name."""
        return PoolSpans(self, self._instruments, name, database)

    def publish(self, pools: Mapping[str, PoolState]) -> None:
        """Take the state of all pools, by name."""
        self._instruments.pools = dict(pools)

    def start(self) -> None:
        """Begin to export."""
        resource = _resource(self._workers)
        if "traces" in self._signals:
            self.tracer = self._tracer_provider(resource).get_tracer(SCOPE)
        if "metrics" in self._signals:
            self._instruments.make(self._meter_provider(resource).get_meter(SCOPE))

    async def stop(self) -> None:
        """Export what is left, for `STOP_SECONDS` at most."""
        self.tracer = None
        self._instruments.drop()
        stops, cuts, self._stops, self._cuts = self._stops, self._cuts, [], []
        if not stops:
            return
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def stop_all() -> None:
            for stop in stops:
                stop()
            with suppress(RuntimeError):  # The event loop has not waited for it, and has ended.
                loop.call_soon_threadsafe(done.set)

        # Not a thread of the event loop's pool: the interpreter would wait for it at its end.
        threading.Thread(target=stop_all, name="otel-stop", daemon=True).start()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await done.wait()
        except TimeoutError:
            logger.warning("traces and metrics are left unexported", extra={"seconds": STOP_SECONDS})
            for cut in cuts:
                cut()

    def _tracer_provider(self, resource: Resource) -> trace_api.TracerProvider:
        given = trace_api.get_tracer_provider()
        if isinstance(given, TracerProvider):
            return given
        exporter = OTLPSpanExporter()
        # At the end of the process it would wait for half a minute.
        made = TracerProvider(resource=resource, shutdown_on_exit=False)
        made.add_span_processor(BatchSpanProcessor(exporter))
        self._stops.append(made.shutdown)
        self._cuts.append(exporter.shutdown)
        return made

    def _meter_provider(self, resource: Resource) -> metrics_api.MeterProvider:
        given = metrics_api.get_meter_provider()
        if isinstance(given, MeterProvider):
            return given
        exporter = OTLPMetricExporter()
        reader = PeriodicExportingMetricReader(exporter)
        made = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self._stops.append(made.shutdown)
        self._cuts.append(exporter.shutdown)
        return made


def _resource(workers: int) -> Resource:
    """Describe this process: as OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say, and each worker by its own id."""
    told = Resource.create()
    own: dict[str, str] = {}
    if str(told.attributes[SERVICE_NAME]).startswith("unknown_service"):
        own[SERVICE_NAME] = SCOPE
    if workers > 1:
        # All workers read the same variable, and their figures would be taken for one process's.
        own[SERVICE_INSTANCE_ID] = "-".join((str(told.attributes[SERVICE_INSTANCE_ID]), str(os.getpid())))
    return told.merge(Resource(own))
