"""A terminal for a program: what it writes when somebody looks."""

import os
import pty
import subprocess
from collections.abc import Callable, Sequence
from fcntl import ioctl
from pathlib import Path
from struct import pack
from termios import TIOCSWINSZ

from local.setup import PROJECT

COLUMNS = 100


def on_a_terminal(
    command: Sequence[str | Path], seen: Callable[[str, subprocess.Popen[bytes]], None]
) -> tuple[int, str]:
    """Run a program on a pseudo-terminal to its end; `seen` gets all that it has written, each time that grows, and it.

    Returns the exit status and what was written.
    """
    master, slave = pty.openpty()
    ioctl(slave, TIOCSWINSZ, pack("HHHH", 40, COLUMNS, 0, 0))
    # The tests' own environment may say that nobody looks.
    environment = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "COLUMNS"}}
    process = subprocess.Popen(
        command, cwd=PROJECT, stdin=slave, stdout=slave, stderr=slave, env=environment | {"TERM": "xterm"}
    )
    os.close(slave)
    written = ""
    try:
        while True:
            try:
                piece = os.read(master, 4096)
            except OSError:  # Linux says so when nobody has the other end any more.
                break
            if not piece:
                break
            written += piece.decode(errors="replace")
            seen(written, process)
        return process.wait(), written
    finally:
        process.kill()
        process.wait()
        os.close(master)
