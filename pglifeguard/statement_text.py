"""A statement without its values, as an operator may see it.

`pg_stat_activity` shows a statement as it was sent. The service's own have parameters, whose values are not in it; what
somebody typed by hand, or a program put together, may quote rows. So every literal is replaced, whoever sent it.
"""

import re

VALUE = "?"
# What may hold a value, by the lexical rules of PostgreSQL, each up to its end or to where the text was cut off.
_VALUES = re.compile(
    r"""
    (?P<comment>  --[^\n]* | /\*.*?(?:\*/|\Z) )
    | (?P<escape> \b[eE]'(?:[^'\\]|\\(?:.|\Z)|'')*(?:'|\Z) )
    | (?P<string> '(?:[^']|'')*(?:'|\Z) )
    | (?P<dollar> \$(?P<tag>[^\W\d]\w*)?\$.*?(?:\$(?(tag)(?P=tag))\$|\Z) )
    | (?P<name>   "(?:[^"]|"")*(?:"|\Z) )
    | (?P<number> (?<![\w$])(?:\d|\.\d)[\w.]* )
    """,
    re.VERBOSE | re.DOTALL,
)
# A quoted name is kept when nobody would write a value so. In a mistaken `WHERE full_name = "Ada"` PostgreSQL takes the
# value for a name.
_PLAIN_NAME = re.compile(r'"[a-z_][a-z0-9_]*"')


def without_values(statement: str, *, characters: int = 500) -> str:
    """Return a statement on one line with `?` for every literal and without comments, cut to so many characters.

    Quoted names that are not of small letters, digits and underscores are replaced too. Where the end of a string or
    of a comment cannot be told for certain, the text ends.
    """
    kept: list[str] = []
    end = 0
    for found in _VALUES.finditer(statement):
        kept.append(statement[end : found.start()])
        end = found.end()
        if found["name"] is not None and _PLAIN_NAME.fullmatch(found[0]):
            kept.append(found[0])
        else:
            kept.append(" " if found["comment"] is not None else VALUE)
        # With standard_conforming_strings off the string goes on here; comments may be nested.
        if (found["string"] is not None and "\\'" in found[0]) or (found["comment"] or "").rfind("/*") > 0:
            break
    else:
        kept.append(statement[end:])
    return " ".join("".join(kept).split())[:characters]
