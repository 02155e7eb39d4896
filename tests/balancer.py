"""The real HAProxy with the real configuration, in front of instances on this machine.

Only addresses and the names of files are changed; a test may ask for smaller figures, and each must be there to change.
"""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from pglifeguard.embedded.postgres import free_port
from pglifeguard.embedded.waiting import eventually

FOLDER = Path(__file__).parent.parent / "haproxy"
PROGRAM = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/bin")
needs_haproxy = pytest.mark.skipif(PROGRAM is None, reason="haproxy is not installed: apt-get install haproxy")


@dataclass(frozen=True)
class Balancer:
    """A running HAProxy: what clients reach, what operators reach, and its process."""

    url: str
    operators_url: str
    pid: int
    log: Path

    @property
    def port(self) -> int:
        """Where clients connect to."""
        return int(urlsplit(self.url).port or 0)

    async def figures(self) -> str:
        """Read its own metrics."""
        async with httpx.AsyncClient(base_url=self.operators_url, timeout=10, trust_env=False) as client:
            return (await client.get("/metrics")).text

    async def figure(self, name: str, proxy: str) -> int:
        """Read one of its metrics."""
        text = await self.figures()
        found = re.search(rf'^haproxy_{name}\{{proxy="{proxy}"\}} (\d+)', text, re.MULTILINE)
        assert found is not None, text
        return int(found[1])

    async def up(self, backend: str = "instances") -> int:
        """Count the instances that it believes to be there; in `starting` also those that have never been ready."""
        return await self.figure("backend_active_servers", backend)

    def marked_down(self) -> list[str]:
        """List its log lines that say that an instance was taken out."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if re.search(r"Server instances/\S+ is DOWN", line)]


def configuration(*instances: str, public: int, operators: int, changes: dict[str, str]) -> str:
    """Return haproxy.cfg for instances at these URLs; `changes` maps pieces of its text to other ones."""
    servers = [f"    server app{number} {urlsplit(url).netloc}" for number, url in enumerate(instances, 1)]
    moved = {
        "bind :8000": f"bind 127.0.0.1:{public}",
        "bind :8405": f"bind 127.0.0.1:{operators}",
        " resolvers compose init-addr none": "",
        "    server-template app 10 app:8000": "\n".join(servers),
        "/etc/haproxy/": f"{FOLDER}/",
    }
    text = re.sub(r"\nresolvers compose\n(?:    .*\n)+", "\n", (FOLDER / "haproxy.cfg").read_text(encoding="utf-8"))
    for old, new in (moved | changes).items():
        assert old in text, f"haproxy.cfg has no {old!r}"
        text = text.replace(old, new)
    return text


@asynccontextmanager
async def balanced(directory: Path, *instances: str, changes: dict[str, str] | None = None) -> AsyncIterator[Balancer]:
    """Run HAProxy in front of the instances until the end; returns when it finds one of them healthy."""
    assert PROGRAM is not None
    public, operators = free_port(), free_port()
    file = directory / "haproxy.cfg"
    file.write_text(configuration(*instances, public=public, operators=operators, changes=changes or {}), "utf-8")
    log = directory / "haproxy.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(PROGRAM, "-db", "-f", str(file), stdout=output, stderr=output)
    balancer = Balancer(f"http://127.0.0.1:{public}", f"http://127.0.0.1:{operators}", process.pid, log)
    async with httpx.AsyncClient(trust_env=False) as client:

        async def balances() -> bool:
            try:
                return (await client.get(f"{balancer.operators_url}/health")).is_success
            except httpx.TransportError:
                return process.returncode is not None

        try:
            assert await eventually(balances, 10), log.read_text(encoding="utf-8")
            assert process.returncode is None, log.read_text(encoding="utf-8")
            yield balancer
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
