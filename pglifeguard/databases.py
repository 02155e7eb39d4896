"""The databases of the service: each an engine, its pool and its monitor, opened and closed together.

The owner of the event loop opens `Databases`: the lifespan of an application, a worker, a script. It opens also when a
database is down: readiness reports that, and the monitors notice when the database is back.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self, TypeVar, TypeVarTuple, cast

from sqlalchemy import Row

from pglifeguard.budget import Demand, demands, granted, on_one_server
from pglifeguard.checkout import holder
from pglifeguard.collisions import ATTEMPTS, collision, pause_seconds
from pglifeguard.consistency import Consistency, current_consistency
from pglifeguard.credentials import PasswordSource
from pglifeguard.database import Database, Isolation, Role
from pglifeguard.database_settings import DatabaseSettings
from pglifeguard.discovery import Found
from pglifeguard.environment import NOT_FROM_HERE, SettingsError, exported_signals
from pglifeguard.errors import BudgetExceeded, DatabaseUnavailable, NotFound
from pglifeguard.listening import Listener
from pglifeguard.members import Members
from pglifeguard.metrics import Metrics
from pglifeguard.pool import OnConnect
from pglifeguard.primary_retry import PrimaryRetry
from pglifeguard.query import Query
from pglifeguard.replica import Replica
from pglifeguard.router import Router, ServerCheck
from pglifeguard.sampling import Sampler
from pglifeguard.sessions import ReadSession, WriteSession
from pglifeguard.settings import DatabasesSettings
from pglifeguard.telemetry import PoolState, Telemetry
from pglifeguard.write_once import write_once

logger = logging.getLogger(__name__)

# Seconds between two rounds of upkeep of the pools: short against every lifetime, long against a round's cost.
UPKEEP_SECONDS = 1.0
# The beginning of the variables that describe a database.
PREFIX_OF_ROLE = {"primary": "DATABASE_", "replica": "DATABASE_REPLICA_", "analytics": "DATABASE_ANALYTICS_"}
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NO_QUERY = (
    "write_once() takes a Query, a constant of the module: `ADD = Query(insert(…).values(…).returning(…))`; a "
    "statement that is made for the call runs in a session: `async with databases.writing() as session`"
)
NOT_OPEN = (
    "the databases are not open: `async with Databases(…) as databases:` opens them, and the lifespan of the service "
    "does; a test that calls the service runs that by `with TestClient(app) as client:`"
)
OTHER_LOOP = (
    "the databases are open in another event loop, to which their connections belong; each asyncio.run has its own, "
    "and each call of a TestClient without `with`: open them in the loop that uses them, or use one loop for all"
)
WITHOUT_OTEL = (
    "OTEL_EXPORTER_OTLP_ENDPOINT or one like it is set, and {missing} is not installed: install the extra, "
    f"`pip install 'pglifeguard[otel]'`, or unset the variable. {NOT_FROM_HERE}"
)
STILL_OPEN = "the databases are open already; close them first, in the event loop in which they were opened"


class Databases:
    """The primary, its replicas and the analytics database, as one thing to open and close.

    `async with Databases(settings) as databases:` opens and closes them. They belong to the event loop in
    which they were opened: a session in another one, or before, is a RuntimeError. Closed, they refuse (PoolExhausted),
    and may be opened again.
    """

    def __init__(
        self,
        settings: DatabasesSettings,
        metrics: Metrics | None = None,
        *,
        on_connect: OnConnect | None = None,
        password: PasswordSource | None = None,
    ) -> None:
        self.settings = settings = settings if password is None else settings.asking(password)
        self._on_connect = on_connect
        self.metrics = Metrics() if metrics is None else metrics
        self.sampler = Sampler()
        self.telemetry = _telemetry(settings)
        # The loop in which they are open; None before that and afterwards.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._make()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _make(self) -> None:
        settings, metrics, sampler = self.settings, self.metrics, self.sampler

        def database(name: str, role: Role, chosen: DatabaseSettings) -> Database:
            return Database(name, role, chosen, settings, metrics, sampler, self._on_connect, self.telemetry)

        # As they are now: `resize` changes them until the databases are closed. Where DNS finds the replicas, these are
        # the sizes of all places, taken or not.
        self._sizes = dict(settings.pools)
        self.closing = False
        self._paused_until = 0.0
        self._tasks: list[asyncio.Task[None]] = []

        self.primary = database("primary", "primary", settings.primary)
        self.analytics = database("analytics", "analytics", settings.analytics)
        # With those that are drained.
        self.replicas = [
            database(name, "replica", chosen)
            for name, chosen in settings.pools.items()
            if name not in {"primary", "analytics"} and not settings.finds_replicas
        ]
        for replica in self.replicas:
            self.primary.learn_from(replica)
        self.router = Router(
            self.primary,
            [Replica(database, self.primary.monitor, settings, metrics) for database in self.replicas],
            metrics,
            fallback=settings.replica_fallback,
            finds_replicas=settings.finds_replicas,
        )
        self._members: Members | None = None
        if settings.finds_replicas:

            def found(place: str, one: Found) -> Database:
                made = database(place, "replica", self._sizes[place].at(one.host))
                made.found, made.stage = one, "warming"
                self.primary.learn_from(made)
                if self.paused:
                    made.pool.pause(self.paused_seconds)
                return made

            self._members = Members(settings, metrics, self.router, self.replicas, make=found, meet=_meet)
        self.listener = Listener(settings.listening, warns=settings.warn_unencrypted)
        self.primary.monitor.listeners.append(self.listener.follow)
        self.primary_retry = PrimaryRetry(settings, self.router, metrics, self.telemetry)

    def all(self) -> list[Database]:
        """List the databases: primary, replicas, analytics. Where DNS finds the replicas, they come and go."""
        return [self.primary, *self.replicas, self.analytics]

    def reading(self, consistency: Consistency | None = None, *, label: str | None = None) -> ReadSession:
        """Open a session that reads from a replica that is near enough, else from the primary.

        In a request it shows what the client wrote before, and counts for the route; `label` names another holder.
        Each statement sees what is committed when it starts; for one snapshot over several, see `reporting`.
        """
        self._check_loop()
        consistency = consistency or current_consistency() or Consistency()
        database, consistency.reason = self.router.route(
            at_least=consistency.wanted, primary=consistency.primary_only, avoided=consistency.avoided
        )
        if consistency.read_from is None or consistency.read_from.role != "replica" or consistency.primary_only:
            # When one of several reads in a request went to a replica, the whole request can be run once more.
            consistency.read_from = database
        check = None
        if database.role == "replica" and (
            consistency.wanted is not None
            or database.connector.several
            or database.stage is not None
            or database.settings.profile == "sleeping"
        ):
            # The monitor probes one server; the connection may lead to another, or to one that has just woken up. A
            # replica that was found may be drained before the session acquires its connection.
            check = ServerCheck(self.router, cast("Replica", self.router.judge_of(database)), consistency)
        return ReadSession(database, database.reads, label=_label(label), server_check=check)

    def reporting(self, *, label: str | None = None) -> ReadSession:
        """Open a session on the analytics pool: REPEATABLE READ, READ ONLY, one snapshot for all its statements."""
        self._check_loop()
        return ReadSession(self.analytics, self.analytics.snapshots, label=_label(label))

    def writing(
        self,
        consistency: Consistency | None = None,
        *,
        label: str | None = None,
        isolation: Isolation | None = None,
    ) -> WriteSession:
        """Open a session on the primary; it commits when its block ends, and rolls back when that raises.

        Under "REPEATABLE READ" and "SERIALIZABLE" PostgreSQL may refuse what collides with another transaction, by
        40001: `run_transaction` then runs the whole once more.

        Raises, at the end of the block: OutcomeUnknown when the connection dies during COMMIT, ConnectionLost when
        before.
        """
        self._check_loop()
        consistency = consistency or current_consistency()
        # Without a replica all reads go to the primary, and a token would cost a round trip for nothing.
        return WriteSession(
            self.primary,
            label=_label(label),
            consistency=consistency,
            asks_token=bool(self.settings.replicas),
            isolation=isolation,
        )

    async def run_transaction(
        self,
        work: Callable[[WriteSession], Awaitable[T]],
        *,
        isolation: Isolation = "SERIALIZABLE",
        label: str | None = None,
    ) -> T:
        """Run `work(session)` as one transaction, and again when it collided with another one; return what it returns.

        It is tried five times at most, each time from a clean session, with a short random pause between. Not
        when `work` has committed a part itself. What it does beside the database has to bear a repetition.

        Raises: what `work` raised; at last the collision, a DBAPIError or asyncpg.PostgresError of 40001 or 40P01.
        """
        attempt = 0
        while True:
            session = self.writing(label=label, isolation=isolation)
            try:
                async with session:
                    return await work(session)
            except Exception as error:
                if attempt == ATTEMPTS - 1 or session.committed or collision(error) is None:
                    raise
            self.count_collision(session.failure)
            await asyncio.sleep(pause_seconds(attempt))
            attempt += 1

    def count_collision(self, failure: BaseException | None) -> None:
        """Count a transaction that is run again."""
        reason = collision(failure)
        self.metrics.transactions_retried.labels(reason).inc()
        if self.telemetry is not None:
            self.telemetry.event("transaction run again", reason=str(reason))

    async def write_once(self, query: Query[*Ts], **parameters: Any) -> Sequence[Row[*Ts]]:
        """Run one query that writes, in one round trip; return its rows. What it changed is stored when this returns.

        Nothing takes it back: what may still fail, or takes two statements, belongs into `writing()` or `WriteDB`. In
        a request with replicas it costs a second round trip, for the consistency token that the answer carries.

        Raises: PoolExhausted, DatabaseUnreachable: nothing was stored. OutcomeUnknown when the connection was lost or
        the answer did not come in time. sqlalchemy.exc.IntegrityError; any other asyncpg.PostgresError as it comes.
        TypeError for anything but a Query. RuntimeError in a request with an Idempotency-Key, which needs `WriteDB`.
        """
        self._check_loop()
        given: object = query
        if not isinstance(given, Query):
            raise TypeError(NO_QUERY)
        current = current_consistency()
        holder.set(_label(None))
        token = current is not None and bool(self.settings.replicas)
        return await write_once(self.primary, query, parameters, current or Consistency(), token=token)

    def listen(self, channel: str) -> AbstractAsyncContextManager[AsyncIterator[str | None]]:
        """Hear the payloads of a channel: `async with databases.listen("jobs") as news: async for payload in news:`.

        All listeners of the process share one connection to LISTEN_URL, beside the pools. None comes first, and again
        where notifications may have been missed: while the connection was lost, or when more than 1,000 were left
        unread. Read the tables then. The iteration ends when the databases are closed.

        Raises: RuntimeError, with a sentence, when LISTEN_URL is not set or leads to a pooler; ValueError for a
        channel's name that PostgreSQL would cut off. When entered, DatabaseUnreachable; when iterated, ConnectionLost
        after 60 s without the connection.
        """
        self._check_loop()
        return self.listener.listen(channel)

    def _in_place(self, pool: str) -> list[Database]:
        """Return the database of this pool; none for the place of a replica that no replica takes now."""
        self.sized(pool)
        return [database for database in self.all() if database.name == pool]

    async def renew_connections(self, pool: str | None = None) -> None:
        """Replace all connections by new ones, after a password was rotated or a role's settings were changed.

        Each database, or the one whose `pool` is named, is first asked for a new connection, which becomes the
        monitor's. Then the idle connections of its pool are closed, and those at work at their release. No request is
        refused for waiting for a login meanwhile. Listeners of the primary hear None.

        Raises: DatabaseUnreachable when a database lets no new connection in; its old ones go on then. NotFound when
        there is no such pool.
        """
        self._check_loop()
        if self.closing:
            return
        databases = self.all() if pool is None else self._in_place(pool)
        renewing = (
            database.monitor.renew(timeout_seconds=self.settings.health_timeout_seconds) for database in databases
        )
        failures = await asyncio.gather(*renewing, return_exceptions=True)
        for database, failure in zip(databases, failures, strict=True):
            if failure is None:
                database.pool.renew()
                if database is self.primary:
                    self.listener.renew()
        for failure in failures:
            if failure is not None:
                raise failure

    def pause(self, *, seconds: float) -> None:
        """Let all requests wait for their connections until `resume`, or for `seconds`: for a planned switchover.

        Checkouts go on until their end: `checked_out` of the pools' figures tells when there are none left. Requests
        that ask for a connection meanwhile are not refused, up to 10,000 for each pool; readiness stays as it is.

        Raises: ValueError for anything but a number of seconds above 0.
        """
        self._check_loop()
        if not 0 < seconds < math.inf:
            raise ValueError("a pause takes a number of seconds above 0; `resume()` ends it before")
        for database in self.all():
            database.pool.pause(seconds)
        self._paused_until = time.monotonic() + seconds
        logger.warning("connections are paused", extra={"seconds": seconds})

    def resume(self) -> None:
        """End a pause: the pools connect anew, and the requests get their connections in turn."""
        for database in self.all():
            database.pool.resume()
        self._paused_until = 0.0
        logger.warning("connections are resumed")

    @property
    def paused(self) -> bool:
        """Whether requests wait for the end of a pause."""
        return self.paused_seconds > 0

    @property
    def paused_seconds(self) -> float:
        """Seconds until a pause ends by itself; 0 without one."""
        return max(0.0, self._paused_until - time.monotonic())

    def resize(self, pool: str, *, pool_size: int | None = None, max_overflow: int | None = None) -> DatabaseSettings:
        """Give a pool another size until the databases are closed; return its settings, with the new size.

        None leaves a size as it is; both None are a return to the settings that these databases were made with. In a
        smaller pool idle connections are closed now and others at their release, and the queue goes on.

        Raises: BudgetExceeded when the server grants less to all workers and instances together. NotFound when there is
        no such pool. ValueError when a size is out of its bounds.
        """
        self._check_loop()
        configured, before = self.configured(pool), self.sized(pool)
        current = configured if pool_size is None and max_overflow is None else before
        sized = configured.resized(
            current.pool_size if pool_size is None else pool_size,
            current.max_overflow if max_overflow is None else max_overflow,
        )
        if sized == before:
            return sized
        self._check_grants(self._sizes | {pool: sized})
        self._sizes[pool] = sized
        for database in self._in_place(pool):
            database.resize(sized if database.found is None else sized.at(database.found.host))
            if database is self.primary:
                self.primary_retry.resize(sized.capacity)
        self.publish()
        logger.warning(
            "pool is resized",
            extra={"pool": pool, "pool_size": sized.pool_size, "max_overflow": sized.max_overflow},
        )
        return sized

    def configured(self, pool: str) -> DatabaseSettings:
        """Return the settings that a pool was made with, whatever its size is now. Raises: NotFound."""
        self.sized(pool)
        return self.settings.pools[pool]

    def sized(self, pool: str) -> DatabaseSettings:
        """Return the settings of a pool with its size of now. Raises: NotFound."""
        if pool not in self._sizes:
            raise NotFound(f"There is no pool {pool!r}; there are {', '.join(self._sizes)}.")
        return self._sizes[pool]

    @property
    def sizes(self) -> dict[str, DatabaseSettings]:
        """The settings of all pools with their sizes of now, by name; of replicas that DNS finds, of each place."""
        return dict(self._sizes)

    def _check_grants(self, sizes: Mapping[str, DatabaseSettings]) -> None:
        """Raise BudgetExceeded when pools of these sizes may open more than is granted, and more than before."""
        # What one server grants is compared with what it gets, and CONNECTION_LIMIT with all that one name gets: see
        # `_on_one_server`.
        for before, after, allowed in (
            *self._compared(self._on_one_server(self._sizes), self._on_one_server(sizes), self._granted),
            *self._compared(self._sizes, sizes, lambda _server: granted(self.settings, None)),
        ):
            # A pool that is too large already may become smaller.
            if allowed is not None and after.wanted > max(allowed, before.wanted):
                raise BudgetExceeded(
                    f"{after.server} would get {after.arithmetic} = {after.wanted} connections, and grants this "
                    f"service {allowed}. Choose a smaller size, or make another pool smaller first."
                )

    def _compared(
        self,
        before: Mapping[str, DatabaseSettings],
        after: Mapping[str, DatabaseSettings],
        allowed: Callable[[str], int | None],
    ) -> Iterator[tuple[Demand, Demand, int | None]]:
        pairs = zip(demands(self.settings, before), demands(self.settings, after), strict=True)
        return ((old, new, allowed(new.server)) for old, new in pairs)

    def _on_one_server(self, sizes: Mapping[str, DatabaseSettings]) -> dict[str, DatabaseSettings]:
        """Return what leads to one server: of replicas that DNS finds one place, or one for each address of it."""
        known = Counter(each.monitor.position.started for each in self.replicas)
        known.pop(None, None)
        return on_one_server(self.settings, sizes, max(known.values(), default=1))

    async def open(self) -> None:
        """Warm the pools and start the monitors. A database that is down does not keep the service from starting.

        Raises: RuntimeError when they are open already; SettingsError when a pooler stands in front of one that would
        make its data wrong.
        """
        if self._loop is not None and not self._loop.is_closed():
            raise RuntimeError(STILL_OPEN)
        if self.closing or self._loop is not None:
            # Pools and monitors end with their event loop, which may have ended before they were closed.
            self._make()
        self._loop = asyncio.get_running_loop()
        if self.telemetry is not None:
            self.telemetry.start()
        fixed = self.all()
        members = [] if self._members is None else [self._members.open()]
        await asyncio.gather(*(_meet(database) for database in fixed), *members)
        await self._refuse_poolers()
        self._tasks = [asyncio.create_task(database.monitor.probe_forever()) for database in fixed]
        self._tasks += [asyncio.create_task(self._upkeep()), asyncio.create_task(self._log_figures())]

    async def _refuse_poolers(self) -> None:
        refused = [
            f"{PREFIX_OF_ROLE[database.role]}URL {database.connector.look.refusal}."
            for database in self.all()
            if database.connector.look is not None and database.connector.look.refusal is not None
        ]
        if refused:
            await self.close()
            raise SettingsError("\n".join(dict.fromkeys(refused)))

    async def close(self, *, grace_seconds: float = 5.0) -> None:
        """Refuse new requests, drain the pools for `grace_seconds` at most, close every connection."""
        self.closing = True
        await self.listener.close()
        if self._members is not None:
            await self._members.close()
        for database in self.all():
            database.pool.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.router.forged.close()
        deadline = asyncio.get_running_loop().time() + grace_seconds
        for database in self.all():
            await database.pool.drained(deadline - asyncio.get_running_loop().time())
        for database in self.all():
            if holdings := database.pool.holdings():
                logger.error("connections cut at shutdown", extra={"pool": database.name, "count": len(holdings)})
            database.pool.abandon()
            await database.engine.dispose()
            await database.monitor.close()
        self.sampler.flush(everything=True)
        if self.telemetry is not None:
            await self.telemetry.stop()
        self._loop = None

    def publish(self) -> None:
        """Set the gauges to what the pools are now; called for each scrape."""
        metrics = self.metrics
        if self.telemetry is not None:
            self.telemetry.publish({database.name: _state(database) for database in self.all()})
        for database in self.all():
            figures, name = database.pool.figures(), database.name
            metrics.pool_total.labels(name).set(figures.total)
            metrics.pool_available.labels(name).set(figures.available)
            metrics.pool_checked_out.labels(name).set(figures.checked_out)
            metrics.pool_open.labels(name).set(figures.checked_out + figures.checked_in)
            metrics.pool_connecting.labels(name).set(figures.connecting)
            metrics.pool_waiting.labels(name).set(figures.waiting)
            metrics.asleep.labels(name).set(database.monitor.asleep)
            if database.monitor.asleep:
                # The last value would say that the database answers, however long ago that was.
                metrics.forget(metrics.up, name)
            else:
                metrics.up.labels(name).set(database.monitor.healthy)
        for demand, allowed in self.budget():
            metrics.budget_wanted.labels(demand.server).set(demand.wanted)
            metrics.budget_instance.labels(demand.server).set(demand.per_instance)
            if allowed is not None:
                metrics.budget_granted.labels(demand.server).set(allowed)

    def budget(self) -> list[tuple[Demand, int | None]]:
        """List what all instances together may open on each server, and what it grants; None where nobody says."""
        wanted = demands(self.settings, self._on_one_server(self._sizes))
        return [(demand, self._granted(demand.server)) for demand in wanted]

    def _granted(self, server: str) -> int | None:
        """Return how many connections a server has for this service; None where nobody says."""
        on_it = (database for database in self.all() if database.settings.server == server)
        said = [one for one in (database.monitor.granted for database in on_it) if one is not None]
        return granted(self.settings, min(said, default=None))

    def _check_loop(self) -> None:
        # During the shutdown the pools refuse late requests, which are answered 503; that is no mistake of the caller.
        if asyncio.get_running_loop() is not self._loop and not self.closing:
            raise RuntimeError(NOT_OPEN if self._loop is None else OTHER_LOOP)

    async def _upkeep(self) -> None:
        while True:
            await asyncio.sleep(UPKEEP_SECONDS)
            self.sampler.flush()
            for database in self.all():
                database.pool.tend()
                self._report_long_held(database)
                if database.monitor.healthy and database.stage != "draining":
                    await _warm_up(database)
            # With several workers a scrape reaches one of them, which reads the last published figures of the others.
            self.publish()

    def _report_long_held(self, database: Database) -> None:
        for holding in database.pool.newly_long_held(self.settings.leak_after_seconds):
            self.metrics.long_held.labels(database.name, holding.holder).inc()
            logger.warning(
                "connection held for long",
                extra={
                    "pool": database.name,
                    "route": holding.holder,
                    "held_seconds": round(holding.held_seconds, 1),
                    "idle_seconds": round(holding.idle_seconds, 1),
                    "taken_in": holding.taken_in,
                },
            )

    async def _log_figures(self) -> None:
        while True:
            await asyncio.sleep(self.settings.pool_log_interval_seconds)
            for database in self.all():
                logger.info("pool figures", extra={"pool": database.name, **database.pool.figures()._asdict()})


def _telemetry(settings: DatabasesSettings) -> Telemetry | None:
    """Return what listens, where the environment names an OTLP endpoint; None without one.

    Raises: SettingsError when it cannot be exported to.
    """
    signals = exported_signals()
    if not signals:
        return None
    try:
        # It loads the SDK, which takes longer than all of this library.
        from pglifeguard.otel import OpenTelemetry  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise SettingsError(WITHOUT_OTEL.format(missing=error.name)) from error
    return OpenTelemetry(signals, workers=settings.workers)


def _state(database: Database) -> PoolState:
    figures, sized = database.pool.figures(), database.settings
    pending = database.pool.load - figures.checked_out
    return PoolState(figures.checked_out, figures.checked_in, figures.total, sized.warm_size, sized.pool_size, pending)


def _label(given: str | None) -> str:
    """Return the holder that a session is counted for: the given one, else the request's route, else "background"."""
    if given is not None:
        return given
    current = current_consistency()
    return "background" if current is None or current.label is None else current.label


async def _meet(database: Database) -> None:
    """Open what the pool keeps warm, and so find out what the database is; without any, the monitor's connection."""
    if database.settings.warm_size:
        await _warm_up(database)
    else:
        await database.monitor.probe(timeout_seconds=database.settings.connect_timeout_seconds)
    if database.connector.look is not None:
        # A slow pooler takes longer than a login may; what it is decides whether the service starts.
        await database.connector.look.wait()


async def _warm_up(database: Database) -> None:
    try:
        await database.pool.warm_up()
    except DatabaseUnavailable as error:
        # The upkeep tries again each second, so the log samples this line.
        where = database.connector.where
        database.watch.log("pool %s at %s not warmed: %s", database.name, where, error, reason=str(error))
