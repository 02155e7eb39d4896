"""Sessions that write at an isolation level: `SerializableDB` and `RepeatableReadDB` for endpoints and dependencies.

An endpoint that names one may run several times for one request (`collisions.py`): what it does beside the database
has to bear that. However often a request names a session that writes, `WriteDB` included, it is the same one.
"""

from typing import Annotated

from fastapi import Depends

from app.db.collisions import Isolated
from app.db.dependencies import WriteDB
from app.db.sessions import WriteSession

MIXED = (
    "this request's `WriteDB` was opened without isolation level {isolation}, where nobody could see it asked for: the "
    "route or one of its dependencies has to name `SerializableDB` or `RepeatableReadDB` in its signature"
)


class AtIsolation(Isolated):
    """Gives the request's session that writes, whose transaction is at an isolation level."""

    async def __call__(self, session: WriteDB) -> WriteSession:
        """Return the session; the route has been looked through for this level when it was opened.

        Raises: RuntimeError when it is at a lower level.
        """
        if session.isolation not in {self.isolation, "SERIALIZABLE"}:
            raise RuntimeError(MIXED.format(isolation=self.isolation))
        return session


serializable_session = AtIsolation("SERIALIZABLE")
repeatable_read_session = AtIsolation("REPEATABLE READ")

SerializableDB = Annotated[WriteSession, Depends(serializable_session, scope="function")]
RepeatableReadDB = Annotated[WriteSession, Depends(repeatable_read_session, scope="function")]
