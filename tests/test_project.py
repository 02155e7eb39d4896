"""What surrounds the code: files for editors, hooks, CI, the repository's host, and for those who join."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOR_PEOPLE = ["CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "README.md", "SECURITY.md", "docs/versioning.md"]


def read(name: str) -> str:
    """Read a file of the project."""
    return (ROOT / name).read_text(encoding="utf-8")


def listed(*patterns: str) -> list[str]:
    """List the files of the project that git knows, or would."""
    command = ["git", "ls-files", "-co", "--exclude-standard", *patterns]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()


# For others' programs


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", [".github/workflows/*.yml"]),
        ("github-issue-forms", [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/idea.yml"]),
        ("github-issue-config", [".github/ISSUE_TEMPLATE/config.yml"]),
        ("dependabot", [".github/dependabot.yml"]),
        ("compose-spec", ["docker-compose.yml"]),
    ],
)
def test_file_follows_its_schema(schema: str, files: list[str]) -> None:
    """What the host or an engine reads has no misspelt key; the schemas are those that are published for it."""
    names = listed(*files)

    command = [str(BIN / "check-jsonschema"), "--builtin-schema", f"vendor.{schema}", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert names
    assert done.returncode == 0, done.stdout


def test_ci_runs_on_every_python_that_is_promised() -> None:
    """From the oldest that the library takes to the newest, each is a classifier of the wheel."""
    matrix = yaml.safe_load(read(".github/workflows/check.yml"))["jobs"]["check"]["strategy"]["matrix"]["python"]
    promised = [line.split(" :: ")[-1] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]

    assert matrix == promised
    assert PROJECT["project"]["requires-python"] == f">={matrix[0]}"
    assert f"CI runs on Python {matrix[0]} to {matrix[-1]}." in read("CONTRIBUTING.md")


def test_dependabot_sees_every_image() -> None:
    """A Dockerfile in a folder that is not listed would be on its old image for ever."""
    updates = yaml.safe_load(read(".github/dependabot.yml"))["updates"]
    kinds = {update["package-ecosystem"]: update for update in updates}
    folders = {f"/{Path(name).parent.as_posix()}".replace("/.", "/") for name in listed("*Dockerfile")}

    assert set(kinds["docker"]["directories"]) == folders
    assert kinds.keys() == {"pip", "docker", "docker-compose", "github-actions"}


# While somebody works


def test_watch_builds_what_the_images_are_made_of() -> None:
    """`docker compose watch` looks at all that the service's Dockerfile copies, and at the folders of the others."""
    services = yaml.safe_load(read("docker-compose.yml"))["services"]
    copied = re.findall(r"^COPY (?!--from)(\S+) ", read("Dockerfile"), re.MULTILINE)
    watched = {
        name: [rule["path"] for rule in service["develop"]["watch"]]
        for name, service in services.items()
        if "develop" in service
    }

    assert sorted(watched["app"]) == sorted(copied)
    assert watched["pgbouncer"] == [services["pgbouncer"]["build"]]
    assert watched["balancer"] == [services["balancer"]["build"]]
    for name in watched:
        # `sync` copies into the container, whose file system is read-only.
        assert {rule["action"] for rule in services[name]["develop"]["watch"]} == {"rebuild"}


@pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed")
def test_docker_reads_the_rules_of_watch() -> None:
    """`docker compose config`, which starts nothing, shows them with whole paths."""
    command = ["docker", "compose", "config", "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    rules = json.loads(done.stdout)["services"]["app"]["develop"]["watch"]
    assert {"path": str(ROOT / "app"), "action": "rebuild"}.items() <= rules[0].items()


def recipes(target: str) -> list[str]:
    """Return the commands of a target of the Makefile."""
    body = read("Makefile").partition(f"\n{target}:")[2].partition("\n\n")[0]
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in body.splitlines()[1:]]


def hooks() -> list[dict[str, Any]]:
    """Return the hooks of commits."""
    (local,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert local["repo"] == "local"
    return list(local["hooks"])


def test_hooks_check_what_ci_checks() -> None:
    """Each is a command of `make lint` or `make types`, and none of these is left out; nothing is fetched for them."""
    assert [hook["entry"] for hook in hooks()] == [*recipes("lint"), *recipes("types")]
    assert {hook["language"] for hook in hooks()} == {"system"}


def test_commit_with_a_mistake_is_refused(tmp_path: Path) -> None:
    """In a repository with the hooks git commits what is in style, and nothing that is not."""
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    module = tmp_path / "module.py"

    def git(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = ["git", "-c", "user.name=tests", "-c", "user.email=tests", *arguments]
        # mypy looks at the whole project, which is not there.
        environment = {"PATH": os.defpath, "HOME": str(tmp_path), "PREK_SKIP": "mypy"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    git("init", "--quiet")
    subprocess.run([BIN / "prek", "install"], cwd=tmp_path, capture_output=True, check=True)
    module.write_text('"""A module."""\n\nimport os\n', encoding="utf-8")
    git("add", "module.py", ".pre-commit-config.yaml", "pyproject.toml")
    refused = git("commit", "--message", "Add a module")
    module.write_text('"""A module."""\n', encoding="utf-8")
    git("add", "module.py")
    taken = git("commit", "--message", "Add a module")

    assert refused.returncode == 1
    assert "F401" in refused.stdout + refused.stderr
    assert taken.returncode == 0, taken.stdout + taken.stderr


def test_editors_run_programs_that_are_there() -> None:
    """Each debug configuration starts a module that Python finds, in the project, and no test is ended by the clock."""
    for configuration in json.loads(read(".vscode/launch.json"))["configurations"]:
        module = configuration["module"]

        assert module == "pytest" or (ROOT / module / "__main__.py").exists()
        assert configuration["cwd"] == "${workspaceFolder}"
        if module == "pytest":
            assert configuration["args"][:2] == ["--timeout", "0"]


def test_container_for_development_is_pythons_own() -> None:
    """Its Python is one that CI runs on, all else is `make`, and editors get the same extensions outside of it."""
    container = json.loads(read(".devcontainer/devcontainer.json"))
    matrix = yaml.safe_load(read(".github/workflows/check.yml"))["jobs"]["check"]["strategy"]["matrix"]["python"]
    image = re.fullmatch(r"python:(3\.\d+)-trixie", container["image"])

    assert image is not None
    assert image[1] in matrix
    assert container["postCreateCommand"] == "make install"
    assert container["forwardPorts"] == [8000]
    recommended = json.loads(read(".vscode/extensions.json"))["recommendations"]
    assert container["customizations"]["vscode"]["extensions"] == recommended


def test_editorconfig_agrees_with_ruff() -> None:
    """A line that an editor lets stand is one that `make lint` lets stand."""
    assert f"max_line_length = {PROJECT['tool']['ruff']['line-length']}\n" in read(".editorconfig")


# For those who join


@pytest.mark.parametrize("name", FOR_PEOPLE)
def test_commands_that_people_are_told_are_there(name: str) -> None:
    """Every `make` that the page names is a target."""
    targets = set(re.findall(r"^([a-z][a-z-]*):", read("Makefile"), re.MULTILINE))
    blocks = re.findall(r"^```.*?^```", read(name), re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", read(name), flags=re.MULTILINE | re.DOTALL)
    code = re.findall(r"`([^`]+)`", prose) + re.findall(r"^\$ (.*)", "\n".join(blocks), re.MULTILINE)
    told = {word for line in code for words in re.findall(r"^make((?: [a-z-]+)+)", line) for word in words.split()}

    assert told - targets == set()


@pytest.mark.parametrize("name", FOR_PEOPLE)
def test_nobody_is_made_up(name: str) -> None:
    """No address is named that nobody reads; whoever copies the project names people of their own."""
    assert re.findall(r"[\w.+-]+@[\w-]+\.\w+", read(name)) == []


def test_supported_version_is_this_one() -> None:
    """SECURITY.md names the second number of the version."""
    version = re.findall(r'^__version__ = "(\d+\.\d+)', read("pglifeguard/__init__.py"), re.MULTILINE)

    assert re.findall(r"the newest release, now (\d+\.\d+)", read("SECURITY.md")) == version


def test_index_of_packages_is_nobodys_own() -> None:
    """No lock names a host: uv.lock would, so git ignores it."""
    ignored = subprocess.run(["git", "check-ignore", "--quiet", "uv.lock"], cwd=ROOT, check=False)

    assert ignored.returncode == 0
    for name in listed("requirements*.txt"):
        assert "://" not in read(name), name


def test_files_that_a_page_names_are_there() -> None:
    """Links are checked by the site's build; a path that is written as code sends a reader nowhere unnoticed."""
    files = listed()
    tops = {path.partition("/")[0] for path in files if "/" in path}
    # What is told of was true then; and what that page, or a line, names is what its reader makes.
    told = re.compile(r"CHANGELOG\.md|docs/(?:decisions/.*|adding-a-domain\.md)|local/new/texts/.*")
    missing = []
    made = ".github/CODEOWNERS"
    for page in (path for path in files if path.endswith(".md") and not told.fullmatch(path)):
        for name in re.findall(r"`([\w.-]+/[\w./-]+)`", read(page)):
            here = (name, os.path.normpath(f"{page}/../{name}"))
            if name != made and name.partition("/")[0] in tops and not any(path.startswith(here) for path in files):
                missing.append(f"{page}: {name}")

    assert missing == []


def test_every_threat_names_a_guard_and_tests_that_exist() -> None:
    """A row of SECURITY.md's table holds all four, and each test that it names is one of this tree."""
    table = read("SECURITY.md").partition("\n## Threats, guards and tests\n")[2]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line.startswith("|")
    ]
    named = {row[0]: re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[-1]) for row in rows}

    assert [word.strip() for word in head] == ["asset", "attacker", "guard", "test"]
    assert len(rows) >= 10
    assert [row for row in rows if len(row) != 4 or not all(row)] == []
    assert [asset for asset, tests in named.items() if not tests] == []
    assert [
        (path, name)
        for row in rows
        for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[-1])
        if not re.search(rf"^(?:async )?def {name}\(", read(path), re.MULTILINE)
    ] == []
