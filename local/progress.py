"""What goes on, for whoever waits: one line that moves on a terminal, and a plain line for each step elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Give what says a step when it begins; in a file or a pipe each line begins with the seconds until then."""
    began = time.monotonic()

    def say(step: str) -> None:
        if console.is_terminal:
            status.update(Text(step))
        else:
            console.print(f"{time.monotonic() - began:5.1f} s  {step}", markup=False, soft_wrap=True)

    with console.status("") as status:
        yield say
