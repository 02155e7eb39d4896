"""The poolers that tests start: PgBouncer, pgpool-II and Odyssey, installed here or in an image of Debian's packages.

`found()` lists the programs that this machine has. A `Program` writes its configuration for a way to pool (`Shape`) and
runs as a process of the test's own, in front of a cluster of the tests.
"""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

import asyncpg
from sqlalchemy.engine import make_url

from local.cluster import Cluster
from pglifeguard.embedded.account import Account
from pglifeguard.embedded.postgres import HOST, free_port
from pglifeguard.embedded.waiting import eventually

Kind = Literal["PgBouncer", "pgpool-II", "Odyssey"]
Mode = Literal["transaction", "session", "statement"]
COMMANDS: dict[Kind, str] = {"PgBouncer": "pgbouncer", "pgpool-II": "pgpool", "Odyssey": "odyssey"}
# Debian puts them where only root's PATH looks; a PgBouncer that was built by hand may stand elsewhere.
PLACES = f"{os.environ.get('POOLERS_PATH', '')}:{os.environ.get('PATH', os.defpath)}:/usr/sbin"
# Built by the Dockerfile beside this file from packages of later Debian releases: the release, and what is taken of it.
IMAGES = {"trixie": "pgbouncer pgpool2", "sid": "pgbouncer pgpool2 odyssey"}
# PgBouncer keeps track of prepared statements in transaction mode since then.
TRACKS_STATEMENTS = (1, 21)
ROLES = ("app_rw", "app_ro", "app_owner")


@dataclass(frozen=True)
class Shape:
    """How a pooler is set up for one column of the table."""

    mode: Mode = "transaction"
    size: int = 2
    # Settings of the pooler's own, over those that it is given here.
    settings: dict[str, object] = field(default_factory=dict)
    # A database of the primary that PgBouncer and Odyssey show as `replica`, from the replica.
    on_replica: str | None = None


@dataclass(frozen=True)
class Program:
    """One pooler of one version, and the command that runs it."""

    kind: Kind
    version: str
    command: tuple[str, ...]
    image: str | None = None

    @property
    def name(self) -> str:
        """Kind and version, as the table has them."""
        return f"{self.kind} {self.version}"

    @property
    def number(self) -> tuple[int, int]:
        """The first two parts of the version."""
        major, minor, *_ = self.version.split(".")
        return int(major), int(minor)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes that this pooler has; pgpool-II gives each client a session of its own."""
        modes: dict[Kind, tuple[Mode, ...]] = {
            "PgBouncer": ("transaction", "session", "statement"),
            "pgpool-II": ("session",),
            "Odyssey": ("transaction", "session"),
        }
        return modes[self.kind]


def installed(kind: Kind) -> Program | None:
    """Return the pooler of this kind that is installed on this machine; None when there is none."""
    path = shutil.which(COMMANDS[kind], path=PLACES)
    return None if path is None else Program(kind, _version([path]), (path,))


def found() -> list[Program]:
    """List the poolers of this machine and of the images, which are built when they are not there; oldest first."""
    programs = {
        program.name: program
        for image in (None, *images())
        for kind in COMMANDS
        for program in _versions_of(kind, image)
    }
    return sorted(programs.values(), key=lambda program: (list(COMMANDS).index(program.kind), program.number))


def _versions_of(kind: Kind, image: str | None) -> Iterator[Program]:
    name = COMMANDS[kind]
    if image is None:
        paths = {str(Path(place, name)) for place in PLACES.split(":") if place and Path(place, name).is_file()}
        for path in sorted(paths):
            yield Program(kind, _version([path]), (path,))
    else:
        said = _version(["docker", "run", "--rm", "--network", "none", image, "env", SEARCH, name])
        if said:
            yield Program(kind, said, (name,), image)


SEARCH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"


def _version(command: list[str]) -> str:
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    number = re.search(r"(\d+\.\d+(\.\d+)?)", said.stdout + said.stderr)
    return "" if said.returncode or number is None else number[1]


@cache
def images() -> tuple[str, ...]:
    """Return the images that there are, or can be built."""
    if shutil.which("docker") is None:
        return ()
    names = {f"lifeguard-poolers-{suite}": (suite, packages) for suite, packages in IMAGES.items()}
    return tuple(name for name, wanted in names.items() if _has_image(name) or _build_image(name, *wanted))


def _has_image(name: str) -> bool:
    return not subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode


def _build_image(name: str, suite: str, packages: str) -> bool:
    arguments = ["--build-arg", f"SUITE={suite}", "--build-arg", f"PACKAGES={packages}", "--tag", name]
    command = ["docker", "build", "--quiet", *arguments, str(Path(__file__).parent)]
    return not subprocess.run(command, capture_output=True, check=False).returncode


class Running:
    """A pooler that runs; a test may stop it and start it again on the same port."""

    def __init__(self, program: Program, shape: Shape, cluster: Cluster, directory: Path) -> None:
        self.program = program
        self.shape = shape
        self.port = free_port()
        self._cluster = cluster
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._container = f"lifeguard-pooler-{self.port}"
        self._arguments = self._configure()

    @property
    def log(self) -> str:
        """What it has written."""
        return (self._directory / "log").read_text(encoding="utf-8", errors="replace")

    def url(self, url: str) -> str:
        """Return where the database of `url` is, through this pooler."""
        return make_url(url).set(port=self.port).render_as_string(hide_password=False)

    def change(self, settings: dict[str, object]) -> None:
        """Write the configuration anew with these settings, for the next start."""
        self.shape = replace(self.shape, settings=self.shape.settings | settings)
        self._arguments = self._configure()

    async def start(self) -> None:
        """Start it; returns when it lets a client in."""
        command = [*self.program.command, *self._arguments]
        account = Account.current()
        # One that was killed leaves this behind, and the next one would not start.
        (self._directory / "pid").unlink(missing_ok=True)
        if self.program.image is not None:
            user = [] if account.uid is None else ["--user", f"{account.uid}:{account.gid}"]
            mount = ["--volume", f"{self._directory}:{self._directory}", "--name", self._container]
            inside = ["env", SEARCH, *command]
            command = ["docker", "run", "--rm", "--network", "host", *user, *mount, self.program.image, *inside]
            account = Account(None, None)
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220  # It returns at once.
                command, stdout=log, stderr=log, cwd="/", **account.arguments
            )
        if not await eventually(self._answers, 15):
            raise TimeoutError(self.log)

    def replica_url(self, url: str) -> str:
        """Return where a URL of the replica is, through this pooler, or past one that leads to the primary only."""
        if self.shape.on_replica is None:
            return url
        return make_url(url).set(port=self.port, database="replica").render_as_string(hide_password=False)

    async def stop(self) -> None:
        """End it at once, as a crash does."""
        process, self._process = self._process, None
        if process is None:
            return
        if self.program.image is not None:
            await asyncio.to_thread(
                subprocess.run, ["docker", "kill", self._container], capture_output=True, check=False
            )
        else:
            process.terminate() if self.program.kind != "pgpool-II" else process.send_signal(2)
        try:
            await asyncio.to_thread(process.wait, 10)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    async def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        try:
            url = self.url(self._cluster.url("app_rw", database="postgres"))
            connection = await asyncpg.connect(url, timeout=2, statement_cache_size=0)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        connection.terminate()
        return True

    def _configure(self) -> list[str]:
        write = {"PgBouncer": self._pgbouncer, "pgpool-II": self._pgpool, "Odyssey": self._odyssey}
        arguments = write[self.program.kind]()
        for path in self._directory.iterdir():
            path.chmod(0o644)
        self._directory.chmod(0o755)
        Account.current().own(self._directory)
        return arguments

    def _write(self, name: str, lines: list[str]) -> Path:
        path = self._directory / name
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
        return path

    def _pgbouncer(self) -> list[str]:
        passwords = self._cluster.passwords
        users = self._write("users.txt", [f'"{role}" "{passwords[role]}"' for role in ROLES])
        settings: dict[str, object] = {
            "listen_addr": HOST,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "plain",
            "auth_file": users,
            "admin_users": "app_owner",
            "pool_mode": self.shape.mode,
            "default_pool_size": self.shape.size,
            "max_client_conn": 200,
            "server_login_retry": 1,
        }
        if self.program.number >= TRACKS_STATEMENTS:
            settings["max_prepared_statements"] = 200
        lines = [f"{name} = {value}" for name, value in (settings | self.shape.settings).items()]
        upstream = f"* = host={HOST} port={self._cluster.primary.port}"
        if self.shape.on_replica is not None:
            port = self._cluster.replica.port
            upstream = f"replica = host={HOST} port={port} dbname={self.shape.on_replica}\n{upstream}"
        return [str(self._write("pgbouncer.ini", ["[databases]", upstream, "[pgbouncer]", *lines]))]

    def _pgpool(self) -> list[str]:
        passwords = self._cluster.passwords
        users = self._write("pool_passwd", [f"{role}:TEXT{passwords[role]}" for role in ROLES])
        hba = self._write("pool_hba.conf", ["host all all 127.0.0.1/32 scram-sha-256"])
        settings: dict[str, object] = {
            "backend_clustering_mode": "streaming_replication",
            "listen_addresses": HOST,
            "port": self.port,
            "pcp_port": free_port(),
            "unix_socket_directories": self._directory,
            "pcp_socket_dir": self._directory,
            "socket_dir": self._directory,
            "wd_ipc_socket_dir": self._directory,
            "pid_file_name": self._directory / "pid",
            "logdir": self._directory,
            "work_dir": self._directory,
            "enable_pool_hba": "on",
            "pool_passwd": users,
            "num_init_children": 32,
            "max_pool": 2,
            "sr_check_period": 1,
            "sr_check_user": "app_rw",
            "sr_check_database": "postgres",
            "sr_check_password": passwords["app_rw"],
            "failover_on_backend_error": "off",
            "failover_on_backend_shutdown": "off",
            "load_balance_mode": "off",
        }
        for number, server in enumerate((self._cluster.primary, self._cluster.replica)):
            settings |= {
                f"backend_hostname{number}": HOST,
                f"backend_port{number}": server.port,
                f"backend_weight{number}": 1,
                f"backend_flag{number}": "DISALLOW_TO_FAILOVER",
            }
        lines = [f"{name} = '{value}'" for name, value in (settings | self.shape.settings).items()]
        configuration = self._write("pgpool.conf", lines)
        pcp = self._write("pcp.conf", [])
        return ["-n", "-f", str(configuration), "-a", str(hba), "-F", str(pcp), "-k", str(users)]

    def _odyssey(self) -> list[str]:
        lines = [
            "daemonize no",
            "log_to_stdout yes",
            'log_format "%p %t %l [%i %s] (%c) %m\\n"',
            "log_session no",
            f'listen {{\n  host "{HOST}"\n  port {self.port}\n}}',
            *self._odyssey_storage("primary", self._cluster.primary.port, "default"),
        ]
        if self.shape.on_replica is not None:
            lines += self._odyssey_storage("replica", self._cluster.replica.port, '"replica"')
        return [str(self._write("odyssey.conf", lines))]

    def _odyssey_storage(self, name: str, port: int, shown_as: str) -> Iterator[str]:
        yield f'storage "{name}" {{\n  type "remote"\n  host "{HOST}"\n  port {port}\n}}'
        yield f"database {shown_as} {{"
        settings: dict[str, object] = {"pool": f'"{self.shape.mode}"', "pool_size": self.shape.size}
        if self.shape.mode == "transaction":
            settings["pool_reserve_prepared_statement"] = "yes"
        if name == "replica":
            settings["storage_db"] = f'"{self.shape.on_replica}"'
        for role in ROLES:
            password = self._cluster.passwords[role]
            yield f'  user "{role}" {{\n    authentication "clear_text"\n    password "{password}"'
            yield f'    storage "{name}"\n    storage_user "{role}"\n    storage_password "{password}"'
            yield from (f"    {key} {value}" for key, value in (settings | self.shape.settings).items())
            yield "  }"
        yield "}"


@asynccontextmanager
async def running(program: Program, shape: Shape, cluster: Cluster, directory: Path) -> AsyncIterator[Running]:
    """Run a pooler in front of the primary (pgpool-II: of primary and replica) until the block ends."""
    pooler = Running(program, shape, cluster, directory)
    try:
        await pooler.start()
        yield pooler
    finally:
        await pooler.stop()
