"""What a person sees: the generator's seconds as one line that moves on a terminal, and as a line each elsewhere."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict

from rich.console import Console
from rich.status import Status
from rich.text import Text

from local.load.plan import Plan, Second
from local.setup import PROJECT
from pglifeguard.embedded.account import EmbeddedError


@asynccontextmanager
async def sending(plan: Plan) -> AsyncIterator[AsyncIterator[Second]]:
    """Run the generator, and give what it tells each second until its time is over."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "local.load.traffic",
        cwd=PROJECT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this process, which ends everything in order.
    )  # fmt: skip
    assert process.stdin is not None  # noqa: S101  # For the type checker: both are pipes.
    output = process.stdout
    assert output is not None  # noqa: S101

    async def seconds() -> AsyncIterator[Second]:
        async for line in output:
            yield Second(**json.loads(line))
        if await process.wait() != 0:
            raise EmbeddedError("The generator has failed; its own words are above.")

    try:
        # Not on its command line, which everybody can read: there may be a token in it.
        process.stdin.write(json.dumps(asdict(plan)).encode())
        process.stdin.close()
        yield seconds()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


class Board:
    """Counts what it shows; `status` is the line that moves."""

    def __init__(self, console: Console, status: Status) -> None:
        self.answers: Counter[str] = Counter()
        self._console = console
        self._status = status
        self._number = 0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text)

    def show(self, second: Second, waiting: int | None) -> None:
        """Show a second, and count its answers."""
        self.answers.update(second.answers)
        self._number += 1
        came = sum(second.answers.values())
        if second.whole:
            line = f"{self._number:3} s  {came:4}/s  {told(second)}  {'?' if waiting is None else waiting} waiting"
        elif came:
            # No rate: this is not a second, and nothing was sent in it.
            line = f"After the last second {came} more: {told(second)}"
        else:
            return
        if self._console.is_terminal:
            self._status.update(Text(line, no_wrap=True, overflow="ellipsis"))
        else:
            self._console.print(line)


def told(second: Second) -> str:
    """Say what was answered, and how fast the successes among it were."""
    if not second.answers:
        return "nothing was answered"
    times = "no success" if second.p50 is None else f"p50 {second.p50:.0f} ms, p99 {second.p99:.0f} ms"
    return f"{counted(second.answers)}  {times}"


def counted(answers: Mapping[str, int]) -> str:
    """Write counts down, by status."""
    return ", ".join(f"{answer}: {count}" for answer, count in sorted(answers.items()))
