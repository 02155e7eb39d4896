"""A test that leaves its servers broken is the only one that fails."""

import asyncio
import os
import re
import sys
from pathlib import Path

from local.cluster import Cluster
from tests.servers import Servers

PROJECT = Path(__file__).parent.parent


async def test_failure_does_not_spread() -> None:
    """Each test that breaks servers fails alone, whatever it did to them, and no test gets an error for it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/breaking.py",
        cwd=PROJECT, env={**os.environ, "COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        output = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()

    assert re.search(r"=+ 7 failed, 5 passed in", output), output
    assert len(re.findall(r"^FAILED .* - AssertionError: on purpose$", output, re.MULTILINE)) == 6, output
    assert "FAILED tests/breaking.py::test_serves_what_does_not_start - RuntimeError: the application does" in output


async def test_breakable_servers_are_not_the_shared_ones(breakable_cluster: Cluster, shared_servers: Servers) -> None:
    """What a test breaks is never what the others stand on."""
    assert (await shared_servers.take()).directory != breakable_cluster.directory
