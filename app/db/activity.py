"""Questions about a server's own sessions (pg_stat_activity), for operators.

Sessions of other roles show neither state nor statement unless the role has pg_read_all_stats.
"""

BY_STATE = """
SELECT coalesce(application_name, '') AS application, coalesce(state, 'unknown') AS state, count(*) AS connections,
       max(extract(epoch FROM clock_timestamp() - state_change))::float8 AS longest_seconds
FROM pg_stat_activity
WHERE backend_type = 'client backend'
GROUP BY 1, 2 ORDER BY 1, 2
"""
# $1: how many characters of the statement to show.
EACH = """
SELECT pid, coalesce(usename, '') AS role, coalesce(application_name, '') AS application,
       coalesce(state, 'unknown') AS state,
       coalesce(extract(epoch FROM clock_timestamp() - state_change), 0)::float8 AS seconds,
       coalesce(left(query, $1), '') AS query
FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
ORDER BY state, seconds DESC
"""
# $1: idle for longer than so many seconds; $2: the application's name. A role may end its own sessions only.
CLOSE_IDLE = """
SELECT pg_terminate_backend(pid) AS closed
FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND state = 'idle'
  AND state_change < clock_timestamp() - make_interval(secs => $1) AND application_name = $2
  AND usename = current_user
"""
MAX_CONNECTIONS = "SELECT current_setting('max_connections')::int AS granted"
