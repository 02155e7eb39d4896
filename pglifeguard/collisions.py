"""Collisions: PostgreSQL refuses a transaction because another one was faster, and the caller has to run it again.

REPEATABLE READ and SERIALIZABLE keep data correct in this way (40001); deadlocks (40P01) end alike. The transaction has
to read everything again, so the whole is run again: the endpoint with its dependencies, or the function given to
`Databases.run_transaction`.
"""

import random
from collections.abc import Callable

import asyncpg
from sqlalchemy.exc import DBAPIError

from pglifeguard.errors import sqlstate

# By SQLSTATE, with the code of the answer when no attempt is left.
COLLISIONS = {"40001": "serialization_failure", "40P01": "deadlock"}
# Attempts in all. Each pause is random, so that the transactions do not collide again: up to 10, 20, 40 and 80 ms,
# longer than a transaction takes and shorter than a client notices.
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
