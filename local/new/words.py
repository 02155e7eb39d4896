"""What becomes of words: the project's name, and mentions of files and commands that a copy does not have."""

import ast
import posixpath
import re
from collections.abc import Collection, Iterable

# The library's own names, which stay what they are: the package, its modules, and the class, where code or prose says
# it. Everything else that is called so is the project, and gets the copy's name.
OF_THE_LIBRARY = re.compile(
    r"pglifeguard|PGLIFEGUARD|fastapi[./]lifeguard|import Lifeguard\b|\bLifeguard(?=\(|\.\w|`)"
    r"|Lifeguard(?=, (?:Read|Write)DB)"
)
_NAME = re.compile(rf"({OF_THE_LIBRARY.pattern})|lifeguard|Lifeguard|LIFEGUARD")
# Characters of a line of Python: ruff's line-length in pyproject.toml.
LINE = 120
_PREFIX = re.compile(r" *(# )?")
CREDIT = "pglifeguard's "
# Of a page: blocks of code, and what is code within a line.
_BLOCK = r"^ *```(?:.|\n)*?^ *```$|(?<=\n\n)(?: {4}.*\n)+"
_INLINE = r"(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n)(?:.|\n))+?(?<!`)(?P=ticks)(?!`)"
# A bracket in code begins no link.
_LINK = re.compile(
    rf"{_BLOCK}|{_INLINE}"
    r"|(?P<before>(?:(?<=\S)[ \n])?\()?(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)(?P<after>\))?",
    re.MULTILINE,
)
_DECISION = re.compile(r"\bdecision \d{4}\b", re.IGNORECASE)


def renamed(text: str, name: str) -> str:
    """Give the project's name up for the copy's; the library keeps its own."""

    def rename(found: re.Match[str]) -> str:
        word = found.group()
        if found[1]:
            return word
        return name.upper() if word.isupper() else name.capitalize() if word[0].isupper() else name

    return _NAME.sub(rename, text)


def unlinked(text: str, path: str, kept: Collection[str]) -> str:
    """Make plain text of the links of a page to files that a copy does not have.

    Pictures of them go, and so does a link that stands alone in brackets.
    """
    folders = {posixpath.dirname(file) for file in kept}

    def mend(found: re.Match[str]) -> str:
        if found["target"] is None:
            return found.group()
        target = found["target"].partition("#")[0]
        whole = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if not target or "://" in target or whole in kept or whole in folders:
            return found.group()
        if found["image"] or (found["before"] and found["after"]):
            return ""
        said = found["text"]
        named = not said.strip("`").startswith("pglifeguard") and (
            re.fullmatch(r"`?[\w./-]+\.\w+`?|[\w.-]+/[\w./-]+", said) or _DECISION.match(said)
        )
        said = f"{CREDIT}{said[0].lower() + said[1:] if _DECISION.match(said) else said}" if named else said
        return f"{found['before'] or ''}{said}{found['after'] or ''}"

    return re.sub(r"\n{3,}", "\n\n", _LINK.sub(mend, text))


def credited(text: str, left_out: Iterable[str], targets: Iterable[str], *, page: bool) -> str:
    """Say of each file, decision and command of make that is mentioned, and not in the copy, whose it is.

    Within the code of a page nothing is said, so that it can be typed: what it names and a copy does not have is for
    `changes`.
    """
    # Its own folder says already whose a module of the library is.
    named = (path for path in left_out if not path.startswith("pglifeguard/"))
    paths = "|".join(sorted(map(re.escape, named), key=len, reverse=True))
    commands = "|".join(map(re.escape, targets))
    # Not in strings of code, where a path is one, nor where it was said already.
    elsewhere = (
        rf"(?<![\w/.`\"'-])(?<!{CREDIT})(?=`?(?:{paths})/?(?![\w/-]))|(?<!{CREDIT})(?=`make (?:{commands})\b(?!-))"
        rf"|\b(?<!{CREDIT})(?=[Dd]ecision \d{{4}}\b)"
    )
    # Anchors are made of headings.
    skipped = rf"^##.*|{_BLOCK}|{_INLINE}" if page else r"^##.*"
    said = re.sub(rf"{elsewhere}|{skipped}", lambda found: found.group() or CREDIT, text, flags=re.MULTILINE)
    return re.sub(rf"(?<={CREDIT})D(?=ecision)", "d", said)


def wrapped(source: str) -> str:
    """Break the comments and docstrings of Python that became too long by other names; code is ruff's."""
    prose = _docstring_lines(source)
    lines, left = [], source.splitlines()
    for number, line in enumerate(left, 1):
        prefix = _PREFIX.match(line)
        if prefix is None or len(line) <= LINE or not (number in prose or prefix[1]):
            lines.append(line)
            continue
        cut = line.rindex(" ", 0, LINE)
        lines.append(line[:cut])
        overflow = line[cut + 1 :]
        after = left[number] if number < len(left) else ""
        more = _PREFIX.match(after)
        goes_on = more is not None and more.group() == prefix.group() and after[more.end() :].strip(' "')
        if goes_on and (prefix[1] or number + 1 in prose):
            # Into the next line, which may have to be broken in its turn.
            left[number] = f"{prefix.group()}{overflow} {after[prefix.end() :]}"
        else:
            lines.append(f"{prefix.group()}{overflow}")
    return "".join(f"{line}\n" for line in lines)


def _docstring_lines(source: str) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.end_lineno is not None:
                found |= {*range(first.lineno, first.end_lineno + 1)}
    return found
