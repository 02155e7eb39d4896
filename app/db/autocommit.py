"""The session of a write that is one query: `AutocommitDB` for endpoints, `databases.autocommitting()` elsewhere.

The query is a transaction by itself: one round trip, where `WriteSession` takes three and holds its connection for all
of them. The price is in the docstring of the class; decision 0012 weighs it.
"""

from collections.abc import Sequence
from typing import Any, Never, TypeVarTuple

from sqlalchemy import Row

from app.db.connector import DRIVER_FAILURES
from app.db.lease import Lease
from app.db.pool import holder
from app.db.query import Query
from app.db.sessions import ENDED, WriteSession
from app.db.watched import UNKNOWN
from app.errors import DatabaseUnavailable, OutcomeUnknown, sqlstate

Ts = TypeVarTuple("Ts")

# A server that stops takes back what is under way, and says so; a value of the wrong kind never got there.
NOT_STORED = ("57P01", "22")
ONE_QUERY = (
    "an autocommit session runs one query by `rows`, and a first one is stored by now; what needs more than that takes "
    "`WriteDB`"
)
STORED = (
    "an autocommit session cannot take its query back, which is stored by now; what may be taken back takes `WriteDB`"
)


class AutocommitSession(WriteSession):
    """A write session for one query, which is committed when it is answered.

    What the endpoint does after it cannot take it back; and when the connection is lost meanwhile, nobody can tell
    whether it was stored, where a WriteSession still knows that nothing was, unless COMMIT was on its way.
    """

    spent = False

    async def rows(self, query: Query[*Ts], **parameters: Any) -> Sequence[Row[*Ts]]:
        """Return all rows of the query, and keep what it changed.

        Raises: OutcomeUnknown when the connection is lost or the answer does not come in time; else as `Lease.rows`.
        """
        if self._ended:
            raise RuntimeError(ENDED)
        if self.spent or "sync_session" in vars(self):
            raise RuntimeError(ONE_QUERY)
        self.spent = True
        holder.set(self._label)
        lease = Lease(self._database, await self._database.pool.acquire(), readonly=False)
        try:
            if self._ended:
                # Whoever was to hear of it has been answered while this waited for its connection.
                raise RuntimeError(ENDED)
            rows = await lease.rows(query, parameters)
            await self._keep_token(lease.tenure)
        except (*DRIVER_FAILURES, DatabaseUnavailable) as error:
            if lease.connection.is_closed() and not (sqlstate(error) or "").startswith(NOT_STORED):
                raise OutcomeUnknown(UNKNOWN) from error
            raise
        finally:
            if lease.connection.left:
                await lease.end()
            else:
                lease.give_back()
        return rows

    async def rollback(self) -> None:
        """Do nothing before the query.

        Raises: RuntimeError after it, for it is stored.
        """
        if self.spent:
            raise RuntimeError(STORED)
        await super().rollback()

    async def copy_records(self, *_arguments: Any, **_options: Any) -> Never:
        """Refuse: COPY is part of a transaction."""
        raise RuntimeError(ONE_QUERY)

    def hand_over(self, *_engine: Any) -> Never:
        """Refuse: SQLAlchemy's session would begin a transaction."""
        raise RuntimeError(ONE_QUERY)
