"""`python -m local.load` beside `python -m local`, each as a person starts it, and what is seen of it from outside."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from rich.console import Console

from local.cluster import Cluster
from local.load.board import Board
from local.load.plan import Second
from local.load.target import make_token
from local.load.troubles import FUNCTION
from local.serve import Running, running_in
from local.setup import PROJECT
from pglifeguard.embedded.directories import open_directory
from pglifeguard.embedded.leftovers import postmaster
from tests.local.test_main import Run, directory, processes, started, until
from tests.terminal import on_a_terminal

__all__ = ["directory"]  # A fixture.
COMMAND = (sys.executable, "-m", "local.load")
LOAD_SECONDS = 60.0
TIMES = r"(?:p50 \d+ ms, p99 \d+ ms|no success)"
SECOND = re.compile(rf"^ +\d+ s +(\d+)/s  (?:(.+)  {TIMES}|nothing was answered)  (?:\d+|\?) waiting$", re.MULTILINE)
REST = re.compile(rf"^After the last second (\d+) more: (.+)  {TIMES}$", re.MULTILINE)
SECRET = "a secret of the tests, of 32 bytes or more"


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Give a service of `make run` that wants tokens, which the tests of this file use in turn."""
    with open_directory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTH_SECRET", SECRET)
        # With a space: what is printed can be typed as it is.
        with started(place / "local run", "--seed", "20") as run:
            patch.delenv("AUTH_SECRET")
            yield run
            run.stop(signal.SIGTERM)


@pytest.fixture(scope="module")
def service(run: Run) -> Running:
    """Give what is known of the service from its process."""
    found = running_in(run.directory)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def token(service: Running) -> str:
    """Give an operator's token."""
    return make_token(service)


@pytest.fixture
def client(run: Run, token: str) -> Iterator[httpx.Client]:
    """Give an operator's client of the service."""
    with httpx.Client(base_url=run.url, headers={"Authorization": f"Bearer {token}"}, timeout=10) as client:
        yield client


class Load:
    """One `python -m local.load`; its words go to a file."""

    def __init__(self, directory: Path, output: Path, *options: str, **environment: str) -> None:
        self._output = output
        with output.open("wb") as words:
            self.process = subprocess.Popen(
                [*COMMAND, "--directory", directory, *options],
                cwd=PROJECT,
                stdout=words,
                stderr=words,
                env=os.environ | environment,
            )

    @property
    def words(self) -> str:
        """What it has said so far."""
        return self._output.read_text(encoding="utf-8")

    def said(self, text: str) -> bool:
        """Tell whether it has said something, or will say nothing more."""
        return text in self.words or self.process.poll() is not None

    def ends(self) -> int:
        """Wait for its end and return its exit status."""
        return self.process.wait(LOAD_SECONDS)


Loading = Callable[..., Load]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Loading]:
    """Give a way to start loads, and end those that a failed test leaves."""
    begun: list[Load] = []

    def begin(directory: Path, *options: str, **environment: str) -> Load:
        begun.append(Load(directory, tmp_path / f"load-{len(begun)}", *options, **environment))
        return begun[-1]

    yield begin
    for each in begun:
        each.process.terminate()
        each.ends()


def patients_of_loads(client: httpx.Client) -> Any:
    """Ask for what loads have made and not deleted, where it is certain to be."""
    return client.get("/patients", params={"name": "LOAD-", "limit": 100}).raise_for_status().json()


async def on_primary(service: Running, query: str, *arguments: str) -> Any:
    """Ask the primary, as the owner of its tables."""
    connection = await asyncpg.connect(service.environment["MIGRATIONS_URL"], timeout=5)
    try:
        return await connection.fetchval(query, *arguments)
    finally:
        await connection.close()


def test_calm_load_is_told_by_the_second_and_leaves_nothing(run: Run, client: httpx.Client, load: Loading) -> None:
    """It finds the service and makes itself a token; all its reads and writes succeed; its patients are gone then."""
    calm = load(run.directory, "--seconds", "4", "--rate", "40", "--writes", "0.5")
    until(lambda: calm.said("To watch them"), LOAD_SECONDS)
    assert len(patients_of_loads(client)) == 50

    assert calm.ends() == 0

    assert f"To watch them: {run.url}/debug/pools" in calm.words
    seconds = SECOND.findall(calm.words)
    rest = REST.findall(calm.words)
    assert len(seconds) == 4, calm.words
    assert {answers.partition(":")[0] for _, answers in seconds + rest if answers} == {"200"}
    counted = re.search(r"^In all: 200: (\d+)\.$", calm.words, re.MULTILINE)
    assert counted is not None
    assert int(counted[1]) == sum(int(came) for came, _ in seconds + rest)
    assert 100 <= int(counted[1]) <= 164
    metrics = client.get("/metrics").text
    changes = re.search(r'^http_request_seconds_count\{method="PATCH".*\} (\d+)', metrics, re.MULTILINE)
    assert changes is not None, metrics
    assert int(changes[1]) > 20
    assert "\x1b" not in calm.words
    assert patients_of_loads(client) == []


def test_run_says_how_to_ask_a_service_that_wants_tokens(run: Run) -> None:
    """Without one each of the requests that it prints would be a 401."""
    (line,) = re.findall(r"^  TOKEN=\$\((.*)\)$", run.words, re.MULTILINE)
    command = line.replace(".venv/bin/python", shlex.quote(sys.executable))

    made = subprocess.run(
        ["bash", "-c", command],
        cwd=PROJECT, env=os.environ | {"AUTH_SECRET": SECRET}, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert httpx.get(f"{run.url}/patients/1").status_code == 401
    assert httpx.get(f"{run.url}/patients/1", headers={"authorization": f"Bearer {made.stdout.strip()}"}).is_success


@pytest.mark.parametrize(
    ("second", "line"),
    [
        (Second({"200": 3}, 1.0, 2.0), "  1 s     3/s  200: 3  p50 1 ms, p99 2 ms  0 waiting\n"),
        (Second({"503 x": 3}, None, None), "  1 s     3/s  503 x: 3  no success  0 waiting\n"),
        (Second({}, None, None), "  1 s     0/s  nothing was answered  0 waiting\n"),
        (Second({"200": 3}, 1.0, 2.0, whole=False), "After the last second 3 more: 200: 3  p50 1 ms, p99 2 ms\n"),
        (Second({}, None, None, whole=False), ""),
    ],
)
def test_line_says_what_is_known_of_its_second(second: Second, line: str) -> None:
    """Where nothing was answered nothing has failed either, and what comes after the last second has no rate."""
    written = io.StringIO()
    console = Console(file=written, highlight=False, soft_wrap=True)

    Board(console, console.status("")).show(second, 0)

    assert written.getvalue() == line


def test_load_moves_on_a_terminal(run: Run) -> None:
    """There one line is drawn anew each second, and what stays is printed above it."""
    command: list[str | Path] = [*COMMAND, "--directory", run.directory, "--seconds", "4", "--rate", "20"]

    status, written = on_a_terminal(command, lambda *_: None)

    assert status == 0
    assert {f" {second} s" for second in (1, 2, 3, 4)} <= set(re.findall(r" [1-4] s", written))
    assert "\x1b[2K" in written
    assert not SECOND.search(written)
    assert "In all: 200: " in written


async def test_overload_fills_the_pool_and_is_undone(
    run: Run, service: Running, client: httpx.Client, load: Loading
) -> None:
    """Each connection of the primary's pool is at work, the rest is refused, reads go on; a second one is refused."""
    overload = load(run.directory, "--overload", "3", "--seconds", "16")
    until(lambda: overload.said("To watch them"), LOAD_SECONDS)
    second = load(run.directory, "--overload", "2", "--seconds", "4")

    seen: set[tuple[int, bool]] = set()

    def full() -> bool:
        pool = client.get("/debug/pool-stats").json()["primary"]
        seen.add((pool["checked_out"], pool["waiting"] > 0))
        return (15, True) in seen

    until(full, LOAD_SECONDS)
    assert (15, True) in seen
    assert second.ends() == 1
    assert "Another load with --overload is running." in second.words
    assert overload.ends() == 0

    assert "112 slow writes a second for 8 s, 3 times what the pool can serve." in overload.words
    assert re.search(r"503 pool_exhausted: \d+", overload.words)
    served = [int(n) for n in re.findall(r"In all: 200: (\d+)", overload.words)]
    assert served
    assert served[0] > 200
    assert await on_primary(service, "SELECT count(*) FROM pg_trigger WHERE tgname = $1", FUNCTION) == 0
    assert await on_primary(service, "SELECT count(*) FROM pg_proc WHERE proname = $1", FUNCTION) == 0
    assert patients_of_loads(client) == []


async def test_lock_is_seen_and_released_by_ctrl_c(
    run: Run, service: Running, client: httpx.Client, load: Loading
) -> None:
    """The live page's figures name its session as the one that blocks others; Ctrl-C ends it and deletes the rows."""
    lock = load(run.directory, "--lock", "--seconds", "20", "--rate", "20", "--writes", "1")
    until(lambda: lock.said("locks the table patients against writes"), LOAD_SECONDS)

    (pid,) = re.findall(r"Session (\d+) locks", lock.words)
    blockers: set[int] = set()

    def shown() -> bool:
        servers = client.get("/debug/pools/sessions").json()["servers"]
        blockers.update(pair["blocker_pid"] for server in servers for pair in server["blocked"])
        return int(pid) in blockers

    until(shown, LOAD_SECONDS)
    assert int(pid) in blockers

    lock.process.send_signal(signal.SIGINT)

    assert lock.ends() == 0
    assert "Stopped." in lock.words
    assert "Traceback" not in lock.words
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'make load%'"
    assert await on_primary(service, query) == 0
    assert patients_of_loads(client) == []


def test_lock_that_is_ended_is_said(run: Run, client: httpx.Client, load: Loading) -> None:
    """Who ends its session, on the page or elsewhere, is told so by the load, which goes on."""
    lock = load(run.directory, "--lock", "--seconds", "8", "--rate", "20")
    until(lambda: lock.said("locks the table"), LOAD_SECONDS)
    (pid,) = re.findall(r"Session (\d+) locks", lock.words)
    client.post("/debug/end", params={"pool": "primary", "pid": pid}).raise_for_status()

    assert lock.ends() == 0

    assert f"Somebody has ended session {pid}, and its lock." in lock.words


def test_replica_is_stopped_and_started_again(directory: Path, load: Loading) -> None:
    """The replica of this run; it streams again, and goes when `make run` does. A load then says what it leaves."""
    with started(directory, "--seed", "20") as run:
        data = Cluster(directory).replica.data
        before = postmaster(data)
        assert before is not None
        killing = load(directory, "--kill-replica", "--seconds", "8", "--rate", "20")
        until(lambda: killing.said(f"Stopping the replica, process {before.pid}"), LOAD_SECONDS)
        until(lambda: postmaster(data) is None, LOAD_SECONDS)
        assert postmaster(data) is None

        assert killing.ends() == 0

        after = postmaster(data)
        assert after is not None
        assert f"The replica is started again, process {after.pid}." in killing.words

        def replica() -> str:
            return str(httpx.get(f"{run.url}/health/db").json()["databases"]["replica"]["status"])

        until(lambda: replica() == "healthy", LOAD_SECONDS)
        assert replica() == "healthy"
        assert {*re.findall(r"^In all: (.+): \d+\.$", killing.words, re.MULTILINE)} == {"200"}

        overload = load(directory, "--overload", "1", "--seconds", "4")
        until(lambda: overload.said("To watch them"), LOAD_SECONDS)
        assert run.stop(signal.SIGTERM) == 0
    assert processes(directory) == []
    overload.ends()
    assert "The trigger that slows writes is left until the next --overload" in overload.words
    assert "are left: " in overload.words
    assert "Traceback" not in overload.words


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "No service of `make run` works over"),
        (("--url", "http://127.0.0.1:9"), "http://127.0.0.1:9 does not answer"),
        (("--url", "http://192.0.2.1:8000"), "192.0.2.1 is not this machine."),
        (("--url", "ftp://127.0.0.1"), "ftp://127.0.0.1 is no URL of a service"),
        (("--url", "http://no-such-name.invalid"), "no-such-name.invalid leads nowhere"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    tmp_path: Path, load: Loading, options: tuple[str, ...], sentence: str
) -> None:
    """With a sentence, before anything is sent."""
    refused = load(tmp_path, *options)

    assert refused.ends() == 1
    assert sentence in refused.words
    assert "Traceback" not in refused.words


class Limited(BaseHTTPRequestHandler):
    """A service that reads have not worn out, and writes have."""

    def do_GET(self) -> None:
        """Answer with nothing."""
        self._answer(200, b"[]")

    def do_POST(self) -> None:
        """Refuse."""
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(429, b"{}")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # Its base class has named it.
        """Say nothing."""

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_service_that_limits_its_clients_is_not_loaded(tmp_path: Path, load: Loading) -> None:
    """What is in the way is named, as the setting is called."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Limited) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        refused = load(tmp_path, "--url", f"http://127.0.0.1:{server.server_port}")
        status = refused.ends()
        server.shutdown()

    assert status == 1
    assert "(429): to load it, serve without RATE_LIMIT_PER_SECOND." in refused.words
    assert "Traceback" not in refused.words


def test_anywhere_allows_another_machine(tmp_path: Path, load: Loading) -> None:
    """With the option it is asked, and here nobody is there."""
    asked = load(tmp_path, "--url", "http://no-such-name.invalid", "--anywhere")

    assert asked.ends() == 1
    assert "http://no-such-name.invalid does not answer" in asked.words


def test_troubles_need_the_databases_of_make_run(run: Run, token: str, load: Loading) -> None:
    """A service that is named by another URL is somebody else's: it is loaded with a token, and nothing else."""
    url = run.url.replace("127.0.0.1", "localhost")
    refused = load(run.directory, "--url", url)
    assert refused.ends() == 1
    assert "wants a token with the scopes patients:read, patients:write, ops" in refused.words

    for option in (("--kill-replica",), ("--overload", "3")):
        trouble = load(run.directory, "--url", url, *option, LOAD_TOKEN=token)
        assert trouble.ends() == 1
        assert f"{option[0]} needs the databases of `make run`" in trouble.words


def test_options_are_documented() -> None:
    """docs/live-page.md has a row for each option of `--help`, in its order and with its default."""
    page = (PROJECT / "docs" / "live-page.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(--[a-z-]+)` \| (.*?) ?\|", page, re.MULTILINE))
    told = subprocess.run([*COMMAND, "--help"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    options = re.findall(r"^  (--[a-z-]+)", told, re.MULTILINE)
    defaults = dict(re.findall(r"(--(?:rate|writes|seconds|overload)) .*?\[default:\s+([0-9.]+)", told, re.DOTALL))

    assert [*rows, "--help"] == options
    assert {name: rows[name] for name in defaults} == defaults
    assert len(defaults) == 4
