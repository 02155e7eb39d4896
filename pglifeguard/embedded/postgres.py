"""One PostgreSQL server: started, stopped, killed, frozen, promoted. Two of them make a `Cluster`."""

import asyncio
import os
import random
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Literal

import asyncpg
import psutil  # type: ignore[import-untyped]  # See waiting.py.

from pglifeguard.embedded.account import Account, EmbeddedError
from pglifeguard.embedded.programs import ENVIRONMENT, explain, programs
from pglifeguard.embedded.waiting import eventually

HOST = "127.0.0.1"
# Below the ports that Linux and macOS lend to outgoing connections: a client that redials a server which is down
# could be lent that very port, and would then be connected to itself.
PORTS = range(20_000, 32_000)
START_SECONDS = 30.0
STOP_SECONDS = 20.0
SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class Server:
    """A server over one data directory, whose configuration every `start()` writes anew.

    `base` is the text that it shares with other servers, `settings` what it has of its own. The port is chosen at the
    first start and stays.
    """

    def __init__(  # noqa: PLR0913  # Each is the server's own.
        self,
        data: Path,
        *,
        log: Path,
        password: str,
        base: str,
        account: Account,
        directory_of_programs: Path | None = None,
    ) -> None:
        self.data = data
        self.log = log
        self.password = password
        self.account = account
        # Several servers can have one port, each on an address of its own.
        self.host = HOST
        self.port = 0
        self.settings: dict[str, str] = {}
        self._base = base
        # None stands for the programs that were found.
        self._directory_of_programs = directory_of_programs
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether the process is there, frozen or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The postmaster's process id. Raises: EmbeddedError when it does not run."""
        if self._process is None or not self.running:
            raise EmbeddedError(f"The server in {self.data} is not running; {self.log} says why.")
        return self._process.pid

    async def start(self) -> None:
        """Start and wait until it answers queries.

        Raises: EmbeddedError when it ends, with the last lines of its log, or is not ready within 30 seconds.
        """
        attempts = 3
        while True:
            if not self.port:
                self.port = free_port()
            try:
                await self._start_once()
            except EmbeddedError as error:
                attempts -= 1
                # Somebody took the port between our look and the server's.
                if not attempts or "Address already in use" not in str(error):
                    raise
                self.port = 0
            else:
                return

    async def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop and wait for the end; a server that does not run is stopped already.

        smart waits for clients to leave, fast disconnects them, immediate leaves recovery to the next start.
        """
        if not self.running:
            return
        self.thaw()
        os.kill(self.pid, SIGNALS[mode])
        if not await self._gone(STOP_SECONDS):
            await self.kill()

    async def ended(self) -> None:
        """Wait until the server has ended, whoever ended it; one that does not run has."""
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)

    async def kill(self) -> None:
        """End every process of the server by SIGKILL, as losing power would."""
        if self.running:
            self._signal_all(signal.SIGKILL)
            await self._gone(STOP_SECONDS)

    async def restart(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop and start on the same port."""
        await self.stop(mode)
        await self.start()

    def freeze(self) -> None:
        """Suspend every process: connections stay open and are accepted, nothing answers, as behind a black hole."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the processes go on."""
        self._signal_all(signal.SIGCONT)

    async def promote(self) -> None:
        """Turn a standby into a primary and wait until it is one."""
        connection = await self.connect()
        try:
            await connection.execute("SELECT pg_promote(wait => true, wait_seconds => 20)")
        finally:
            await connection.close()

    async def connect(self, database: str = "postgres") -> "asyncpg.Connection[asyncpg.Record]":
        """Connect as the superuser; the caller closes."""
        return await asyncpg.connect(
            host=self.host,
            port=self.port,
            user="postgres",
            password=self.password,
            database=database,
            ssl=False,
            timeout=5,
        )

    async def _start_once(self) -> None:
        own = {"listen_addresses": self.host, "port": str(self.port), "unix_socket_directories": ""} | self.settings
        lines = [f"{name} = '{value}'" for name, value in own.items()]
        (self.data / "postgresql.conf").write_text("\n".join([self._base, *lines, ""]), encoding="utf-8")
        await self.start_as_configured()

    async def start_as_configured(self) -> None:
        """Start with the configuration of the last start, whoever started it then, and wait until it answers queries.

        Raises: EmbeddedError as `start()`.
        """
        with self.log.open("ab") as log:
            offset = log.tell()
            # Popen returns at once; asyncio's own subprocesses do not all take an account.
            self._process = subprocess.Popen(  # noqa: ASYNC220
                [(self._directory_of_programs or programs(self.account)) / "postgres", "-D", self.data],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.data,
                env=ENVIRONMENT,
                start_new_session=True,  # Ctrl-C is for the parent, which stops everything in order.
                **self.account.arguments,
            )

        async def ready_or_ended() -> bool:
            return not self.running or self._ready()

        if not await eventually(ready_or_ended, START_SECONDS) or not self.running:
            await self.kill()
            raise EmbeddedError(explain(self.log.read_bytes()[offset:].decode(errors="replace"), str(self.log)))

    def _ready(self) -> bool:
        """Read the status where pg_ctl reads it: line 8 of postmaster.pid, written by this very process."""
        try:
            lines = (self.data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"  # noqa: PLR2004

    def _signal_all(self, number: signal.Signals) -> None:
        postmaster = psutil.Process(self.pid)
        for process in [postmaster, *postmaster.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):  # A backend that ended meanwhile.
                process.send_signal(number)

    async def _gone(self, seconds: float) -> bool:
        async def gone() -> bool:
            return not self.running

        return await eventually(gone, seconds)


def free_port() -> int:
    """Find a port that nobody listens on."""
    for port in random.sample(PORTS, k=len(PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise EmbeddedError(f"No port between {PORTS.start} and {PORTS.stop} is free on {HOST}.")
