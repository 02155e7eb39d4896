"""Make the copy: take the files along, rename, change, and put everything in its place at once."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from local.library import vendor
from local.new import changes, files, words
from local.new.locks import pruned
from local.new.makefile import DOCKER as DOCKER_TARGETS
from local.new.makefile import LEFT_OUT as LEFT_OUT_TARGETS
from local.new.makefile import makefile

PROJECT = Path(__file__).parents[2]
TEXTS = Path(__file__).parent / "texts"
# Development dependencies of what is left out.
DROPPED = frozenset({"axe-playwright-python", "check-jsonschema", "matplotlib", "playwright"})
UNUSED = (
    "Of the kubectl layer only the archive with helm in it is used, and not the 400 MB that it can be deployed with."
)
EXTRAS = "cli,dns,fastapi,otel,serving"
FOOT = """
---

This page came with pglifeguard {version}. Its figures, and tests that it tells of and does not name, are that
project's, on its own service and machines.
"""
# Below the title of a page, in a copy without containers.
STACK = """
`docker compose` on this page means the stack of pglifeguard's reference service; this project has none.
"""


class NewError(Exception):
    """There will be no copy; the text is a sentence for a person."""


@dataclass(frozen=True)
class Order:
    """What somebody wants."""

    name: str
    directory: Path
    author: str
    without: frozenset[str] = frozenset()
    docker: bool = True


def make(order: Order, progress: Callable[[str], None]) -> int:
    """Make the copy with its first commit, and return the number of its files. Nothing is left when it fails.

    Raises: NewError, ChangeError, LibraryError, OSError.
    """
    with _half(order.directory) as half:
        progress("Copying what git tracks")
        kept, left_out = _chosen(order)
        version = _library_version()
        for path in kept:
            _copy(path, half / words.renamed(path, order.name))
        progress("Renaming")
        for change in changes.wanted(without=order.without, docker=order.docker):
            file = half / words.renamed(change.path, order.name)
            file.write_text(change.made(file.read_text(encoding="utf-8")), encoding="utf-8")
        targets = (*LEFT_OUT_TARGETS, *(() if order.docker else DOCKER_TARGETS))
        there = {*kept, "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml"}
        for path in kept:
            file = half / words.renamed(path, order.name)
            if not file.is_symlink():
                said = _said(path, file.read_text(encoding="utf-8"), there, left_out, targets)
                text = words.renamed(said, order.name)
                if path.endswith(".py"):
                    text = words.wrapped(text)
                if path.startswith("docs/"):
                    if not order.docker and "docker compose" in text:
                        title, _, rest = text.partition("\n")
                        text = f"{title}\n{STACK}{rest}"
                    text += FOOT.format(version=version)
                file.write_text(text, encoding="utf-8")
        progress("Building pglifeguard")
        (half / "vendor").mkdir()
        library = vendor(PROJECT, half)
        _write_own(order, half, library, version)
        _tidy(half)
        progress("Committing")
        _commit(half, order)
    return sum(1 for path in order.directory.rglob("*") if path.is_file() and ".git" not in path.parts)


def tracked(project: Path = PROJECT) -> list[str]:
    """List the files that git tracks; what they hold is taken from the working tree, committed or not.

    Raises: NewError where there is no git, or no checkout.
    """
    try:
        listed = _git("ls-files", "-z", directory=project)
    except NewError as error:
        raise NewError(f"A copy is made of what git tracks, and {project} is no checkout: {error}") from None
    if not listed:
        raise NewError(f"A copy is made of what git tracks, and git tracks nothing in {project}.")
    return [path for path in listed.split("\0") if path and (project / path).exists()]


def check_code(project: Path = PROJECT) -> None:
    """Refuse code that git does not track: `app/main.py`, which it does, may name such a domain already.

    Raises: NewError.
    """
    strange = _git("ls-files", "-z", "--others", "--exclude-standard", "--", "app", "migrations", directory=project)
    if names := [path for path in strange.split("\0") if path]:
        more = f" and {len(names) - 5} more files" if len(names) > 5 else ""  # noqa: PLR2004  # Enough to see.
        raise NewError(
            f"git does not track {', '.join(names[:5])}{more}: `git add` what the copy is to have, with its tests, or "
            "move it away."
        )


def _chosen(order: Order) -> tuple[list[str], list[str]]:
    """Return the files that go along, and those that do not."""
    every = tracked()
    for domain in sorted(order.without):
        if not any(path.startswith(f"app/{domain}/") for path in every):
            raise NewError(f"WITHOUT leaves out {domain}, and there is no app/{domain} here: take it out of WITHOUT.")
    check_code()
    if forgotten := files.unlisted(every):
        more = f" and {len(forgotten) - 5} more files" if len(forgotten) > 5 else ""  # noqa: PLR2004  # Enough to see.
        raise NewError(f"local/new/files.py does not say whether a copy gets {', '.join(forgotten[:5])}{more}.")
    left_out = [*files.LEFT_OUT, *(() if order.docker else files.DOCKER)]
    left_out += [pattern for domain in order.without for pattern in files.DOMAINS[domain]]
    kept = [path for path in every if not files.matches(path, left_out)]
    for domain in sorted(order.without):
        _check_nothing_needs(domain, [path for path in kept if re.fullmatch(r"(app|migrations)/.*\.py", path)])
    own = {
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "pyproject.toml",
        ".ci/run",
        "requirements.txt",
        "requirements-dev.txt",
        "requirements-fuzz.txt",
    }
    own |= {"requirements-deploy.txt"} if order.docker else set()
    gone = {*every} - {*kept} - own
    folders = _folders(gone) - _folders(kept)
    return kept, sorted(gone | {folder for folder in folders if "/" in folder})


def _check_nothing_needs(domain: str, code: list[str]) -> None:
    """Refuse to leave a domain out that code of the owner's imports, or to whose table a foreign key leads."""
    named = re.compile(rf"""\bapp\.{domain}\b|["']{domain}\.\w+["']""")
    needing = [path for path in code if named.search((PROJECT / path).read_text(encoding="utf-8"))]
    if needing:
        raise NewError(f"WITHOUT leaves out {domain}, which {', '.join(needing[:5])} cannot do without.")


def _folders(paths: Iterable[str]) -> set[str]:
    return {str(folder) for path in paths for folder in PurePosixPath(path).parents}


def _copy(path: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(PROJECT / path, target, follow_symlinks=False)


def _said(path: str, text: str, there: set[str], left_out: list[str], targets: tuple[str, ...]) -> str:
    if path == "LICENSE" or path.startswith("grafana/image/dashboards/"):
        return text
    page = path.endswith(".md")
    return words.credited(words.unlinked(text, path, there) if page else text, left_out, targets, page=page)


def _write_own(order: Order, half: Path, library: str, version: str) -> None:
    """Write the files that a copy has instead of ours."""
    name = order.name
    ours = {
        path: (PROJECT / path).read_text(encoding="utf-8")
        for path in ("README.md", "Makefile", "pyproject.toml", "LICENSE")
    }
    written = {
        "README.md": _readme(ours["README.md"], order, version),
        "CHANGELOG.md": (TEXTS / "CHANGELOG.md").read_text(encoding="utf-8").replace("@VERSION@", version),
        "Makefile": words.renamed(makefile(ours["Makefile"], docker=order.docker), name),
        "pyproject.toml": words.renamed(_pyproject(ours["pyproject.toml"], order, version), name),
        "LICENSE": _license(ours["LICENSE"], order.author),
        ".ci/run": (TEXTS / "ci.sh").read_text(encoding="utf-8"),
    }
    for lock, of_the_library in (
        ("requirements.txt", library),
        ("requirements-dev.txt", library),
        ("requirements-audit.txt", None),
        ("requirements-deploy.txt", None),
        ("requirements-fuzz.txt", None),
    ):
        if order.docker or lock != "requirements-deploy.txt":
            text = (PROJECT / lock).read_text(encoding="utf-8")
            written[lock] = pruned(text, DROPPED, name=name, library=of_the_library)
    (half / ".ci").mkdir(exist_ok=True)
    for path, text in written.items():
        (half / path).write_text(text, encoding="utf-8")
    (half / ".ci/run").chmod(0o755)


def _readme(ours: str, order: Order, version: str) -> str:
    text = (TEXTS / "README.md").read_text(encoding="utf-8")
    for gone in ("no docker" if order.docker else "docker", "users" if "users" in order.without else "no users"):
        text = re.sub(rf"<!-- {gone} -->\n(?:.*\n)*?<!-- /{gone} -->\n", "", text)
    text = re.sub(r"<!-- .* -->\n", "", text)
    table = re.findall(r"^\|.*$", ours.partition("\n## Routes\n")[2].partition("\n## ")[0], re.MULTILINE)
    routes = [row for row in table if not any(f" /{domain}" in row for domain in order.without)]
    domains = [domain for domain in ("patients", "users", "reports") if domain not in order.without]
    listed = " and ".join(filter(None, [", ".join(domains[:-1]), domains[-1]])).capitalize()
    examples = f"{listed} are its example{'s' if len(domains) > 1 else ''}"
    text = text.replace("@VERSION@", version).replace("@EXAMPLES@", examples).replace("@ROUTES@", "\n".join(routes))
    text = words.unlinked(text, "README.md", {*_chosen(order)[0]})
    return words.renamed(text, order.name)


def _license(ours: str, author: str) -> str:
    """Put the copy's authors above those of what it is made of, whom the licence asks to go on naming."""
    return re.sub(
        r"^Copyright \(c\) (\d+) The Lifeguard authors$",
        lambda found: f"Copyright (c) {found[1]} {author}\nPortions copyright (c) {found[1]} the pglifeguard authors",
        ours,
        flags=re.MULTILINE,
    )


def _pyproject(ours: str, order: Order, version: str) -> str:
    """Write the project's head anew; what follows, for mypy, ruff, pytest and coverage, is ours with less in it."""
    document = tomllib.loads(ours)
    groups = document["dependency-groups"]

    def listed(requirements: list[str]) -> str:
        return (
            "[\n" + "".join(f'    "{requirement.replace(chr(34), chr(39))}",\n' for requirement in requirements) + "]"
        )

    service = [f"pglifeguard[{EXTRAS}]=={version}", *groups["service"]]
    dev = [one for one in groups["dev"] if re.split(r"[^\w.-]", one)[0] not in DROPPED]
    dev = [f"pglifeguard[testing]=={version}", *dev]
    overrides = [one for one in document["tool"]["uv"]["override-dependencies"] if not one.startswith("psycopg2")]
    head = [
        "# The service is deployed from this tree and published nowhere. `make lock` writes the hashed locks.",
        "[project]",
        'name = "lifeguard"',
        f'version = "{changes.VERSION}"',
        f'requires-python = "{document["project"]["requires-python"]}"',
        "# The first one is the wheel in vendor/.",
        f"dependencies = {listed(service)}",
        "",
        "[dependency-groups]",
        f"dev = {listed(dev)}",
        "# What `make audit` runs; in an environment of its own, .venv-audit.",
        f"audit = {listed(groups['audit'])}",
        *(["# For `make test-deploy` alone.", f"deploy = {listed(groups['deploy'])}"] if order.docker else []),
        "# For `make fuzz` alone, in an environment of its own.",
        f"fuzz = {listed(groups['fuzz'])}",
        "",
        "[tool.uv]",
        "package = false",
        'find-links = ["vendor"]',
        "# Two checkouts of one version are two libraries, and uv would keep the one that is there.",
        'reinstall-package = ["pglifeguard"]',
        *([f"# {UNUSED}", f"override-dependencies = {listed(overrides)}"] if order.docker else []),
        "",
        "[tool.mypy]",
    ]
    rest = ours.partition("\n[tool.mypy]\n")[2]
    for change in PYPROJECT:
        rest = change.made(rest)
    if not order.docker:
        rest = rest.replace("# tests/deploy needs helm: it has a target of its own.\n", "").replace(', "deploy"]', "]")
    return "\n".join(head) + "\n" + rest


PYPROJECT = (
    changes.Change(
        "pyproject.toml", r"^files = .*$", 'files = ["app", "fuzz", "grafana", "local", "migrations", "tests"]'
    ),
    changes.Change("pyproject.toml", r"^# There `app` is .*\nexclude = .*\n# Modules of .*\n"),
    changes.Change("pyproject.toml", r'^"bench/\*\*" = \[\n(?:.*\n)+?\]\n'),
    changes.exactly(
        "pyproject.toml",
        "[tool.ruff.lint.pydocstyle]\n",
        "[tool.ruff.lint.isort]\n"
        "# Imports stand where they stood when the library was in the tree.\n"
        'known-first-party = ["pglifeguard"]\n\n'
        "[tool.ruff.lint.pydocstyle]\n",
    ),
    changes.Change(
        "pyproject.toml",
        r"^# tests/backup needs .*\n(?:# .*\n)?norecursedirs = .*$",
        '# tests/deploy needs helm: it has a target of its own.\nnorecursedirs = [".*", "deploy"]',
    ),
    changes.Change("pyproject.toml", r'^"docs/conf\.py" = .*\n'),
    changes.exactly("pyproject.toml", 'source = ["app", "pglifeguard"]', 'source = ["app"]'),
    changes.exactly(
        "pyproject.toml", "fail_under = 100\n", "fail_under = 97 # pglifeguard's own tests reach the rest.\n"
    ),
    changes.exactly(
        "pyproject.toml", 'omit = ["app/__main__.py", "pglifeguard/__main__.py"]', 'omit = ["app/__main__.py"]'
    ),
)


def _library_version() -> str:
    text = (PROJECT / "pglifeguard/__init__.py").read_text(encoding="utf-8")
    return str(re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0])


def _tidy(half: Path) -> None:
    """Sort imports and break lines as ruff does: another name is longer or shorter, and comes elsewhere."""
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--quiet", "--fix", "--select", "I,D209"], ["format", "--quiet"]):
        run = subprocess.run([*ruff, *command, "."], cwd=half, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise NewError(f"ruff: {run.stdout}{run.stderr}")
    shutil.rmtree(half / ".ruff_cache", ignore_errors=True)


def _commit(half: Path, order: Order) -> None:
    """Begin a history of its own, also where git does not know who commits."""
    who = [] if _git("config", "user.name", directory=half, check=False) else ["-c", f"user.name={order.author}"]
    who += [] if _git("config", "user.email", directory=half, check=False) else ["-c", "user.email="]
    _git("init", "--quiet", "--initial-branch", "main", directory=half)
    _git("add", "--all", "--force", directory=half)
    message = f"Start {order.name} from pglifeguard's reference service"
    _git(*who, "-c", "commit.gpgsign=false", "commit", "--quiet", "--no-verify", "--message", message, directory=half)


def _git(*arguments: str, directory: Path, check: bool = True) -> str:
    program = shutil.which("git")
    if program is None:
        raise NewError("git is not on the PATH: it says which files there are, and keeps the copy's history.")
    run = subprocess.run(
        [program, *arguments], cwd=directory, env=_environment(), capture_output=True, text=True, check=False
    )
    if check and run.returncode != 0:
        raise NewError(f"git {arguments[0]}: {run.stderr.strip()}")
    return run.stdout.strip()


def author_known() -> str:
    """Return who git says is here; nothing where it does not know."""
    return _git("config", "user.name", directory=PROJECT, check=False)


def _environment() -> dict[str, str]:
    """Leave out what git tells its hooks: it would lead to another repository."""
    return {
        name: value for name, value in os.environ.items() if name not in {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}
    }


@contextmanager
def _half(directory: Path) -> Iterator[Path]:
    """Give a place beside the copy's; it becomes the copy when all went well, and goes when not."""
    try:
        half = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise NewError(f"DIR {directory} cannot be made in {directory.parent}: {error.strerror}.") from None
    try:
        yield half
        half.chmod(0o755)
        if directory.exists():
            directory.rmdir()
        half.rename(directory)
    finally:
        shutil.rmtree(half, ignore_errors=True)
