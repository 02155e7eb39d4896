"""One database: its engine, the pool in front, the monitor beside, and the kinds of transaction that sessions begin."""

import logging
import time
from typing import Literal, NamedTuple, TypeAlias, cast, get_args

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from pglifeguard import dialect
from pglifeguard.checkout import PoolWatch
from pglifeguard.connector import Connector
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.discovery import Found
from pglifeguard.fence import Fence
from pglifeguard.metrics import Metrics
from pglifeguard.monitor import Monitor, Probe
from pglifeguard.pool import OnConnect
from pglifeguard.pooler import startup_parameters
from pglifeguard.pooler_look import PoolerLook
from pglifeguard.sampling import Sampler
from pglifeguard.settings import DatabasesSettings
from pglifeguard.sqlalchemy import EngineWatch, PoolAdapter, opened_connection
from pglifeguard.telemetry import Telemetry

logger = logging.getLogger(__name__)

Role = Literal["primary", "replica", "analytics"]
# What a replica that DNS has found does: it opens its connections, takes reads, or lets the last ones end.
Stage = Literal["warming", "serving", "draining"]
Isolation: TypeAlias = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
# Seconds without any answer after which the statements on a server are cut. They have no deadline of the client's
# (decision 0005), so on a frozen primary they waited for command_timeout, 35 s.
MUTE_SECONDS = 1.5


class TransactionMode(NamedTuple):
    """A kind of transaction: the engine with its options for SQLAlchemy, and the words that begin the same by hand.

    With `skips_transaction`, queries of `rows` need no transaction until there is one: each stands for itself.
    """

    engine: AsyncEngine
    begin: str
    skips_transaction: bool = False


class Database:
    """One database: its engine, the pool in front, the monitor beside, and the kinds of transaction."""

    def __init__(  # noqa: PLR0913, PLR0917  # What it is, and six things that it shares with its siblings.
        self,
        name: str,
        role: Role,
        settings: DatabaseSettings,
        service: DatabasesSettings,
        metrics: Metrics,
        sampler: Sampler,
        on_connect: OnConnect | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.name = name
        self.role = role
        self.settings = settings
        self.watch = watch = PoolWatch(
            metrics,
            name,
            sampler,
            slow_query_seconds=service.slow_query_seconds,
            idle_hold_seconds=service.idle_hold_seconds,
            telemetry=None if telemetry is None else telemetry.of_pool(name, settings.parameters.database),
        )
        look = PoolerLook(
            name,
            writable=role == "primary",
            parameters=startup_parameters(settings.parameters.server_settings),
            keeps_statements=settings.statement_cache_size > 0,
        )
        # Replicas take no writes, and each standby is judged where it is read from.
        self.fence = Fence()
        fence = self.fence if role == "primary" else None
        self.connector = connector = Connector(
            settings,
            writable=role == "primary",
            warn_as=name if service.warn_unencrypted else None,
            look=look if settings.pooler_check else None,
            fence=fence,
        )
        self.monitor = Monitor(name, connector, service, metrics, fence)
        self.engine = create_async_engine(
            # SQLAlchemy reads the dialect from this URL; the connector knows where to connect.
            dialect.URL,
            poolclass=PoolAdapter,
            settings=settings,
            watch=watch,
            connector=connector,
            # To name the line of each checkout takes a walk over the stack: for development.
            trace=service.trace_checkouts,
            on_connect=on_connect,
            connect_args={"async_creator_fn": opened_connection},
            json_serializer=dialect.write_json,
            echo=settings.echo,
            hide_parameters=True,
        )
        self.adapter = cast("PoolAdapter", self.engine.pool)
        self.pool = self.adapter.bounded
        if settings.sleeps:
            self.monitor.let_sleep(self.pool)
        event.listen(self.engine.sync_engine, "do_connect", self.adapter.keep_statements)
        EngineWatch(self.engine, self.pool, watch, writable=role == "primary")
        read_only = self.engine.execution_options(postgresql_readonly=True)
        # A standby is read-only, so `rows` needs no transaction there: one round trip in place of three.
        self.reads = TransactionMode(read_only, "BEGIN READ ONLY;", skips_transaction=role == "replica")
        # None is the server's default.
        self.writes: dict[Isolation | None, TransactionMode] = {None: TransactionMode(self.engine, "BEGIN;")}
        for level in get_args(Isolation):
            engine = self.engine.execution_options(isolation_level=level)
            self.writes[level] = TransactionMode(engine, f"BEGIN ISOLATION LEVEL {level};")
        # For reports: all statements of a session see one snapshot.
        self.snapshots = TransactionMode(
            read_only.execution_options(isolation_level="REPEATABLE READ"),
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;",
        )
        # Where DNS has found it, and what it does; None for what the URL names.
        self.found: Found | None = None
        self.stage: Stage | None = None
        self._server: float | None = None
        if role == "primary":
            self.fence.leave = lambda server: self.pool.abandon(keep=server)
            self.monitor.listeners.append(self._leave_replaced_server)
        self._answered_at = time.monotonic()
        if role != "replica":  # A replica's reads are cut sooner: they are run once more on the primary.
            self.monitor.listeners.append(self._cut_mute_server)

    def learn_from(self, replica: "Database") -> None:
        """Let a replica's probes tell this primary that it was replaced.

        A standby that follows a newer timeline does, and a promoted one where this database's URL names it as a host.
        Another replica that was promoted, by mistake or for tests, is no successor: see replica.py.
        """
        own = {(host.name, host.port) for host in self.connector.hosts}
        named = any(
            (host.name, host.port) in own or (host.dialled, host.port) in own for host in replica.connector.hosts
        )

        def see(probe: Probe) -> None:
            at, latest = probe.position, replica.connector.latest
            if at.in_recovery:
                self.fence.see(at.system, at.timeline, None)
            elif named and latest is not None and latest.direct:
                # Through a pooler the name is the pooler's, and says nothing of the servers behind it.
                self.fence.see(at.system, at.timeline, at.started)

        replica.monitor.listeners.append(see)

    def resize(self, settings: DatabaseSettings) -> None:
        """Take the size of these settings, which are otherwise those of this database."""
        self.settings = settings
        self.pool.resize(settings)

    def _cut_mute_server(self, probe: Probe) -> None:
        """Cut the statements that wait on a server which answers no probe, no login and no statement."""
        if probe.status != "timeout":
            self._answered_at = probe.at
        elif probe.at - self._answered_at >= MUTE_SECONDS and (count := self.pool.cut_unanswered(MUTE_SECONDS)):
            logger.warning("statements cut on a mute server", extra={"database": self.name, "count": count})

    def _leave_replaced_server(self, probe: Probe) -> None:
        """Drop the connections to a server that another one replaced; their statements would wait until a timeout."""
        # `probe.server` is the server that the monitor's connection was opened to. `position.started` would not do:
        # behind a pooler it changes with the server that answers, while the pool's connections go on.
        if probe.status == "asleep":
            self._server = None  # It may wake up as another one, and that is no failover.
        if probe.server is None:
            return
        if self._server not in {None, probe.server}:
            logger.warning("database is another server", extra={"database": self.name})
            self.pool.abandon(keep=probe.server)
        self._server = probe.server
