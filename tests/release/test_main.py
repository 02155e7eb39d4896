"""`python -m release` in a copy of the project with a history of its own: what it refuses, builds and tags."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TOOLS = ROOT / ".venv-release"
VERSION = "9.8.7"
NOTES = "### Added\n\n- Something.\n\n### Fixed\n\n- What git would take for a comment:\n\n# this.\n"
CHANGELOG = f"# Changelog\n\n## [Unreleased]\n\n## [{VERSION}] - 2026-01-02\n\n{NOTES}"
# Committed in the tests' name, and without a Docker engine, whatever the machine has.
ENVIRONMENT = os.environ | {
    "DOCKER_HOST": "unix:///nowhere",
    "GIT_CONFIG_GLOBAL": os.devnull,
    **{f"GIT_{role}_{what}": "tests" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}
# Each installs the service's packages, and validates a document of its parts.
builds = pytest.mark.timeout(300)
with_tools = pytest.mark.skipif(not TOOLS.exists(), reason="`make .venv-release/.installed` was not run")


def git(project: Path, *arguments: str) -> str:
    """Run git in a project, and return what it says."""
    done = subprocess.run(["git", *arguments], cwd=project, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def release(project: Path, *arguments: str) -> tuple[int, str]:
    """Run the command in a project; return its status and all that it said."""
    done = subprocess.run(
        [sys.executable, "-m", "release", *arguments],
        cwd=project, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Give a copy of what is released, as version 9.8.7, on a branch main without a remote."""
    copy = tmp_path / "project"
    parts = ["pglifeguard", "release", "pyproject.toml", "requirements.txt", "LICENSE", ".gitignore"]
    for name in git(ROOT, "ls-files", "-co", "--exclude-standard", *parts).splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    package = copy / "pglifeguard" / "__init__.py"
    text = re.sub('(?m)^__version__ = ".*"$', f'__version__ = "{VERSION}"', package.read_text(encoding="utf-8"))
    package.write_text(text, encoding="utf-8")
    (copy / "CHANGELOG.md").write_text(CHANGELOG, encoding="utf-8")
    (copy / ".venv-release").symlink_to(TOOLS)
    git(copy, "init", "--quiet", "--initial-branch", "main")
    (copy / ".git" / "info" / "exclude").write_text(".venv-release\n", encoding="utf-8")
    git(copy, "add", "--all")
    git(copy, "commit", "--quiet", "--message", "Begin")
    return copy


@builds
@with_tools
def test_dry_run_does_everything_but_the_tag(project: Path) -> None:
    """The SBOM is CycloneDX: the wheel and each package of the lock in its version, with licences, and no tool."""
    lock = (project / "requirements.txt").read_text(encoding="utf-8")
    locked = dict(re.findall(r"(?m)^([\w.-]+)==(\S+) \\$", lock))  # Those that are for every system.

    status, words = release(project, VERSION, "--no-check", "--dry-run")

    assert status == 0, words
    assert "A dry run: v9.8.7 was not tagged." in words
    assert git(project, "tag") == ""
    document = json.loads((project / "dist" / "sbom.cdx.json").read_text(encoding="utf-8"))
    parts = {re.sub("[-_.]+", "-", part["name"]).lower(): part for part in document["components"]}
    assert document["bomFormat"] == "CycloneDX"
    assert len(locked) > 20
    assert {name: parts[name]["version"] for name in locked} == locked
    assert parts["pglifeguard"]["version"] == VERSION
    assert parts["asyncpg"]["licenses"]
    assert not {"pip", "uv", "pytest", "cyclonedx-bom"} & parts.keys()


@builds
@with_tools
def test_version_is_built_and_tagged_and_not_pushed(project: Path) -> None:
    """The tag has the notes; what publishes it is said."""
    status, words = release(project, VERSION, "--no-check")

    assert status == 0, words
    assert "Nothing was pushed" in words
    assert f"git push --atomic origin main v{VERSION}" in words
    assert "The image was not built: no Docker engine answers." in words
    assert git(project, "cat-file", "-t", f"v{VERSION}") == "tag"
    assert git(project, "rev-parse", f"v{VERSION}^{{commit}}") == git(project, "rev-parse", "main")
    assert git(project, "tag", "--list", "--format=%(contents)") == NOTES.strip()
    assert {path.name for path in (project / "dist").iterdir()} == {
        "notes.md", "sbom.cdx.json", f"pglifeguard-{VERSION}.tar.gz", f"pglifeguard-{VERSION}-py3-none-any.whl",
    }  # fmt: skip
    assert (project / "dist" / "notes.md").read_text(encoding="utf-8") == NOTES
    with zipfile.ZipFile(next((project / "dist").glob("*.whl"))) as wheel:
        assert f'__version__ = "{VERSION}"' in wheel.read("pglifeguard/__init__.py").decode()


@pytest.mark.parametrize(
    ("path", "right", "wrong", "sentence"),
    [
        ("pglifeguard/__init__.py", VERSION, "9.8.6", "__version__ in pglifeguard/__init__.py is 9.8.6."),
        ("CHANGELOG.md", VERSION, "9.8.6", "CHANGELOG.md has no ## [9.8.7] with a date."),
        ("CHANGELOG.md", " - 2026-01-02", "", "CHANGELOG.md: ## [9.8.7] - … has no version"),
        ("CHANGELOG.md", "[Unreleased]\n", "[Unreleased]\n\n- More.\n", "CHANGELOG.md has entries under [Unreleased]"),
    ],
)
def test_tree_that_does_not_agree_is_refused(project: Path, path: str, right: str, wrong: str, sentence: str) -> None:
    """Nothing is built for a version that the library or the changelog does not know."""
    file = project / path
    file.write_text(file.read_text(encoding="utf-8").replace(right, wrong, 1), encoding="utf-8")
    git(project, "commit", "--quiet", "--all", "--message", "Change")

    status, words = release(project, VERSION)

    assert status == 1
    assert sentence in words
    assert "Nothing was tagged." in words
    assert "make check" not in words
    assert not (project / "dist").exists()


def test_all_that_is_in_the_way_is_told_at_once(project: Path) -> None:
    """Another branch, a file that git does not know, and a tag that is there already."""
    git(project, "tag", f"v{VERSION}")
    git(project, "switch", "--quiet", "--create", "work")
    (project / "new.txt").write_text("new", encoding="utf-8")

    status, words = release(project, VERSION)

    assert status == 1
    assert "- The branch is work, and releases are made of main.\n" in words
    assert "- The tree is not clean" in words
    assert f"- v{VERSION} is tagged already.\n" in words


@pytest.mark.parametrize("version", ["v9.8.7", "9.8", "9.8.7rc1", "09.8.7"])
def test_what_is_no_version_is_refused(project: Path, version: str) -> None:
    """A tag called vv9.8.7 would be there for good."""
    status, words = release(project, version)

    assert status == 1
    assert f"'{version}' is no version: it is three numbers, as in 0.2.0." in words
    assert git(project, "tag") == ""


@with_tools
def test_check_that_fails_ends_the_release(project: Path) -> None:
    """Nothing is built after it, and nothing tagged."""
    (project / "Makefile").write_text("check:\n\tfalse\n", encoding="utf-8")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "Break the check")

    status, words = release(project, VERSION)

    assert status == 1
    assert "That failed with exit status 2." in words
    assert not (project / "dist").exists()
    assert git(project, "tag") == ""


@with_tools
def test_work_that_goes_on_meanwhile_is_not_tagged(project: Path) -> None:
    """A file that the check leaves in the tree is in nothing that was built."""
    (project / "Makefile").write_text("check:\n\ttouch left\n", encoding="utf-8")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "Leave a file")

    status, words = release(project, VERSION)

    assert status == 1
    assert "The tree has changed meanwhile." in words
    assert git(project, "tag") == ""
