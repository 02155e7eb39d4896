"""`make audit`: what it asks, what it makes of the answers, and who runs it."""

import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WEAKNESS = {
    "id": "PYSEC-2026-1",
    "summary": "Made up.",
    "modified": "2026-01-01T00:00:00Z",
    "published": "2026-01-01T00:00:00Z",
    "affected": [{"package": {"name": "asyncpg", "ecosystem": "PyPI"}, "ranges": []}],
}
with_tools = pytest.mark.skipif(
    not (ROOT / ".venv-audit/.installed").exists(), reason="`make audit` was not run, which installs its tools"
)


@contextmanager
def advisories(weak: str = "", status: int = 200) -> Iterator[tuple[str, set[str]]]:
    """Serve answers as OSV gives them, one package of which has a weakness; give its URL, and who was asked for."""
    asked: set[str] = set()

    class Advisories(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = question["package"]["name"]
            asked.add(name)
            answer = json.dumps({"vulns": [WEAKNESS]} if name == weak else {}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # Its name in the standard library.
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), Advisories) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/query", asked
        finally:
            server.shutdown()
            thread.join()


def audit(url: str, directory: Path = ROOT) -> tuple[int, str]:
    """Run `.ci/audit`; return its status and all that it said."""
    done = subprocess.run(
        [directory / ".ci/audit"], env=os.environ | {"ADVISORIES_URL": url, "NO_COLOR": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@with_tools
def test_nothing_known_is_well() -> None:
    """Every package of every lock that is for this machine is asked for."""
    with advisories() as (url, asked):
        status, said = audit(url)

    assert status == 0, said
    assert "No known vulnerabilities found" in said
    assert "NOT AUDITED" not in said
    locked = re.findall(r"^([\w.-]+)==\S+ \\$", (ROOT / "requirements.txt").read_text("utf-8"), re.MULTILINE)
    assert {"zizmor", "ruff", *locked} <= asked


@with_tools
def test_known_weakness_fails() -> None:
    """The package, its version and the advisory are named."""
    with advisories("asyncpg") as (url, _):
        status, said = audit(url)

    assert status == 1
    assert re.search(r"^asyncpg +[\d.]+ +PYSEC-2026-1", said, re.MULTILINE), said


@with_tools
@pytest.mark.parametrize("answer", [None, 503])
def test_advisories_that_cannot_be_had_are_said(answer: int | None) -> None:
    """A network without the internet is no weakness, and nobody takes the silence for an answer."""
    if answer is None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            status, said = audit(f"http://127.0.0.1:{closed.getsockname()[1]}/v1/query")
    else:
        with advisories(status=answer) as (url, _):
            status, said = audit(url)

    assert status == 0, said
    assert "*** NOT AUDITED: weaknesses of dependencies: the advisories cannot be reached ***" in said


@with_tools
@pytest.mark.parametrize(
    ("path", "right", "wrong", "sentence"),
    [
        (".github/workflows/check.yml", r"@[0-9a-f]{40} # v\S+", "@v7", "unpinned-uses"),
        (".github/workflows/check.yml", r"\n        with:\n          persist-credentials: false", "", "artipacked"),
        (".github/workflows/check.yml", r"contents: read", "contents: write", "excessive-permissions"),
        ("module.py", r"^", "import subprocess\n\nsubprocess.run('ls', shell=True)\n", "S602"),
        ("requirements.txt", r"asyncpg==\S+", "asyncpg", "asyncpg"),
    ],
)
def test_what_it_finds_fails(tmp_path: Path, path: str, right: str, wrong: str, sentence: str) -> None:
    """A workflow that trusts too much, a shell in the code and a package without a version are each an end of it."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in (".venv", ".venv-audit"):
        (tmp_path / name).symlink_to(ROOT / name)
    with advisories() as (url, _):
        before = audit(url, tmp_path)
        file = tmp_path / path
        file.write_text(re.sub(right, wrong, file.read_text("utf-8") if file.exists() else "", count=1), "utf-8")
        status, said = audit(url, tmp_path)

    assert before[0] == 0, before[1]
    assert status == 1
    assert sentence in said


def test_ci_audits() -> None:
    """The project's own check runs it, and a job of the workflow by itself; no job may do more than read."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text(encoding="utf-8"))
    commands = {name: [step.get("run") for step in job["steps"]] for name, job in workflow["jobs"].items()}

    assert re.search(r"^make audit$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    assert "make audit" in commands["audit"]
    assert ".ci/run" in commands["check"]
    assert workflow["permissions"] == {"contents": "read"}
    assert not [job for job in workflow["jobs"].values() if "permissions" in job]


def test_actions_are_pinned_by_commit() -> None:
    """A tag can be moved to other code; the comment has the version for who reads it, and for Dependabot."""
    used = [
        line.partition("uses:")[2].strip()
        for path in (ROOT / ".github/workflows").glob("*.yml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "uses:" in line
    ]

    assert used
    assert [each for each in used if not re.fullmatch(r"[\w/.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each)] == []
