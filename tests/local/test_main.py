"""`python -m local` from the outside: real processes, real signals, a real port."""

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]  # The wheel brings it along; its stubs would be one more package.
import psycopg
import pytest

from local.__main__ import _tell_unused
from local.runs import MARK
from local.serve import Service, running_in
from local.setup import PROJECT
from pglifeguard.embedded.leftovers import postmaster
from pglifeguard.embedded.postgres import free_port
from tests.terminal import on_a_terminal

READY_SECONDS = 40.0
STOP_SECONDS = 15.0
# What the service keeps when nobody asks: five in the pools of primary and replica, and the monitor's of each of three.
SESSIONS = 13


class Run:
    """One `python -m local`; its words go to a file."""

    def __init__(
        self, directory: Path, port: int, *options: str, project: Path = PROJECT, beside: Path | None = None
    ) -> None:
        self.directory = directory
        self.url = f"http://127.0.0.1:{port}"
        self.output = (beside or directory).with_name(f"{directory.name}.{time.monotonic_ns()}.out")
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "local", "--directory", str(directory), "--port", str(port), *options],
                cwd=project,
                stdout=output,
                stderr=output,
            )

    @property
    def words(self) -> str:
        """What it has said so far."""
        return self.output.read_text(encoding="utf-8")

    def wait_ready(self) -> "Run":
        """Wait until it says that the service answers."""
        until(lambda: "answers at" in self.words or self.process.poll() is not None, READY_SECONDS)
        assert "answers at" in self.words, self.words
        return self

    def stop(self, number: signal.Signals) -> int:
        """Signal it and return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Poll a condition up to a deadline; what follows asserts it."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def processes(directory: Path) -> list[psutil.Process]:
    """Find every process that works for a run: PostgreSQL's by where they stand, the service's by their mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            works_here = process.environ().get(MARK) == str(directory) or Path(process.cwd()).is_relative_to(directory)
            if works_here and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture
def directory(open_directory: Path) -> Iterator[Path]:
    """Give a directory for one run's data, and end whatever a failed test leaves running over it."""
    place = open_directory / "local"
    yield place
    for process in processes(place):
        with suppress(psutil.NoSuchProcess):  # A postmaster takes its children along.
            process.kill()
    until(lambda: not processes(place), STOP_SECONDS)


@contextmanager
def started(directory: Path, *options: str, port: int | None = None, **named: Any) -> Iterator[Run]:
    """Start, wait until ready, and do not leave it running when the test fails."""
    run = Run(directory, free_port() if port is None else port, *options, **named)
    try:
        yield run.wait_ready()
    finally:
        run.process.kill()
        run.process.wait()


def test_serves_seeded_patients_and_ctrl_c_leaves_no_trace(directory: Path) -> None:
    """From an empty directory to an answer with two workers, and back to no process, with exit status 0."""
    with started(directory, "--seed", "20", "--workers", "2") as run:
        assert httpx.get(f"{run.url}/patients/20").json()["mrn"] == "MRN-000020"
        assert httpx.get(f"{run.url}/patients/21").status_code == 404
        assert len(processes(directory)) > 10

        assert run.stop(signal.SIGINT) == 0

    assert "make load ARGS=" in run.words
    assert "\x1b" not in run.words
    assert processes(directory) == []


def test_start_and_stop_move_on_a_terminal(directory: Path) -> None:
    """There a line that is drawn anew says what goes on, until the service answers and after Ctrl-C."""
    command: list[str | Path] = [sys.executable, "-m", "local", "--directory", directory, "--port", str(free_port())]
    stopped: list[str] = []

    def stop_once(written: str, run: "subprocess.Popen[bytes]") -> None:
        if "answers at" in written and not stopped:
            stopped.append(written)
            run.send_signal(signal.SIGINT)

    status, written = on_a_terminal([*command, "--no-seed"], stop_once)

    assert status == 0, written
    moved = re.compile(r"\x1b\[2K.{0,20}[⠀-⣿].{0,10} (\w+)")
    assert {"Creating", "Starting"} <= set(moved.findall(stopped[0])), written
    assert "Stopping" in moved.findall(written.removeprefix(stopped[0])), written
    assert processes(directory) == []


def test_recovers_after_kill_9_and_keeps_the_data(directory: Path) -> None:
    """The next run ends what a killed one left behind, takes its port and shows what was written; SIGTERM ends it."""
    new = {"mrn": "MRN-900001", "full_name": "Ada Example", "birth_date": "1980-05-17"}
    port = free_port()
    first = Run(directory, port).wait_ready()
    created = httpx.post(f"{first.url}/patients", json=new)
    assert created.status_code == 201
    first.process.kill()
    first.process.wait()
    orphans = processes(directory)
    assert orphans

    second = Run(directory, port).wait_ready()

    assert set(processes(directory)).isdisjoint(orphans)
    assert httpx.get(f"{second.url}{created.headers['location']}").json()["full_name"] == "Ada Example"
    assert "Seeded" not in second.words
    assert second.stop(signal.SIGTERM) == 0
    assert processes(directory) == []


def test_end_of_the_primary_is_told(directory: Path) -> None:
    """With where its log is; the service stays, and Ctrl-C leaves nothing. An end by Ctrl-C is nothing to tell."""
    with started(directory, "--no-seed") as run:
        primary = postmaster((directory / "data").resolve() / "primary")
        assert primary is not None
        primary.send_signal(signal.SIGINT)

        until(lambda: "starts it with its data" in run.words, STOP_SECONDS)

        assert f"The primary has ended; {directory}/primary.log may say why." in run.words
        assert httpx.get(f"{run.url}/health/live").is_success
        assert run.stop(signal.SIGINT) == 0
    assert processes(directory) == []

    with started(directory, "--no-seed") as again:
        assert again.stop(signal.SIGINT) == 0
    assert "has ended" not in again.words


def test_end_of_the_replica_and_of_the_service_is_told(directory: Path) -> None:
    """The replica's with its log, while reads are served; the service's with the signal, and nothing is left."""
    with started(directory, "--seed", "1") as run:
        replica = postmaster((directory / "data").resolve() / "replica")
        assert replica is not None
        replica.send_signal(signal.SIGINT)
        until(lambda: "The primary serves its reads" in run.words, STOP_SECONDS)
        assert f"The replica has ended; {directory}/replica.log may say why." in run.words
        assert httpx.get(f"{run.url}/patients/1").is_success
        (service,) = (each for each in processes(directory) if "serve" in each.cmdline())

        service.kill()

        assert run.process.wait(STOP_SECONDS) == 128 + signal.SIGKILL
    assert "The service was ended by SIGKILL" in run.words
    assert processes(directory) == []


def test_fresh_starts_anew(directory: Path) -> None:
    """--fresh forgets the last run's rows, and --no-seed makes none."""
    with started(directory, "--seed", "5") as run:
        run.stop(signal.SIGTERM)

    with started(directory, "--fresh", "--no-seed") as run:
        assert httpx.get(f"{run.url}/patients").json() == []
        run.stop(signal.SIGTERM)


def test_taken_port_is_said_and_leaves_nothing(directory: Path) -> None:
    """The sentence names the port and a command that works; what was made for the run is gone, and another serves."""
    place = directory / "deep" / "down"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = Run(place, port, beside=directory)

        assert run.process.wait(STOP_SECONDS) == 1

        assert f"Port {port} on 127.0.0.1 is taken or not ours to use" in run.words
        assert "Traceback" not in run.words
        assert not directory.exists()
        said = re.findall(r'make run ARGS="--directory (\S+) --port (\d+)"', run.words)
        assert [where for where, _ in said] == [str(place)]
        with started(place, "--no-seed", port=int(said[0][1]), beside=directory) as again:
            assert again.stop(signal.SIGTERM) == 0


def test_failed_run_touches_nothing_of_a_directory_that_was_there(directory: Path) -> None:
    """Of a folder with something in it goes the lock of the run that failed; a run before it keeps all that it has."""
    directory.mkdir()
    (directory / "mine").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert Run(directory, port).process.wait(STOP_SECONDS) == 1
        assert [path.name for path in directory.iterdir()] == ["mine"]
        with started(directory, "--no-seed") as run:
            run.stop(signal.SIGTERM)
        before = sorted(path.name for path in directory.iterdir())

        assert Run(directory, port).process.wait(STOP_SECONDS) == 1

    assert sorted(path.name for path in directory.iterdir()) == before
    assert {"data", "lock", "mine"} < {*before}


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("DATABASE_POOLSIZE", "5", "DATABASE_POOLSIZE is not a setting of this service. Did you mean"),
        ("AUTH_SECRT", "x", "AUTH_SECRT is not a setting"),
        ("DATABASE_POOL_SIZE", "ten", "DATABASE_POOL_SIZE: "),
        ("CONNECTION_LIMIT", "10", "CONNECTION_LIMIT: primary:5432 would get 1 workers"),
        ("CONNECTION_LIMIT", "10", "= 17 connections > 10 - 3 reserved"),
        ("DATABASE_POOL_SIZE", "500", "connections > 100 - 3 reserved"),
        ("MIGRATIONS_WAIT_SECONDS", "long", "MIGRATIONS_WAIT_SECONDS: "),
        ("TLS_CERTIFICATE", "none.pem", "TLS_CERTIFICATE and TLS_KEY belong together"),
    ],
)
def test_wrong_setting_is_said_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, directory: Path, name: str, value: str, sentence: str
) -> None:
    """The service's own sentence, and not after the servers were made for it; nothing is left."""
    monkeypatch.setenv(name, value)

    run = Run(directory, free_port(), *(["--reload"] if value == "ten" else []))

    assert run.process.wait(STOP_SECONDS) == 1
    assert sentence in run.words
    assert "Traceback" not in run.words
    assert "Creating" not in run.words
    assert not directory.exists()


def test_settings_that_are_not_used_are_named(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Whoever has set DATABASE_URL may believe that their own database is served, and PORT that it counts."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://me@db.example/app")
    monkeypatch.setenv("PORT", "8055")
    monkeypatch.setenv("WORKERS", "1")

    with started(directory, "--no-seed") as run:
        words = run.words
        run.stop(signal.SIGTERM)

    assert "DATABASE_URL is set, and not used here" in words
    assert 'PORT=8055 is set, and not used here: make run takes it by ARGS="--port 8055".' in words
    assert "WORKERS=1" not in words


def test_settings_that_dev_does_not_use_are_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It serves with one process whatever is set, so WORKERS is nothing to wait for."""
    monkeypatch.setenv("PORT", "8055")
    monkeypatch.setenv("WORKERS", "4")

    _tell_unused(Service(directory, host="127.0.0.1", port=8000, workers=1, reload=True))

    told = capsys.readouterr().err
    assert 'make dev takes it by ARGS="--port 8055"' in told
    assert "WORKERS" not in told


def test_https_is_refused(monkeypatch: pytest.MonkeyPatch, directory: Path, tmp_path: Path) -> None:
    """Settings of a deployment, in an environment or a `.env`: nobody would be answered by plain HTTP."""
    made = ("-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "certificate.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *made]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setenv("TLS_CERTIFICATE", str(tmp_path / "certificate.pem"))
    monkeypatch.setenv("TLS_KEY", str(tmp_path / "key.pem"))

    run = Run(directory, free_port())

    assert run.process.wait(STOP_SECONDS) == 1
    assert "TLS_CERTIFICATE is set, and `make run` serves by plain HTTP" in run.words


def test_second_run_over_the_same_directory_is_refused(directory: Path) -> None:
    """Two runs would stop each other's databases; the second says who was first, which a hang-up ends."""
    with started(directory, "--no-seed") as first:
        second = Run(directory, free_port())

        assert second.process.wait(STOP_SECONDS) == 1

        assert f"Another run (process {first.process.pid})" in second.words
        assert httpx.get(f"{first.url}/health/ready").status_code == 200
        assert first.stop(signal.SIGHUP) == 0

    assert processes(directory) == []


def sessions(environment: dict[str, str]) -> set[str]:
    """List the service's sessions on both servers, each by its server, its process and when it began."""
    ours = "SELECT pid || ' ' || backend_start FROM pg_stat_activity WHERE application_name = 'lifeguard'"
    found = set()
    for name in ("DATABASE_URL", "DATABASE_REPLICA_URL"):
        with psycopg.connect(environment[name]) as connection:
            found |= {f"{name} {row[0]}" for row in connection.execute(ours)}
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Give a copy of the project's code, to be changed."""
    project = tmp_path / "copy"
    for name in ("app", "local", "migrations", "pglifeguard", "postgres"):
        shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "alembic.ini", project)
    return project


@pytest.mark.parametrize("options", [(), ("--reload",)])
def test_settings_that_are_no_code_are_said_before_anything_is_made(
    directory: Path, project: Path, options: tuple[str, ...]
) -> None:
    """With the place; a reload, too, would need the tables of migrations, which need the settings."""
    (project / "app" / "settings.py").write_text("no Python\n", encoding="utf-8")
    run = Run(directory, free_port(), *options, project=project)

    assert run.process.wait(STOP_SECONDS) == 1
    assert "Reading the settings failed with these last words:" in run.words
    assert "SyntaxError" in run.words
    assert "Creating" not in run.words
    assert not directory.exists()


def test_saved_file_is_served_and_leaves_no_session_behind(directory: Path, project: Path) -> None:
    """Four times, and after an error: the answer is the file's, the sessions new and as many, the servers the same."""
    file = project / "app" / "patients" / "queries.py"
    code = file.read_text(encoding="utf-8")
    held: list[set[str]] = []

    def answers(sentence: str) -> bool:
        with suppress(httpx.TransportError):
            return bool(httpx.get(f"{run.url}/patients/999", timeout=1).json()["detail"] == sentence)
        return False

    def save(text: str, appears: Callable[[], bool]) -> None:
        file.write_text(text, encoding="utf-8")
        until(appears, READY_SECONDS)
        assert appears(), run.words

    def keep_sessions(environment: dict[str, str]) -> None:
        until(lambda: len(sessions(environment)) == SESSIONS, READY_SECONDS)
        held.append(sessions(environment))

    with started(directory, "--no-seed", "--reload", project=project) as run:
        servers = [postmaster((directory / "data").resolve() / name) for name in ("primary", "replica")]
        running = running_in(directory)
        assert running is not None
        keep_sessions(running.environment)
        save("no Python", lambda: "SyntaxError" in run.words)
        for number in range(4):
            answer = f"Patient 999 is not {number}."
            save(code.replace("does not exist", f"is not {number}"), functools.partial(answers, answer))
            keep_sessions(running.environment)
        assert servers == [postmaster((directory / "data").resolve() / name) for name in ("primary", "replica")]

        assert run.stop(signal.SIGINT) == 0

    assert [len(each) for each in held] == [SESSIONS] * 5
    assert len(set[str]().union(*held)) == SESSIONS * 5
    assert processes(directory) == []


def test_reload_of_several_processes_is_refused(directory: Path) -> None:
    """Otherwise uvicorn would quietly serve with one."""
    run = Run(directory, free_port(), "--reload", "--workers", "2")

    assert run.process.wait(STOP_SECONDS) == 2
    assert "--reload serves with one process: leave --workers out." in run.words
    assert not directory.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_full_disk_is_a_sentence(directory: Path) -> None:
    """A disk too small for two servers is told before they are made."""
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", directory], check=False)
    if mounted.returncode != 0:
        pytest.skip("this container may not mount")
    try:
        run = Run(directory, free_port())

        assert run.process.wait(STOP_SECONDS) == 1
    finally:
        subprocess.run(["umount", directory], check=True)

    assert "has 20 MB left" in run.words
    assert "Traceback" not in run.words
