"""Operators' orders for all workers of an instance: pause, resume, drain and resize.

A request reaches one worker. That worker carries the order out, passes it on to the others, and counts who obeyed. Each
worker listens on a Unix socket in the folder that the workers share (PROMETHEUS_MULTIPROC_DIR), which only this account
may open. A question and its answer are a line of JSON each.

A worker that starts asks the others what they were told: the one that replaces a killed worker is paused as they are,
and has pools of their size. With one process nothing here listens.
"""

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple
from zlib import crc32

from pglifeguard.databases import Databases
from pglifeguard.errors import ServiceError

logger = logging.getLogger(__name__)

SUFFIX = ".orders"
# Seconds in which a worker has to answer: longer than the login with which a drain begins.
ANSWER_SECONDS = 10.0
# Seconds between two looks at what is still at work.
LOOK_SECONDS = 0.05


class Told(NamedTuple):
    """What became of an order: how many workers there are, how many obeyed, and why the others did not.

    `pending` counts the connections at work in all of them that the order has to wait for, by pool.
    """

    workers: int
    obeyed: int
    pending: dict[str, int]
    failures: list[str]


class Siblings:
    """The workers of one instance, as one of them sees the others."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases
        # When this worker was last told something, by the clock that all processes of a machine share.
        self._told_at = 0.0
        # Where the workers' sockets are; None while this one does not listen.
        self._folder: Path | None = None
        # Two services may share processes and folder, so a name tells which databases the orders are for.
        locations = "\n".join(database.location for _, database in databases.settings.databases)
        self._service = f"{crc32(locations.encode()):08x}"
        self._name = ""

    async def tell(self, operation: str, arguments: Mapping[str, Any], *, wait_seconds: float = 0.0) -> Told:
        """Carry an order out here and then in all other workers; wait until nothing is pending, `wait_seconds` at most.

        Raises: ServiceError when this worker refuses it; then no other one is told.
        """
        arguments = await self._carry_out(operation, arguments)
        order = {"operation": operation, "arguments": arguments, "wait_seconds": wait_seconds}
        others = [self._ask(name, order) for name in self._others()]
        own, *answers = await asyncio.gather(self._settle(operation, wait_seconds), *others)
        heard = [answer for answer in answers if answer is not None]
        obeyed = [own, *(answer["pending"] for answer in heard if "pending" in answer)]
        failures = [answer["failure"] for answer in heard if "failure" in answer]
        workers = max(1 + len(heard), self._databases.settings.workers)
        if missing := workers - 1 - len(heard):
            failures.append(f"{missing} of {workers} workers cannot be reached from the one that answers.")
        # Where DNS finds the replicas, each worker has its own.
        pools = dict.fromkeys(pool for each in obeyed for pool in each)
        pending = {pool: sum(each.get(pool, 0) for each in obeyed) for pool in pools}
        return Told(workers, len(obeyed), pending, failures)

    @asynccontextmanager
    async def reachable(self) -> AsyncIterator[None]:
        """Take over what the others were told before, and hear what they pass on, for as long as this block runs."""
        folder = self._databases.settings.prometheus_multiproc_dir
        if folder is None:
            yield
            return
        try:
            opened, own, listener = self._listen_in(folder)
        except OSError as error:
            logger.warning("operators' orders do not reach this worker", extra={"reason": str(error)})
            yield
            return
        server = await asyncio.start_unix_server(self._answer, sock=listener)
        try:
            await self._catch_up()
            yield
        finally:
            server.close()
            self._leave(opened, own)

    def _listen_in(self, folder: Path) -> tuple[int, Path, socket.socket]:
        """Open the folder, and bind this worker's socket in it. Raises: OSError."""
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._folder = _shortened(folder, opened)
        self._name = f"{self._service}-{os.getpid()}-{token_hex(4)}{SUFFIX}"
        own = self._folder / self._name
        try:
            _forget_dead(self._folder)
            return opened, own, _bound(own)
        except OSError:
            self._leave(opened, own)
            raise

    def _leave(self, opened: int, own: Path) -> None:
        self._folder = None
        with suppress(OSError):  # Also where its path is too long to be one.
            own.unlink()
        os.close(opened)

    def _others(self) -> list[Path]:
        if self._folder is None:
            return []
        return [path for path in self._folder.glob(f"{self._service}-*{SUFFIX}") if path.name != self._name]

    async def _ask(self, address: Path, question: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return another worker's answer; None for one that has ended, or does not listen yet and will ask itself."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS + question.get("wait_seconds", 0.0)):
                reader, writer = await asyncio.open_unix_connection(address)
                try:
                    writer.write(json.dumps(question).encode() + b"\n")
                    answer: dict[str, Any] = json.loads(await reader.readline())
                finally:
                    writer.close()
        except (ConnectionRefusedError, FileNotFoundError):
            return None
        except (OSError, ValueError):  # A TimeoutError is an OSError.
            return {"failure": f"Worker {_process(address)} did not answer."}
        return answer

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer another worker's question."""
        try:
            question = json.loads(await reader.readline())
            writer.write(json.dumps(await self._obey(question)).encode() + b"\n")
            await writer.drain()
        except (OSError, ValueError):
            logger.warning("a worker's question was cut off")
        finally:
            writer.close()

    async def _obey(self, question: Mapping[str, Any]) -> dict[str, Any]:
        if question["operation"] == "state":
            return self._state()
        try:
            await self._carry_out(question["operation"], question["arguments"])
        except ServiceError as error:
            return {"failure": f"Worker {os.getpid()}: {error}"}
        return {"pending": await self._settle(question["operation"], question["wait_seconds"])}

    async def _carry_out(self, operation: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Carry an order out in this worker; return the arguments with which the others do the same."""
        databases = self._databases
        match operation:
            case "pause":
                databases.pause(**arguments)
            case "resume":
                databases.resume()
            case "drain":
                await databases.renew_connections(**arguments)
            case _:
                sized = databases.resize(**arguments)
                sizes = {"pool_size": sized.pool_size, "max_overflow": sized.max_overflow}
                arguments = {**arguments, **sizes}
        self._told_at = time.monotonic()
        return arguments

    async def _settle(self, operation: str, wait_seconds: float) -> dict[str, int]:
        """Count by pool what an order has to wait for, when there is nothing left or after `wait_seconds`."""
        deadline = time.monotonic() + wait_seconds
        while True:
            pools = {database.name: database.pool for database in self._databases.all()}
            pending = {
                name: pool.figures().checked_out if operation == "pause" else pool.leaving
                for name, pool in pools.items()
            }
            if not any(pending.values()) or time.monotonic() >= deadline:
                return pending
            await asyncio.sleep(LOOK_SECONDS)

    def _state(self) -> dict[str, Any]:
        databases = self._databases
        sizes = {name: (each.pool_size, each.max_overflow) for name, each in databases.sizes.items()}
        return {"told_at": self._told_at, "paused_seconds": databases.paused_seconds, "sizes": sizes}

    async def _catch_up(self) -> None:
        """Do what the other workers were told before this one started."""
        answers = await asyncio.gather(*(self._ask(name, {"operation": "state"}) for name in self._others()))
        states = [answer for answer in answers if answer is not None and answer.get("told_at")]
        if not states:
            return
        state = max(states, key=lambda each: each["told_at"])
        if state["paused_seconds"] > 0:
            self._databases.pause(seconds=state["paused_seconds"])
        try:
            # What becomes smaller makes room in the budget for the others.
            for pool, (pool_size, max_overflow) in sorted(state["sizes"].items(), key=self._growth):
                self._databases.resize(pool, pool_size=pool_size, max_overflow=max_overflow)
        except ServiceError as error:
            logger.warning("pools keep the sizes of the settings", extra={"reason": str(error)})
        self._told_at = state["told_at"]

    def _growth(self, sized: tuple[str, list[int]]) -> int:
        pool, size = sized
        return sum(size) - self._databases.sized(pool).capacity


def _shortened(folder: Path, opened: int) -> Path:
    """Return a short path of an open folder: a socket's address has room for a hundred characters, a path may not."""
    short = Path(f"/proc/self/fd/{opened}")
    return short if short.exists() else folder


def _bound(address: Path) -> socket.socket:
    """Return a socket at this address that only this account may connect to."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(address))
        # Nobody can connect before it listens.
        address.chmod(0o600)
    except OSError:
        listener.close()
        raise
    return listener


def _process(address: Path) -> int:
    return int(address.name.split("-")[1])


def _forget_dead(folder: Path) -> None:
    """Remove the sockets of workers that were killed: each left one."""
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            os.kill(_process(path), 0)
        except OSError:
            path.unlink(missing_ok=True)
