"""When something is exported, from which process, until when, and the metrics of pools."""

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry import metrics as metrics_api
from opentelemetry import trace as trace_api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pglifeguard import Databases, SettingsError, otel
from pglifeguard.embedded.waiting import eventually
from pglifeguard.environment import exported_signals
from pglifeguard.metrics import SECONDS_BUCKETS
from pglifeguard.otel import OpenTelemetry
from pglifeguard.testing.faults import exhausted
from tests.app.test_cli import MODULE, served
from tests.conftest import Database
from tests.exported import Exported
from tests.service import quiet, serving

ROOT = Path(__file__).parent.parent.parent
UUID = "[0-9a-f-]{36}"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
BOTH = frozenset({"traces", "metrics"})
SIGNALS: list[tuple[dict[str, str], frozenset[str]]] = [
    ({}, frozenset()),
    ({ENDPOINT: " "}, frozenset()),
    ({ENDPOINT: "http://there"}, BOTH),
    ({ENDPOINT: "http://there", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, BOTH),
    ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://there"}, frozenset({"traces"})),
    ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://there"}, frozenset({"metrics"})),
    ({ENDPOINT: "http://there", "OTEL_TRACES_EXPORTER": "none"}, frozenset({"metrics"})),
    ({ENDPOINT: "http://there", "OTEL_SDK_DISABLED": "True"}, frozenset()),
    (
        {
            ENDPOINT: "http://there:4317",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "sqlalchemy, pglifeguard",
        },
        frozenset(),
    ),
]


# Names that every process gives: pytest-xdist runs a suite only where all of its processes have found the same one.
@pytest.mark.parametrize(("variables", "signals"), SIGNALS, ids=lambda value: str(sorted(value)))
def test_endpoint_turns_it_on(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], signals: frozenset[str]
) -> None:
    """What has an endpoint is exported, unless the SDK is disabled."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert exported_signals() == signals


def test_other_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that would not understand what is sent ends the start with a sentence."""
    monkeypatch.setenv(ENDPOINT, "http://there:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "grpc")

    with pytest.raises(SettingsError, match="is grpc: metrics are exported by http/protobuf alone"):
        exported_signals()


def test_nothing_listens_without_an_endpoint(database: Database) -> None:
    """Off means None at each place that would be called."""
    databases = Databases(database.settings())

    assert databases.telemetry is None
    assert {each.watch.telemetry for each in databases.all()} == {None}


def test_missing_extra_ends_the_start(database: Database, monkeypatch: pytest.MonkeyPatch, exported: Exported) -> None:
    """With an endpoint and without the SDK there is an error that says what to install."""
    assert exported.url
    monkeypatch.delitem(sys.modules, "pglifeguard.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delattr("pglifeguard.otel", raising=False)

    with pytest.raises(SettingsError, match=r"pip install 'pglifeguard\[otel\]'"):
        Databases(database.settings())


def test_service_stops_with_that_sentence(database: Database, tmp_path: Path) -> None:
    """The process ends with the sentence and without a traceback."""
    block = "import sys; sys.modules['opentelemetry.sdk'] = None; from app.main import create_app; create_app()"

    ended = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        env={**os.environ, **database.environment(), ENDPOINT: "http://127.0.0.1:1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )

    assert ended.returncode == 1
    assert ended.stderr.startswith("lifeguard cannot start.\nOTEL_EXPORTER_OTLP_ENDPOINT or one like it is set, and ")
    assert "Traceback" not in ended.stderr


async def test_metrics_of_pools(database: Database, exported: Exported) -> None:
    """The state of each pool is exported, and the times of getting, opening and using connections."""
    sizes = {"pool_size": 3, "max_overflow": 2, "pool_min_size": 1}
    async with serving(database.settings(replica=False, **sizes)) as service:
        await service.client.get("/patients")
        async with service.databases.reading() as session:
            await session.connection()
            service.databases.publish()

            async def used() -> bool:
                points = exported.points("db.client.connection.count")
                return bool(points) and points["primary", "used"].as_int == 1

            assert await eventually(used, 10)
        state = {
            name: exported.points(f"db.client.connection.{name}")["primary",].as_int
            for name in ("max", "idle.max", "idle.min", "pending_requests")
        }
        assert state == {"max": 5, "idle.max": 3, "idle.min": 1, "pending_requests": 0}
        assert exported.points("db.client.connection.count")["primary", "idle"].as_int == 0
        times = {
            name: exported.points(f"db.client.connection.{name}")["primary",]
            for name in ("wait_time", "create_time", "use_time")
        }
        assert min(point.count for point in times.values()) >= 1
        assert {tuple(point.explicit_bounds) for point in times.values()} == {SECONDS_BUCKETS}


async def test_waiting_requests_are_pending(database: Database, exported: Exported) -> None:
    """A request in the queue is a pending one."""
    async with quiet(database.settings(replica=False, pool_size=1, max_overflow=0, pool_timeout=20)) as service:
        pool = service.databases.primary.pool

        async def queued() -> bool:
            return pool.figures().waiting == 1

        async def pending() -> bool:
            service.databases.publish()
            points = exported.points("db.client.connection.pending_requests")
            return bool(points) and points["primary",].as_int == 1

        async with exhausted(service.databases.primary):
            request = asyncio.create_task(service.client.get("/patients"))
            assert await eventually(queued, 10)
            assert await eventually(pending, 10)
        await request


@pytest.mark.parametrize("signal", ["TRACES", "METRICS"])
async def test_one_signal_alone(
    database: Database, exported: Exported, monkeypatch: pytest.MonkeyPatch, signal: str
) -> None:
    """With an endpoint for one of both, nothing of the other is made, and requests are served."""
    monkeypatch.delenv(ENDPOINT)
    monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", f"{exported.url}/v1/{signal.lower()}")

    async with quiet(database.settings(replica=False, pool_min_size=0, pool_size=1, max_overflow=0)) as service:
        telemetry = service.databases.telemetry
        assert isinstance(telemetry, OpenTelemetry)
        assert (telemetry.tracer is None) == (signal == "METRICS")
        assert (telemetry._instruments.wait_time is None) == (signal == "TRACES")
        assert (await service.client.get("/patients")).status_code == 200
        async with exhausted(service.databases.primary):
            assert (await service.client.get("/patients")).status_code == 503


async def test_databases_export_without_an_application(database: Database, exported: Exported) -> None:
    """A worker's statements are traces of their own, and so they are after it has closed and opened its databases."""
    databases = Databases(database.settings(replica=False))
    names = []
    for _ in range(2):
        before = len(exported.spans())
        async with databases, databases.writing() as session:
            await session.connection()
        names.append([span.name for span in exported.spans()[before:]])

    # What was left is exported before `close` returns.
    assert names == [["acquire primary", "BEGIN", "COMMIT"]] * 2


@pytest.fixture
def mute() -> Iterator[str]:
    """Give the URL of a receiver that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("how", ["mute", "refused"])
async def test_receiver_that_is_away_costs_spans_and_no_request(
    database: Database, exported: Exported, monkeypatch: pytest.MonkeyPatch, mute: str, how: str
) -> None:
    """Requests are answered, and the end does not wait for what cannot be exported."""
    assert exported.url
    monkeypatch.setenv(ENDPOINT, mute if how == "mute" else "http://127.0.0.1:1")
    monkeypatch.setattr(otel, "STOP_SECONDS", 0.2)
    async with quiet(database.settings()) as service:
        answers = [await service.client.get("/patients") for _ in range(3)]

        telemetry = service.databases.telemetry

    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert isinstance(telemetry, OpenTelemetry)
    assert telemetry.tracer is None


async def test_end_says_what_is_left(
    database: Database,
    exported: Exported,
    monkeypatch: pytest.MonkeyPatch,
    mute: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A flush that takes too long is given up, and a line of the log says so."""
    assert exported.url
    monkeypatch.setenv(ENDPOINT, mute)
    monkeypatch.setattr(otel, "STOP_SECONDS", 0.05)

    async with Databases(database.settings(replica=False)) as databases, databases.reading() as session:
        await session.connection()

    assert "traces and metrics are left unexported" in caplog.messages


async def test_providers_of_the_application_are_used(
    database: Database, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the application has made OpenTelemetry's global providers, spans and figures go there, and they stay."""
    assert exported.url
    reader, spans = InMemoryMetricReader(), InMemorySpanExporter()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    ended = list[str]()
    monkeypatch.setattr(tracers, "shutdown", lambda: ended.append("tracers"))
    monkeypatch.setattr(trace_api, "get_tracer_provider", lambda: tracers)
    monkeypatch.setattr(metrics_api, "get_meter_provider", lambda: meters)

    async with Databases(database.settings(replica=False)) as databases:
        async with databases.reading() as session:
            await session.connection()
        databases.publish()
        told = reader.get_metrics_data()

    assert told is not None
    names = {metric.name for one in told.resource_metrics for scope in one.scope_metrics for metric in scope.metrics}
    assert "db.client.connection.count" in names
    assert "acquire primary" in {span.name for span in spans.get_finished_spans()}
    assert ended == []
    meters.shutdown()


@pytest.mark.parametrize(
    ("variables", "workers", "name", "instance"),
    [
        ({}, 1, "pglifeguard", UUID),
        ({"OTEL_SERVICE_NAME": "clinic"}, 2, "clinic", f"{UUID}-{{process}}"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=clinic,service.instance.id=one"}, 1, "clinic", "one"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=one"}, 2, "pglifeguard", "one-{process}"),
    ],
)
def test_process_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], workers: int, name: str, instance: str
) -> None:
    """Service and instance are those of the variables; each process has an id of its own in either case."""
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)

    told = otel._resource(workers).attributes

    assert told["service.name"] == name
    assert re.fullmatch(instance.replace("{process}", str(os.getpid())), str(told["service.instance.id"]))


async def test_what_is_left_at_sigterm_is_exported(database: Database, tmp_path: Path, exported: Exported) -> None:
    """A span that would wait for a minute is exported when the process is told to end."""
    patient = {"OTEL_BSP_SCHEDULE_DELAY": "60000", "OTEL_SERVICE_NAME": "ended"}
    environment = {"DATABASE_URL": database.url(), "TMPDIR": str(tmp_path), **exported.environment, **patient}

    def told() -> list[str]:
        return [span.name for span in exported.spans() if span.resource["service.name"] == "ended"]

    async with served(tmp_path, environment, *MODULE) as server:
        await server.client.get("/patients")
        before = told()
        await server.stop()

    assert before == []
    assert {"GET /patients", "SELECT patients"} <= set(told())


async def test_each_worker_is_an_instance(database: Database, tmp_path: Path, exported: Exported) -> None:
    """Two workers export under two ids; their metrics are plain text to everybody."""
    environment = {"DATABASE_URL": database.url(), "TMPDIR": str(tmp_path), **exported.environment}

    async with served(tmp_path, environment, *MODULE, "--workers", "2") as server:

        async def both() -> bool:
            # Each request is on a connection of its own, which the kernel gives to either worker.
            async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
                await client.get("/health/live")
            found = [span for span in exported.spans() if span.name == "GET /health/live"]
            return len({span.resource["service.instance.id"] for span in found}) == 2

        assert await eventually(both, 30)
        scraped = await server.client.get("/metrics", headers={"accept": "application/openmetrics-text"})

    # The files that workers share have no room for exemplars, so there is nothing that the other format would add.
    assert scraped.headers["content-type"].startswith("text/plain")
