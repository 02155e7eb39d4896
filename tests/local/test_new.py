"""`make new`, by what it makes: copies of each kind are made once, and read. tests/new installs one and runs it."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from local.library import LibraryError, vendor
from local.new import changes, copying, files, makefile
from local.new.copying import NewError, Order, check_code, make, tracked
from local.new.names import refusal
from local.new.words import credited, renamed, unlinked, wrapped
from local.new_domain import DOMAINS, _registered
from local.setup import PROJECT

# Nobody has told git who they are: no file of settings, and no home to look into.
NOBODY = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "HOME": "/nonexistent"}
KINDS = {
    "whole": ("clinic", frozenset[str](), True),
    "no users": ("clinic", frozenset({"users"}), True),
    "no reports": ("x1", frozenset({"reports"}), True),
    "no docker": ("clinic", frozenset[str](), False),
    "small": ("a2345678901234567890", frozenset({"users", "reports"}), False),
}


@dataclass(frozen=True)
class Copy:
    """A copy that was made, and its order."""

    order: Order

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self.order.directory

    def read(self, path: str) -> str:
        """Read a file of it."""
        return (self.directory / path).read_text(encoding="utf-8")

    def git(self, *arguments: str) -> str:
        """Ask its history."""
        return subprocess.run(
            ["git", *arguments], cwd=self.directory, check=True, capture_output=True, text=True
        ).stdout

    def files(self) -> list[str]:
        """List what is in its first commit."""
        return self.git("ls-files").splitlines()

    def texts(self) -> Iterator[tuple[str, str]]:
        """Give each file of it that is one of text."""
        for path in self.files():
            if not path.endswith(".whl") and not (self.directory / path).is_symlink():
                yield path, self.read(path)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Copy]:
    """Give a copy of each kind."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in NOBODY.items():
            patch.setenv(variable, value)
        for kind, (name, without, docker) in KINDS.items():
            directory = tmp_path_factory.mktemp("copies") / name
            order = Order(name, directory, "Clinic & Co", without, docker=docker)
            make(order, lambda _: None)
            made[kind] = Copy(order)
    return made


@pytest.fixture(params=KINDS)
def copy(request: pytest.FixtureRequest, copies: dict[str, Copy]) -> Copy:
    """Give each copy in turn."""
    return copies[request.param]


@pytest.fixture(scope="module")
def whole(copies: dict[str, Copy]) -> Copy:
    """Give the copy that has everything."""
    return copies["whole"]


@pytest.fixture(scope="module")
def small(copies: dict[str, Copy]) -> Copy:
    """Give the copy that has as little as can be."""
    return copies["small"]


def code_of(page: str) -> Iterator[str]:
    """Give what is code on a page: blocks, fenced or indented, and then what stands in backticks."""
    block = re.compile(r"^( *)```.*\n(?P<fenced>(?:.*\n)*?)\1```$|(?<=\n\n)(?P<indented>(?: {4}.*\n)+)", re.MULTILINE)
    for found in block.finditer(page):
        yield found["fenced"] or found["indented"]
    for paragraph in block.sub("", page).split("\n\n"):
        for found in re.finditer(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", paragraph, re.DOTALL):
            yield found[2]


def new(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-m", "local.new", *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def test_each_file_is_taken_along_or_left_out() -> None:
    """A new file is on one of the two lists of local/new/files.py, and no pattern there is about nothing."""
    every = tracked()

    assert files.unlisted(every) == []
    patterns = {*files.LEFT_OUT, *files.KEPT, *files.DOCKER, *(p for each in files.DOMAINS.values() for p in each)}
    # Made with this command, and in no commit before it.
    own = {"tests/local/test_new.py", "tests/new/*", "docs/make-it-yours.md"}
    assert sorted(p for p in patterns - own if not any(files.matches(path, [p]) for path in every)) == []
    assert files.unlisted(["tests/test_of_tomorrow.py"]) == ["tests/test_of_tomorrow.py"]


def test_each_target_is_taken_along_or_left_out() -> None:
    """A new target of the Makefile is on one of the two lists of local/new/makefile.py."""
    listed = {*makefile.LEFT_OUT, *makefile.KEPT}

    assert makefile.targets((PROJECT / "Makefile").read_text(encoding="utf-8")) == listed


def test_tracked_files_are_taken_as_they_are_now(tmp_path: Path) -> None:
    """Of a working tree what git tracks goes along; what it does not, or what was removed, does not."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    for name in ("kept", "removed", "unknown"):
        (tmp_path / name).touch()
    subprocess.run(["git", "add", "kept", "removed"], cwd=tmp_path, check=True)
    (tmp_path / "removed").unlink()

    assert tracked(tmp_path) == ["kept"]


def test_code_that_git_does_not_track_is_named(tmp_path: Path) -> None:
    """A domain that was just made is named by app/main.py, which goes along: the copy would not start."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "app/orders").mkdir(parents=True)
    check_code(tmp_path)
    (tmp_path / "app/orders/routes.py").touch()

    with pytest.raises(NewError, match=r"git does not track app/orders/routes\.py: `git add`"):
        check_code(tmp_path)


def test_folder_of_which_git_tracks_nothing_is_no_checkout(tmp_path: Path) -> None:
    """As when an archive was unpacked within another repository."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "unpacked").mkdir()

    with pytest.raises(NewError, match="git tracks nothing in"):
        tracked(tmp_path / "unpacked")


def test_name_is_no_variable_of_the_code() -> None:
    """A name that the code has already, as settings or state, would be given to something else."""
    for path in tracked():
        if path.endswith(".py") and not files.matches(path, files.LEFT_OUT):
            names = {
                node.id
                for node in ast.walk(ast.parse((PROJECT / path).read_text(encoding="utf-8")))
                if isinstance(node, ast.Name)
            }
            assert "lifeguard" not in names, path


@pytest.mark.parametrize("name", ["clinic", "ab", "orders2", "a" * 20])
def test_name_is_taken(name: str) -> None:
    """One word of letters and digits."""
    assert refusal(name) is None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "2 to 20 lower-case letters"),
        ("a", "2 to 20 lower-case letters"),
        ("a" * 21, "2 to 20 lower-case letters"),
        ("Clinic", "2 to 20 lower-case letters"),
        ("my-clinic", "2 to 20 lower-case letters"),
        ("my_clinic", "2 to 20 lower-case letters"),
        ("2clinic", "2 to 20 lower-case letters"),
        ("klinik\n", "2 to 20 lower-case letters"),
        ("klinïk", "2 to 20 lower-case letters"),
        ("class", "of Python's own"),
        ("match", "of Python's own"),
        ("list", "of Python's own"),
        ("true", "what YAML takes"),
        ("yes", "what YAML takes"),
        ("binary", "reserved word of SQL"),
        ("test", "what something else is called here"),
        ("logging", "of Python's own"),
        ("user", "reserved word of SQL"),
        ("order", "reserved word of SQL"),
        ("app", "what something else is called here"),
        ("postgres", "what something else is called here"),
        ("lifeguard", "what something else is called here"),
        ("pglifeguard", "what something else is called here"),
        ("fastapi", "a package that the service depends on"),
    ],
)
def test_name_is_refused_with_a_sentence(name: str, why: str) -> None:
    """It would be no name of a database, a chart, an image, a package; or the name of something else."""
    sentence = refusal(name, ["fastapi"])

    assert sentence is not None
    assert why in sentence


def test_wrong_orders_are_refused_and_make_nothing(tmp_path: Path) -> None:
    """Each is a sentence on stderr, status 1, and nothing in the folder is touched."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("kept", encoding="utf-8")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    wrong: list[tuple[str, list[str | Path]]] = [
        ("NAME 'fastapi' is a package that", ["fastapi", tmp_path / "made"]),
        ("is there and not empty", ["clinic", tmp_path / "full"]),
        ("is there and not empty", ["clinic", tmp_path / "file"]),
        ("a folder that does not exist", ["clinic", tmp_path / "no/made"]),
        ("is inside of this project", ["clinic", PROJECT / "made"]),
        ("WITHOUT takes users, reports, or both", ["clinic", tmp_path / "made", "--without", "patients"]),
        ("; patients cannot be left out", ["clinic", tmp_path / "made", "--without", "users patients"]),
        ("Say NAME=…, as in", ["", tmp_path / "made"]),
        ("Say DIR=…, as in", ["clinic", ""]),
        ("Say NAME=… and DIR=…, as in", ["", ""]),
        ("DIR /proc/made ", ["clinic", "/proc/made"]),
        (": File name too long.", ["clinic", f"/{'a' * 300}"]),
        ("a person whom this machine does not know", ["clinic", "~nobody.of.this.name/made"]),
        ("AUTHOR is one line", ["clinic", tmp_path / "made", "--author", "a\nb"]),
    ]
    for sentence, arguments in wrong:
        run = new(*arguments)

        assert (run.returncode, run.stdout, "Traceback" in run.stderr) == (1, "", False), run.stderr
        assert sentence in run.stderr
        assert not re.search(r"\[Errno|--without", run.stderr)
    assert sorted(tmp_path.rglob("*")) == before


def test_next_command_can_be_typed(tmp_path: Path) -> None:
    """Also where the folder's name has a space."""
    run = new("clinic", tmp_path / "two words")

    assert run.returncode == 0, run.stderr
    command = run.stdout.partition("Next: ")[2].replace("make run", "pwd")
    assert subprocess.check_output(["sh", "-c", command], text=True).strip() == str(tmp_path / "two words")


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where words that are to be changed are no longer there, it says so, and the empty folder is as it was."""
    forgotten = changes.exactly("app/main.py", "nobody ever wrote this")
    monkeypatch.setattr(changes, "EVERYWHERE", (*changes.EVERYWHERE, forgotten))
    (tmp_path / "clinic").mkdir()

    with pytest.raises(changes.ChangeError, match=r"app/main\.py has no .* any more"):
        make(Order("clinic", tmp_path / "clinic", "Clinic"), lambda _: None)

    assert sorted(tmp_path.rglob("*")) == [tmp_path / "clinic"]


def test_copy_begins_a_history(copy: Copy) -> None:
    """One commit, of an author whom the order names where git knows nobody, and nothing beside it."""
    name = copy.order.name

    assert copy.git("log", "--format=%an: %s") == f"Clinic & Co: Start {name} from pglifeguard's reference service\n"
    assert copy.git("status", "--porcelain", "--ignored") == ""
    assert copy.git("branch", "--show-current") == "main\n"


def test_copy_has_its_own_name_everywhere(copy: Copy) -> None:
    """Of ours, only the library is named: the package, and its class where code or a page uses it."""
    for path in copy.files():
        assert "lifeguard" not in path.replace("pglifeguard", "").lower()
    for path, text in copy.texts():
        for line in text.splitlines():
            left = re.sub(r"pglifeguard|PGLIFEGUARD|import Lifeguard\b|\bLifeguard\(|`Lifeguard`", "", line)
            assert "lifeguard" not in left.lower(), f"{path}: {line}"


def test_copy_is_called_by_its_name(whole: Copy) -> None:
    """Database, compose project, images, chart, dashboards, title, locals: each has the copy's name."""
    for path, words in {
        "docker-compose.yml": "\nname: clinic\n",
        "pgbouncer/pgbouncer.ini": "clinic = host=primary port=5432 dbname=clinic\n",
        "deploy/helm/clinic/Chart.yaml": "\nname: clinic\n",
        "deploy/helm/clinic/values.yaml": "repository: clinic-app\n",
        "grafana/image/dashboards/clinic-pools.json": '"title": "Clinic: pools"',
        "grafana/image/provisioning/dashboards/clinic.yml": "folder: Clinic\n",
        "prometheus/alerts.yml": '"/d/clinic-pools?',
        "app/main.py": '"title": "Clinic"',
        "app/settings.py": '"clinic", min_length=1',
        ".env.example": "# DATABASE_APPLICATION_NAME=clinic\n",
        "migrations/settings.py": '"clinic-migrations"',
        "local/runs.py": '"CLINIC_LOCAL"',
        "pyproject.toml": 'name = "clinic"\nversion = "0.1.0"\n',
        "deploy/make-certificates.sh": "/CN=Clinic's own authority",
    }.items():
        assert words in whole.read(path), path
    assert (whole.directory / "deploy/helm/clinic/files/dashboards").resolve() == (
        whole.directory / "grafana/image/dashboards"
    )


def test_copy_has_papers_of_its_own(copy: Copy) -> None:
    """Title, licence and changelog are the copy's; the licence goes on naming whose work it is made of."""
    assert copy.read("README.md").startswith(f"# {copy.order.name.capitalize()}\n")
    assert re.search(
        r"^Copyright \(c\) \d+ Clinic & Co\nPortions copyright \(c\) \d+ the pglifeguard authors$",
        copy.read("LICENSE"),
        re.MULTILINE,
    )
    assert "THE SOFTWARE IS PROVIDED" in copy.read("LICENSE")
    assert copy.read("CHANGELOG.md").count("\n## ") == copy.read("CHANGELOG.md").count("\n- ") == 1
    for page in (copy.directory / "docs").glob("*.md"):
        assert page.read_text(encoding="utf-8").endswith("on its own service and machines.\n"), page


def test_links_lead_somewhere(copy: Copy) -> None:
    """Every relative link of a page names a file of the copy, and every anchor a heading of it."""
    found = 0
    for path, text in copy.texts():
        page = copy.directory / path
        for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text) if path.endswith(".md") else ():
            name, _, anchor = target.partition("#")
            linked = page.parent / name if name else page
            assert linked.exists(), f"{path} links to {target}"
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{path} links to {target}"
            found += 1
    assert found > 50


def test_what_is_not_there_is_said_to_be_elsewhere(copy: Copy) -> None:
    """A page, a test, a decision or a target that is named and left out is called pglifeguard's."""
    targets = makefile.targets(copy.read("Makefile"))
    mentions = re.compile(r"(?P<before>.{0,15}?)(?P<path>(?<![\w./])(?:docs|tests|bench|examples)/[\w./-]*\w)")
    for path, text in copy.texts():
        for found in mentions.finditer(text):
            # Or a page or a command is about to make it.
            there = (copy.directory / found["path"]).exists() or re.search("NAME|appointments", found["path"])
            assert there or re.search(r"pglifeguard's `?$", found["before"]), f"{path}: {found.group()}"
        for command in re.findall(r"(?<!pglifeguard's )`make ([a-z-]+)", text):
            assert command in targets, f"{path}: make {command}"
        assert not re.search(r"(?<!pglifeguard's )\bdecision \d{4}", text), path


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("a `b c` d ``e ` f`` `g", ["b c", "e ` f"]),
        ("a\n\n    b\n    c\n\nd `e`\n", ["    b\n    c\n", "e"]),
        ("a\n\n```text\nb `c`\n```\n\n`d\ne`\n", ["b `c`\n", "d\ne"]),
    ],
)
def test_code_of_a_page_is_found(said: str, code: list[str]) -> None:
    """Fenced, indented, and within a line, which may be broken."""
    assert [*code_of(said)] == code


def test_scopes_are_those_of_its_domains(copy: Copy) -> None:
    """The page lists no scope of a domain that was left out."""
    page = copy.read("docs/tokens.md")

    for domain in ("users", "reports"):
        assert (f"| `{domain}:read`" in page) == (domain not in copy.order.without)


@pytest.mark.parametrize(
    ("domains", "without", "left"),
    [
        (("patients", "users", "reports", "beds"), {"reports"}, ("patients", "users", "beds")),
        (("patients", "beds", "reports"), {"reports"}, ("patients", "beds")),
        (("reports", "patients", "users"), {"reports", "users"}, ("patients",)),
        (("patients", "users", "reports", "beds"), {"reports", "users"}, ("patients", "beds")),
        (("patients", "beds", "users"), {"users"}, ("patients", "beds")),
        (("patients", "users"), {"users"}, ("patients",)),
        (("patients", "users", "reports", "x" * 39, "y" * 39), {"reports", "users"}, ("patients", "x" * 39, "y" * 39)),
    ],
)
def test_domains_of_the_owner_stay(domains: tuple[str, ...], without: set[str], left: tuple[str, ...]) -> None:
    """Whatever stands beside them in app/main.py, in one line or in several, those that are left out go."""
    source = (PROJECT / "app/main.py").read_text(encoding="utf-8")
    text = DOMAINS.sub("DOMAINS = ()", source)
    for name in domains:
        text = _registered(text, name)

    for change in changes.wanted(without=frozenset(without), docker=True):
        if change.path == "app/main.py":
            text = change.made(text)

    found = DOMAINS.search(text)
    assert found is not None
    assert ast.literal_eval(found[0].removeprefix("DOMAINS = ")) == left


def test_domain_that_is_not_there_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has removed it here has nothing to leave out, and is told so."""
    monkeypatch.setattr(copying, "tracked", lambda: ["app/main.py", "app/patients/routes.py"])

    with pytest.raises(NewError, match=r"^WITHOUT leaves out users, and there is no app/users here: take it out"):
        copying._chosen(Order("clinic", Path("clinic"), "Clinic", frozenset({"users"})))


def test_domain_that_is_needed_is_not_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A copy without it would not start, or not migrate; the sentence names what needs it."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app/a.py").write_text('ForeignKey("users.id")', encoding="utf-8")
    (tmp_path / "app/b.py").write_text("from app.users.models import User", encoding="utf-8")
    (tmp_path / "app/c.py").write_text("users.id, 'people.id', app.userspace", encoding="utf-8")
    monkeypatch.setattr(copying, "PROJECT", tmp_path)

    with pytest.raises(NewError, match=r"^WITHOUT leaves out users, which app/a\.py, app/b\.py cannot do without\.$"):
        copying._check_nothing_needs("users", ["app/a.py", "app/b.py", "app/c.py"])
    copying._check_nothing_needs("reports", ["app/a.py", "app/b.py", "app/c.py"])


def test_library_may_be_in_a_folder_with_a_space(copy: Copy) -> None:
    """The order to take it reaches the program as one word, which may be empty."""
    said = [
        subprocess.run(
            ["make", "--no-print-directory", "-n", "-o", "install", "update-pglifeguard", *given],
            cwd=copy.directory, capture_output=True, text=True, check=True,
        ).stdout.rstrip("\n")
        for given in (["FROM=../a b"], [])
    ]  # fmt: skip

    assert said[0].endswith('local.library "../a b"')
    assert said[1].endswith('local.library ""')


def test_commands_of_pages_can_be_typed(copy: Copy) -> None:
    """No code of a page has words of ours in it, or names a file or target that the copy does not have."""
    gone = {renamed(path, copy.order.name) for path in tracked()} - {*copy.files()}
    named = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, sorted(gone)))})(?![\w/-])")
    targets = makefile.targets(copy.read("Makefile"))
    found = 0
    for path, text in copy.texts():
        for code in code_of(text) if path.endswith(".md") else ():
            assert "pglifeguard's" not in code, f"{path}: {code}"
            # One word is a name, and whose it is stands before it.
            if " " in code.strip() and not code.startswith("make "):
                assert not named.search(code), f"{path}: {code}"
                assert {*re.findall(r"^(?:\$ | {4})?make ([a-z-]+)", code, re.MULTILINE)} <= targets, f"{path}: {code}"
            found += 1
    assert found > 500


def test_pages_tell_of_the_copy(copies: dict[str, Copy]) -> None:
    """What is true of this tree alone is not said: tests that read its pages, and its own outage."""
    for copy in copies.values():
        pages = "".join(text for path, text in copy.texts() if path.endswith(".md"))
        assert "this project grew from" not in pages
        assert not re.search(r"A test\s+compares (?:these tables|the table)\s", pages)
        assert not re.search(r"\n\s*\. ", pages)
        assert "The tests ask for no row" not in pages
        assert "make dev " in copy.read("README.md")
    assert "Patients are its example,\n" in copies["small"].read("README.md")
    left_out = "and pglifeguard's docs/adding-a-domain.md, without pglifeguard's `tests/test_floors.py`"
    assert [left_out in copies[name].read("README.md") for name in ("small", "whole")] == [True, False]
    assert "(docs/adding-a-domain.md) |" in copies["whole"].read("README.md")
    assert "Patients, users and reports are its examples,\n" in copies["whole"].read("README.md")
    assert copies["no docker"].read("docs/runbook.md").startswith("# Runbook\n\n`docker compose` on this page means ")
    assert "pglifeguard's" not in copies["small"].read(".editorconfig")
    for path in ("README.md", "docs/make-it-yours.md"):
        assert "FROM=../lifeguard" not in (PROJECT / path).read_text(encoding="utf-8")


def test_copy_is_in_style(copy: Copy) -> None:
    """However long its name is, ruff finds nothing: no line too long, no import that nobody uses, no name unknown."""
    for command in (["check"], ["format", "--check"]):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
            cwd=copy.directory,
            capture_output=True,
            text=True,
            check=False,
        )

        assert run.returncode == 0, run.stdout


def test_library_is_a_wheel_that_the_locks_name(copy: Copy) -> None:
    """It holds the library alone, with its licence; image and development demand the same version by its hash."""
    (wheel,) = (copy.directory / "vendor").iterdir()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    version = wheel.name.split("-")[1]

    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {
            "pglifeguard",
            f"pglifeguard-{version}.dist-info",
        }
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    for lock in ("requirements.txt", "requirements-dev.txt"):
        assert copy.read(lock).startswith("--find-links vendor\n")
        assert f"\npglifeguard=={version} \\\n    --hash=sha256:{digest}\n" in copy.read(lock)
    project = tomllib.loads(copy.read("pyproject.toml"))
    assert f"pglifeguard[cli,dns,fastapi,otel,serving]=={version}" in project["project"]["dependencies"]
    # As `make install` does, so does `uv sync` when the wheel becomes another one of the same version.
    assert project["tool"]["uv"]["find-links"] == ["vendor"]
    assert project["tool"]["uv"]["reinstall-package"] == ["pglifeguard"]
    forgets, installs = re.findall(r"^\t.*pip (uninstall|install) .*", copy.read("Makefile"), re.MULTILINE)[:2]
    assert (forgets, installs) == ("uninstall", "install")


def test_locks_are_ours_without_what_nobody_asks_for(whole: Copy) -> None:
    """Plotting and browsers are gone with what only they needed; every package that stays is asked for, as it was."""
    entry = re.compile(r"^([a-z0-9][\w.-]*)==(.*)\n", re.MULTILINE)
    ours = set(entry.findall((PROJECT / "requirements-dev.txt").read_text(encoding="utf-8")))
    theirs = set(entry.findall(whole.read("requirements-dev.txt")))

    names = {name for name, _ in theirs}
    assert {name for name, _ in theirs - ours} == {"pglifeguard"}
    assert {"matplotlib", "numpy", "playwright", "check-jsonschema"} <= {name for name, _ in ours - theirs}
    assert {"fastapi", "asyncpg", "pytest", "locust"} <= names
    askers = re.findall(r"^    # +(?:via )?([\w.-]+)$", whole.read("requirements-dev.txt"), re.MULTILINE)
    assert {*askers} - {"via"} <= names


def test_domains_can_be_left_out(copies: dict[str, Copy]) -> None:
    """Neither their folders, their tests, their routes nor their table are there; the others are."""
    no_users, no_reports, small = copies["no users"], copies["no reports"], copies["small"]

    assert 'DOMAINS = ("patients", "reports")\n' in no_users.read("app/main.py")
    assert 'DOMAINS = ("patients", "users")\n' in no_reports.read("app/main.py")
    assert 'DOMAINS = ("patients",)\n' in small.read("app/main.py")
    for copy in (no_users, small):
        assert "users" not in {path.name for path in (copy.directory / "app").iterdir()}
        assert "users" not in copy.read("migrations/versions/0001_users_and_patients.py").partition("\n")[0]
        assert "/users" not in copy.read("README.md")
        assert not [path for path, text in copy.texts() if "DIRECTORY_URL" in text]
        assert not [path for path, text in copy.texts() if path.startswith("tests/") and '"/users' in text]
    assert "/reports" not in small.read("README.md")
    assert not [path for path, text in small.texts() if path.startswith("tests/") and '"/reports' in text]


def test_containers_can_be_left_out(small: Copy, whole: Copy) -> None:
    """No image, no compose file, no chart, no balancer and no pooler is there, and no target that is about them."""
    folders = {path.split("/")[0] for path in small.files()}

    assert not folders & {"backup", "deploy", "docker-compose.yml", "Dockerfile", "haproxy", "pgbouncer"}
    assert not [path for path in small.files() if "docker" in path.lower()]
    assert "docker compose up" not in small.read("README.md")
    assert "test-deploy" not in makefile.targets(small.read("Makefile"))
    assert "test-deploy" in makefile.targets(whole.read("Makefile"))


@pytest.mark.skipif(shutil.which("docker") is None, reason="there is no docker to read compose files")
def test_compose_files_are_whole(whole: Copy) -> None:
    """Compose takes each of them."""
    for more in ([], ["--file", "docker-compose.tls.yml"], ["--file", "docker-compose.secrets.yml"]):
        command = ["docker", "compose", "--file", "docker-compose.yml", *more, "--profile", "*", "config", "--quiet"]

        run = subprocess.run(command, cwd=whole.directory, capture_output=True, text=True, check=False)

        assert run.returncode == 0, run.stderr


def test_image_gets_the_wheel(whole: Copy) -> None:
    """What is copied into the image is let through by .dockerignore, and is there."""
    let_through = set(re.findall(r"^!(.+)$", whole.read(".dockerignore"), re.MULTILINE))
    copied = set(re.findall(r"^COPY (?!--from)(\S+) ", whole.read("Dockerfile"), re.MULTILINE))

    assert let_through == copied == {"requirements.txt", "alembic.ini", "app", "migrations", "vendor"}
    assert all((whole.directory / path).exists() for path in copied)


def test_another_library_is_taken_into_the_copy(copies: dict[str, Copy], tmp_path: Path) -> None:
    """`make update-pglifeguard`: the wheel is replaced, and locks and pyproject.toml say its version and hash."""
    copy = Copy(Order("clinic", tmp_path / "clinic", "Clinic"))
    shutil.copytree(copies["whole"].directory, copy.directory)
    wheel = tmp_path / "pglifeguard-9.8.7-py3-none-any.whl"
    zipfile.ZipFile(wheel, "w").close()
    none = tmp_path / "elsewhere" / wheel.name
    none.parent.mkdir()
    none.write_bytes(b"cut off in the middle")
    command = [sys.executable, "-m", "local.library", "--project", str(copy.directory)]

    taken = subprocess.run([*command, str(wheel)], cwd=PROJECT, capture_output=True, text=True, check=False)
    refused, broken, unnamed = (
        subprocess.run([*command, str(wrong)], cwd=PROJECT, capture_output=True, text=True, check=False)
        for wrong in (tmp_path, none, "")
    )

    assert taken.returncode == 0, taken.stderr
    assert [path.name for path in (copy.directory / "vendor").iterdir()] == [wheel.name]
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    for lock in ("requirements.txt", "requirements-dev.txt"):
        assert f"\npglifeguard==9.8.7 \\\n    --hash=sha256:{digest}\n" in copy.read(lock)
    assert "serving]==9.8.7" in copy.read("pyproject.toml")
    assert (refused.returncode, refused.stderr) == (1, f"{tmp_path} is no checkout of pglifeguard.\n")
    assert (broken.returncode, broken.stderr) == (1, f"{none} is called as a wheel of pglifeguard, and is none.\n")
    assert unnamed.returncode == 1
    assert unnamed.stderr == "Say FROM=…, as in: make update-pglifeguard FROM=../pglifeguard\n"


def test_library_goes_into_copies_alone(tmp_path: Path) -> None:
    """A project without vendor/, as ours, does not get one."""
    wheel = tmp_path / "pglifeguard-9.8.7-py3-none-any.whl"
    zipfile.ZipFile(wheel, "w").close()

    with pytest.raises(LibraryError, match="has no vendor/ for it"):
        vendor(wheel, tmp_path)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("lifeguard = Lifeguard(settings)", "clinic = Lifeguard(settings)"),
        ("from pglifeguard.fastapi import Lifeguard, ReadDB", "from pglifeguard.fastapi import Lifeguard, ReadDB"),
        ("from pglifeguard.fastapi.lifeguard import Lifeguard", "from pglifeguard.fastapi.lifeguard import Lifeguard"),
        ("Lifeguard: pools", "Clinic: pools"),
        ("deploy/helm/lifeguard/x LIFEGUARD_LOCAL", "deploy/helm/clinic/x CLINIC_LOCAL"),
        ("PGLIFEGUARD_TEST_URL", "PGLIFEGUARD_TEST_URL"),
    ],
)
def test_project_is_renamed_and_the_library_is_not(said: str, says: str) -> None:
    """The same word is the project's name and, in another case or place, the library's."""
    assert renamed(said, "clinic") == says


def test_links_to_what_is_left_out_become_text() -> None:
    """In brackets they go; a file or a decision is called pglifeguard's; other words stay as they are."""
    page = (
        "a ([why](gone.md)), see [gone.md](gone.md#x), [Decision 0001](decisions/0001.md), [the fence](gone.md), "
        "![a picture](gone.png)[there](there.md)\n([why](gone.md)). Next\n\n([why](gone.md)) then"
    )

    assert unlinked(page, "docs/page.md", {"docs/there.md"}) == (
        "a, see pglifeguard's gone.md, pglifeguard's decision 0001, the fence, [there](there.md). Next\n\n then"
    )


def test_bracket_in_code_begins_no_link() -> None:
    """Else all between it and the next link would be that link's text."""
    page = "64 kB of `[` or `]`.\n\n```python\nfound[0](gone)\n```\n\nand [the fence](gone.md)"

    assert unlinked(page, "docs/page.md", set()) == page.replace("[the fence](gone.md)", "the fence")


def test_mentions_of_what_is_left_out_are_credited_once() -> None:
    """A path, a command and a decision, in words; not in a string of code."""
    text = (
        'see `tests/x.py`, tests/x.py and `make bench`; decision 0002. pglifeguard\'s `make bench`. open("tests/x.py")'
    )

    assert credited(text, ["tests/x.py"], ["bench"], page=False) == (
        "see pglifeguard's `tests/x.py`, pglifeguard's tests/x.py and pglifeguard's `make bench`; "
        "pglifeguard's decision 0002. "
        'pglifeguard\'s `make bench`. open("tests/x.py")'
    )


def test_code_of_pages_is_not_credited() -> None:
    """What can be typed stays as it is; what is code and nothing else is called pglifeguard's in front of it."""
    page = (
        "`run tests/x.py` and `tests/x.py -q`:\n\n    run tests/x.py\n\n"
        "```console\n$ run tests/x.py\n```\n\n## tests/x.py\n"
    )

    assert credited(page, ["tests/x.py"], [], page=True) == page.replace("and `", "and pglifeguard's `")


def test_long_prose_is_broken_and_code_is_not() -> None:
    """The overflow of a comment or docstring goes into its next line; a string keeps its length."""
    long = "word " * 25
    source = f'"""First.\n\n{long}end\nnext line\n"""\n\n# {long}end\nX = "{long}"\n'

    lines = wrapped(source).splitlines()

    assert lines[2:5] == [("word " * 24).strip(), "word end next line", '"""']
    assert lines[6:8] == [f"# {('word ' * 23).strip()}", "# word word end"]
    assert lines[8] == f'X = "{long}"'
