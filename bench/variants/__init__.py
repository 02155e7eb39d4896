"""The ways to serve a patient that are compared: each module has a `create_app()`."""

# The ways to connect that are compared, and which of them are the same module with other variables.
WAYS = {
    "per_request": "connection for each request",
    "threads": "sync engine in threads (psycopg)",
    "textbook": "textbook: async engine, pre-ping, BEGIN … COMMIT",
    "asyncpg_pool": "asyncpg's own pool",
    "ours_at_work": "ours",
    "pooled": "ours through PgBouncer",
}
MODULES = {"pooled": "ours_at_work"}
