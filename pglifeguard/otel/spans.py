"""The spans: a request, its acquisitions of connections with what they waited for, its statements and transactions.

A span of something that has ended is made then, with the times that were measured anyway. So what is in no trace, or in
one that is not sampled, costs a look at the context.
"""

import time
from collections.abc import Awaitable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

from opentelemetry import context as context_api
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.semconv.attributes.db_attributes import (
    DB_COLLECTION_NAME,
    DB_NAMESPACE,
    DB_OPERATION_NAME,
    DB_QUERY_SUMMARY,
    DB_QUERY_TEXT,
    DB_RESPONSE_STATUS_CODE,
    DB_SYSTEM_NAME,
    DbSystemNameValues,
)
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import (
    HTTP_REQUEST_METHOD,
    HTTP_RESPONSE_STATUS_CODE,
    HTTP_ROUTE,
)
from opentelemetry.semconv.attributes.network_attributes import NETWORK_PROTOCOL_VERSION
from opentelemetry.semconv.attributes.server_attributes import SERVER_ADDRESS, SERVER_PORT
from opentelemetry.semconv.attributes.url_attributes import URL_PATH, URL_SCHEME
from opentelemetry.trace import Span, SpanContext, SpanKind, StatusCode, Tracer

from pglifeguard.otel.figures import POOL, PoolInstruments
from pglifeguard.statement_summary import summarize
from pglifeguard.telemetry import Exemplar, Phase, failure_name

SQLSTATE_CHARACTERS = 5
SERVER_ERROR = 500
METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
# Beside the semantic conventions.
REASON = "lifeguard.reason"
CLIENT_LEFT = "lifeguard.client_left"
# The key by which a request's scope says that it has a span.
TRACED = "lifeguard.traced"

# Whether this context was made inside a request's span.
_in_request: ContextVar[bool] = ContextVar("in_request", default=False)


class Spans:
    """Makes spans by `tracer`; without one it makes none."""

    def __init__(self) -> None:
        self.tracer: Tracer | None = None
        # traceparent and tracestate, and what else OTEL_PROPAGATORS names.
        self._fields = frozenset(name.lower().encode() for name in propagate.get_global_textmap().fields)

    @property
    def sampled_tracer(self) -> Tracer | None:
        """The tracer; None where the current trace is not sampled."""
        return self.tracer_in(trace.get_current_span().get_span_context())

    def tracer_in(self, current: SpanContext) -> Tracer | None:
        """Return the tracer; None where this trace is not sampled."""
        return self.tracer if current.trace_flags.sampled or not current.is_valid else None

    def serving(self, scope: MutableMapping[str, Any]) -> "Serving | None":
        """Return the span of a request, by its ASGI scope; None where another layer has made one already."""
        # A server may start a request in the context of the one before it on its connection, whose span is no parent.
        stale = _in_request.get() and TRACED not in scope
        if self.tracer is None or (trace.get_current_span().get_span_context().is_valid and not stale):
            return None
        scope[TRACED] = True
        sent = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in self._fields}
        parent = propagate.extract(sent, Context() if stale else None)
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        address, port = scope.get("server") or (None, None)
        attributes = {
            HTTP_REQUEST_METHOD: method,
            # Never the query string: a name in it is health data.
            URL_PATH: scope["path"],
            URL_SCHEME: scope.get("scheme", "http"),
            NETWORK_PROTOCOL_VERSION: scope["http_version"],
            **({} if address is None else {SERVER_ADDRESS: address}),
            **({} if port is None else {SERVER_PORT: port}),
        }
        name = "HTTP" if method == "_OTHER" else method
        return Serving(self.tracer.start_span(name, parent, SpanKind.SERVER, attributes), name, parent)

    @contextmanager
    def retrying(self, name: str, reason: str) -> Iterator[None]:
        """Span another attempt at a request."""
        tracer = self.sampled_tracer
        if tracer is None:
            yield
            return
        with tracer.start_as_current_span(
            name, attributes={REASON: reason}, record_exception=False, set_status_on_exception=False
        ):
            yield

    def event(self, name: str, **attributes: str) -> None:
        """Note something that happened in the current span."""
        trace.get_current_span().add_event(name, {f"lifeguard.{key}": value for key, value in attributes.items()})

    def exemplar(self) -> Exemplar:
        """Return the ids of the current trace and span, if it is sampled."""
        return _exemplar(trace.get_current_span().get_span_context())


def _exemplar(current: SpanContext) -> Exemplar:
    if not current.trace_flags.sampled:
        return None
    return {"trace_id": trace.format_trace_id(current.trace_id), "span_id": trace.format_span_id(current.span_id)}


class Serving:
    """A request's span, current inside of its block."""

    __slots__ = ("_context", "_name", "_span", "_token", "_was_in_request")

    def __init__(self, span: Span, name: str, parent: Context) -> None:
        self._span = span
        self._name = name
        # With what else the client sent, such as baggage.
        self._context = trace.set_span_in_context(span, parent)

    def __enter__(self) -> Self:
        self._token = context_api.attach(self._context)
        self._was_in_request = _in_request.set(True)
        return self

    def __exit__(self, *failure: object) -> None:
        _in_request.reset(self._was_in_request)
        context_api.detach(self._token)
        self._span.end()

    def answered(
        self, *, status: int | None, route: str | None, left: bool, failure: str | None, **attributes: str
    ) -> None:
        """Note the answer's status, None where there was none; whether its client left; and what ended it else."""
        span = self._span
        if not span.is_recording():
            return
        # One call for all: each takes a lock.
        told: dict[str, str | int | bool] = {f"lifeguard.{name}": value for name, value in attributes.items()}
        if route is not None:
            span.update_name(f"{self._name} {route}")
            told[HTTP_ROUTE] = route
        if status is not None:
            told[HTTP_RESPONSE_STATUS_CODE] = status
            failure = failure or (str(status) if status >= SERVER_ERROR else None)
        if left:
            told[CLIENT_LEFT] = True
        if failure is not None:
            told[ERROR_TYPE] = failure
            span.set_status(StatusCode.ERROR)
        span.set_attributes(told)


class PoolSpans:
    """Makes the spans of one pool, and records its times."""

    def __init__(self, spans: Spans, instruments: PoolInstruments, pool: str, database: str) -> None:
        self._spans = spans
        self._instruments = instruments
        self._acquire = f"acquire {pool}"
        self._of_pool = {POOL: pool}
        self._of_database = {
            DB_SYSTEM_NAME: DbSystemNameValues.POSTGRESQL.value,
            DB_NAMESPACE: database,
            **self._of_pool,
        }

    @contextmanager
    def acquiring(self) -> Iterator[None]:
        """Span an acquisition that has to wait for something."""
        tracer = self._spans.sampled_tracer
        if tracer is None:
            yield
            return
        with tracer.start_as_current_span(
            self._acquire, attributes=self._of_pool, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except BaseException as error:
                span.set_attribute(ERROR_TYPE, failure_name(error))
                if (reason := getattr(error, "reason", None)) is not None:
                    span.set_attribute(REASON, reason)
                span.set_status(StatusCode.ERROR)
                raise

    def took_idle(self) -> None:
        """Note an acquisition that took an idle connection at once."""
        self._note(self._acquire, began=0.0)

    def phase(self, name: Phase, *, began: float, ended: float = 0.0) -> None:
        """Note a part of the acquisition that is spanned, by how many seconds ago it began and ended."""
        self._note(name, began=began, ended=ended)

    def _note(self, name: str, *, began: float, ended: float = 0.0) -> None:
        tracer = self._spans.sampled_tracer
        if tracer is not None:
            _record(tracer, name, SpanKind.INTERNAL, self._of_pool, began=began, ended=ended)

    def acquired(self, seconds: float) -> Exemplar:
        """Count an acquisition."""
        if self._instruments.wait_time is not None:
            self._instruments.wait_time.record(seconds, self._of_pool)
        return self._spans.exemplar()

    def connected(self, seconds: float) -> None:
        """Count a connection that was opened."""
        if self._instruments.create_time is not None:
            self._instruments.create_time.record(seconds, self._of_pool)

    def returned(self, seconds: float) -> None:
        """Count a connection that was given back, and the seconds that it was held."""
        if self._instruments.use_time is not None:
            self._instruments.use_time.record(seconds, self._of_pool)

    def timed_out(self) -> None:
        """Count an acquisition that was refused at its deadline."""
        if self._instruments.timeouts is not None:
            self._instruments.timeouts.add(1, self._of_pool)

    def asked(
        self, connection: Any, statement: str, seconds: float, failure: str | None, *, name: str | None = None
    ) -> Exemplar:
        """Note a statement that was answered or failed; `name` is for the library's own questions."""
        current = trace.get_current_span().get_span_context()
        tracer = self._spans.tracer_in(current)
        if tracer is None:
            return None
        made = summarize(statement)
        name = name or made.name
        attributes = {
            **self._of_database,
            DB_QUERY_SUMMARY: name,
            DB_QUERY_TEXT: made.text,
            **({} if made.operation is None else {DB_OPERATION_NAME: made.operation}),
            **({} if made.table is None else {DB_COLLECTION_NAME: made.table}),
        }
        _record(tracer, name, SpanKind.CLIENT, attributes, began=seconds, failure=failure, host=connection.host)
        return _exemplar(current)

    async def controls(self, connection: Any, words: str, answer: Awaitable[str]) -> str:
        """Await the answer to BEGIN, COMMIT or ROLLBACK, and note it."""
        began = time.perf_counter()
        failure: str | None = None
        try:
            return await answer
        except BaseException as error:
            failure = failure_name(error)
            raise
        finally:
            seconds = time.perf_counter() - began
            tracer = self._spans.sampled_tracer
            if tracer is not None:
                name = words.partition(" ")[0].rstrip(";")
                told = {**self._of_database, DB_QUERY_SUMMARY: name, DB_OPERATION_NAME: name, DB_QUERY_TEXT: words}
                _record(tracer, name, SpanKind.CLIENT, told, began=seconds, failure=failure, host=connection.host)


def _record(  # noqa: PLR0913  # What a span is.
    tracer: Tracer,
    name: str,
    kind: SpanKind,
    attributes: Mapping[str, str],
    *,
    began: float,
    ended: float = 0.0,
    failure: str | None = None,
    host: Any = None,
) -> None:
    """Make the span of something that began and ended so many seconds ago."""
    told: dict[str, str | int] = {**attributes}
    if host is not None:
        told |= {SERVER_ADDRESS: host.name, SERVER_PORT: host.port}
    if failure is not None:
        told[ERROR_TYPE] = failure
        if len(failure) == SQLSTATE_CHARACTERS:
            told[DB_RESPONSE_STATUS_CODE] = failure
    now = time.time_ns()
    span = tracer.start_span(name, kind=kind, attributes=told, start_time=now - int(began * 1e9))
    if failure is not None:
        span.set_status(StatusCode.ERROR)
    span.end(now - int(ended * 1e9))
