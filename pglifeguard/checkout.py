"""The records of a pool: the life of one connection and its checkouts, an instant of a pool, who holds what.

Times are in seconds. Nothing here waits or decides; `pool` fills these in, metrics and operators read them.
"""

import time
from contextvars import ContextVar
from dataclasses import dataclass

from pglifeguard.connector import KeptAliveConnection

# Who takes a connection in this context: the route template of a request, or the name of a task.
holder: ContextVar[str] = ContextVar("holder", default="background")


@dataclass(slots=True, eq=False)
class Checkout:
    """The life of one open connection; times are of the pool's clock, in seconds.

    `queried` and `asked_at` are of `time.perf_counter`, by which statements are timed. `asked_at` is when the statement
    under way was sent, None between two statements: what waits for the database is not idle.
    """

    connection: KeptAliveConnection
    opened_at: float
    expires_at: float
    generation: int
    idle_since: float
    uses: int = 0
    holder: str = ""
    taken_at: float = 0.0
    queried: float = 0.0
    asked_at: float | None = None
    taken_in: str | None = None
    reported: bool = False
    # Whether it leads where its holder could not stay: the others are taken first.
    behind: bool = False

    def begin_query(self) -> None:
        """Note that the connection waits for the server from now on."""
        self.asked_at = time.perf_counter()

    def end_query(self) -> float:
        """Count the time since `begin_query` as time at work, and return its seconds.

        Call it in a `finally`: `cut_unanswered` cuts a connection that seems to wait for ever.
        """
        if self.asked_at is None:
            # Two tasks used one session at the same time, and the one that asyncpg refused has ended first.
            return 0.0
        seconds = time.perf_counter() - self.asked_at
        self.queried += seconds
        self.asked_at = None
        return seconds

    def queried_seconds(self) -> float:
        """Seconds that this checkout spent on statements, the one under way included."""
        return self.queried if self.asked_at is None else self.queried + time.perf_counter() - self.asked_at


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """One instant of a pool. `checked_out + connecting + available == total`, always.

    Connecting are the requests within `total` that have no connection yet: it was just granted, or is being checked or
    opened; and connections being opened for nobody in particular. Waiting are the requests beyond.
    """

    pool_size: int
    max_overflow: int
    total: int
    checked_out: int
    checked_in: int
    connecting: int
    overflow: int
    available: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Holding:
    """A checkout that is going on: who holds it, for how long, and how much of that without a query."""

    holder: str
    held_seconds: float
    idle_seconds: float
    taken_in: str | None = None


def holding_of(checkout: Checkout, now: float) -> Holding:
    """Describe a checkout that is going on."""
    held = now - checkout.taken_at
    return Holding(checkout.holder, held, max(0.0, held - checkout.queried_seconds()), checkout.taken_in)
