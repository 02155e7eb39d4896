"""The databases of the service: each an engine, its pool and its sentinel, opened and closed together.

`Databases` is made by `create_app`, opened by the lifespan, and reached by sessions through `app.state`. It starts
with any of the databases down: readiness says so, and the sentinels notice when they are back.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, TypeVarTuple, cast, get_args

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import create_async_engine

from app.db import dialect
from app.db.autocommit import AutocommitSession
from app.db.collisions import ATTEMPTS, collision, pause_seconds
from app.db.connector import Connector
from app.db.lease import Lease
from app.db.observe import EngineWatch, PoolWatch
from app.db.once_more import OnceMore
from app.db.query import Query
from app.db.replica import Replica, Router
from app.db.sentinel import Look, Sentinel
from app.db.sessions import Consistency, Isolation, ReadSession, Way, WriteSession
from app.db.sqlalchemy_pool import BoundedPool, opened_connection
from app.errors import DatabaseUnavailable
from app.metrics import Metrics
from app.sampling import Sampler
from app.settings import DatabaseSettings, Settings

logger = logging.getLogger(__name__)

Role = Literal["primary", "replica", "analytics"]
# Seconds between two rounds of upkeep of the pools: short against every lifetime, long against a round's cost.
UPKEEP_SECONDS = 1.0
# A server that answers nobody for so long is given up. Requests wait half a second for a connection meanwhile, and the
# statements that are under way have no deadline of the client's (decision 0005).
MUTE_SECONDS = 1.5
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NOT_OPEN = (
    "the databases are not open: `async with Databases(…) as databases:` opens them, and the lifespan of the service "
    "does; a test that calls the service runs that by `with TestClient(app) as client:`"
)
OTHER_LOOP = (
    "the databases are open in another event loop, to which their connections belong; each asyncio.run has its own, "
    "and each call of a TestClient without `with`: open them in the loop that uses them, or use one loop for all"
)
STILL_OPEN = "the databases are open already; close them first, in the event loop in which they were opened"


class Database:
    """One database: its engine, the pool in front, the sentinel beside, and three ways to use the engine."""

    def __init__(  # noqa: PLR0913, PLR0917  # What it is, and four things that it shares with its siblings.
        self,
        name: str,
        role: Role,
        settings: DatabaseSettings,
        service: Settings,
        metrics: Metrics,
        sampler: Sampler,
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
        )
        self.connector = connector = Connector(settings, writable=role == "primary")
        self.sentinel = Sentinel(name, connector, service, metrics)
        self.engine = create_async_engine(
            # SQLAlchemy reads the dialect from it; where to connect is the connector's business.
            dialect.URL,
            poolclass=BoundedPool,
            settings=settings,
            watch=watch,
            connector=connector,
            # Where each connection was taken costs a walk over the stack: for development.
            trace=service.environment == "development",
            connect_args={
                "async_creator_fn": opened_connection,
                "prepared_statement_cache_size": settings.statement_cache_size,
            },
            echo=settings.echo,
            hide_parameters=True,
        )
        self.pool = cast("BoundedPool", self.engine.pool)
        EngineWatch(self.engine, self.pool, watch, writable=role == "primary")
        read_only = self.engine.execution_options(postgresql_readonly=True)
        # A standby is read-only by nature: what `rows` reads there needs no transaction, and is one round trip, not 3.
        self.reads = Way(read_only, "BEGIN READ ONLY;", alone=role == "replica")
        # None is what the server takes for its default.
        self.writes: dict[Isolation | None, Way] = {None: Way(self.engine, "BEGIN;")}
        for level in get_args(Isolation):
            engine = self.engine.execution_options(isolation_level=level)
            self.writes[level] = Way(engine, f"BEGIN ISOLATION LEVEL {level};")
        # For reports: all statements of a session see one snapshot.
        self.snapshots = Way(
            read_only.execution_options(isolation_level="REPEATABLE READ"),
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;",
        )
        self._server: float | None = None
        if role == "primary":
            self.sentinel.listeners.append(self._follow)
        self._answered_at = time.monotonic()
        if role != "replica":  # A replica's reads are cut sooner: they are run once more on the primary.
            self.sentinel.listeners.append(self._leave_mute)

    def _leave_mute(self, look: Look) -> None:
        """Cut what waits on a server that answers nobody: neither looks, nor logins, nor any statement."""
        if look.status != "timeout":
            self._answered_at = look.at
        elif look.at - self._answered_at >= MUTE_SECONDS and (count := self.pool.cut_unanswered(MUTE_SECONDS)):
            logger.warning("statements cut on a mute server", extra={"database": self.name, "count": count})

    def _follow(self, look: Look) -> None:
        """Leave a server that another one replaced: who waits for its answer would wait until a timeout."""
        # By its own connection: behind a pooler those of the pool go on, whichever server answers there.
        if look.server is None:
            return
        if self._server not in {None, look.server}:
            logger.warning("database is another server", extra={"database": self.name})
            self.pool.abandon(keep=look.server)
        self._server = look.server

    async def fetch(self, query: Query[*Ts], parameters: Mapping[str, Any]) -> Sequence[Row[*Ts]]:
        """Run one query on a connection taken for it alone, outside any transaction.

        Raises: PoolExhausted, DatabaseUnreachable; and as `Lease.rows` does.
        """
        lease = Lease(self, await self.pool.acquire(), readonly=True)
        try:
            return await lease.rows(query, parameters)
        finally:
            lease.give_back()


class Databases:
    """The primary, its replicas and the analytics database, as one thing to open and close.

    `async with Databases(settings, metrics) as databases:` opens and closes them. They belong to the event loop in
    which they were opened: a session in another one, or before, is a RuntimeError. Closed, they refuse (PoolExhausted),
    and may be opened again.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.sampler = Sampler()
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
            return Database(name, role, chosen, settings, metrics, sampler)

        self.primary = database("primary", "primary", settings.primary)
        self.analytics = database("analytics", "analytics", settings.analytics)
        self.replicas = [
            # One replica is plainly "replica"; several are numbered.
            database("replica" if len(settings.replicas) == 1 else f"replica-{number}", "replica", chosen)
            for number, chosen in enumerate(settings.replicas, 1)
        ]
        self.router = Router(
            self.primary,
            [Replica(database, self.primary.sentinel, settings, metrics) for database in self.replicas],
            metrics,
            fallback=settings.replica_fallback,
        )
        self.once_more = OnceMore(settings, self.router, metrics)
        self.closing = False
        self._tasks: list[asyncio.Task[None]] = []

    def all(self) -> list[Database]:
        """List the databases: primary, replicas, analytics."""
        return [self.primary, *self.replicas, self.analytics]

    def reading(self, consistency: Consistency | None = None, *, label: str = "background") -> ReadSession:
        """Open a session that reads from a replica that is near enough, else from the primary.

        Each statement sees what is committed when it starts; for one snapshot over several, see `reporting`.
        """
        self._check_loop()
        wish = Consistency() if consistency is None else consistency
        database, wish.reason = self.router.route(at_least=wish.wanted, primary=wish.primary_only)
        if wish.read_from is None or wish.read_from.role != "replica" or wish.primary_only:
            # Of several reads in a request, one on a replica is enough for the whole to be run once more.
            wish.read_from = database
        door = None
        if database.role == "replica" and (wish.wanted is not None or database.connector.several):
            # The sentinel looks at one server; the connection may lead to another.
            door = _Door(self.router, database, wish)
        return ReadSession(database, database.reads, label=label, door=door)

    def reporting(self, *, label: str = "background") -> ReadSession:
        """Open a session on the analytics pool: REPEATABLE READ, READ ONLY, one snapshot for all its statements."""
        self._check_loop()
        return ReadSession(self.analytics, self.analytics.snapshots, label=label)

    def writing(
        self,
        consistency: Consistency | None = None,
        *,
        label: str = "background",
        isolation: Isolation | None = None,
    ) -> WriteSession:
        """Open a session on the primary; it commits when its block ends, and rolls back when that raises.

        Under "REPEATABLE READ" and "SERIALIZABLE" PostgreSQL may refuse what collides with another transaction, by
        40001: `run_transaction` then runs the whole once more.

        Raises, at the end of the block: OutcomeUnknown when the connection dies during COMMIT, ConnectionLost when
        before.
        """
        self._check_loop()
        return WriteSession(
            self.primary, label=label, consistency=self._if_replicated(consistency), isolation=isolation
        )

    async def run_transaction(
        self,
        work: Callable[[WriteSession], Awaitable[T]],
        *,
        isolation: Isolation = "SERIALIZABLE",
        label: str = "background",
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
        self.metrics.transactions_retried.labels(collision(failure)).inc()

    def autocommitting(self, consistency: Consistency | None = None, *, label: str = "background") -> AutocommitSession:
        """Open a session on the primary for one query that commits by itself."""
        self._check_loop()
        return AutocommitSession(self.primary, label=label, consistency=self._if_replicated(consistency))

    async def open(self) -> None:
        """Warm the pools and start the sentinels. A database that is down does not keep the service from starting.

        Raises: RuntimeError when they are open already.
        """
        if self._loop is not None and not self._loop.is_closed():
            raise RuntimeError(STILL_OPEN)
        if self.closing or self._loop is not None:
            # Pools and sentinels end with their loop, which may have ended before anybody closed them.
            self._make()
        self._loop = asyncio.get_running_loop()
        await asyncio.gather(*(_warm_up(database) for database in self.all()))
        self._tasks = [asyncio.create_task(database.sentinel.watch()) for database in self.all()]
        self._tasks += [asyncio.create_task(self._upkeep()), asyncio.create_task(self._log_figures())]

    async def close(self, *, grace_seconds: float = 5.0) -> None:
        """Admit nobody, let what is at work finish for `grace_seconds`, close every connection."""
        self.closing = True
        for database in self.all():
            database.pool.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        deadline = asyncio.get_running_loop().time() + grace_seconds
        for database in self.all():
            await database.pool.drained(deadline - asyncio.get_running_loop().time())
        for database in self.all():
            if holdings := database.pool.holdings():
                logger.error("connections cut at shutdown", extra={"pool": database.name, "count": len(holdings)})
            database.pool.abandon()
            await database.engine.dispose()
            await database.sentinel.close()
        self.sampler.flush(everything=True)
        self._loop = None

    def publish(self) -> None:
        """Set the gauges to what the pools are now; called for each scrape."""
        metrics = self.metrics
        for database in self.all():
            figures, name = database.pool.figures(), database.name
            metrics.pool_total.labels(name).set(figures.total)
            metrics.pool_available.labels(name).set(figures.available)
            metrics.pool_checked_out.labels(name).set(figures.checked_out)
            metrics.pool_open.labels(name).set(figures.checked_out + figures.checked_in)
            metrics.pool_waiting.labels(name).set(figures.waiting)
            metrics.up.labels(name).set(database.sentinel.healthy)

    def _check_loop(self) -> None:
        # Once they close, the pools refuse whoever still comes: that is a 503 of the shutdown, and no mistake.
        if asyncio.get_running_loop() is not self._loop and not self.closing:
            raise RuntimeError(NOT_OPEN if self._loop is None else OTHER_LOOP)

    def _if_replicated(self, consistency: Consistency | None) -> Consistency | None:
        # Without a replica nobody reads elsewhere, and a token would be a round trip for nothing.
        return consistency if self.replicas else None

    async def _upkeep(self) -> None:
        while True:
            await asyncio.sleep(UPKEEP_SECONDS)
            self.sampler.flush()
            for database in self.all():
                database.pool.tend()
                self._report_long_held(database)
                if database.sentinel.healthy:
                    await _warm_up(database)
            # With several workers a scrape reaches one of them and reads what the others published last.
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
                figures = database.pool.figures()
                extra = {name: getattr(figures, name) for name in figures.__slots__}
                logger.info("pool figures", extra={"pool": database.name, **extra})


@dataclass(frozen=True, slots=True)
class _Door:
    """Keeps a read from a server of a replica's address that may not serve it."""

    router: Router
    database: Database
    consistency: Consistency

    async def admits(self, lease: Lease) -> Database | None:
        """Return the primary when the server that this connection leads to may not serve the read."""
        consistency = self.consistency
        replica = next(one for one in self.router.replicas if one.database is self.database)
        reason = await replica.serves(lease, self.router.believed(consistency.wanted))
        if reason is None:
            return None
        # Other connections of the pool may lead to a server that may.
        lease.tenure.behind = True
        consistency.read_from, consistency.reason = self.router.leave(reason), reason
        return consistency.read_from


async def _warm_up(database: Database) -> None:
    try:
        await database.pool.warm_up()
    except DatabaseUnavailable as error:
        # Each second, as long as it lasts.
        database.watch.log("pool not warmed", reason=str(error))
