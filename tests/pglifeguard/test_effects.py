"""What a statement leaves behind is seen in its text, and in doubt something is."""

import pytest
from asyncpg import introspection

from pglifeguard.effects import Effect, effect_of

ROWS = [
    "SELECT now()",
    "SELECT 1;",
    "  ( SELECT 1 ) UNION (SELECT 2)",
    "SELECT lower(a) || upper(b), count(*) FILTER (WHERE x) OVER (PARTITION BY y) FROM t",
    "SELECT CAST(x AS NUMERIC(10, 2)), y::VARCHAR(3) FROM t JOIN u USING (id) WHERE x IN ($1, $2) AND (a, b) > (c, d)",
    "WITH a AS (SELECT 1), b (x) AS MATERIALIZED (SELECT count(*) FROM a) SELECT * FROM b, a",
    "INSERT INTO t (a) VALUES ($1::VARCHAR) ON CONFLICT (a) DO UPDATE SET a = excluded.a RETURNING t.id",
    "SELECT 'SET x; COMMIT', \"SET\" FROM t -- SET y\n/* ; SET z; */",
    "SELECT $a$; SET x = 1; $a$",
    "SELECT x FROM t FOR UPDATE OF t SKIP LOCKED",
    "COPY t (a, b) FROM STDIN",
    "CREATE FUNCTION public.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "SELECT pg_catalog.now()",
    "",
    introspection.INTRO_LOOKUP_TYPES,
    introspection.INTRO_LOOKUP_TYPES_13,
    "SELECT current_setting('jit') AS cur, set_config('jit', 'off', false) AS new",
]
TRANSACTION = [
    "SET LOCAL x = 1",
    "set\ttransaction read only",
    "SET CONSTRAINTS ALL DEFERRED",
    "SELECT set_config('a', f.b, true) FROM f",
    "SELECT set_config('a', 'b', true",
    "SELECT pg_advisory_xact_lock(1)",
    "SAVEPOINT x",
    "ROLLBACK TO SAVEPOINT x",
    "ROLLBACK WORK TO x",
    "LOCK TABLE t",
    "DECLARE c CURSOR FOR SELECT 1",
    "SELECT pg_notify('a', 'b')",
]
DOUBT = [
    "SELECT my_function(1)",
    "SELECT * FROM t JOIN my_function(1) AS f(a int) ON true",
    "SELECT public.now()",
    'SELECT "My Function"(1)',
    "SELECT set_config('a', $1, $2)",
    "DO $$ BEGIN PERFORM set_config('a', 'b', false); END $$",
    "CALL my_procedure()",
    "COPY (SELECT my_function()) TO STDOUT",
    "something new",
]
SESSION = [
    "SET search_path = x",
    "/* why */ SET a = 1",
    "-- why\nSET a = 1",
    "SELECT 1; SET a = 1",
    "RESET ALL",
    "LISTEN a",
    "SELECT set_config('a', coalesce($1, 'b'), false)",
    "SELECT E'it\\'s', set_config('a', 'b', false)",
    'SELECT pg_catalog."pg_advisory_lock"(1)',
    "SELECT pg_try_advisory_lock(1)",
    "CREATE TEMP TABLE t (a int)",
    "CREATE TABLE pg_temp.t (a int)",
    "SELECT 1 INTO TEMPORARY t",
    "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
    "SET ROLE x",
    "SET SESSION AUTHORIZATION x",
]
CONNECTION = ["PREPARE a AS SELECT 1", "DEALLOCATE ALL", "DISCARD ALL", "LOAD 'x'"]
CONTROL = [
    "BEGIN",
    "START TRANSACTION",
    "COMMIT",
    "END",
    "ABORT",
    "ROLLBACK",
    "rollback and chain",
    "PREPARE TRANSACTION 'a'",
    "COMMIT PREPARED 'a'",
    "SELECT 1; COMMIT",
]
KINDS = {
    Effect.ROWS: ROWS,
    Effect.TRANSACTION: TRANSACTION,
    Effect.DOUBT: DOUBT,
    Effect.SESSION: SESSION,
    Effect.CONNECTION: CONNECTION,
    Effect.CONTROL: CONTROL,
}


@pytest.mark.parametrize(("effect", "sql"), [(effect, sql) for effect, texts in KINDS.items() for sql in texts])
def test_text_is_judged_by_how_far_it_reaches(effect: Effect, sql: str) -> None:
    """Whatever the case, the white space, the quotes and what stands before it."""
    assert effect_of(sql) is effect
