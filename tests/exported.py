"""What an OTLP receiver has got, as a test reads it: spans by name and trace, and the last point of each metric."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message
from opentelemetry.proto.trace.v1.trace_pb2 import Status

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Span:
    """A span that was exported; times are in nanoseconds."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    failed: bool
    attributes: dict[str, Any]
    events: dict[str, dict[str, Any]]
    resource: dict[str, Any]


@dataclass(frozen=True)
class Trace:
    """The spans of one trace, in the order in which they began."""

    spans: list[Span]

    def named(self, name: str) -> list[Span]:
        """Return the spans of this name."""
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> Span:
        """Return the only span of this name."""
        [span] = self.named(name)
        return span

    def beneath(self, span: Span) -> list[str]:
        """Return the names of a span's children."""
        return [child.name for child in self.spans if child.parent == span.id]

    @property
    def root(self) -> Span:
        """The span whose parent is not here."""
        ids = {span.id for span in self.spans}
        [root] = [span for span in self.spans if span.parent not in ids]
        return root


@dataclass(frozen=True)
class Exported:
    """A receiver, and what it has got."""

    url: str
    environment: dict[str, str] = field(default_factory=dict)

    def spans(self) -> list[Span]:
        """Return all spans, in the order in which they began."""
        message = ExportTraceServiceRequest.FromString(self._get("/v1/traces"))
        found = [
            _span(span, _values(told.resource.attributes))
            for told in message.resource_spans
            for scope in told.scope_spans
            for span in scope.spans
        ]
        return sorted(found, key=lambda span: (span.began, -span.ended))

    def trace(self, trace: str) -> Trace:
        """Return the spans of a trace."""
        return Trace([span for span in self.spans() if span.trace == trace])

    def points(self, name: str) -> dict[tuple[str, ...], Any]:
        """Return the last point of each series of a metric, by the values of its attributes."""
        message = ExportMetricsServiceRequest.FromString(self._get("/v1/metrics"))
        return {
            tuple(_values(point.attributes).values()): point
            for told in message.resource_metrics
            for scope in told.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in getattr(metric, str(metric.WhichOneof("data"))).data_points
        }

    def _get(self, path: str) -> bytes:
        return httpx.get(f"{self.url}{path}", trust_env=False).raise_for_status().content


@contextmanager
def receiving() -> Iterator[Exported]:
    """Run a receiver in a process of its own."""
    command = [sys.executable, "-m", "tests.otlp_receiver"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        try:
            yield Exported(
                url,
                {
                    "OTEL_EXPORTER_OTLP_ENDPOINT": url,
                    # The defaults are 5 and 60 seconds.
                    "OTEL_BSP_SCHEDULE_DELAY": "50",
                    "OTEL_METRIC_EXPORT_INTERVAL": "100",
                    "NO_PROXY": "127.0.0.1",
                },
            )
        finally:
            process.kill()


def _span(span: Message, resource: dict[str, Any]) -> Span:
    return Span(
        span.name,
        Message.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == Status.STATUS_CODE_ERROR,
        _values(span.attributes),
        {event.name: _values(event.attributes) for event in span.events},
        resource,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in attributes}
