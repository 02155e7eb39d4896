"""What the library tells of requests, connections and statements to whoever traces them, in words of its own.

Nobody listens unless an OTLP endpoint is set. Then `pglifeguard.otel` does, and is alone in knowing OpenTelemetry. All
times are in seconds. What takes time is told when it has ended, by how long it took: nothing is prepared for it before.
"""

from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol, Self

from pglifeguard.errors import sqlstate

# What an acquisition spends its time on: a release by another request, a login, a probe of an idle connection.
Phase = Literal["wait", "connect", "check"]
# The ids of the current trace and span, for a figure of prometheus-client; None where nothing is traced.
Exemplar = dict[str, str] | None


class PoolState(NamedTuple):
    """The connections of one pool: at work, idle, the bounds of both, and the requests that wait for one."""

    used: int
    idle: int
    capacity: int
    idle_min: int
    idle_max: int
    pending: int


class PoolTelemetry(Protocol):
    """Listens to one pool. What is a figure of Prometheus too returns the exemplar for it."""

    def acquiring(self) -> AbstractContextManager[None]:
        """Span an acquisition that has to wait for something."""

    def took_idle(self) -> None:
        """Note an acquisition that took an idle connection at once."""

    def phase(self, name: Phase, *, began: float, ended: float = 0.0) -> None:
        """Note a part of the acquisition that is spanned, by how many seconds ago it began and ended."""

    def acquired(self, seconds: float) -> Exemplar:
        """Count an acquisition."""

    def connected(self, seconds: float) -> None:
        """Count a connection that was opened."""

    def returned(self, seconds: float) -> None:
        """Count a connection that was given back, and the seconds that it was held."""

    def timed_out(self) -> None:
        """Count an acquisition that was refused at its deadline."""

    def asked(
        self, connection: Any, statement: str, seconds: float, failure: str | None, *, name: str | None = None
    ) -> Exemplar:
        """Note a statement that was answered or failed; `name` is for the library's own questions."""

    def controls(self, connection: Any, words: str, answer: Awaitable[str]) -> Coroutine[Any, Any, str]:
        """Await the answer to BEGIN, COMMIT or ROLLBACK, and note it."""


class ServedRequest(Protocol):
    """A request's span, current inside of its block."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *failure: object) -> None: ...

    def answered(
        self, *, status: int | None, route: str | None, left: bool, failure: str | None, **attributes: str
    ) -> None:
        """Note the answer's status, None where there was none; whether its client left; and what ended it else."""


class Telemetry(Protocol):
    """Listens to the databases of one service, and to the requests around them."""

    def of_pool(self, name: str, database: str) -> PoolTelemetry:
        """Return what listens to one pool, which leads to the database of this name."""

    def serving(self, scope: MutableMapping[str, Any]) -> ServedRequest | None:
        """Return the span of a request, by its ASGI scope; None where another layer has made one already."""

    def retrying(self, name: str, reason: str) -> AbstractContextManager[None]:
        """Span another attempt at a request."""

    def event(self, name: str, **attributes: str) -> None:
        """Note something that happened in the current span."""

    def exemplar(self) -> Exemplar:
        """Return the ids of the current trace and span, if it is sampled."""

    def publish(self, pools: Mapping[str, PoolState]) -> None:
        """Take the state of all pools, by name."""

    def start(self) -> None:
        """Begin to export."""

    async def stop(self) -> None:
        """Export what is left, for about two seconds at most."""


# How to ask for the trace that this context is in; None outside of requests, and where nothing is traced.
exemplar_source: ContextVar[Callable[[], Exemplar] | None] = ContextVar("exemplar_source", default=None)


def current_trace() -> Exemplar:
    """Return `trace_id` and `span_id` of the request that is being served, for log lines; None where none is traced."""
    source = exemplar_source.get()
    return None if source is None else source()


def failure_name(error: BaseException) -> str:
    """Name a failure without its text, which may hold values: by SQLSTATE, else by class."""
    return sqlstate(error) or type(error).__qualname__
