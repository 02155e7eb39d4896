"""The replicas that DNS finds, as far as this process uses them: each joins, serves, and is drained when it goes.

At most `database_replica_max_pools` pools are open at any time, those that are drained among them, so the budget holds
while the list changes: a new replica waits for the place of the one that goes. A place gives the pool its name, so
that the metrics have as many series as there are places, however many replicas come and go.

A replica joins when its connections are open and its lag is known, with a small share of the reads that grows for
RAMP_SECONDS. One that DNS names no more takes no new reads, the running ones end, and then its pool is closed. One that
serves nothing for UNFIT_SECONDS gives its place to another one, if DNS names one.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, get_args

from pglifeguard.database import Database, Stage
from pglifeguard.discovery import Finder, Found, chosen, rank_of
from pglifeguard.metrics import Metrics
from pglifeguard.monitor import Probe
from pglifeguard.replica import SERVING, Replica
from pglifeguard.router import Router
from pglifeguard.settings import DatabasesSettings

logger = logging.getLogger(__name__)

# Seconds in which the share of a new replica grows to its whole; its cache is empty at first.
RAMP_SECONDS = 10.0
FIRST_SHARE = 0.1
# Answers in a row that have to lack a replica. One answer may be incomplete: a resolver that is asked for two kinds of
# addresses may have got one of the two.
MISSING_ANSWERS = 2
# Seconds without serving after which another replica is used, and after which this one may be chosen again.
UNFIT_SECONDS = 15.0
FORGIVEN_SECONDS = 300.0
TICK_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class Member:
    """A replica with a pool in this process. Times are of the owner's clock."""

    found: Found
    replica: Replica
    # When it was last seen to serve, and since when it does.
    fit_at: float
    serving_since: float = 0.0
    # Answers in a row that lacked it.
    missing: int = 0
    warming: asyncio.Task[None] | None = None
    watching: asyncio.Task[None] | None = None
    listener: Callable[[Probe], None] = field(init=False)

    @property
    def database(self) -> Database:
        """Its pool and monitor."""
        return self.replica.database


class Members:
    """Keeps the pools of one process in step with what DNS answers."""

    def __init__(  # noqa: PLR0913  # What it changes, and how it makes what it adds.
        self,
        settings: DatabasesSettings,
        metrics: Metrics,
        router: Router,
        databases: list[Database],
        *,
        make: Callable[[str, Found], Database],
        meet: Callable[[Database], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep `databases` and the replicas of `router` in step; `make` a database in a place, and `meet` it."""
        self._settings = settings
        self._metrics = metrics
        self._router = router
        self._databases = databases
        self._make = make
        self._meet = meet
        self._clock = clock
        (host,) = settings.replicas[0].parameters.hosts
        self._finder = Finder(host, "srv" if settings.database_replica_discovery == "srv" else "dns")
        self._places = [name for name in settings.pools if name not in {"primary", "analytics"}]
        # What this process draws its replicas by.
        self._lot = token_hex(8)
        self._opened_at = clock()
        self._failing = False
        self._listed: dict[str, Found] = {}
        self._members: dict[str, Member] = {}
        # The replicas that served nothing, with the time of that finding.
        self._unfit: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # A rate needs a zero to start from.
        for outcome in ("found", "failed"):
            metrics.replica_lookups.labels(outcome)
        for change in ("joined", "left"):
            metrics.replica_changes.labels(change)

    async def open(self) -> None:
        """Look the replicas up, wait until those that answer are warm, and follow the changes from then on."""
        self._opened_at = self._clock()
        await self.look()
        await asyncio.gather(*self._tasks)
        self._start(self._look_forever())
        self._start(self._tick_forever())

    async def close(self) -> None:
        """Follow no more changes; the pools are the owner's to close."""
        watching = [member.watching for member in self._members.values() if member.watching is not None]
        await _end(*self._tasks, *watching)

    async def look(self) -> None:
        """Ask DNS, and begin what follows from its answer. Never raises: without an answer the list stays as it is."""
        try:
            found = await self._finder.find()
        except (OSError, ValueError) as error:  # A name that no resolver takes is a ValueError.
            self._metrics.replica_lookups.labels("failed").inc()
            if not self._failing:
                logger.warning("replicas cannot be looked up", extra={"reason": str(error), "known": len(self._listed)})
            self._failing = True
            return
        self._metrics.replica_lookups.labels("found").inc()
        self._metrics.replicas.labels("listed").set(len(found))
        if self._failing:
            logger.info("replicas are looked up again", extra={"listed": len(found)})
        self._failing = False
        listed = {one.key: one for one in found}
        for key, member in self._members.items():
            member.missing = 0 if key in listed else member.missing + 1
            if 0 < member.missing < MISSING_ANSWERS and member.database.stage != "draining":
                listed[key] = member.found
        self._listed = listed
        self._arrange()

    def tick(self) -> None:
        """Let the shares of new replicas grow, and give up replicas that serve nothing while there are others."""
        now, given_up = self._clock(), False
        for key, member in self._members.items():
            member.replica.share = _share(now - member.serving_since)
            if member.database.stage == "serving" and member.replica.state in SERVING:
                member.fit_at = now
                self._unfit.pop(key, None)
            elif now - member.fit_at >= UNFIT_SECONDS and key not in self._unfit:
                self._unfit[key], given_up = now, True
        if given_up:
            self._arrange()

    def _arrange(self) -> None:
        """Drain what is not wanted, and let join what is, as far as there are places."""
        settings, now = self._settings, self._clock()
        listed, members = self._listed, self._members
        self._unfit = {key: at for key, at in self._unfit.items() if key in listed and now - at < FORGIVEN_SECONDS}
        ranks = {key: rank_of(one, settings.database_zone, settings.zones) for key, one in listed.items()}
        wanted = chosen(listed.values(), len(self._places), self._lot, ranks, self._unfit)
        for key, member in members.items():
            if key in listed:
                member.found = listed[key]
                member.replica.rank, member.replica.weight = ranks[key], max(listed[key].weight, 1)
            elif member.database.stage != "draining":
                self._leave(member, "DNS names it no more")
        # Those that DNS still names are exchanged one at a time, since an exchange leaves a pool less for a while.
        changing = [
            key
            for key, member in members.items()
            if member.database.stage == "draining" or (member.database.stage == "warming" and key not in self._unfit)
        ]
        unwanted = [key for key in members if key not in wanted]
        if unwanted and not changing:
            self._leave(members[max(unwanted, key=lambda key: (key in self._unfit, ranks[key]))], "others come first")
        taken = {member.database.name for member in members.values()}
        free = [place for place in self._places if place not in taken]
        for key, place in zip([key for key in wanted if key not in members], free, strict=False):
            self._join(place, listed[key], ranks[key])
        self._count()

    # The way of one replica.

    def _join(self, place: str, found: Found, rank: int) -> None:
        database = self._make(place, found)
        replica = Replica(database, self._router.primary.monitor, self._settings, self._metrics)
        replica.rank, replica.weight = rank, max(found.weight, 1)
        member = Member(found, replica, self._clock())
        # The replica judges itself first, at each probe of either server.
        member.listener = lambda _probe: self._admit(member)
        for monitor in (database.monitor, self._router.primary.monitor):
            monitor.listeners.append(member.listener)
        self._members[found.key] = member
        self._databases.append(database)
        self._router.judges.append(replica)
        self._metrics.replica_changes.labels("joined").inc()
        logger.info("replica joins", extra={"pool": place, "address": found.key})
        member.warming = self._start(self._warm(member))

    async def _warm(self, member: Member) -> None:
        await self._meet(member.database)
        member.watching = asyncio.create_task(member.database.monitor.probe_forever())
        await member.database.monitor.probe()

    def _admit(self, member: Member) -> None:
        """Let a replica take reads, once its connections are open and its lag is known to be small."""
        database, look = member.database, member.database.connector.look
        figures = database.pool.figures()
        warm = figures.checked_in + figures.checked_out >= database.settings.warm_size
        refused = look is not None and look.refusal is not None
        if database.stage != "warming" or not warm or refused or member.replica.state not in SERVING:
            return
        database.stage = "serving"
        member.fit_at = self._clock()
        # At the start of the process all are equally new to it, and have served other processes before.
        starting = member.fit_at - self._opened_at < RAMP_SECONDS
        member.serving_since = float("-inf") if starting else member.fit_at
        member.replica.share = _share(member.fit_at - member.serving_since)
        self._router.replicas.append(member.replica)
        self._count()
        logger.info("replica takes reads", extra={"pool": database.name, "address": member.found.key})

    def _leave(self, member: Member, reason: str) -> None:
        """Give a replica no new reads, and close its pool when the last one has ended."""
        database = member.database
        if database.stage == "serving":
            self._router.replicas.remove(member.replica)
        database.stage = "draining"
        database.pool.dispose()
        self._metrics.replica_changes.labels("left").inc()
        extra = {"pool": database.name, "address": member.found.key, "reason": reason}
        logger.warning("replica is drained", extra=extra)
        self._start(self._drain(member))

    async def _drain(self, member: Member) -> None:
        database = member.database
        await _end(member.warming)
        await database.pool.drained(self._settings.graceful_timeout_seconds)
        if holdings := database.pool.holdings():
            logger.error("connections cut of a drained replica", extra={"pool": database.name, "count": len(holdings)})
        database.pool.close()
        database.pool.abandon()
        await database.engine.dispose()
        await _end(member.watching)
        await database.monitor.close()
        member.replica.detach()
        self._router.primary.monitor.listeners.remove(member.listener)
        self._router.judges.remove(member.replica)
        self._databases.remove(database)
        del self._members[member.found.key]
        self._metrics.forget_pool(database.name)
        logger.info("replica is gone", extra={"pool": database.name, "address": member.found.key})
        self._arrange()

    # Tasks and figures.

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _look_forever(self) -> None:
        seconds = self._settings.database_replica_discovery_seconds
        while True:
            # Processes that were started together must not ask together for ever.
            await asyncio.sleep(seconds * random.uniform(0.9, 1.1))  # noqa: S311  # Not a secret.
            await self.look()

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.tick()

    def _count(self) -> None:
        stages = Counter(member.database.stage for member in self._members.values())
        for stage in get_args(Stage):
            self._metrics.replicas.labels(stage).set(stages[stage])


def _share(seconds: float) -> float:
    """Return the share of a replica that has taken reads for so long."""
    return min(1.0, FIRST_SHARE + (1 - FIRST_SHARE) * seconds / RAMP_SECONDS)


async def _end(*tasks: asyncio.Task[None] | None) -> None:
    ending = [task for task in tasks if task is not None]
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)
