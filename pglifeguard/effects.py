"""The effect of a statement beside reading and writing rows, judged by its text: `effect_of`.

A connection goes from one request to the next, so changes of the *session* (a SET, a session lock, a temporary table)
must be undone at its release. Changes of the *transaction* (SET LOCAL, a transaction lock) are lost where there is no
transaction. Each distinct text is judged once, and on the safe side: a function that is not known to be harmless is a
doubt, and costs a reset at the release. Changes made by a trigger or by an operator's function are not seen.
"""

import re
from enum import IntEnum
from functools import lru_cache

from pglifeguard.builtin_functions import HARMLESS, NOT_CALLED


class Effect(IntEnum):
    """How far a statement reaches, each including what stands before it."""

    ROWS = 0
    """Nothing but rows and tables."""
    TRANSACTION = 1
    """It means something until the transaction ends, and nothing without one."""
    DOUBT = 2
    """It calls what may change the session."""
    SESSION = 3
    """It leaves something in the session that `RESET` undoes."""
    CONNECTION = 4
    """It leaves something in the session that only closing the connection undoes."""
    CONTROL = 5
    """It begins or ends a transaction."""


# Statements of a service are a few hundred; those with lists of changing length must not fill the memory.
REMEMBERED = 4096

# Quoted text, in which nothing is a word of SQL: strings, dollar quotes, quoted names, comments.
_QUOTED = re.compile(
    r"""(?P<escaped>\b[eE]'(?:[^'\\]|\\.|'')*') | (?P<string>'(?:[^']|'')*')
      | (?P<dollar>\$(?P<tag>[A-Za-z_]*)\$.*?\$(?P=tag)\$)
      | "(?P<name>(?:[^"]|"")*)" | (?P<comment>--[^\n]*|/\*.*?\*/)""",
    re.VERBOSE | re.DOTALL,
)
_CALL = re.compile(r"(?P<before>(?:\bas|\binto|\bcopy|::)\s*)?(?P<name>[\w.$]+)\s*\(")
_COMMON_TABLE = re.compile(
    r"(?:\bwith(?:\s+recursive)?|,)\s*(\w+)\s*(?:\([^()]*\)\s*)?as\s+(?:not\s+)?(?:materialized\s*)?\("
)
_INTO_TEMPORARY = re.compile(r"\binto\s+(?:local\s+|global\s+)?temp(?:orary)?\b|\bpg_temp\b")

# What a statement begins with, white space reduced; the first that fits decides.
_HEADS: tuple[tuple[Effect, str], ...] = (
    (
        Effect.CONTROL,
        "begin|start transaction|commit|end|abort|prepare transaction|rollback(?! (work |transaction )?to\\b)",
    ),
    (Effect.TRANSACTION, "savepoint|release|rollback|lock|notify|set (local|transaction|constraints)"),
    (Effect.TRANSACTION, "declare(?!.* with hold)"),
    (Effect.CONNECTION, "prepare|execute|deallocate|load|discard (all|plans)"),
    (Effect.SESSION, "set|reset|listen|unlisten|discard|declare|create( or replace)?( global| local)? temp(orary)?"),
    (Effect.ROWS, "select|insert|update|delete|with|values|table|merge|explain|show|fetch|move|close|copy"),
    (Effect.ROWS, "create|alter|drop|comment|grant|revoke|truncate|analyze|vacuum|reindex|refresh|cluster|checkpoint"),
)
_FIRST = [(re.compile(rf"({pattern})\b"), effect) for effect, pattern in _HEADS]
# These name functions without calling them.
_DEFINITIONS = ("create", "alter", "drop", "comment", "grant", "revoke", "truncate")
_REACHING = {
    **dict.fromkeys(("pg_advisory_xact_lock", "pg_advisory_xact_lock_shared"), Effect.TRANSACTION),
    **dict.fromkeys(("pg_try_advisory_xact_lock", "pg_try_advisory_xact_lock_shared"), Effect.TRANSACTION),
    **dict.fromkeys(("pg_notify", "pg_export_snapshot", "lo_open"), Effect.TRANSACTION),
    **dict.fromkeys(("pg_advisory_lock", "pg_advisory_lock_shared", "setseed"), Effect.SESSION),
    **dict.fromkeys(("pg_try_advisory_lock", "pg_try_advisory_lock_shared"), Effect.SESSION),
    **dict.fromkeys(("dblink_connect", "dblink_connect_u"), Effect.CONNECTION),
}
# What asyncpg 0.32 asks before and after it looks for a type (`Connection._introspect_types`), and undoes itself.
_OF_THE_DRIVER = frozenset(
    {
        "select current_setting('jit') as cur, set_config('jit', 'off', false) as new",
        "select set_config('jit', $1, false)",
    }
)


@lru_cache(maxsize=REMEMBERED)
def effect_of(sql: str) -> Effect:
    """Judge a text of one or more statements by the furthest-reaching of them."""
    if " ".join(sql.split()).lower() in _OF_THE_DRIVER:
        return Effect.ROWS
    statements = _QUOTED.sub(_unquoted, sql).lower().split(";")
    return max(_effect_of_one(" ".join(statement.split())) for statement in statements)


def _unquoted(match: re.Match[str]) -> str:
    name = match["name"]
    if name is None:
        return " " if match["comment"] is not None else "''"
    # A quoted name that is no plain word may be any function or table.
    return name if re.fullmatch(r"\w+", name) else "unknown_name"


def _effect_of_one(statement: str) -> Effect:
    statement = statement.lstrip("( ")
    if not statement:
        return Effect.ROWS
    head = next((effect for pattern, effect in _FIRST if pattern.match(statement)), Effect.DOUBT)
    if _INTO_TEMPORARY.search(statement):
        head = max(head, Effect.SESSION)
    # `CREATE FUNCTION f(…)` names what it does not call; `SET x = f()` is judged by its head.
    if head != Effect.ROWS or statement.startswith(
        ("create", "alter", "drop", "comment", "grant", "revoke", "truncate")
    ):
        return head
    tables = set(_COMMON_TABLE.findall(statement))
    calls = (call for call in _CALL.finditer(statement) if not call["before"] and call["name"] not in tables)
    return max((_effect_of_call(call, statement) for call in calls), default=head)


def _effect_of_call(call: re.Match[str], statement: str) -> Effect:
    name = call["name"].removeprefix("pg_catalog.")
    if name in NOT_CALLED or name in HARMLESS:
        return Effect.ROWS
    if name == "set_config":
        return _effect_of_setting(statement[call.end() :])
    return _REACHING.get(name, Effect.DOUBT)


def _effect_of_setting(arguments: str) -> Effect:
    """Judge `set_config(name, value, is_local)` by its last argument, where that is written out."""
    depth, last = 0, ""
    for character in arguments:
        depth += (character in "([") - (character in ")]")
        if depth < 0:
            break
        last = "" if character == "," and depth == 0 else last + character
    return {"true": Effect.TRANSACTION, "false": Effect.SESSION}.get(last.strip(), Effect.DOUBT)
