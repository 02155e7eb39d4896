"""A write that is one query: one round trip, stored when it returns. `Databases.write_once` is the public method.

The query is a transaction by itself. A `WriteSession` takes three round trips and holds its connection for all of them.
The price: nothing that comes later can roll the query back, and when the connection is lost meanwhile, it is unknown
whether the query was stored. In a WriteSession that is unknown during COMMIT only.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVarTuple

from sqlalchemy import Row

from pglifeguard.consistency import Consistency
from pglifeguard.database import Database
from pglifeguard.driver_failures import DRIVER_FAILURES
from pglifeguard.errors import DatabaseUnavailable, OutcomeUnknown, sqlstate
from pglifeguard.lease import Lease
from pglifeguard.query import Query
from pglifeguard.tracked_connection import UNKNOWN

Ts = TypeVarTuple("Ts")

# SQLSTATEs after which nothing was stored, though the connection is closed: a server that shuts down rolls back and
# says so, and a value that asyncpg refused was never sent.
NOT_STORED = ("57P01", "22")
KEYED = (
    "write_once commits by itself, and a request with an Idempotency-Key is one transaction, its answer included: a "
    "repetition would write twice. Take `WriteDB` in this route, and run the query by `session.rows`"
)


async def write_once(
    database: Database, query: Query[*Ts], parameters: Mapping[str, Any], consistency: Consistency, *, token: bool
) -> Sequence[Row[*Ts]]:
    """Run one query outside any transaction; with `token`, ask for a consistency token after it.

    Raises: OutcomeUnknown when the connection is lost or the answer does not come in time; RuntimeError in a request
    with an Idempotency-Key; else as `Lease.rows`.
    """
    if consistency.keyed:
        raise RuntimeError(KEYED)
    lease = Lease(database, await database.pool.acquire(), readonly=False)
    try:
        rows = await lease.rows(query, parameters)
        consistency.committed = True
        if token:
            consistency.token = await lease.written_token()
    except (*DRIVER_FAILURES, DatabaseUnavailable) as error:
        if lease.connection.is_closed() and not (sqlstate(error) or "").startswith(NOT_STORED):
            consistency.committed = True
            raise OutcomeUnknown(UNKNOWN) from error
        raise
    finally:
        if lease.connection.left:
            await lease.end()
        else:
            lease.give_back()
    return rows
