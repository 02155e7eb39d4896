"""A Python that is forked does what one that is started does."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.interpreter import python

SOURCE = """
import atexit, os, sys
print(__name__, sys.argv, os.getcwd(), sys.path[0], sorted(os.environ.items()))
print(sorted(sys.modules.keys() & {"local", "tests"}))
print("beside it", file=sys.stderr)
atexit.register(print, "at the end")
"""
ENDS = {"returns": "", "exits": "sys.exit(3)", "says why": "sys.exit('a sentence')", "fails": "raise ValueError(1)"}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_forked_python_is_like_any(tmp_path: Path, end: str) -> None:
    """Arguments, environment, directory, path, output and status are the same, and nothing of the tests is in it."""
    (tmp_path / "asked.py").write_text(SOURCE + end, encoding="utf-8")
    environment, arguments = {"ASKED": "yes"}, ("-m", "asked", "one", "--two")
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=tmp_path, env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    started = (await process.communicate())[0].decode()

    status, said = await python(*arguments, environment=environment, cwd=tmp_path)

    assert status == process.returncode
    # Buffers may be flushed in another order, and the lines of a traceback, which are indented, begin elsewhere.
    told, expected = ({line for line in text.splitlines() if line[:1].strip()} for text in (said, started))
    assert expected
    assert expected <= told
