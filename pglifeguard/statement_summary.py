"""A statement's short name, "SELECT patients", and what it is made of: for traces, which group by it.

It is read from the text, because half of the statements come as text only. What is inside parentheses is left out, so
subqueries, common table expressions and functions name nothing. Where that leaves a doubt, no table is named.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from pglifeguard.statement_text import without_values

TEXT_CHARACTERS = 2_000
# As the semantic conventions say.
SUMMARY_CHARACTERS = 255
# Statements that are remembered; a service has a handful, and one that puts texts together must not keep them all.
REMEMBERED = 512

_INNERMOST = re.compile(r"\([^()]*\)")
_VERB = re.compile(r"\b(?:SELECT|INSERT|UPDATE|DELETE|MERGE)\b", re.IGNORECASE)
_TABLE = re.compile(
    r"""
    \b (?: (?<!DISTINCT\ )FROM | JOIN | INTO | (?<!FOR\ )(?<!KEY\ )(?<!DO\ )UPDATE | ^COPY )
    \s (?: ONLY\s | LATERAL\s )* (?P<name> [\w."]++ )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CALLED = re.compile(r"\b(?:FROM|JOIN)\s(?:LATERAL\s)?[\w.\"]++\s?\(\)", re.IGNORECASE)
_NAMED_QUERY = re.compile(
    r"(?:\bWITH|\bRECURSIVE|,)\s(\w+)(?:\s?\(\))?\sAS\s(?:NOT\s)?(?:MATERIALIZED\s)?\(\)", re.IGNORECASE
)
_INNER_SELECT = re.compile(r"\(\s?SELECT\b", re.IGNORECASE)
_SEVERAL = re.compile(r"\bFROM\s[^()]*?,", re.IGNORECASE)


class Summary(NamedTuple):
    """A statement without values, its short name, its verb, and its table where it has one and no other."""

    text: str
    name: str
    operation: str | None
    table: str | None


@lru_cache(REMEMBERED)
def summarize(statement: str) -> Summary:
    """Summarize a statement."""
    text = without_values(statement, characters=TEXT_CHARACTERS)
    top = _CALLED.sub(" ", _without_parentheses(text))
    named = {name.lower() for name in _NAMED_QUERY.findall(top)}
    is_with = top[:5].upper() == "WITH "
    verb = _VERB.search(top) if is_with else re.match(r"[A-Za-z]+", top)
    operation = None if verb is None else verb[0].upper()
    found = (match["name"].replace('"', "") for match in _TABLE.finditer(top))
    tables = dict.fromkeys(name for name in found if name.lower() not in named)
    name = " ".join([operation or "", *tables]).strip()[:SUMMARY_CHARACTERS] or "statement"
    certain = len(tables) == 1 and not (is_with or _INNER_SELECT.search(text) or _SEVERAL.search(top))
    return Summary(text, name, operation, next(iter(tables)) if certain else None)


def _without_parentheses(text: str) -> str:
    """Empty all parentheses, from the inside out."""
    marked, before = text, ""
    while marked != before:
        before, marked = marked, _INNERMOST.sub("\0", marked)
    return marked.replace("\0", "()")
