"""Collisions: PostgreSQL refuses a transaction because another one was faster, and running it again is the remedy.

Under REPEATABLE READ and SERIALIZABLE that is how correctness is kept (40001); deadlocks (40P01) end alike. All that
the transaction read has to be read again, so what is run again is the whole: the endpoint with its dependencies, or the
function given to `Databases.run_transaction`.
"""

import random
from collections.abc import Callable

import asyncpg
from sqlalchemy.exc import DBAPIError

from pglifeguard.errors import sqlstate

# By SQLSTATE, with the code that a client is told when no attempt is left.
COLLISIONS = {"40001": "serialization_failure", "40P01": "deadlock"}
# Attempts in all. Each pause is drawn between nothing and twice what the last one could be, so that those that collided
# do not meet again: up to 10, 20, 40 and 80 ms, below what a client notices and above what a transaction takes.
ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.01


def collision(error: BaseException | None) -> str | None:
    """Return the code of a collision, after which the transaction may succeed when it runs again; None for others."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return COLLISIONS.get(sqlstate(error) or "") if isinstance(error, (DBAPIError, asyncpg.PostgresError)) else None


def pause_seconds(attempt: int, draw: Callable[[], float] = random.random) -> float:
    """Return how long to wait after this attempt, the first being 0."""
    return draw() * FIRST_PAUSE_SECONDS * 2.0**attempt
