"""Finding out whether the pooler in front of a database keeps the prepared statements of its clients.

asyncpg prepares each statement once per connection, under a name, and sends the name from then on. A pooler in
transaction mode gives each transaction another server connection. So it must keep track of the statements that its
client has prepared (PgBouncer since 1.21 with `max_prepared_statements`). Otherwise the name is unknown on the server
connection, or it is another client's statement.
"""

import asyncpg

# asyncpg prepares this statement too, so it is in its own answer, under the name that the server knows.
STATEMENTS = "SELECT pg_backend_pid() AS process, ARRAY(SELECT name FROM pg_prepared_statements) AS names"
# asyncpg's names for its statements; a pooler that keeps track of them gives them other names.
DRIVERS_NAME = "__asyncpg_"
WARNING = (
    "a pooler in front of this database hands prepared statements on and does not keep them: in transaction mode "
    "requests fail with statements_not_kept, or run another client's statement; set max_prepared_statements there "
    "(PgBouncer 1.21 or later), or DATABASE_STATEMENT_CACHE_SIZE=0 here"
)


def forgets_statements(connection: asyncpg.Connection, found: asyncpg.Record) -> bool:
    """Say whether what `STATEMENTS` found on this connection shows a pooler that hands names on.

    A pooler answers the login itself, with a process number of its own, where a server gives its own. In session mode
    handing names on does no harm, and cannot be told apart from here.
    """
    pooled = found["process"] != connection.get_server_pid()
    return pooled and any(name.startswith(DRIVERS_NAME) for name in found["names"])
