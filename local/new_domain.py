"""What `python -m app new-domain` makes: a folder of app/, its tests, its migration, and its name in app/main.py.

The texts are in local/domain/, written of things; they are not part of the service, so no image holds them.
"""

import io
import keyword
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory

ROOT = Path(__file__).parent.parent
TEMPLATES = Path(__file__).parent / "domain"
# PostgreSQL's names have 63 bytes at most; this leaves room for those of constraints and indexes.
LONGEST = 40
# They end in s, and one of them is called the same.
NO_PLURALS = frozenset({"news", "series", "species"})
# Paths that the library serves, and tables that are nobody's domain.
RESERVED = {
    "alembic_version",
    "audit",
    "audit_trail",
    "debug",
    "docs",
    "health",
    "idempotency_keys",
    "idempotency_rows",
    "metrics",
}
DOMAINS = re.compile(r"^DOMAINS = \(([^)]*)\)", re.MULTILINE)
# As a word of its own or as a part of a name, but not of "nothing".
THING = re.compile("(?<![a-z])(?:Thing|things|thing)")
LINE = 120


class Refused(Exception):
    """A domain that cannot be made, in a sentence; nothing was changed."""


def make(name: str, singular: str | None = None, *, root: Path) -> list[Path]:
    """Make a domain and return the files that were made or changed, by their paths below `root`.

    Raises: Refused. Then, and if anything else fails, the tree is what it was.
    """
    _check_word(name)
    one = singular_of(name) if singular is None else singular
    _check(name, one)
    texts = _texts(name, one, root)
    main = root / "app/main.py"
    before = main.read_text(encoding="utf-8")
    after = _registered(before, name)
    folders = [root / "app" / name, root / "tests/app" / name]
    for path in (*folders, root / f"app/{name}.py", *texts):
        if path.exists():
            raise Refused(f"{path.relative_to(root)} exists already, and is not overwritten.")
    try:
        for folder in folders:
            folder.mkdir()
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        for command in (["check", "--fix-only"], ["format"], ["check"]):
            _ruff(*command, *texts, root=root)
        main.write_text(after, encoding="utf-8")
    except BaseException:  # Ctrl-C and a full disk leave no half of a domain either.
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        for path in texts:
            path.unlink(missing_ok=True)
        main.write_text(before, encoding="utf-8")
        raise
    return [path.relative_to(root) for path in (*texts, main)]


def singular_of(name: str) -> str:
    """Guess what one of them is called. Raises: Refused."""
    endings = (("ies", "y"), ("lyses", "lysis"), ("(ss|x|ch|sh|zz|(?<![ao])us)es", r"\1"), ("([rt]o)es", r"\1"))
    for ending, instead in (*endings, ("([^s])s", r"\1")) if name not in NO_PLURALS else ():
        found, times = re.subn(f"(?<=..){ending}$", instead, name)
        if times:
            return found
    raise Refused(f"{name!r} is no plural whose singular can be guessed: name another, or say --singular.")


def _check_word(word: str) -> None:
    if not re.fullmatch(rf"[a-z][a-z0-9_]{{1,{LONGEST - 1}}}", word):
        raise Refused(
            f"{word!r} is no name for a domain: it begins with a small letter, goes on with small letters, digits "
            f"and _, and has from 2 to {LONGEST} of them in all."
        )
    if keyword.iskeyword(word):
        raise Refused(f"{word!r} is a word of Python: choose another name.")


def _check(name: str, singular: str) -> None:
    _check_word(singular)
    if name == singular:
        raise Refused(f"{name!r} is both plural and singular: say what one of them is called by --singular.")
    if name in RESERVED:
        raise Refused(f"{name!r} is a path or a table of the library: choose another name.")
    ours, others = set[str](), set[str]()
    for template in TEMPLATES.rglob("*.tmpl"):
        for word in _names(template.read_text(encoding="utf-8")):
            (ours if THING.search(word) else others).add(_worded(word, name, singular))
    if taken := sorted(ours & others):
        raise Refused(f"{name!r} would give {taken[0]!r} two meanings in its code: choose another name.")


def _names(source: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield token.string


def _worded(text: str, name: str, singular: str) -> str:
    """Write of this domain what is written of things."""
    if singular[0] in "aeio":
        text = re.sub(r"\b([Aa])(?= thing\b)", r"\1n", text)
    words = {"Thing": singular.title().replace("_", ""), "things": name, "thing": singular}
    return THING.sub(lambda found: words[found[0]], text)


def _texts(name: str, singular: str, root: Path) -> dict[Path, str]:
    heads = ScriptDirectory.from_config(Config(root / "alembic.ini")).get_heads()
    if len(heads) != 1 or not heads[0].isdigit():
        raise Refused(
            f"The migrations' newest version is {', '.join(heads) or 'missing'}, and not one number. Give it the next "
            "number, in its file's name and as its `revision`, and let each migration follow one other."
        )
    revision = f"{int(heads[0]) + 1:04}"
    places = {"app": root / "app" / name, "tests": root / "tests/app" / name, "domain": root / "migrations/versions"}
    texts = {}
    for template in sorted(TEMPLATES.rglob("*.tmpl")):
        file = f"{revision}_{name}.py" if template.stem == "migration.py" else template.stem
        text = _worded(template.read_text(encoding="utf-8"), name, singular)
        text = text.replace("DOWN_REVISION", heads[0]).replace("REVISION", revision)
        texts[places[template.parent.name] / file] = text
    return texts


def _registered(source: str, name: str) -> str:
    """Add the name to the domains of app/main.py. Raises: Refused."""
    found = DOMAINS.search(source)
    if found is None:
        raise Refused('app/main.py has no line like DOMAINS = ("patients", "users").')
    domains = re.findall(r'"(\w+)"', found[1])
    if name in domains:
        raise Refused(f"app/main.py names {name!r} already.")
    names = [f'"{each}"' for each in [*domains, name]]
    line = f"DOMAINS = ({', '.join(names)})"
    if len(line) > LINE:
        line = "DOMAINS = (\n" + "".join(f"    {each},\n" for each in names) + ")"
    return source[: found.start()] + line + source[found.end() :]


def _ruff(*arguments: str | Path, root: Path) -> None:
    command = [sys.executable, "-m", "ruff", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"ruff, which sorts and formats what was made, says:\n{done.stdout}{done.stderr}".rstrip())
