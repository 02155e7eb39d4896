"""What a person who waits sees of a command's steps, on a terminal and elsewhere."""

import io
import re
import sys

from rich.console import Console

from local.progress import progress
from tests.terminal import on_a_terminal

SAYS = """
from rich.console import Console
from local.progress import progress
with progress(Console()) as say:
    say("one [x]")
    say("two")
print("done")
"""


def test_steps_are_plain_lines_where_nobody_looks() -> None:
    """In a file or a pipe each step is a line of its own, at once, with the seconds before it."""
    written = io.StringIO()

    with progress(Console(file=written, width=20)) as say:
        say("one [x] that is longer than the console")
        first = written.getvalue()
        say("two")

    assert re.fullmatch(r"  \d\.\d s  one \[x\] that is longer than the console\n", first)
    assert re.fullmatch(r"  \d\.\d s  two\n", written.getvalue().removeprefix(first))


def test_steps_move_on_a_terminal() -> None:
    """There they are one line, of which nothing is left."""
    status, written = on_a_terminal([sys.executable, "-c", SAYS], lambda *_: None)

    assert status == 0
    assert " two" in written
    assert not re.search(r"\d s  ", written)
    assert re.search(r"\x1b\[2K(?:\x1b\[\?25h)?done\r\n$", written), written
