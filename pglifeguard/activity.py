"""Queries about the sessions of a server (pg_stat_activity, pg_locks), for operators.

A role without pg_read_all_stats sees the process id, role, application and locks of other roles' sessions. Their kind,
state, age and statement are NULL. The queries list such a session all the same, with the state `unknown`, since it may
be the one that blocks all others.
"""

# A session whose kind is hidden is a client's when it has a database and a user: the server's own workers have no user,
# and a WAL sender has no database.
CLIENTS = """
(backend_type = 'client backend' OR (backend_type IS NULL AND datid IS NOT NULL AND usesysid IS NOT NULL))
"""
BY_STATE = f"""
SELECT coalesce(application_name, '') AS application, coalesce(state, 'unknown') AS state, count(*) AS connections,
       max(extract(epoch FROM clock_timestamp() - state_change))::float8 AS longest_seconds
FROM pg_stat_activity
WHERE {CLIENTS}
GROUP BY 1, 2 ORDER BY 1, 2
"""  # noqa: S608  # Made of constants.
# $1: how many characters of the statement to show.
EACH = f"""
SELECT pid, coalesce(usename, '') AS role, coalesce(application_name, '') AS application,
       coalesce(state, 'unknown') AS state,
       coalesce(extract(epoch FROM clock_timestamp() - state_change), 0)::float8 AS seconds,
       -- What another role typed by hand may quote rows; the service's own statements have parameters.
       CASE WHEN usename = current_user THEN coalesce(left(query, $1), '') ELSE '' END AS query
FROM pg_stat_activity
WHERE {CLIENTS} AND pid <> pg_backend_pid()
ORDER BY state, seconds DESC
"""  # noqa: S608  # Made of constants.
# $1: for how many sessions to ask, those that have waited longest: each of them stops every lock for a moment.
# One row for each pair. `lock` is what is waited for; of a row it is the transaction that changed it. A blocker that
# waits itself is not the one to end: `blocker_waits` says so. A prepared transaction has the process id 0.
BLOCKED = """
SELECT waiting.pid, coalesce(waiter.usename, '') AS role, coalesce(waiter.application_name, '') AS application,
       extract(epoch FROM clock_timestamp() - waiting.waitstart)::float8 AS waited_seconds,
       concat_ws(' ', waiting.mode, 'on', waiting.locktype,
                 CASE WHEN waiting.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                      THEN waiting.relation::regclass::text ELSE waiting.relation::text END) AS lock,
       blocker_pid, coalesce(blocker.usename, '') AS blocker_role,
       CASE blocker_pid WHEN 0 THEN 'prepared transaction' ELSE coalesce(blocker.application_name, '') END
           AS blocker_application,
       coalesce(blocker.state, 'unknown') AS blocker_state,
       extract(epoch FROM clock_timestamp() - blocker.xact_start)::float8 AS blocker_transaction_seconds,
       extract(epoch FROM clock_timestamp() - blocker.state_change)::float8 AS blocker_state_seconds,
       EXISTS (SELECT FROM pg_locks WHERE pg_locks.pid = blocker_pid AND NOT granted) AS blocker_waits
FROM (SELECT * FROM pg_locks WHERE NOT granted ORDER BY waitstart LIMIT $1) AS waiting
CROSS JOIN LATERAL unnest(pg_blocking_pids(waiting.pid)) AS blocker_pid
LEFT JOIN pg_stat_activity AS waiter ON waiter.pid = waiting.pid
LEFT JOIN pg_stat_activity AS blocker ON blocker.pid = blocker_pid
ORDER BY waited_seconds DESC NULLS LAST, waiting.pid, blocker_pid
"""
# $1: sessions to list in any case, by process id; $2: how many to list; $3: how many characters of the statement to
# read, which still has its values (see `statement_text`). Those of $1 come first, then those that wait for a lock
# (`waits`), then the longest transactions. `started` is in microseconds since 1970: with the process id it names a
# session for good.
IN_TRANSACTION = f"""
SELECT pid, coalesce(usename, '') AS role, coalesce(application_name, '') AS application,
       coalesce(state, 'unknown') AS state,
       extract(epoch FROM clock_timestamp() - xact_start)::float8 AS transaction_seconds,
       extract(epoch FROM clock_timestamp() - state_change)::float8 AS state_seconds,
       (extract(epoch FROM backend_start) * 1000000)::bigint AS started,
       coalesce(wait_event_type = 'Lock', false) AS waits,
       nullif(concat_ws(': ', wait_event_type, wait_event), '') AS waits_for,
       coalesce(left(query, $3), '') AS statement
FROM pg_stat_activity
WHERE {CLIENTS} AND pid <> pg_backend_pid() AND (xact_start IS NOT NULL OR pid = ANY($1::int[]))
ORDER BY pid = ANY($1::int[]) DESC, waits DESC, xact_start NULLS LAST, pid LIMIT $2
"""  # noqa: S608  # Made of constants.
# $1: the process id; $2: `started` as above, None for whoever has the process id now.
END_SESSION = f"""
SELECT coalesce(usename, '') AS role, coalesce(application_name, '') AS application, pg_terminate_backend(pid) AS ended
FROM pg_stat_activity
WHERE {CLIENTS} AND pid = $1 AND pid <> pg_backend_pid()
  AND ($2::bigint IS NULL OR (extract(epoch FROM backend_start) * 1000000)::bigint = $2)
"""  # noqa: S608  # Made of constants.
# $1: idle for longer than so many seconds; $2: the application's name. A role may end its own sessions only.
CLOSE_IDLE = """
SELECT pg_terminate_backend(pid) AS closed
FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND state = 'idle'
  AND state_change < clock_timestamp() - make_interval(secs => $1) AND application_name = $2
  AND usename = current_user
"""
# $1: idle for longer than so many seconds; $2: the application's name. The connection that listens is idle by nature,
# and LISTEN is the last that it ran.
IDLE = """
SELECT pid, usename::text AS role, application_name AS application, coalesce(client_addr::text, 'socket') AS client,
       extract(epoch FROM clock_timestamp() - state_change)::float8 AS seconds
FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND datname = current_database()
  AND state = 'idle' AND state_change < clock_timestamp() - make_interval(secs => $1)
  AND application_name = $2 AND usename = current_user AND query NOT ILIKE 'listen %'
ORDER BY seconds DESC
"""
# $3: process ids of the above. Each is judged once more: it may be at work by now.
END_IDLE = f"""
SELECT pid, pg_terminate_backend(pid) AS ended FROM ({IDLE}) AS idle WHERE pid = ANY($3::int[])
"""  # noqa: S608  # Made of constants.
